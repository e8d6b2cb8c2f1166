"""What a comparison still lacks, read from what lies in its folder; asked again whenever something is finished.

OUT/tuning/ARM/POINT    runs of the search        OUT/critics/NAME, OUT/caches/NAME
OUT/runs/ARM/seed-N     what is compared          OUT/recipes/, OUT/logs/    of each of these
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avatarl.data.dataset import PreparedData
from avatarl.errors import RunFailed, UserError
from avatarl.models.critic_cache import RecordFormat
from avatarl.models.critic_cache.parts import MANIFEST as CACHE_MANIFEST
from avatarl.training import TrainConfig
from avatarl.training.folder.identity import check_run_folder, identities_of_run
from avatarl.training.folder.log import evaluations_of

from .config import ComparisonConfig, Settings, critics_of, make_run
from .search import Point, search


@dataclass(frozen=True)
class Job:
    """One process that brings a comparison further."""

    name: str  # its folder below the comparison's
    folder: Path  # what it makes
    arguments: tuple[str, ...]  # of avatarl
    recipe: TrainConfig | None = None  # of a training run


@dataclass(frozen=True)
class Tuned:
    """One point of an arm's search, and how good it was."""

    arm: str
    point: Point
    cross_entropy: float  # the best of the run's evaluations, nats; infinity where it diverged
    is_chosen: bool


@dataclass(frozen=True)
class Member:
    """One finished run that is compared."""

    arm: str
    seed: int
    folder: Path
    critics: tuple[Path, ...]  # the runs of those of its critics that this comparison trained


@dataclass
class Progress:
    """One look at a comparison's folder.

    Attributes:
        missing: What can be begun now, the first first.
        tuned: The points of the searches that are known.
        members: The runs that are finished.
    """

    comparison: ComparisonConfig
    data: PreparedData
    missing: list[Job] = field(default_factory=list)
    tuned: list[Tuned] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    _found: dict[tuple[str, str], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, comparison: ComparisonConfig, data: PreparedData) -> Progress:
        """Look at everything.

        Raises:
            UserError: A setting is wrong, or a run in the folder is not what this comparison would make.
            RunFailed: A run that is compared gave up.
        """
        comparison.check()
        progress = cls(comparison, data)
        for seed in comparison.seeds:  # a seed after the other, so that pairs are whole where it is stopped
            for arm in comparison.arms:
                settings = progress._settings("arm", arm)
                folder = progress._out / "runs" / arm / f"seed-{seed}"
                if settings is not None and progress._is_finished(folder, settings, seed):
                    critics = tuple(progress._out / "critics" / name for name in progress._own_critics("arm", arm))
                    progress.members.append(Member(arm, seed, folder, critics))
        progress.members.sort(key=lambda member: list(comparison.arms).index(member.arm))
        progress.missing.sort(key=lambda job: job.name.startswith("runs/"))  # what others wait for comes first
        return progress

    @property
    def _out(self) -> Path:
        return Path(self.comparison.out)

    def _settings(self, kind: str, name: str) -> Settings | None:
        """All settings of an arm or a critic; None while a search or a critic of it is not finished."""
        if (kind, name) not in self._found:
            self._found[kind, name] = self._find_settings(kind, name)
        return self._found[kind, name]

    def _find_settings(self, kind: str, name: str) -> Settings | None:
        comparison = self.comparison
        given = (comparison.arms if kind == "arm" else comparison.critics)[name] or {}
        settings = self._untuned_settings(kind, name)
        tuned_as = given.get("tuned_as", name if kind == "arm" and comparison.is_tuned(name) else None)
        if tuned_as is None or settings is None:
            return settings
        point = self._tuned_point(tuned_as)
        if point is None:
            return None
        # What an arm says itself goes before what it inherits.
        own = comparison.changes_of(kind, name) if tuned_as != name else {}
        return {
            **settings,
            **dict(zip(comparison.tuning.grid, point, strict=True)),
            **own,
            **self._of_critics(settings),
        }

    @staticmethod
    def _of_critics(settings: Settings) -> Settings:
        return {"critic": settings["critic"]} if "critic" in settings else {}

    def _untuned_settings(self, kind: str, name: str) -> Settings | None:
        """Base recipe and changes, with each critic of this comparison by its folder; None while one is not there."""
        settings = self.comparison.untuned_base(kind) | self.comparison.changes_of(kind, name)
        critics = [self._critic(critic) for critic in critics_of(settings)]  # all, so that they train side by side
        if None in critics:
            return None
        if critics:
            settings["critic"] = critics[0] if len(critics) == 1 else critics
        return settings

    def _tuned_point(self, arm: str) -> Point | None:
        """What the search found for an arm; None while it is not finished."""
        if ("point", arm) not in self._found:
            self._found["point", arm] = self._search(arm)
        return self._found["point", arm]

    def _search(self, arm: str) -> Point | None:
        settings = self._untuned_settings("arm", arm)
        if settings is None:
            return None
        grid, seed = self.comparison.tuning.grid, self.comparison.tuning.seed
        known: dict[Point, float] = {}

        def score(point: Point) -> float | None:
            if point in known:
                return known[point]
            folder = self._out / "tuning" / arm / point_name(grid, point)
            tried = {**settings, **dict(zip(grid, point, strict=True))}
            if has_diverged(folder):
                known[point] = math.inf
            elif self._is_finished(folder, tried, seed):
                known[point] = min(row["cross_entropy"] for row in evaluations_of(folder))
            return known.get(point)

        best = search(grid, score)
        self.tuned += [Tuned(arm, point, known[point], point == best) for point in known]
        return best

    def _critic(self, name: str) -> str | None:
        """Where a critic lies; None while this comparison has to make it first."""
        if name not in self.comparison.critics:
            return name
        settings, folder = self._settings("critic", name), self._out / "critics" / name
        if settings is None or not self._is_finished(folder, settings, self.comparison.seed_of_critic(name)):
            return None
        options, cache = self.comparison.cache_options(name), self._out / "caches" / name
        if options is None:
            return str(folder)
        if (cache / CACHE_MANIFEST).is_file():
            self._check_cache(cache, options)
            return str(cache)
        run = make_run(settings, folder, seed=0)
        words = {"critic": folder, "data": run.data, "out": cache, "block": run.block, **options}
        words |= {"precision": run.precision, "device": run.device}
        if run.train_windows is not None:
            words["train_windows"] = run.train_windows
        arguments = ("critic", "cache", *(word for key, value in words.items() for word in (f"--{key}", str(value))))
        self._add(Job(f"caches/{name}", cache, arguments))
        return None

    def _check_cache(self, cache: Path, options: Settings) -> None:
        """Refuse a cache that was made with other options; whose and of what it is, the runs that use it look at."""
        found = json.loads((cache / CACHE_MANIFEST).read_text(encoding="utf-8"))
        record = RecordFormat.within(
            options["kind"], options["bytes_per_token"], options["keep_top"], self.data.vocab_size
        )
        wanted = {"kind": options["kind"], "bytes_per_token": record.dtype.itemsize, "num_top": record.num_top}
        wanted["seed"] = options["seed"] if record.num_draws else None
        for name, value in wanted.items():
            if found.get(name, value) != value:
                raise UserError(f"{cache} has {name} {found[name]!r}, and {value!r} is asked for; give another out")

    def _own_critics(self, kind: str, name: str) -> list[str]:
        """The critics that this comparison trains for an arm or critic, those of its critics included."""
        named = critics_of(self.comparison.untuned_base(kind) | self.comparison.changes_of(kind, name))
        own = [critic for critic in named if critic in self.comparison.critics]
        return list(
            dict.fromkeys([*own, *(deeper for critic in own for deeper in self._own_critics("critic", critic))])
        )

    def _is_finished(self, folder: Path, settings: Settings, seed: int) -> bool:
        """Whether a run is there, whole, and what it should be; where it is not, it is added to what is missing."""
        config = make_run(settings, folder, seed)
        if has_diverged(folder):
            raise RunFailed(f"{folder} gave up, and is one that is compared; {folder / 'refused'} says where")
        check_run_folder(folder, config, resume=True)
        if not (folder / "final").is_dir():
            recipe = self._out / "recipes" / f"{self._name(folder).replace('/', '-')}.yaml"
            self._add(Job(self._name(folder), folder, ("train", "--config", str(recipe), "--resume"), config))
            return False
        known = [identity.get("data") for identity in identities_of_run(folder)]
        if self.data.digest not in known:
            raise UserError(f"{folder} was trained on other data than {self.data.path}; give another out")
        return True

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self._out).as_posix()

    def _add(self, job: Job) -> None:
        if job not in self.missing:
            self.missing.append(job)


def has_diverged(folder: Path) -> bool:
    """Whether a run gave up because its updates were no numbers."""
    return (folder / "refused").is_dir() and not (folder / "final").is_dir()


def point_name(grid: dict[str, list], point: Point) -> str:
    """A folder's name for a point of a grid."""
    last = [name.rpartition(".")[2] for name in grid]
    names = last if len(set(last)) == len(last) else list(grid)
    return ",".join(f"{name}={json.dumps(value)}" for name, value in zip(names, point, strict=True)).replace("/", "_")
