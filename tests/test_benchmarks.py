"""The benchmarks run, measure what they say, and the README's tables are those of the records."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # they are scripts, which find each other beside them

import estimators  # noqa: E402
import loss  # noqa: E402
import step  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402

TINY_LOSS = loss.Case(20, 1500, 16, 8, 16, "float32", "cpu")
TINY_STEP = step.Case("1m", "1m", 64, 8, 2, "adamw", "float32", False, "auto", "cpu")
TINY_GRADIENT = estimators.Case("article without threshold", 4, 50, "cpu")


def test_the_plain_composition_is_the_avatarl_loss():
    loss.check_plain("cpu")


@pytest.mark.parametrize("name", ["avatarl chunked", "F.linear_cross_entropy chunked", "our cross-entropy chunked"])
def test_alternatives_have_the_gradients_of_the_plain_ones(name: str):
    if "F.linear" in name and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this version of PyTorch has no linear_cross_entropy")
    plain = loss.PLAIN if name.startswith("avatarl") else "F.cross_entropy of logits"
    torch.testing.assert_close(loss.build(name, TINY_LOSS).call(), loss.build(plain, TINY_LOSS).call())


def test_a_sweep_changes_one_factor_at_a_time():
    base, *others = loss.make_cases("cpu", None, sweep=True, shape=None)
    changed = [[name for name in vars(base) if getattr(base, name) != getattr(case, name)] for case in others]
    assert all(len(names) == 1 or names == ["width", "critic_width"] for names in changed)
    assert len({base, *others}) == 10


def test_what_is_not_installed_is_noted_and_the_others_are_timed():
    names = ["Liger JSD", "bare products", "avatarl chunked"]
    [(_, measured)] = timing.measure(loss.build, names, [TINY_LOSS], "cpu", seconds=0.1)
    if not timing.version_of("liger-kernel"):
        assert measured["Liger JSD"] == timing.Measured(note="liger-kernel is not installed")
    for name in names[1:]:
        assert len(measured[name].seconds) >= 1
        assert measured[name].columns()["median_ms"] > 0


def test_calls_take_turns():
    order = []
    times = timing.interleave({name: lambda name=name: order.append(name) for name in "ab"}, 0.01, "cpu")
    assert order[:6] == ["a", "b"] * 3
    assert len(times["a"]) - len(times["b"]) in (0, 1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident peaks are read from Linux's /proc")
@pytest.mark.parametrize("process", ["this", pytest.param("its own", marks=pytest.mark.slow)])
def test_memory_is_that_of_one_call(process: str):
    peaks = timing.peaks_here if process == "this" else timing.resident_peaks
    small, large = peaks(fill, "fill", [16, 80])
    assert 15 < small < 32  # pages let go meanwhile count against it
    assert 79 < large < 96


def fill(name: str, mebibytes: int) -> timing.Ready:
    return timing.Ready(lambda: torch.ones(mebibytes, 2**18), warm_up=lambda: torch.ones(1))


@pytest.mark.parametrize("name", step.EVERYTHING)
def test_every_part_of_a_step_runs(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(step.MATMUL_SIZE, "cpu", 8)
    step.build(name, TINY_STEP).call()
    flops, critic_flops = step.operations(name, TINY_STEP)
    assert name.startswith(step.PART) or flops > critic_flops >= 0


def test_a_step_trains():
    training = step.make_training(TINY_STEP)
    before = training.player.get_output_embeddings().weight.clone()
    training.avatarl()()
    assert not torch.equal(training.player.get_output_embeddings().weight, before)


def test_more_samples_scatter_less_and_without_bias():
    scattered = [estimators.scatter(estimators.sampled(samples), TINY_GRADIENT, draws=100) for samples in (4, 64)]
    assert scattered[1][0] < scattered[0][0] / 4
    for _, bias_ratio in scattered:
        assert bias_ratio < 3


def test_commands_record_what_tables_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(step.MATMUL_SIZE, "cpu", 8)
    where = ["--results", str(tmp_path), "--device", "cpu", "--seconds", "0"]
    monkeypatch.setattr(loss, "LOSSES", {name: loss.LOSSES[name] for name in (loss.PLAIN, "avatarl chunked")})
    loss.main(["--shape", "20", "1500", "16", "8", "16", *where])
    step.main(["--player", "1m", "--critic", "1m", "--vocab", "64", "--block_size", "8", "--batch", "2", *where])
    estimators.main(["--positions", "4", "--vocab", "50", "--draws", "2", "--figure", str(tmp_path / "e.png"), *where])
    assert (tmp_path / "e.png").stat().st_size > 0

    template = "".join(f"<!-- {name} -->\n\n<!-- /{name} -->\n" for name in tables.TABLES)
    shown = tables.with_tables(template, tmp_path)
    for name in ("avatarl chunked", "cross_entropy and critic's logits", "reinforce S=64"):
        assert f"| {name} |" in shown
    assert shown.count("No rows yet") == 1  # nothing was swept
    assert tables.with_tables(shown, tmp_path) == shown


def test_the_tables_of_the_readme_are_those_of_the_records():
    text = tables.README.read_text(encoding="utf-8")
    assert tables.with_tables(text) == text, "run `python benchmarks/tables.py`"
