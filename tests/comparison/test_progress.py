"""What a comparison finds missing, in which order and with which settings, and what it will not go on with."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from avatarl import AvataRLConfig, UserError
from avatarl.comparison import TuningConfig
from avatarl.comparison import progress as progress_module
from avatarl.comparison.progress import Progress, point_name
from avatarl.data import PreparedData

from ..conftest import BLOCK, TINY
from .conftest import (
    BASE,
    CROSS_ENTROPY,
    TUNING,
    Compared,
    complete,
    do_in_process,
    jobs_of,
    names_of,
    prefers,
    pretender,
)

# --- order -----------------------------------------------------------------------------------------------------------


def test_the_runs_come_seed_by_seed(compared: Compared, data: PreparedData, tmp_path: Path):
    progress = Progress.of(compared(), data)
    assert names_of(progress.missing) == [
        "runs/cross_entropy/seed-1",
        "runs/smooth/seed-1",
        "runs/cross_entropy/seed-2",
        "runs/smooth/seed-2",
    ]
    assert progress.members == [] and progress.tuned == []
    assert not (tmp_path / "out").exists(), "a look makes nothing"
    job = progress.missing[1]
    recipe = tmp_path / "out" / "recipes" / "runs-smooth-seed-1.yaml"
    assert job.arguments == ("train", "--config", str(recipe), "--resume")
    assert job.folder == tmp_path / "out" / "runs" / "smooth" / "seed-1" == Path(job.recipe.out)
    assert (job.recipe.seed, job.recipe.objective, job.recipe.steps) == (1, "label_smoothing", 4)


def test_searches_and_critics_come_before_runs(compared: Compared, data: PreparedData):
    comparison = compared(
        arms={
            "free": {"objective": "label_smoothing"},
            "cross_entropy": CROSS_ENTROPY,
            "pupil": {"critic": ["teacher", "aide"]},
        },
        critics={"teacher": {"tuned_as": "cross_entropy", "cache": {}}, "aide": {}},
        tuning=TUNING,
        seeds=[2, 1],
    )
    free = ["runs/free/seed-2", "runs/free/seed-1"]
    first = Progress.of(comparison, data).missing
    assert names_of(first) == [
        "tuning/cross_entropy/learning_rate=0.001,weight_decay=0.05",
        "tuning/cross_entropy/learning_rate=0.03,weight_decay=0.05",
        "critics/aide",  # which waits for nothing, and so is trained beside the search
        *free,
    ]
    assert [job.recipe.seed for job in first[:2]] == [9, 9]
    looks = complete(comparison, data, pretender(data, prefers(0.03, 0.5)))
    assert looks == [
        names_of(first),
        ["tuning/cross_entropy/learning_rate=0.03,weight_decay=0.5"],
        ["tuning/cross_entropy/learning_rate=0.001,weight_decay=0.5"],
        ["critics/teacher", "runs/cross_entropy/seed-2", "runs/cross_entropy/seed-1"],
        ["caches/teacher"],
        ["runs/pupil/seed-2", "runs/pupil/seed-1"],
    ]
    finished = Progress.of(comparison, data)
    assert [(member.arm, member.seed) for member in finished.members] == [
        (arm, seed) for arm in ("free", "cross_entropy", "pupil") for seed in (2, 1)
    ]
    assert len(finished.tuned) == 4


def test_what_several_wait_for_is_made_once(compared: Compared, data: PreparedData):
    critic = {"critic": "teacher"}
    comparison = compared(arms={"cross_entropy": critic, "a": critic, "b": {"critic": ["teacher", "teacher"]}})
    comparison = replace(comparison, critics={"teacher": {}, "unasked": {}})
    assert names_of(Progress.of(comparison, data).missing) == ["critics/teacher"]


# --- settings --------------------------------------------------------------------------------------------------------


def test_what_the_search_found_is_inherited_and_own_settings_go_before_it(compared: Compared, data: PreparedData):
    comparison = compared(
        arms={
            "cross_entropy": CROSS_ENTROPY,
            "same": {"objective": "label_smoothing", "tuned_as": "cross_entropy"},
            "own": {"objective": "label_smoothing", "tuned_as": "cross_entropy", "optim": {"learning_rate": 0.02}},
            "pupil": {"critic": "teacher", "tuned_as": "cross_entropy", "preset": "released"},
            "plain": {"objective": "label_smoothing"},
        },
        critics={"teacher": {"tuned_as": "cross_entropy", "optim.weight_decay": 0.7, "cache": {}}},
        tuning=TUNING,
        seeds=[1],
    )
    jobs = jobs_of(comparison, data, pretender(data, prefers(0.03, 0.5)))
    rates = {name: (job.recipe.optim.learning_rate, job.recipe.optim.weight_decay) for name, job in jobs.items()
             if name.startswith(("runs", "critics"))}  # fmt: skip
    assert rates == {
        "runs/cross_entropy/seed-1": (0.03, 0.5),
        "runs/same/seed-1": (0.03, 0.5),
        "runs/own/seed-1": (0.02, 0.5),
        "runs/pupil/seed-1": (0.03, 0.5),
        "runs/plain/seed-1": (0.01, 0.1),  # the base's
        "critics/teacher": (0.03, 0.7),
    }
    pupil = jobs["runs/pupil/seed-1"].recipe
    assert (pupil.critic, pupil.avatarl) == (str(Path(comparison.out) / "caches" / "teacher"), AvataRLConfig.released())
    assert all(job.recipe.player.settings == TINY for job in jobs.values() if job.recipe)


def test_each_arm_is_tuned_by_its_own_search(compared: Compared, data: PreparedData):
    comparison = compared(tuning=replace(TUNING, arms=None))
    best = {"cross_entropy": prefers(0.001, 0.05), "label_smoothing": prefers(0.03, 0.5)}
    jobs = jobs_of(comparison, data, pretender(data, lambda job: best[job.recipe.objective](job)))
    assert jobs["runs/cross_entropy/seed-2"].recipe.optim.learning_rate == 0.001
    assert jobs["runs/smooth/seed-2"].recipe.optim.learning_rate == 0.03
    found = Progress.of(comparison, data).tuned
    assert {tuned.arm: tuned.point for tuned in found if tuned.is_chosen} == {
        "cross_entropy": (0.001, 0.05),
        "smooth": (0.03, 0.5),
    }
    for tuned in found:
        score = prefers(0.001, 0.05) if tuned.arm == "cross_entropy" else prefers(0.03, 0.5)
        optim = SimpleNamespace(learning_rate=tuned.point[0], weight_decay=tuned.point[1])
        expected = score(SimpleNamespace(recipe=SimpleNamespace(optim=optim)))
        assert tuned.cross_entropy == pytest.approx(expected), "the best evaluation, not the last"


def test_critics_are_plain_and_have_seeds_that_no_arm_has(compared: Compared, data: PreparedData):
    comparison = compared(
        arms={"cross_entropy": CROSS_ENTROPY, "pupil": {"critic": ["one", "two", "three"]}},
        critics={"one": {}, "two": {}, "three": {"seed": 77}},
        seeds=[3, 1, 2001],
    )
    missing = {job.name: job.recipe for job in Progress.of(comparison, data).missing}
    seeds = [missing[f"critics/{name}"].seed for name in comparison.critics]
    assert len({*seeds, *comparison.seeds}) == 6 and seeds[2] == 77
    assert all(missing[f"critics/{name}"].objective == "cross_entropy" for name in comparison.critics)


def test_a_critic_may_have_critics(compared: Compared, data: PreparedData):
    comparison = compared(
        arms={"cross_entropy": CROSS_ENTROPY, "pupil": {"critic": "second"}},
        critics={"second": {"objective": "avatarl", "critic": "first"}, "first": {}},
        seeds=[1],
    )
    jobs = jobs_of(comparison, data, pretender(data))
    out = Path(comparison.out)
    assert list(jobs) == ["critics/first", "runs/cross_entropy/seed-1", "critics/second", "runs/pupil/seed-1"]
    assert (jobs["critics/second"].recipe.objective, jobs["critics/second"].recipe.critic) == (
        "avatarl",
        str(out / "critics" / "first"),
    )
    plain, pupil = Progress.of(comparison, data).members
    assert plain.critics == () and pupil.critics == (out / "critics" / "second", out / "critics" / "first")


def test_only_what_asks_a_critic_waits_and_pays_for_it(compared: Compared, data: PreparedData):
    comparison = compared(
        base={**BASE, "critic": "teacher"},
        arms={"cross_entropy": CROSS_ENTROPY, "pupil": {}},
        critics={"teacher": {}},
        seeds=[1],
    )
    looks = complete(comparison, data, pretender(data))
    assert looks == [["critics/teacher", "runs/cross_entropy/seed-1"], ["runs/pupil/seed-1"]]
    plain, pupil = Progress.of(comparison, data).members
    assert plain.critics == () and pupil.critics == (Path(comparison.out) / "critics" / "teacher",)


def test_other_critics_stay_as_they_are_named(compared: Compared, data: PreparedData):
    arms = {"cross_entropy": {"critic": "models/mine"}, "pupil": {"critic": ["ema:0.9:2", "models/mine"]}}
    first, second, *_ = Progress.of(compared(arms=arms), data).missing
    assert first.recipe.critic == "models/mine" and second.recipe.critic == ["ema:0.9:2", "models/mine"]


def test_a_cache_is_of_the_windows_that_the_runs_read(compared: Compared, data: PreparedData):
    arms = {"cross_entropy": CROSS_ENTROPY, "pupil": {"critic": "teacher"}}
    options = {"kind": "sample", "bytes_per_token": 60, "keep_top": 4, "seed": 3}
    for train_windows in (None, 24):
        comparison = compared(
            out=f"{compared().out}-{train_windows}",
            base={**BASE, "train_windows": train_windows},
            arms=arms,
            critics={"teacher": {"cache": options}},
        )
        words = jobs_of(comparison, data, pretender(data))["caches/teacher"].arguments
        assert words[:2] == ("critic", "cache")
        given = {name[2:]: value for name, value in zip(words[2::2], words[3::2], strict=True)}
        out = Path(comparison.out)
        expected = {
            "critic": str(out / "critics" / "teacher"),
            "data": str(data.path),
            "out": str(out / "caches" / "teacher"),
            "block_size": str(BLOCK),
            **{name: str(value) for name, value in options.items()},
        }
        expected |= {} if train_windows is None else {"train_windows": "24"}
        assert expected.items() <= given.items() and ("train_windows" in given) == (train_windows is not None)


def test_a_cache_of_a_critic_that_read_more_is_of_its_pupils_windows(compared: Compared, data: PreparedData):
    comparison = compared(
        base={**BASE, "train_windows": 24},
        arms={"cross_entropy": CROSS_ENTROPY, "pupil": {"critic": "teacher", "train_windows": 12}},
        critics={"teacher": {"cache": {}, "train_windows": None}},
    )
    words = jobs_of(comparison, data, pretender(data))["caches/teacher"].arguments
    assert words[words.index("--train_windows") + 1] == "12"


def test_an_unknown_option_of_a_cache_is_named(compared: Compared, data: PreparedData):
    comparison = compared(arms={"cross_entropy": {"critic": "t"}}, critics={"t": {"cache": {"block_size": 3}}})
    with pytest.raises(UserError, match="critic t: cache.block_size; expected kind, bytes_per_token, keep_top, seed"):
        complete(comparison, data, pretender(data))


def test_a_point_s_folder_names_its_values():
    assert point_name({"optim.learning_rate": [], "steps": []}, (0.001, 5)) == "learning_rate=0.001,steps=5"
    assert point_name({"a.shape": [], "b.shape": []}, ("x/y", None)) == 'a.shape="x_y",b.shape=null'


# --- what is there already -------------------------------------------------------------------------------------------


def test_another_seed_or_arm_adds_its_runs_alone(compared: Compared, data: PreparedData):
    arms = {"cross_entropy": CROSS_ENTROPY, "smooth": {"objective": "label_smoothing"}}
    comparison = compared(tuning=TUNING, arms=arms)
    complete(comparison, data, pretender(data))
    assert Progress.of(comparison, data).missing == []
    more = replace(comparison, seeds=[3, 1, 2])
    assert names_of(Progress.of(more, data).missing) == ["runs/cross_entropy/seed-3", "runs/smooth/seed-3"]
    arms = {"new": {"objective": "reinforce"}, **arms}
    more = replace(comparison, arms=arms)
    assert names_of(Progress.of(more, data).missing) == ["runs/new/seed-1", "runs/new/seed-2"]
    fewer = replace(comparison, seeds=[2])
    assert [(member.arm, member.seed) for member in Progress.of(fewer, data).members] == [
        ("cross_entropy", 2),
        ("smooth", 2),
    ]


@pytest.mark.parametrize("what", ["a seed", "a critic"])
def test_another_seed_or_critic_leaves_the_critics_alone(compared: Compared, data: PreparedData, what: str):
    arms = {"cross_entropy": CROSS_ENTROPY, "pupil": {"critic": "teacher"}}
    comparison = compared(arms=arms, critics={"teacher": {}})
    complete(comparison, data, pretender(data))
    if what == "a seed":
        missing = Progress.of(replace(comparison, seeds=[1, 2, 3]), data).missing
        assert names_of(missing) == ["runs/cross_entropy/seed-3", "runs/pupil/seed-3"]
    else:
        more = replace(comparison, critics={"teacher": {}, "another": {}}, arms={**arms, "b": {"critic": "another"}})
        assert names_of(Progress.of(more, data).missing) == ["critics/another"]


def test_a_changed_setting_is_refused(compared: Compared, data: PreparedData):
    comparison = compared()
    complete(comparison, data, pretender(data))
    changed = copy.deepcopy(BASE)
    changed["optim"]["learning_rate"] = 0.02
    message = "seed-1 was started under other settings: optim.learning_rate was 0.01 and is 0.02; give another out$"
    with pytest.raises(UserError, match=message):
        Progress.of(replace(comparison, base=changed), data)
    arms = {**comparison.arms, "smooth": {"objective": "label_smoothing", "baseline.label_smoothing": 0.3}}
    with pytest.raises(UserError, match="smooth/seed-1 was started under other settings: baseline.label_smoothing"):
        Progress.of(replace(comparison, arms=arms), data)


def test_a_changed_setting_of_a_search_or_a_critic_is_refused(compared: Compared, data: PreparedData):
    arms = {"cross_entropy": CROSS_ENTROPY, "pupil": {"critic": "teacher"}}
    comparison = compared(tuning=TUNING, arms=arms, critics={"teacher": {}})
    complete(comparison, data, pretender(data))
    with pytest.raises(UserError, match="weight_decay.* was started under other settings: seed was 9 and is 10"):
        Progress.of(replace(comparison, tuning=replace(TUNING, seed=10)), data)
    with pytest.raises(UserError, match="critics/teacher was started under other settings: steps was 4 and is 5"):
        Progress.of(replace(comparison, critics={"teacher": {"steps": 5}}), data)


def test_a_changed_option_of_a_cache_is_refused(compared: Compared, data: PreparedData):
    arms = {"cross_entropy": CROSS_ENTROPY, "pupil": {"critic": "teacher"}}
    comparison = compared(arms=arms, critics={"teacher": {"cache": {"bytes_per_token": 60}}}, seeds=[1])
    complete(comparison, data, do_in_process)
    with pytest.raises(UserError, match="caches/teacher.*bytes_per_token"):
        Progress.of(replace(comparison, critics={"teacher": {"cache": {"bytes_per_token": 30}}}), data)


@pytest.mark.parametrize("cache", [{}, {"cache": {"bytes_per_token": 60}}], ids=["asked", "cached"])
def test_runs_under_another_critic_are_refused(compared: Compared, data: PreparedData, cache: dict):
    arms = {"cross_entropy": CROSS_ENTROPY, "pupil": {"critic": "teacher"}}
    comparison = compared(arms=arms, critics={"teacher": cache}, seeds=[1])
    complete(comparison, data, do_in_process)
    critic, stored = (Path(comparison.out) / place / "teacher" for place in ("critics", "caches"))
    shutil.rmtree(critic)
    assert complete(comparison, data, do_in_process) == [["critics/teacher"]], "the same again"
    shutil.rmtree(critic)
    other = replace(comparison, critics={"teacher": {"steps": 5, **cache}})
    with pytest.raises(UserError, match=f"another critic than {critic}") as refused:
        complete(other, data, do_in_process)
    if cache:
        assert str(refused.value).startswith(f"{stored} is of another critic")
        shutil.rmtree(stored)
        with pytest.raises(UserError, match=f"another critic than {stored}") as refused:
            complete(other, data, do_in_process)
    assert str(refused.value).startswith(f"{comparison.out}/runs/pupil/seed-1 was trained under another critic")
    assert str(refused.value).endswith("; give another out")


def test_runs_on_other_data_are_refused(compared: Compared, data: PreparedData):
    comparison = compared()
    complete(comparison, data, pretender(data))
    other = SimpleNamespace(path=data.path, digest="another")
    with pytest.raises(UserError, match="seed-1 was trained on other data than .*; give another out"):
        Progress.of(comparison, other)
    with pytest.raises(UserError, match="seed-1 was started under other settings: data was"):
        Progress.of(replace(comparison, data="elsewhere"), other)
    for folder in (Path(comparison.out) / "runs").glob("*/*/final"):
        folder.rmdir()
    with pytest.raises(UserError, match="seed-1 was trained on other data than .*; give another out"):
        Progress.of(comparison, other)


def test_what_is_no_run_is_refused(compared: Compared, data: PreparedData):
    comparison = compared()
    folder = Path(comparison.out) / "runs" / "smooth" / "seed-2"
    folder.mkdir(parents=True)
    assert len(Progress.of(comparison, data).missing) == 4
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="smooth/seed-2, which holds files but no config.yaml"):
        Progress.of(comparison, data)


def test_a_run_that_was_stopped_is_still_missing(compared: Compared, data: PreparedData):
    comparison = compared()
    complete(comparison, data, pretender(data))
    (Path(comparison.out) / "runs" / "smooth" / "seed-2" / "final").rmdir()
    progress = Progress.of(comparison, data)
    assert names_of(progress.missing) == ["runs/smooth/seed-2"]
    assert [(member.arm, member.seed) for member in progress.members][-1] == ("smooth", 1)


def test_a_critic_that_the_search_leaves_out_is_not_paid_for(compared: Compared, data: PreparedData, tmp_path: Path):
    """α = 1 is a point of the grid, and the best; a run there stores no critic."""
    grid = {"baseline.distillation_alpha": [0.5, 1.0]}
    arms = {"cross_entropy": CROSS_ENTROPY, "pupil": {"objective": "distillation", "critic": "teacher"}}
    tuning = TuningConfig(grid=grid, seed=9, arms=["pupil"])
    comparison = compared(arms=arms, critics={"teacher": CROSS_ENTROPY}, tuning=tuning, seeds=[1])
    for best, critics in ((1.0, ()), (0.5, (tmp_path / "out" / "critics" / "teacher",))):
        pretend = pretender(data, lambda job, best=best: abs(job.recipe.baseline.distillation_alpha - best))

        def do(job, pretend=pretend):
            asks = job.recipe.objective == "distillation" and job.recipe.baseline.distillation_alpha < 1
            pretend(job if asks else replace(job, recipe=replace(job.recipe, critic=None)))

        complete(comparison, data, do)
        (pupil,) = (member for member in Progress.of(comparison, data).members if member.arm == "pupil")
        assert pupil.critics == critics
        shutil.rmtree(tmp_path / "out")


def test_a_look_after_another_reads_only_what_has_changed(compared: Compared, data: PreparedData, monkeypatch):
    """However many runs there are: each is read as it is found, and again when it has ended."""
    comparison = compared(
        seeds=list(range(1, 6)),
        arms={"cross_entropy": CROSS_ENTROPY, "pupil": {"critic": "teacher"}},
        critics={"teacher": {"cache": {}}},
        tuning=TUNING,
    )
    read: Counter[str] = Counter()

    def counted(name: str, real: Callable, folder: Path, *rest, **options):
        read[f"{name} {folder}"] += 1
        return real(folder, *rest, **options)

    for name in ("check_run_folder", "evaluations_of"):
        monkeypatch.setattr(progress_module, name, partial(counted, name, getattr(progress_module, name)))
    monkeypatch.setattr(Progress, "_check_cache", lambda *_: read.update(["cache"]))
    pretend, progress = pretender(data), None
    while (progress := Progress.of(comparison, data, progress)).missing:
        pretend(progress.missing[0])  # a look after each job
    anew = Progress.of(comparison, data)
    assert (progress.members, progress.tuned) == (anew.members, anew.tuned) and len(anew.members) == 10
    assert max(count for name, count in read.items() if name.startswith("check")) == 3, "found, ended, and anew"
    assert max(count for name, count in read.items() if name.startswith("eval")) == 2
    assert read["cache"] == 2
