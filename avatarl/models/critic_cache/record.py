"""What a cache stores of a critic at one position, byte by byte.

    rest, entropy, target    2 bytes each: log mass of all that is not stored, entropy, log-probability of the target
    P most likely tokens     an id, and 2 bytes of log-probability, each
    S drawn tokens           an id each

An id has 2 bytes where the vocabulary allows it and 4 otherwise, so that a position takes 6 + 4·P + 2·S or
6 + 6·P + 4·S bytes. The target's own id is the data's. Log-probabilities and entropies are whole numbers of 2^-11 nats:
none is wrong by more than a four-thousandth of a nat. They reach down to −32 nats: what is less likely than e^-32
(1.3 · 10^-14) is stored as if it were so likely, and only what has no probability as that.

Shapes: N positions, P most likely tokens, S drawn tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from avatarl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from avatarl.objective import CachedAnswers

KINDS = ("top", "sample")
NATS_PER_UNIT = 2.0**-11
NOTHING = (1 << 16) - 1  # the code of a mass of 0; the one below is the floor
FIXED_BYTES, CODE_BYTES = 6, 2


@dataclass(frozen=True)
class RecordFormat:
    """How many tokens a position stores, and of how many."""

    num_top: int  # P
    num_draws: int  # S
    vocab_size: int

    @classmethod
    def within(cls, kind: str, bytes_per_token: int, keep_top: int, vocab_size: int) -> RecordFormat:
        """The largest format of a kind that ``bytes_per_token`` has room for.

        Args:
            kind: ``top`` or ``sample``.
            bytes_per_token: The budget of a position.
            keep_top: Of kind ``sample``, how many of the most likely tokens are kept exactly.
            vocab_size: V.

        Raises:
            UserError: There is no room for a single token.
        """
        id_bytes = 2 if vocab_size <= 1 << 16 else 4
        fixed = FIXED_BYTES + (keep_top * (id_bytes + CODE_BYTES) if kind == "sample" else 0)
        each = id_bytes + CODE_BYTES if kind == "top" else id_bytes
        count = (bytes_per_token - fixed) // each
        if count < 1:
            raise UserError(
                f"bytes_per_token is {bytes_per_token}; expected at least {fixed + each} for one token of kind {kind!r}"
            )
        if kind == "top":
            return cls(min(count, vocab_size), 0, vocab_size)
        if keep_top > vocab_size:
            raise UserError(f"keep_top is {keep_top}; expected at most the vocabulary's {vocab_size} tokens")
        return cls(keep_top, count, vocab_size)

    @property
    def dtype(self) -> np.dtype:
        """Of one position in a file."""
        ids = "<u2" if self.vocab_size <= 1 << 16 else "<u4"
        return np.dtype(
            [
                ("rest", "<u2"),
                ("entropy", "<u2"),
                ("target", "<u2"),
                ("top_log_probs", "<u2", (self.num_top,)),
                ("top", ids, (self.num_top,)),
                ("draws", ids, (self.num_draws,)),
            ]
        )

    def pack(self, critic: CachedAnswers) -> np.ndarray:
        """Records (N,) of answers for N positions."""
        records = np.zeros(critic.log_rest.shape[0], self.dtype)
        records["rest"] = encode(critic.log_rest)
        records["entropy"] = encode(-critic.entropy)
        codes = encode(critic.log_probs)
        records["target"], records["top_log_probs"] = codes[:, 0], codes[:, 1:]
        records["top"] = critic.tokens[:, 1:].cpu().numpy()
        records["draws"] = critic.draws.cpu().numpy()
        return records

    def unpack(self, records: np.ndarray, targets: Tensor, log_frequencies: Tensor) -> CachedAnswers:
        """The answers in records (…); ``targets`` int64 (…) and ``log_frequencies`` (V,) are the data's."""
        import torch

        from avatarl.objective import CachedAnswers

        top = torch.from_numpy(records["top"].astype(np.int64))
        codes = np.concatenate([records["target"][..., None], records["top_log_probs"]], axis=-1)
        return CachedAnswers(
            tokens=torch.cat([targets.unsqueeze(-1), top], dim=-1),
            log_probs=decode(codes),
            log_rest=decode(records["rest"]),
            draws=torch.from_numpy(records["draws"].astype(np.int64)),
            entropy=-decode(records["entropy"]),
            log_frequencies=log_frequencies,
        )


def encode(log_probs: Tensor) -> np.ndarray:
    """Codes uint16 of log-probabilities (…), which are at most 0."""
    import torch

    units = (-log_probs.double() / NATS_PER_UNIT).round()
    codes = torch.where(units.isinf(), NOTHING, units.clamp(0, NOTHING - 1))
    return codes.to(torch.int32).cpu().numpy().astype(np.uint16)


def decode(codes: np.ndarray) -> Tensor:
    """Log-probabilities float32 (…) of codes."""
    import torch

    log_probs = torch.from_numpy(codes.astype(np.float32)) * -NATS_PER_UNIT
    return log_probs.masked_fill(torch.from_numpy(codes == NOTHING), -torch.inf)
