"""Updates that are not taken: those of a loss or gradient that is no number, and, if asked for, of a loss that jumps.

Everything is decided and counted on the device, so that no step waits for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import GuardConfig

# A normal distribution's median absolute deviation in units of its standard deviation.
MAD_OF_NORMAL = 0.6745


class Guard:
    """Judges each step's loss and gradient norm, and remembers the losses it took and the steps it refused."""

    def __init__(self, config: GuardConfig, device: torch.device):
        self.config = config
        self._losses = torch.zeros(config.spike_window, device=device)  # a ring of the last accepted ones
        self._accepted = torch.zeros((), dtype=torch.int64, device=device)
        self._refused = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._longest_row = torch.zeros((), dtype=torch.int64, device=device)
        # The refused steps of late, newest last: step, loss, gradient norm.
        self._last = torch.full((config.stop_after, 3), math.nan, dtype=torch.float64, device=device)

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the update of ``step`` is refused, bool (), on the device.

        Args:
            step: The optimiser step, counted from 1.
            loss: Its loss over all processes ().
            grad_norm: The norm of its gradient before clipping ().
        """
        refused = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if self.config.spike_score is not None:
            refused |= self._spike_score(loss) > self.config.spike_score
        slot = (self._accepted % len(self._losses)).unsqueeze(0)
        kept = torch.where(refused, self._losses.gather(0, slot), loss.float())
        self._losses.scatter_(0, slot, kept)
        self._accepted += ~refused
        self._refused += refused
        self._in_a_row = (self._in_a_row + 1) * refused
        self._longest_row = torch.maximum(self._longest_row, self._in_a_row)
        row = torch.stack([torch.full_like(loss, step), loss, grad_norm]).double()
        self._last = torch.where(refused, torch.cat([self._last[1:], row.unsqueeze(0)]), self._last)
        return refused

    def _spike_score(self, loss: Tensor) -> Tensor:
        """How far a loss lies above the median of the last accepted ones, in robust standard deviations ().

            z = 0.6745 · (loss − median) / median |losses − median|

        0 until the window is full. Source: Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993.
        """
        median = self._losses.median()
        deviation = (self._losses - median).abs().median()
        smallest = torch.finfo(torch.float32).eps * median.abs()  # all alike, but for rounding
        score = MAD_OF_NORMAL * (loss - median) / torch.maximum(deviation, smallest)
        return torch.where(self._accepted >= len(self._losses), score, 0.0)

    def forget_losses(self) -> None:
        """Start with an empty window: the losses to come are of another kind than those before."""
        self._accepted.zero_()

    # --- what the host asks once in a while; each waits for the device ---

    @property
    def refused(self) -> int:
        """How many updates of the run were refused."""
        return int(self._refused)

    @property
    def must_stop(self) -> bool:
        """Whether so many were refused in a row that the run cannot be going well."""
        return int(self._longest_row) >= self.config.stop_after

    def last_refused(self) -> list[dict[str, float]]:
        """Step, loss and gradient norm of the last refused updates, newest last."""
        rows = [row for row in self._last.tolist() if not math.isnan(row[0])]
        return [{"step": int(step), "loss": loss, "grad_norm": norm} for step, loss, norm in rows]

    def last_losses(self) -> list[float]:
        """The last accepted losses, in no order: as many as the window holds."""
        return self._losses[: int(self._accepted)].tolist()

    def state_dict(self) -> dict:
        """Plain numbers, exact in JSON."""
        return {
            "losses": self._losses.tolist(),
            "counts": [int(count) for count in (self._accepted, self._refused, self._in_a_row)],
            "last": [[repr(value) for value in row] for row in self._last.tolist()],  # infinities are no JSON
        }

    def load_state_dict(self, state: dict, is_same_run: bool = True) -> None:
        """Go on from there; a window of another size starts empty.

        Where settings, data or critics are others, nothing but the number of refused updates says anything.
        """
        device = self._losses.device
        if not is_same_run:
            self._refused = torch.tensor(state["counts"][1], device=device)
            return
        self._accepted, self._refused, self._in_a_row = (torch.tensor(n, device=device) for n in state["counts"])
        self._longest_row = self._in_a_row.clone()
        if len(state["losses"]) == len(self._losses):
            self._losses = torch.tensor(state["losses"], device=device)
        else:
            self._accepted = torch.zeros_like(self._accepted)
        last = torch.tensor([[float(x) for x in row] for row in state["last"]], dtype=torch.float64)
        rows = min(len(last), len(self._last))
        self._last[len(self._last) - rows :] = last[len(last) - rows :].to(device)
