"""A compiled run is the same run, faster."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from avatarl import AvataRLConfig
from avatarl.training import Schedule, ScheduleConfig, train

from .runs import Interrupted, assert_same_weights, lines_of, weights_of


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["avatarl", "cross_entropy"])
def test_a_compiled_run_has_the_losses_of_an_eager_one(tiny_config, tmp_path: Path, objective: str):
    """In float32 both differ by the order of sums alone, which some steps of the optimiser magnify."""
    for compiled in (False, True):
        config = tiny_config(
            tmp_path / str(compiled),
            objective=objective,
            compile=compiled,
            gradient_accumulation_steps=2,
            log_every_steps=1,
        )
        train(config, quiet=True)
    eager, fast = (lines_of(tmp_path / name / "run") for name in ("False", "True"))
    assert len(eager) == len(fast) == 10  # eight steps, two evaluations
    for expected, found in zip(eager, fast, strict=True):
        assert found.keys() == expected.keys()
        for name in ("loss", "cross_entropy", "entropy"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3), (expected["event"], expected["step"], name)


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tiny_config, tmp_path: Path, interrupt):
    """In one process, where the second start compiles again; the kernels may not depend on where a run begins."""
    settings = dict(objective="avatarl", compile=True, gradient_accumulation_steps=2, log_every_steps=1)
    train(tiny_config(tmp_path / "whole", **settings), quiet=True)
    torch.compiler.reset()
    interrupt(7)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, **settings), quiet=True)
    torch.compiler.reset()
    train(tiny_config(tmp_path, **settings), resume=True, quiet=True)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole" / "run")
    assert_same_weights(*(weights_of(folder / "run" / "final") for folder in (tmp_path, tmp_path / "whole")))


@pytest.mark.slow
def test_a_compiled_run_under_changing_critics(tiny_config, tmp_path: Path, critic_cache: Path):
    """A cached critic, an average that joins in, and both let go: a graph for each, whatever the values."""
    settings = dict(
        critic=[str(critic_cache), "ema:0.5:2"],
        schedules=ScheduleConfig(critic_weight=Schedule("linear", end_step=6), smoothing=Schedule("cosine")),
        avatarl=AvataRLConfig(top_k=4, pool="arithmetic", threshold="none"),
        log_every_steps=1,
    )
    for compiled in (False, True):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        train(tiny_config(tmp_path / str(compiled), compile=compiled, **settings), quiet=True)
    # Training and evaluation, each in three stages, the passes over the logits, and the average's own forward pass.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 9
    for expected, found in zip(*(lines_of(tmp_path / name / "run") for name in ("False", "True")), strict=True):
        assert found["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-3)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
