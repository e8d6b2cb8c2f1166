"""Cross-entropy of critics, and of the mean of their probabilities, on held-out text.

``python docs/critics_mean.py DATA CRITIC [CRITIC ...]``: every validation window, in float32; nats per token. What
"the player passes its critics" in results.md is measured against.
"""

from __future__ import annotations

import math
import sys

import torch

from avatarl.data import PreparedData, Windows
from avatarl.device import pick_device
from avatarl.models import load_model

WINDOWS_AT_ONCE = 8


def main(folder: str, names: list[str]) -> None:
    """Print a line of each critic, and one of their mean."""
    device, data = pick_device("auto"), PreparedData.open(folder)
    critics = [load_model(name, torch.float32, device).eval() for name in names]
    windows = Windows(data.valid, critics[0].config.max_position_embeddings)
    sums = torch.zeros(len(critics) + 1, dtype=torch.float64)
    for first in range(0, len(windows), WINDOWS_AT_ONCE):
        chosen = range(first, min(first + WINDOWS_AT_ONCE, len(windows)))
        inputs, targets = (each.to(device) for each in windows.batch(chosen))
        with torch.no_grad():
            log_probs = torch.stack([of_targets(critic(inputs).logits, targets) for critic in critics])
        mean = log_probs.logsumexp(0, keepdim=True) - math.log(len(critics))
        sums -= torch.cat([log_probs, mean]).double().sum(dim=(1, 2)).cpu()
    for name, total in zip([*names, f"mean of {len(names)}"], sums / (len(windows) * windows.block_size), strict=True):
        print(f"{total:.4f}  {name}")


def of_targets(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B, T) that logits (B, T, V) give to targets (B, T)."""
    return logits.log_softmax(dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
