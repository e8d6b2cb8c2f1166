"""A comparison on the command line: its YAML, options that go before it, and mistakes of one line."""

from __future__ import annotations

import dataclasses
from functools import wraps
from pathlib import Path

import pytest

import avatarl.comparison
from avatarl.cli import main
from avatarl.comparison import ComparisonConfig, TuningConfig

from .conftest import CROSS_ENTROPY

WHOLE = """
out: {out}
data: data/my
base: {{player: {{preset: 1m}}, steps: 3, optim: {{learning_rate: 1e-2}}}}
seeds: [1, 2, 3]
baseline: plain
critics:
  one: {{tuned_as: plain, cache: {{kind: sample}}}}
  two: {{}}
arms:
  plain: {{objective: cross_entropy}}
  dense: {{critic: [one, two], preset: dense, avatarl.reality_weight: 0.7, tuned_as: plain}}
  free: {{}}
tuning:
  seed: 101
  arms: [plain]
  grid: {{optim.learning_rate: [1e-3, 0.01], optim.name: [adamw, muon]}}
pairs: my.jsonl
workers: 2
"""


@pytest.fixture
def asked(monkeypatch, tmp_path: Path) -> list:
    """What the command asks for; nothing is trained."""
    calls = []

    @wraps(avatarl.comparison.compare)
    def compare(comparison: ComparisonConfig, **options) -> None:
        calls.append((comparison, options))
        (tmp_path / "report.md").write_text("the report", encoding="utf-8")

    monkeypatch.setattr(avatarl.comparison, "compare", compare)
    return calls


def test_a_comparison_is_read_from_yaml_and_options_go_before_it(tmp_path: Path, asked: list, capsys):
    (tmp_path / "all.yaml").write_text(WHOLE.format(out=tmp_path))
    assert main(["compare", "--config", str(tmp_path / "all.yaml")]) == 0
    assert capsys.readouterr().out == "the report\n"
    [(first, options)] = asked
    assert options == {"device": "auto"}
    assert first == ComparisonConfig(
        out=str(tmp_path),
        data="data/my",
        base={"player": {"preset": "1m"}, "steps": 3, "optim": {"learning_rate": 0.01}},
        seeds=[1, 2, 3],
        baseline="plain",
        critics={"one": {"tuned_as": "plain", "cache": {"kind": "sample"}}, "two": {}},
        arms={
            "plain": CROSS_ENTROPY,
            "dense": {
                "critic": ["one", "two"],
                "preset": "dense",
                "avatarl.reality_weight": 0.7,
                "tuned_as": "plain",
            },
            "free": {},
        },
        tuning=TuningConfig(
            grid={"optim.learning_rate": [0.001, 0.01], "optim.name": ["adamw", "muon"]}, seed=101, arms=["plain"]
        ),
        pairs="my.jsonl",
        workers=2,
    )
    words = ["compare", "--config", str(tmp_path / "all.yaml"), "--seeds", "[11, 12]", "--data", "new", "--device=cpu"]
    assert main(words) == 0
    assert asked[1] == (dataclasses.replace(first, seeds=[11, 12], data="new"), {"device": "cpu"})


def test_what_is_not_given_is_not_asked_for(tmp_path: Path, asked: list):
    (tmp_path / "few.yaml").write_text(f"out: {tmp_path}\narms: {{cross_entropy: {{}}}}\n")
    assert main(["compare", "--config", str(tmp_path / "few.yaml")]) == 0
    assert asked[0][0] == ComparisonConfig(out=str(tmp_path), arms={"cross_entropy": {}})


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("workers: 2", "workers: 0", "workers is 0"),
        ("seeds: [1, 2, 3]", "seeds: [1, 101]", "tuning.seed is 101, one of seeds"),
        ("baseline: plain", "baseline: plane", "did you mean 'plain'"),
        ("workers: 2", "worker: 2", "worker is not a setting of avatarl compare"),
        ("arms: [plain]", "arm: [plain]", "tuning is"),
        ("pairs: my.jsonl", "pairs: nowhere.jsonl", "nowhere.jsonl"),
        ("pairs: my.jsonl", "", "data/my"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch, capsys, old: str, new: str, message: str
):
    monkeypatch.chdir(tmp_path)
    assert old in WHOLE
    (tmp_path / "all.yaml").write_text(WHOLE.format(out=tmp_path / "out").replace(old, new))
    assert main(["compare", "--config", str(tmp_path / "all.yaml")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("avatarl: ") and len(printed.err.splitlines()) == 1
    assert message in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["all.yaml"]


def test_data_is_asked_for(tmp_path: Path, capsys):
    (tmp_path / "all.yaml").write_text(WHOLE.format(out=tmp_path / "out").replace("data: data/my", ""))
    assert main(["compare", "--config", str(tmp_path / "all.yaml")]) == 2
    assert "data is not given; expected a prepared data folder" in capsys.readouterr().err
