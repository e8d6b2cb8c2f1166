"""A compiled run is the same run, faster."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatarl.training import train

from .test_trainer import lines_of


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["avatarl", "cross_entropy"])
def test_a_compiled_run_has_the_losses_of_an_eager_one(tiny_config, tmp_path: Path, objective: str):
    """In float32 both differ by the order of sums alone, which some steps of the optimiser magnify."""
    for compiled in (False, True):
        config = tiny_config(
            tmp_path / str(compiled), objective=objective, compile=compiled, accumulate_steps=2, log_every_steps=1
        )
        train(config, quiet=True)
    eager, fast = (lines_of(tmp_path / name / "run") for name in ("False", "True"))
    assert len(eager) == len(fast) == 10  # eight steps, two evaluations
    for expected, found in zip(eager, fast, strict=True):
        assert found.keys() == expected.keys()
        for name in ("loss", "cross_entropy", "entropy"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3), (expected["event"], expected["step"], name)
