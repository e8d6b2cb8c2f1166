"""Draws are uniform and known by seed and window alone, whatever batch a window comes in."""

from __future__ import annotations

import torch

from avatarl.training.batches import uniforms_of


def test_a_window_has_the_same_draws_in_any_batch():
    together = uniforms_of(seed=1, windows=range(8), block_size=4, samples=3)
    apart = torch.cat([uniforms_of(seed=1, windows=[window], block_size=4, samples=3) for window in range(8)])
    assert torch.equal(together, apart)
    assert together.shape == (8 * 4, 3) and together.dtype == torch.float32


def test_seed_window_and_split_each_give_other_draws():
    draws = uniforms_of(seed=1, windows=[5], block_size=4, samples=3)
    assert not torch.equal(draws, uniforms_of(seed=2, windows=[5], block_size=4, samples=3))
    assert not torch.equal(draws, uniforms_of(seed=1, windows=[6], block_size=4, samples=3))
    assert not torch.equal(draws, uniforms_of(seed=1, windows=[5], block_size=4, samples=3, evaluation=True))
    assert torch.equal(draws, uniforms_of(seed=1, windows=[5], block_size=4, samples=3))


def test_draws_are_uniform_within_and_across_windows():
    """Kolmogorov and Smirnov's distance on one long window and over many short ones, at p > 0.001 for a fixed seed."""
    within = uniforms_of(seed=3, windows=[0], block_size=1000, samples=5).flatten()
    across = uniforms_of(seed=3, windows=range(2000), block_size=1, samples=1).flatten()
    for draws in (within, across):
        assert draws.min() >= 0 and draws.max() < 1
        steps = torch.arange(len(draws) + 1, dtype=torch.float64) / len(draws)
        ordered = draws.double().sort().values
        distance = torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max()
        assert distance < 1.95 / len(draws) ** 0.5
    assert within.unique().numel() > 4990  # 2^24 values, 5,000 draws: about one pair in common


def test_neighbouring_windows_are_independent():
    draws = uniforms_of(seed=3, windows=range(1000), block_size=8, samples=1).reshape(1000, 8)
    correlation = torch.corrcoef(torch.cat([draws[:-1].T, draws[1:].T]).double())[:8, 8:]
    assert correlation.abs().max() < 0.15  # 64 correlations of 999 pairs: 4.7 standard deviations


def test_windows_do_not_share_draws():
    """A generator that counts on from one window into the next would give each its neighbour's draws, shifted."""
    draws = uniforms_of(seed=3, windows=range(20), block_size=16, samples=4)
    assert draws.unique().numel() == draws.numel()


def test_no_draws_for_objectives_that_do_not_sample():
    assert uniforms_of(seed=1, windows=range(2), block_size=4, samples=0) is None
