"""What a comparison lacks, and that what it makes differs in what is compared and in nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from avatarl import UserError
from avatarl.comparison import TuningConfig
from avatarl.comparison.progress import point_name
from avatarl.data.prepare import prepare
from avatarl.errors import RunFailed
from avatarl.training.folder.log import evaluations_of

from ..conftest import write_documents
from .conftest import complete, do, look

TUNED = {"optim.learning_rate": [0.003, 0.03], "optim.weight_decay": [0.1, 0.2]}


def settings_of(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text())


def best(run: Path) -> float:
    return min(line["cross_entropy"] for line in evaluations_of(run))


@pytest.fixture(scope="module")
def tuned(tiny_comparison, tmp_path_factory):
    """A finished comparison of three arms, with its last look and what was done in which order."""
    comparison = tiny_comparison(
        tmp_path_factory.mktemp("tuned"),
        seeds=[1, 2],
        base={"train_windows": 20},
        critics={
            "one": {"tuned_as": "cross_entropy", "cache": {"kind": "sample", "bytes_per_token": 54}},
            "two": {"seed": 99},
        },
        arms={
            "cross_entropy": {"objective": "cross_entropy"},
            "dense": {"critic": ["one", "two"], "preset": "dense", "avatarl.tail": "sample", "optim.weight_decay": 0.7}
            | {"tuned_as": "cross_entropy"},
            "article": {"critic": "two", "avatarl.top_k": 4},
        },
        tuning=TuningConfig(TUNED, seed=101, arms=["cross_entropy"]),
    )
    return comparison, *complete(comparison)


def test_what_others_wait_for_comes_first_and_nothing_is_done_twice(tuned):
    comparison, progress, done = tuned
    assert len(done) == len(set(done))
    kinds = [name.split("/")[0] for name in done]
    assert kinds.index("runs") > kinds.index("critics") > kinds.index("tuning")
    assert [name for name in done if name.startswith("runs/")] == [
        f"runs/{arm}/seed-{seed}" for seed in (1, 2) for arm in ("cross_entropy", "dense", "article")
    ]
    assert [(member.arm, member.seed) for member in progress.members] == [
        (arm, seed) for arm in ("cross_entropy", "dense", "article") for seed in (1, 2)
    ]
    assert not look(comparison).missing


def test_the_search_is_by_the_best_evaluation_and_gives_its_values_to_who_asked_for_them(tuned):
    comparison, progress, _ = tuned
    out = Path(comparison.out)
    chosen = [each for each in progress.tuned if each.is_chosen]
    assert len(chosen) == 1 and len(progress.tuned) == 3
    for each in progress.tuned:
        run = out / "tuning" / "cross_entropy" / point_name(TUNED, each.point)
        assert each.cross_entropy == best(run)
        assert (settings_of(run)["seed"], settings_of(run)["optim"]["learning_rate"]) == (101, each.point[0])
    assert chosen[0].cross_entropy == min(each.cross_entropy for each in progress.tuned)
    rate, decay = chosen[0].point
    expected = {"cross_entropy": (rate, decay), "dense": (rate, 0.7), "article": (0.01, 0.1)}
    found = {}
    for arm in comparison.arms:
        optim = settings_of(out / "runs" / arm / "seed-1")["optim"]
        found[arm] = optim["learning_rate"], optim["weight_decay"]
    assert found == expected
    assert settings_of(out / "critics" / "one")["optim"]["learning_rate"] == rate
    assert settings_of(out / "critics" / "two")["optim"]["learning_rate"] == 0.01


def test_runs_of_a_seed_differ_in_what_their_arms_change(tuned):
    comparison, _, _ = tuned
    runs = {arm: settings_of(Path(comparison.out) / "runs" / arm / "seed-2") for arm in comparison.arms}
    different = {name for name in runs["article"] if len({json.dumps(run[name]) for run in runs.values()}) > 1}
    assert different == {"out", "objective", "critic", "avatarl", "optim"}
    assert {run["seed"] for run in runs.values()} == {2}


def test_critics_have_seeds_of_their_own_and_caches_the_runs_windows(tuned):
    comparison, progress, _ = tuned
    out = Path(comparison.out)
    seeds = [settings_of(out / "critics" / name)["seed"] for name in ("one", "two")]
    assert seeds[1] == 99 and seeds[0] not in (1, 2, 101, 99)
    assert settings_of(out / "critics" / "one")["objective"] == "cross_entropy"
    cache = json.loads((out / "caches" / "one" / "cache.json").read_text())
    assert (cache["block"], cache["windows"]["train"], cache["kind"]) == (16, 20, "sample")
    dense = next(member for member in progress.members if member.arm == "dense")
    assert settings_of(dense.folder)["critic"] == [str(out / "caches" / "one"), str(out / "critics" / "two")]
    assert dense.critics == (out / "critics" / "one", out / "critics" / "two")


def test_a_further_seed_and_a_further_arm_add_their_runs_alone(tuned):
    comparison, _, _ = tuned
    more = dataclasses.replace(comparison, seeds=[1, 2, 3])
    assert [job.name for job in look(more).missing] == [f"runs/{arm}/seed-3" for arm in comparison.arms]
    more = dataclasses.replace(comparison, arms={**comparison.arms, "another": {"objective": "cross_entropy"}})
    assert [job.name for job in look(more).missing] == ["runs/another/seed-1", "runs/another/seed-2"]


def test_another_setting_or_other_data_in_the_same_folder_is_refused(tuned, tmp_path: Path):
    comparison, _, _ = tuned
    changed = dataclasses.replace(comparison, base={**comparison.base, "batch_windows": 2})
    with pytest.raises(UserError, match="was started under other settings: batch_windows was 4 and is 2"):
        look(changed)
    other = tmp_path / "other"
    source = write_documents(tmp_path / "documents.jsonl", count=60, seed=2)
    prepare([str(source)], other, tokenizer=str(Path(comparison.data) / "tokenizer"), quiet=True)
    with pytest.raises(UserError, match="other settings: data was|trained on other data"):
        look(dataclasses.replace(comparison, data=str(other)))


def test_data_that_changed_under_the_same_name_is_noticed(tiny_comparison, tmp_path: Path):
    source = write_documents(tmp_path / "documents.jsonl", count=60, seed=2)
    prepare([str(source)], tmp_path / "data", tokenizer="bpe:300", valid_fraction=0.1, quiet=True)
    arms = {"cross_entropy": {"objective": "cross_entropy"}}
    comparison = tiny_comparison(tmp_path / "out", data=str(tmp_path / "data"), arms=arms)
    complete(comparison)
    (tmp_path / "data").rename(tmp_path / "old")
    prepare([str(source)], tmp_path / "data", tokenizer="bpe:300", valid_fraction=0.2, quiet=True)
    with pytest.raises(UserError, match="was trained on other data"):
        look(comparison)


def test_a_point_that_diverged_counts_as_the_worst_and_a_compared_run_that_did_ends_it(tiny_comparison, tmp_path: Path):
    grid = {"optim.learning_rate": [0.003, 0.03]}
    arms = {"cross_entropy": {"objective": "cross_entropy"}}
    comparison = tiny_comparison(tmp_path, arms=arms, critics={}, tuning=TuningConfig(grid, seed=101))
    first, second = look(comparison).missing
    (first.folder / "refused").mkdir(parents=True)
    do(second)
    progress = look(comparison)
    assert {each.point: each.is_chosen for each in progress.tuned} == {(0.003,): False, (0.03,): True}
    (compared,) = progress.missing
    (compared.folder / "refused").mkdir(parents=True)
    with pytest.raises(RunFailed, match="seed-1 gave up, and is one that is compared"):
        look(comparison)


def test_an_unknown_option_of_a_cache_is_named(tiny_comparison, tmp_path: Path):
    comparison = tiny_comparison(tmp_path, critics={"one": {"cache": {"kin": "top"}}})
    do(next(job for job in look(comparison).missing if job.name == "critics/one"))
    with pytest.raises(UserError, match="critic one: cache.kin; expected kind, bytes_per_token, keep_top, seed"):
        look(comparison)
