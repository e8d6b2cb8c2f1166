"""Random draws of the sampled objectives, keyed by (seed, position of the window), never by process or device."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def uniforms_of(
    seed: int, windows: Iterable[int], block_size: int, samples: int, evaluation: bool = False
) -> Tensor | None:
    """Uniform numbers in [0, 1) for each position of each window, float32 (windows · block_size, samples).

    A training window is known by its place in the endless order of training, which fixes step and window at once; an
    evaluation window by its index. None when ``samples`` is 0.
    """
    if samples == 0:
        return None
    # Philox is a counter-based generator: this counter names the window, and no state is carried from one to the next.
    drawn = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, int(evaluation), int(window), 0])).random(
            (block_size, samples), dtype=np.float32
        )
        for window in windows
    ]
    return torch.from_numpy(np.concatenate(drawn))


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Set torch's generators for one optimiser step of one process.

    Nothing in training draws from them but dropout, which so depends on nothing that was drawn before.
    """
    (state,) = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state >> np.uint64(1)))
