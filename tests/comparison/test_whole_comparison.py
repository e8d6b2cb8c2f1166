"""A comparison that is really trained, as small as one can be."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from torch import Tensor

from avatarl.cli import main
from avatarl.comparison import ComparisonConfig, TuningConfig, compare
from avatarl.comparison.measures import read_rows, result_row
from avatarl.comparison.progress import Job, Progress
from avatarl.data import PreparedData
from avatarl.training.model import PlayerWithLoss

from ..conftest import BLOCK
from ..training.runs import contents_of
from .conftest import (
    BASE,
    CROSS_ENTROPY,
    complete,
    do_in_process,
)


@dataclass
class Finished:
    comparison: ComparisonConfig
    looks: list[list[str]]
    jobs: dict[str, Job] = field(default_factory=dict)
    weights: dict[str, list[Tensor]] = field(default_factory=dict)  # before the first step
    windows: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # in the order of training


@pytest.fixture(scope="module")
def finished(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A whole comparison that was really trained, and what its players were given."""
    comparison = ComparisonConfig(
        out=str(tmp_path_factory.mktemp("finished") / "out"),
        data=str(data.path),
        base={**BASE, "train_windows": 24},
        seeds=[1, 2],
        critics={"teacher": {"tuned_as": "cross_entropy", "cache": {"bytes_per_token": 58}}},
        arms={
            "cross_entropy": CROSS_ENTROPY,
            "pupil": {"critic": "teacher", "tuned_as": "cross_entropy", "optim.weight_decay": 0.3},
        },
        tuning=TuningConfig(grid={"optim.learning_rate": [0.001, 0.03]}, seed=9),
    )
    result, real = Finished(comparison, []), PlayerWithLoss.forward

    def do(job: Job) -> None:
        def forward(self: PlayerWithLoss, input_ids: Tensor, *rest, **options):
            if self.training:
                weights = [weight.detach().clone() for weight in self.player.parameters()]
                result.weights.setdefault(job.name, weights)
                result.windows[job.name].append(input_ids.clone())
            return real(self, input_ids, *rest, **options)

        result.jobs[job.name] = job
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PlayerWithLoss, "forward", forward)
            do_in_process(job)

    result.looks = complete(comparison, data, do)
    return result


def test_a_whole_comparison_ends(finished: Finished, data: PreparedData):
    assert [sorted({name.split("/")[0] for name in look}) for look in finished.looks] == [
        ["tuning"],
        ["critics", "runs"],
        ["caches"],
        ["runs"],
    ]
    progress = Progress.of(finished.comparison, data)
    out = Path(finished.comparison.out)
    assert [(member.arm, member.seed, member.critics) for member in progress.members] == [
        ("cross_entropy", 1, ()),
        ("cross_entropy", 2, ()),
        ("pupil", 1, (out / "critics" / "teacher",)),
        ("pupil", 2, (out / "critics" / "teacher",)),
    ]
    assert all((member.folder / "final" / "model.safetensors").is_file() for member in progress.members)


def test_what_is_finished_is_not_done_again(finished: Finished, data: PreparedData):
    before = contents_of(Path(finished.comparison.out))
    for _ in range(2):
        assert Progress.of(finished.comparison, data).missing == []
    assert contents_of(Path(finished.comparison.out)) == before


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("what", ["weights", "windows"])
def test_arms_of_a_seed_share_initial_weights_and_the_order_of_the_data(finished: Finished, what: str):
    of = getattr(finished, what)
    for seed in (1, 2):
        assert same(of[f"runs/cross_entropy/seed-{seed}"], of[f"runs/pupil/seed-{seed}"])
    for one, other in (("runs/pupil/seed-1", "runs/pupil/seed-2"), ("critics/teacher", "runs/pupil/seed-1")):
        assert not same(of[one], of[other])


def test_the_search_decides_by_the_best_evaluation(finished: Finished, data: PreparedData):
    out = Path(finished.comparison.out)
    best = {}
    for rate in (0.001, 0.03):
        lines = (out / "tuning" / "cross_entropy" / f"learning_rate={rate}" / "metrics.jsonl").read_text().splitlines()
        values = [line["cross_entropy"] for line in map(json.loads, lines) if line["event"] == "eval"]
        assert len(values) == 2
        best[rate] = min(values)
    chosen = min(best, key=best.get)
    found = Progress.of(finished.comparison, data).tuned
    assert {tuned.point[0]: tuned.cross_entropy for tuned in found} == best
    assert [tuned.point for tuned in found if tuned.is_chosen] == [(chosen,)]
    for name in ("runs/cross_entropy/seed-2", "runs/pupil/seed-1", "critics/teacher"):
        saved = yaml.safe_load((out / name / "config.yaml").read_text())
        assert saved["optim"]["learning_rate"] == chosen
        assert saved["optim"]["weight_decay"] == (0.3 if "pupil" in name else 0.1)


def test_arms_read_the_cache_of_their_windows(finished: Finished):
    out = Path(finished.comparison.out)
    cache = json.loads((out / "caches" / "teacher" / "cache.json").read_text())
    assert (cache["block_size"], cache["windows"]["train"], cache["bytes_per_token"]) == (BLOCK, 24, 58)
    saved = yaml.safe_load((out / "runs" / "pupil" / "seed-1" / "config.yaml").read_text())
    assert saved["critic"] == str(out / "caches" / "teacher") and saved["train_windows"] == 24


def test_a_row_holds_what_the_cache_cost_and_whose_settings_these_are(finished: Finished, data: PreparedData):
    out = Path(finished.comparison.out)
    member = next(each for each in Progress.of(finished.comparison, data).members if each.arm == "pupil")
    row = result_row(member, finished.comparison, data, out, "cpu")
    cache = json.loads((out / "caches" / "teacher" / "cache.json").read_text())
    assert cache["windows"]["valid"] > 0
    assert row["critic_flops"] == cache["critic"]["flops_per_token"] * 24 * BLOCK
    chosen = yaml.safe_load((member.folder / "config.yaml").read_text())["optim"]["learning_rate"]
    assert (row["tuned_as"], row["tuned_settings"]) == ("cross_entropy", f"optim.learning_rate={chosen}")


@pytest.mark.parametrize("again", ["recipe", "comparison.yaml"])
def test_a_comparison_is_its_folder_wherever_it_lies(
    finished: Finished, data: PreparedData, tmp_path: Path, monkeypatch, again: str
):
    """A recipe that names the new folder goes on with it, and so does the file in it from any directory."""
    out = tmp_path / "out"
    shutil.copytree(finished.comparison.out, tmp_path / "made")
    made = replace(finished.comparison, out=str(tmp_path / "made"))
    compare(made, device="cpu", quiet=True)
    first = read_rows(tmp_path / "made" / "results.csv")
    (tmp_path / "made" / "recipes").mkdir()
    (tmp_path / "made" / "recipes" / "runs-pupil-seed-1.yaml").write_text("")  # as a worker leaves it
    (tmp_path / "made").rename(out)
    runs = contents_of(out / "runs")
    monkeypatch.chdir(tmp_path)
    if again == "recipe":
        moved = replace(made, out="out")
        assert Progress.of(moved, data).missing == []
        compare(moved, device="cpu", quiet=True)
    else:
        assert main(["compare", "--config", str(out / "comparison.yaml"), "--device", "cpu"]) == 0
    pd.testing.assert_frame_equal(read_rows(out / "results.csv"), first)
    assert first["critic_training_flops"].iloc[-1] > 0
    assert contents_of(out / "runs") == runs
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
