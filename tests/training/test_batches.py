"""Windows of a step are shared by processes and micro-batches; their random numbers depend on seed and window alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from avatarl import UserError
from avatarl.planning import share_of_step
from avatarl.training import TrainConfig
from avatarl.training.batches import Batches, uniforms_of
from avatarl.training.processes import Processes
from avatarl.training.setup import Setup, set_up

from ..conftest import BLOCK


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


# --- windows of a step ---------------------------------------------------------------------------------------------


def test_a_step_that_cannot_be_shared_is_refused():
    config = TrainConfig(data="data", out="run", steps=1, micro_batch_size=4, gradient_accumulation_steps=2)
    assert config.windows_per_process(4) == 2
    with pytest.raises(
        UserError, match="micro_batch_size times gradient_accumulation_steps is 8, which 3 processes cannot share"
    ):
        config.windows_per_process(3)


@pytest.mark.parametrize(
    ("share", "at_most", "sizes"),
    [(8, 8, [8]), (8, 5, [4, 4]), (6, 4, [3, 3]), (7, 3, [3, 2, 2]), (4, 9, [4]), (13, 8, [7, 6]), (9, 8, [5, 4])],
)
def test_a_share_is_divided_into_few_micro_batches(
    tiny_config, tmp_path: Path, share: int, at_most: int, sizes: list[int]
):
    """Of a prime number of windows too; as many processes as there are windows in a micro-batch."""
    config = tiny_config(tmp_path, micro_batch_size=at_most, gradient_accumulation_steps=share)
    setup = set_up(config, Processes())
    whole = torch.cat(inputs_of_third_step(setup, config, Processes()))
    mine = inputs_of_third_step(setup, config, Processes(rank=at_most - 1, count=at_most))
    assert [len(inputs) for inputs in mine] == sizes
    assert torch.equal(torch.cat(mine), whole[-share:])
    assert share_of_step(config, at_most) == (sizes[0], len(sizes))


def test_the_order_of_windows_does_not_depend_on_the_number_of_processes(tiny_config, tmp_path: Path):
    config = tiny_config(tmp_path, micro_batch_size=8, gradient_accumulation_steps=2)
    setup = set_up(config, Processes())
    whole = torch.cat(inputs_of_third_step(setup, config, Processes()))
    assert whole.shape == (16, BLOCK)
    for count in (2, 4, 8):
        parts = [inputs_of_third_step(setup, config, Processes(rank, count)) for rank in range(count)]
        assert torch.equal(torch.cat(sum(parts, [])), whole)


def inputs_of_third_step(setup: Setup, config: TrainConfig, processes: Processes) -> list[torch.Tensor]:
    """The inputs of each micro-batch that a process reads in step 3."""
    batches = Batches(setup.batches.windows, config, processes, setup.device)
    start = 2 * config.windows_per_step
    return [batch.inputs for batch in batches.of_step(start, num_uniforms=0)]
