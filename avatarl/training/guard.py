"""Skip updates with a non-finite loss or gradient and, if asked to, with a loss that jumps.

All decisions and counts stay on the device, so that no step waits for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import GuardConfig

# A normal distribution's median absolute deviation in units of its standard deviation.
MAD_OF_NORMAL = 0.6745


class Guard:
    """Checks each step's loss and gradient norm, and remembers accepted losses and skipped updates."""

    def __init__(self, config: GuardConfig, device: torch.device):
        self.config = config
        self._losses = torch.zeros(config.spike_window, device=device)  # a ring of the last accepted ones
        self._accepted, self._skipped, self._in_a_row, self._longest_row = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)
        )
        # The last skipped updates, newest last: step, loss, gradient norm.
        self._last = torch.full((config.stop_after, 3), math.nan, dtype=torch.float64, device=device)

    def check(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Decide whether to skip the update of ``step``: bool (), on the device.

        Args:
            step: The optimiser step, counted from 1.
            loss: Its loss over all processes ().
            grad_norm: The norm of its gradient before clipping ().
        """
        skipped = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if self.config.spike_score is not None:
            skipped |= self._spike_score(loss) > self.config.spike_score
        slot = (self._accepted % len(self._losses)).unsqueeze(0)
        kept = torch.where(skipped, self._losses.gather(0, slot), loss.float())
        self._losses.scatter_(0, slot, kept)
        self._accepted += ~skipped
        self._skipped += skipped
        self._in_a_row = (self._in_a_row + 1) * skipped
        self._longest_row = torch.maximum(self._longest_row, self._in_a_row)
        row = torch.stack([torch.full_like(loss, step), loss, grad_norm]).double()
        self._last = torch.where(skipped, torch.cat([self._last[1:], row.unsqueeze(0)]), self._last)
        return skipped

    def _spike_score(self, loss: Tensor) -> Tensor:
        """How far a loss lies above the median of the last accepted ones, in robust standard deviations ().

            z = 0.6745 · (loss − median) / median |losses − median|

        0 until the window is full. Source: Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993.
        """
        median = self._losses.median()
        deviation = (self._losses - median).abs().median()
        smallest = torch.finfo(torch.float32).eps * median.abs()  # losses that are equal but for rounding
        score = MAD_OF_NORMAL * (loss - median) / torch.maximum(deviation, smallest)
        return torch.where(self._accepted >= len(self._losses), score, 0.0)

    def forget_losses(self) -> None:
        """Empty the window of accepted losses, before losses of another kind."""
        self._accepted.zero_()

    # --- read by the host once in a while; each waits for the device ---

    @property
    def num_skipped(self) -> int:
        """How many updates of the run were skipped."""
        return int(self._skipped)

    @property
    def must_stop(self) -> bool:
        """Whether ``stop_after`` updates were skipped in a row."""
        return int(self._longest_row) >= self.config.stop_after

    def last_skipped(self) -> list[dict[str, float]]:
        """Step, loss and gradient norm of the last skipped updates, newest last."""
        rows = [row for row in self._last.tolist() if not math.isnan(row[0])]
        return [{"step": int(step), "loss": loss, "grad_norm": norm} for step, loss, norm in rows]

    def last_losses(self) -> list[float]:
        """The accepted losses in the window, in no order."""
        return self._losses[: int(self._accepted)].tolist()

    def state_dict(self) -> dict:
        """Plain numbers, exact in JSON."""
        return {
            "losses": self._losses.tolist(),
            "counts": [int(count) for count in (self._accepted, self._skipped, self._in_a_row)],
            "last": [[repr(value) for value in row] for row in self._last.tolist()],  # JSON has no infinities
        }

    def load_state_dict(self, state: dict, is_same_run: bool = True) -> None:
        """Restore the state; a window of another size starts empty.

        After a change of settings, data or critics only the number of skipped updates is kept.
        """
        device = self._losses.device
        accepted, self._skipped, in_a_row = (torch.tensor(count, device=device) for count in state["counts"])
        if not is_same_run:
            return
        self._in_a_row, self._longest_row = in_a_row, in_a_row.clone()
        if len(state["losses"]) == len(self._losses):
            self._accepted, self._losses = accepted, torch.tensor(state["losses"], device=device)
        last = torch.tensor([[float(x) for x in row] for row in state["last"]], dtype=torch.float64)
        rows = min(len(last), len(self._last))
        self._last[len(self._last) - rows :] = last[len(last) - rows :].to(device)
