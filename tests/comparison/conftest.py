"""Comparisons of runs so small that a whole one takes some seconds in process, and runs that are only pretended."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from avatarl.cli import main
from avatarl.comparison import ComparisonConfig, TuningConfig, progress
from avatarl.comparison.config import Settings, make_run
from avatarl.comparison.progress import Job, Progress
from avatarl.data import PreparedData
from avatarl.models.critic_cache.parts import MANIFEST as CACHE_MANIFEST
from avatarl.run_dir.identity import settings_digest, write_start
from avatarl.training import TrainConfig, train

from ..conftest import BLOCK, TINY

BASE: dict[str, Any] = {
    "avatarl": {"top_k": 4, "threshold": "none"},
    "player": {"settings": TINY},
    "optim": {"learning_rate": 1e-2, "warmup_steps": 1},
    "block_size": BLOCK,
    "micro_batch_size": 4,
    "steps": 4,
    "precision": "fp32",
    "device": "cpu",
    "eval_every_steps": 2,
    "eval_windows": 4,
    "log_every_steps": 2,
    "checkpoint_every_steps": 4,
    "tensorboard": False,
}
CROSS_ENTROPY = {"objective": "cross_entropy"}
RATES, DECAYS = [0.001, 0.03], [0.05, 0.5]
TUNING = TuningConfig(grid={"optim.learning_rate": RATES, "optim.weight_decay": DECAYS}, seed=9, arms=["cross_entropy"])
Compared = Callable[..., ComparisonConfig]


@pytest.fixture(scope="session")
def data(data_folder: Path) -> PreparedData:
    return PreparedData.open(data_folder)


@pytest.fixture(scope="session", autouse=True)
def remembered_runs() -> Iterator[None]:
    """Reading one recipe takes a twentieth of a second, and a look asks for tens: the same one is read once."""
    known: dict[str, TrainConfig] = {}

    def remembered(settings: Settings, out: Path, seed: int) -> TrainConfig:
        asked = repr((settings, out, seed))
        if asked not in known:
            known[asked] = make_run(settings, out, seed)
        return known[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "make_run", remembered)
        yield


@pytest.fixture
def compared(tmp_path: Path, data_folder: Path) -> Callable[..., ComparisonConfig]:
    """``compared(**settings)``: two arms and two seeds in ``tmp_path / "out"``, but for what is given."""

    def make(**settings) -> ComparisonConfig:
        given = dict(
            out=str(tmp_path / "out"),
            data=str(data_folder),
            base=BASE,
            seeds=[1, 2],
            arms={"cross_entropy": CROSS_ENTROPY, "smooth": {"objective": "label_smoothing"}},
        )
        return ComparisonConfig(**{**given, **settings})

    return make


def complete(comparison: ComparisonConfig, data: PreparedData, do: Callable[[Job], None]) -> list[list[str]]:
    """Do all that is missing, look by look; the names of what each look found."""
    looks: list[list[str]] = []
    while missing := Progress.of(comparison, data).missing:
        looks.append(names_of(missing))
        assert len(looks) < 20, "it does not end"
        for job in missing:
            do(job)
    return looks


def do_in_process(job: Job) -> None:
    """What the job's process would do."""
    if job.recipe is None:
        assert main(list(job.arguments)) == 0
    else:
        train(job.recipe, quiet=True)


def pretender(data: PreparedData, score: Callable[[Job], float] = lambda job: 1.0) -> Callable[[Job], None]:
    """Leaves what a comparison asks of a finished job, in no time; ``score`` says a run's cross-entropy."""

    def pretend(job: Job) -> None:
        job.folder.mkdir(parents=True)
        if job.recipe is None:
            (job.folder / CACHE_MANIFEST).write_text("{}")
            return
        identity = {"settings": settings_digest(job.recipe.as_dict()), "data": data.digest}
        write_start(job.folder, job.recipe.as_dict(), {"identity": identity})
        best = {"event": "eval", "step": 2, "tokens": 128, "cross_entropy": score(job)}
        last = {"event": "eval", "step": 4, "tokens": 256, "cross_entropy": 9.0}
        (job.folder / "metrics.jsonl").write_text(f"{json.dumps(best)}\n{json.dumps(last)}\n")
        (job.folder / "final").mkdir()

    return pretend


def names_of(jobs: Sequence[Job]) -> list[str]:
    return [job.name for job in jobs]


def prefers(rate: float, decay: float) -> Callable[[Job], float]:
    """Scores of runs that are best at these values."""

    def score(job: Job) -> float:
        optim = job.recipe.optim
        return 1 + abs(math.log(optim.learning_rate / rate)) + abs(math.log(optim.weight_decay / decay))

    return score


def jobs_of(comparison: ComparisonConfig, data: PreparedData, do: Callable[[Job], None]) -> dict[str, Job]:
    """Every job that is done until nothing is missing, by its name."""
    jobs = {}

    def keep(job: Job) -> None:
        assert job.name not in jobs, "done twice"
        jobs[job.name] = job
        do(job)

    complete(comparison, data, keep)
    return jobs
