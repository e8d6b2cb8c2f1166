"""Runs that gave up, and mistakes that are found before anything is trained."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest

from avatarl import UserError
from avatarl.comparison import TuningConfig, compare
from avatarl.comparison.progress import Job, Progress, has_diverged
from avatarl.data import PreparedData
from avatarl.errors import RunFailed

from ..conftest import TINY
from .conftest import (
    BASE,
    CROSS_ENTROPY,
    TUNING,
    Compared,
    complete,
    do_in_process,
    jobs_of,
    prefers,
    pretender,
)

# --- runs that gave up -----------------------------------------------------------------------------------------------


def give_up(job: Job, data: PreparedData) -> None:
    """Leaves what a comparison asks of a run that diverged."""
    pretender(data)(job)
    (job.folder / "final").rmdir()
    (job.folder / "refused").mkdir()


def test_a_point_that_diverged_is_infinitely_bad(compared: Compared, data: PreparedData):
    comparison = compared(tuning=TUNING)
    pretend, gave_up = pretender(data, prefers(0.03, 0.05)), []

    def do(job: Job) -> None:
        if job.name.startswith("tuning/") and job.recipe.optim.learning_rate == 0.03:
            gave_up.append(job)
            give_up(job, data)
        else:
            pretend(job)

    complete(comparison, data, do)
    assert [job.name for job in gave_up] == ["tuning/cross_entropy/learning_rate=0.03,weight_decay=0.05"]
    tuned = {found.point: found for found in Progress.of(comparison, data).tuned}
    assert tuned[0.03, 0.05].cross_entropy == math.inf
    assert [point for point, found in tuned.items() if found.is_chosen] == [(0.001, 0.05)]


def test_a_point_whose_evaluation_is_no_number_is_infinitely_bad(compared: Compared, data: PreparedData):
    """Its one step was finite, and so long that the weights overflow."""
    tuning = TuningConfig(grid={"optim.learning_rate": [0.01, 3e38]}, seed=9)
    comparison = compared(arms={"cross_entropy": CROSS_ENTROPY}, tuning=tuning, seeds=[1])

    def do(job: Job) -> None:
        if job.name == "tuning/cross_entropy/learning_rate=3e+38":
            with pytest.raises(RunFailed, match="validation cross-entropy is nan"):
                do_in_process(job)
        else:
            do_in_process(job)

    complete(comparison, data, do)
    tuned = {found.point: found for found in Progress.of(comparison, data).tuned}
    assert tuned[3e38,].cross_entropy == math.inf and tuned[0.01,].is_chosen


def test_a_line_that_diverged_is_left_by_the_next(compared: Compared, data: PreparedData):
    comparison = compared(tuning=TUNING)
    pretend = pretender(data)

    def do(job: Job) -> None:
        is_bad = job.name.startswith("tuning/") and job.recipe.optim.weight_decay == 0.05
        give_up(job, data) if is_bad else pretend(job)

    complete(comparison, data, do)
    assert [found.point for found in Progress.of(comparison, data).tuned if found.is_chosen] == [(0.001, 0.5)]


def test_a_search_that_found_nothing_but_divergence_fails_the_comparison(compared: Compared, data: PreparedData):
    pretend = pretender(data)

    def do(job: Job) -> None:
        give_up(job, data) if job.name.startswith("tuning/") else pretend(job)

    with pytest.raises(RunFailed, match="arm cross_entropy: every run of its search diverged, those in .*tuning.grid"):
        complete(compared(tuning=TUNING), data, do)


def test_a_compared_run_that_diverged_is_left_out(compared: Compared, data: PreparedData):
    comparison = compared()
    gave_up, *others = Progress.of(comparison, data).missing
    give_up(gave_up, data)
    progress = Progress.of(comparison, data)
    assert [job.name for job in progress.missing] == [job.name for job in others]
    assert [f"runs/{arm}/seed-{seed}" for arm, seed in progress.gave_up] == [gave_up.name]
    complete(comparison, data, pretender(data))
    progress = Progress.of(comparison, data)
    assert len(progress.members) == len(others) and len(progress.gave_up) == 1


def test_a_run_that_diverged_under_other_settings_is_no_result_of_these(compared: Compared, data: PreparedData):
    comparison = compared()
    give_up(Progress.of(comparison, data).missing[0], data)
    other = compared(base={**BASE, "optim": {"learning_rate": 1e-4, "warmup_steps": 1}})
    with pytest.raises(UserError, match="was started under other settings: optim.learning_rate"):
        Progress.of(other, data)


def test_a_baseline_that_always_diverged_fails_the_comparison(compared: Compared, data: PreparedData):
    comparison = compared()
    own, others = [], []
    for job in Progress.of(comparison, data).missing:
        (own if "/cross_entropy/" in job.name else others).append(job)
    assert others
    for number, job in enumerate(own):
        assert not Progress.of(comparison, data).gave_up[number:]
        give_up(job, data)
    with pytest.raises(RunFailed, match="every run of the baseline cross_entropy gave up, those in .*runs; "):
        Progress.of(comparison, data)


def test_a_critic_that_diverged_fails_the_comparison(compared: Compared, data: PreparedData):
    comparison = compared(arms={"cross_entropy": {"critic": "teacher"}}, critics={"teacher": {}})
    give_up(Progress.of(comparison, data).missing[0], data)
    with pytest.raises(RunFailed, match="critics/teacher gave up"):
        Progress.of(comparison, data)


def test_what_was_refused_and_went_on_has_not_diverged(tmp_path: Path):
    assert not has_diverged(tmp_path)
    (tmp_path / "refused").mkdir()
    assert has_diverged(tmp_path)
    (tmp_path / "final").mkdir()
    assert not has_diverged(tmp_path)


# --- mistakes that are found before anything is trained --------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"arms": {"cross_entropy": {}, "b": {"stepz": 1}}}, "stepz is not a setting"),
        ({"arms": {"cross_entropy": {}, "b": {"preset": "x", "critic": "t"}}, "critics": {"t": {}}}, "preset is 'x'"),
        ({"arms": {"cross_entropy": {}, "b": {"data": "x"}}}, "arm b changes data"),
        ({"arms": {"cross_entropy": {"critic": "t"}}, "critics": {"t": {"stepz": 1}}}, "stepz is not a setting"),
        ({"tuning": TuningConfig(grid={"optim.rate": [1.0]}, seed=9)}, "optim.rate is not a setting"),
        ({"seeds": [2**63]}, "seed is 9223372036854775808; expected"),
    ],
)
def test_a_wrong_setting_is_found_at_once(compared: Compared, data: PreparedData, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        Progress.of(compared(**settings), data)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"arms": {"cross_entropy": {}, "b": {"stepz": 1, "critic": "t"}}, "critics": {"t": {}}}, "stepz"),
        ({"arms": {"cross_entropy": {}, "b": {"stepz": 1, "tuned_as": "cross_entropy"}}, "tuning": TUNING}, "stepz"),
        (
            {"arms": {"cross_entropy": {"critic": "t"}}, "critics": {"t": {"cache": {"block_size": 3}}}},
            "cache.block_size",
        ),
        ({"arms": {"cross_entropy": {"critic": "t"}}, "critics": {"t": {"cache": True}}}, "cache is True"),
        (
            {"arms": {"cross_entropy": {}, "b": {"critic": "t"}}, "critics": {"t": {"cache": {"kind": "sample"}}}},
            "arm b: a cached critic has 0 of its most likely tokens",
        ),
        (
            {
                "arms": {"cross_entropy": {"critic": "u"}},
                "critics": {
                    "t": {"cache": {}},
                    "u": {"objective": "avatarl", "critic": "t", "avatarl.tail": "dense", "avatarl.pool": "arithmetic"},
                },
            },
            "critic u: tail='dense' needs a live critic",
        ),
        (
            {
                "arms": {"cross_entropy": {"critic": ["t", "u"], "avatarl.critic_weight": [0.1, 0.1, 0.1]}},
                "critics": {"t": {"cache": {}}, "u": {}},
            },
            "arm cross_entropy: critic_weight has 3 entries for 2 critics",
        ),
        (
            {
                "arms": {"cross_entropy": {"critic": "t"}},
                "critics": {"t": {"cache": {}}},
                "tuning": TuningConfig(grid={"avatarl.top_k": [4, 33]}, seed=9),
            },
            "arm cross_entropy: a cached critic has .* top_k=33",
        ),
    ],
)
def test_a_wrong_setting_of_what_waits_is_found_at_once(
    compared: Compared, data: PreparedData, settings: dict, message: str
):
    with pytest.raises(UserError, match=message):
        Progress.of(compared(**settings), data)


def test_what_no_run_will_ask_of_a_cache_is_not_refused(compared: Compared, data: PreparedData):
    """The base's 40 proposals are replaced by the search, and by the arm that is not searched."""
    comparison = compared(
        base={**BASE, "avatarl": {"top_k": 40, "threshold": "none"}},
        arms={"cross_entropy": {"critic": "t"}, "few": {"critic": "t", "avatarl.top_k": 2}},
        critics={"t": {"cache": {}}},
        tuning=TuningConfig(grid={"avatarl.top_k": [4, 8]}, seed=9, arms=["cross_entropy"]),
    )
    assert [job.name for job in Progress.of(comparison, data).missing] == ["critics/t"]


def test_an_arm_that_is_added_to_a_finished_cache_is_looked_at_too(compared: Compared, data: PreparedData):
    given = dict(arms={"cross_entropy": {"critic": "t"}}, critics={"t": {"cache": {}}}, seeds=[1])
    complete(compared(**given), data, pretender(data))
    given["arms"]["many"] = {"critic": "t", "avatarl.top_k": 40}
    with pytest.raises(UserError, match="arm many: a cached critic has .* top_k=40"):
        Progress.of(compared(**given), data)


@pytest.mark.parametrize("waits", [False, True], ids=["waits for nothing", "waits for itself"])
def test_a_base_may_name_a_critic_of_the_comparison(compared: Compared, data: PreparedData, waits: bool):
    critic = {"tuned_as": "pupil"} if waits else {}
    try:
        arms, tuning = {"cross_entropy": CROSS_ENTROPY, "pupil": {}}, replace(TUNING, arms=["pupil"])
        comparison = compared(base={**BASE, "critic": "t"}, critics={"t": critic}, tuning=tuning, arms=arms)
        jobs = jobs_of(comparison, data, pretender(data))
    except UserError as error:
        assert waits and "waits for itself" in str(error)
    else:
        assert not waits and jobs["runs/pupil/seed-1"].recipe.critic == str(Path(comparison.out) / "critics" / "t")


def test_an_arm_s_setting_of_the_player_is_its_own(compared: Compared, data: PreparedData):
    arms = {"cross_entropy": {"player.settings.intermediate_size": 8}, "other": {}}
    small, other, *_ = Progress.of(compared(arms=arms, base=copy.deepcopy(BASE)), data).missing
    assert small.recipe.player.settings == {**TINY, "intermediate_size": 8}
    assert other.recipe.player.settings == TINY


@pytest.mark.parametrize("name", ["runs", "runs/plain", "logs", "recipes", "comparison.yaml", ".lock"])
def test_a_link_in_a_comparison_is_refused_and_leads_nowhere(compared: Compared, tmp_path: Path, name: str):
    comparison = compared(arms={"plain": CROSS_ENTROPY, "other": CROSS_ENTROPY}, baseline="plain")
    (tmp_path / "outside").mkdir()
    path = Path(comparison.out) / name
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"{name} is a link"):
        compare(comparison, quiet=True)
    assert not list((tmp_path / "outside").iterdir())
