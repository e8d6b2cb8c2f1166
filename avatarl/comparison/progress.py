"""What a comparison still lacks, read from what lies in its folder; asked again whenever something is finished.

OUT/tuning/ARM/POINT    runs of the search        OUT/critics/NAME, OUT/caches/NAME
OUT/runs/ARM/seed-N     what is compared          OUT/recipes/, OUT/logs/    of each of these
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from avatarl.data.dataset import PreparedData
from avatarl.errors import RunFailed, UserError
from avatarl.models.critic_cache import RecordFormat
from avatarl.models.critic_cache.parts import LARGEST_MANIFEST_BYTES
from avatarl.models.critic_cache.parts import MANIFEST as CACHE_MANIFEST
from avatarl.models.critics import critic_class
from avatarl.models.digest import weight_files
from avatarl.objective import make_objective
from avatarl.run_dir.identity import identities_of_run
from avatarl.run_dir.log import evaluations_of
from avatarl.training import TrainConfig
from avatarl.training.config import idle_settings
from avatarl.training.resume import check_run_folder
from avatarl.untrusted import read_json, refusing

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
        gave_up: Arm and seed of the runs that are compared and diverged.
    """

    comparison: ComparisonConfig
    data: PreparedData
    missing: list[Job] = field(default_factory=list)
    tuned: list[Tuned] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    gave_up: list[tuple[str, int]] = field(default_factory=list)
    _found: dict[Hashable, Any] = field(default_factory=dict)
    _read: dict[Hashable, Any] = field(default_factory=dict)  # of the files, which later looks need not read

    @classmethod
    def of(cls, comparison: ComparisonConfig, data: PreparedData, before: Progress | None = None) -> Progress:
        """Look at everything, or, where nobody else has written since the look ``before``, at what has changed.

        Raises:
            UserError: A setting is wrong, or a run in the folder is not what this comparison would make.
            RunFailed: A critic gave up, or every run of a search, or every run of the baseline.
        """
        comparison.check()
        progress = cls(comparison, data, _read={} if before is None else before._read)
        progress._check_objectives()
        for seed in comparison.seeds:  # a seed after the other, so that pairs are whole where it is stopped
            for arm in comparison.arms:
                settings = progress._settings("arm", arm)
                folder = progress._out / "runs" / arm / f"seed-{seed}"
                if settings is None:
                    continue
                if progress._is_finished(folder, settings, seed):
                    critics = tuple(progress._out / "critics" / name for name in progress._own_critics("arm", arm))
                    progress.members.append(Member(arm, seed, folder, critics))
                elif has_diverged(folder):
                    progress.gave_up.append((arm, seed))
        if len([arm for arm, _ in progress.gave_up if arm == comparison.baseline]) == len(comparison.seeds):
            raise RunFailed(
                f"every run of the baseline {comparison.baseline} gave up, those in {progress._out / 'runs'}; "
                "expected one at least to compare with: remove them and try a smaller learning rate, or another out"
            )
        progress.members.sort(key=lambda member: list(comparison.arms).index(member.arm))
        progress.missing.sort(key=lambda job: job.name.startswith("runs/"))  # what others wait for comes first
        return progress

    def _check_objectives(self) -> None:
        """Refuse what an arm or a critic could not ask of its critics' caches, before it is its turn."""
        comparison = self.comparison
        for (kind, name), runs in comparison.runs.items():
            critics = critics_of(comparison.untuned[kind, name])
            options = [comparison.cache_options(critic) for critic in critics if critic in comparison.critics]
            records = [self._record_format(of_cache) for of_cache in options if of_cache is not None]
            live = [None] * (len(critics) - len(records))
            limits = [(record.num_top, record.num_draws) for record in records] + live
            for run in runs if records else ():
                try:
                    objective = make_objective(run.objective, run.avatarl, run.baseline)
                    objective.check_settings(self.data.vocab_size, limits)
                except ValueError as error:
                    raise UserError(f"{kind} {name}: {error}") from error

    def _record_format(self, options: Settings) -> RecordFormat:
        """What a cache of these options stores of a position."""
        return RecordFormat.within(
            options["kind"], options["bytes_per_token"], options["keep_top"], self.data.vocab_size
        )

    @property
    def _out(self) -> Path:
        return Path(self.comparison.out)

    def _settings(self, kind: str, name: str) -> Settings | None:
        """All settings of an arm or a critic; None while a search or a critic of it is not finished."""
        return _once(self._found, (kind, name), self._find_settings, kind, name)

    def _find_settings(self, kind: str, name: str) -> Settings | None:
        comparison = self.comparison
        settings = self._untuned_settings(kind, name)
        own = name if kind == "arm" and comparison.is_tuned(name) else None
        tuned_as = comparison.given(kind, name).get("tuned_as", own)
        if tuned_as is None or settings is None:
            return settings
        point = _once(self._found, ("point", tuned_as), self._search, tuned_as)
        if point is None:
            return None
        found = dict(zip(comparison.tuning.grid, point, strict=True))
        return settings | {setting: found[setting] for setting in comparison.grid_of(kind, name)}

    def _untuned_settings(self, kind: str, name: str) -> Settings | None:
        """Base recipe and changes, with each critic of this comparison by its folder; None while one is not there."""
        settings = self.comparison.untuned[kind, name]
        critics = [self._critic(critic) for critic in critics_of(settings)]  # all, so that they train side by side
        if None in critics:
            return None
        return settings | {"critic": critics[0] if len(critics) == 1 else critics} if critics else settings

    def _search(self, arm: str) -> Point | None:
        """What the search found for an arm; None while it is not finished."""
        settings = self._untuned_settings("arm", arm)
        if settings is None:
            return None
        grid, seed = self.comparison.tuning.grid, self.comparison.tuning.seed
        known: dict[Point, float] = {}

        def score(point: Point) -> float | None:
            folder = self._out / "tuning" / arm / point_name(grid, point)
            tried = settings | dict(zip(grid, point, strict=True))
            if self._is_finished(folder, tried, seed):
                known[point] = _once(self._read, ("best", folder), _best_evaluation, folder)
            elif has_diverged(folder):
                known[point] = math.inf
            return known.get(point)

        best = search(grid, score)
        if best is not None and known[best] == math.inf:
            raise RunFailed(
                f"arm {arm}: every run of its search diverged, those in {self._out / 'tuning' / arm}; "
                "try a smaller optim.learning_rate in tuning.grid"
            )
        self.tuned += [Tuned(arm, point, known[point], point == best) for point in known]
        return best

    def _critic(self, name: str) -> str | None:
        """Where a critic lies; None while this comparison has to make it first."""
        if name not in self.comparison.critics:
            return name
        settings, folder = self._settings("critic", name), self._out / "critics" / name
        if settings is None or not self._is_finished(folder, settings, self.comparison.seed_of_critic(name)):
            if has_diverged(folder):
                raise RunFailed(f"{folder} gave up, and others wait for it; {folder / 'refused'} says where")
            return None
        options, cache = self.comparison.cache_options(name), self._out / "caches" / name
        if options is None:
            return str(folder)
        if (cache / CACHE_MANIFEST).is_file():
            _once(self._read, ("cache", cache), self._check_cache, cache, options, folder)
            return str(cache)
        run, windows = make_run(settings, folder, seed=0), self.comparison.cached_windows(name)
        words = {"critic": folder, "data": run.data, "out": cache, "block_size": run.block_size, **options}
        words |= {"precision": run.precision, "device": run.device}
        words |= {} if windows is None else {"train_windows": windows}
        arguments = ("critic", "cache", *(word for key, value in words.items() for word in (f"--{key}", str(value))))
        self._add(Job(f"caches/{name}", cache, arguments))
        return None

    def _check_cache(self, cache: Path, options: Settings, critic: Path) -> None:
        """Refuse a cache that was made with other options or of another critic; of which data, its runs look at."""
        with refusing(f"{cache / CACHE_MANIFEST} cannot be read (", "); give another out"):
            found = read_json(cache / CACHE_MANIFEST, LARGEST_MANIFEST_BYTES)
        record = self._record_format(options)
        wanted = {"kind": options["kind"], "bytes_per_token": record.dtype.itemsize, "num_top": record.num_top}
        wanted["seed"] = options["seed"] if record.num_draws else None
        for name, value in wanted.items():
            if found.get(name, value) != value:
                raise UserError(f"{cache} has {name} {found[name]!r}, and {value!r} is asked for; give another out")
        if "critic" in found and found["critic"]["files"] != weight_files(str(critic)):
            raise UserError(f"{cache} is of another critic than {critic} is now; give another out")

    def _own_critics(self, kind: str, name: str) -> list[str]:
        """The critics that this comparison trains for an arm or critic, those of its critics included.

        None at all where what the search has found asks no critic.
        """
        if "critic" in idle_settings({"objective": "avatarl", **self._settings(kind, name)}):
            return []
        own = [each for each in critics_of(self.comparison.untuned[kind, name]) if each in self.comparison.critics]
        deeper = [each for critic in own for each in self._own_critics("critic", critic)]
        return list(dict.fromkeys(own + deeper))

    def _is_finished(self, folder: Path, settings: Settings, seed: int) -> bool:
        """Whether a run is there, whole, and what it should be; where one is yet to come, it is what is missing."""
        config, before = self._read.get(("run", folder), (None, None))
        state = (folder / "final").is_dir(), has_diverged(folder)
        if state != before:
            config = config or make_run(settings, folder, seed)
            changes = check_run_folder(folder, config, resume=True, allow_changes=True)
            if changes:
                raise UserError(f"{folder} was started under other settings: {'; '.join(changes)}; give another out")
            self._check_identity(folder, config)
            self._read["run", folder] = config, state
        is_finished, gave_up = state
        if not is_finished and not gave_up:
            name = folder.relative_to(self._out).as_posix()
            recipe = self._out / "recipes" / f"{name.replace('/', '-')}.yaml"
            self._add(Job(name, folder, ("train", "--config", str(recipe), "--resume"), config))
        return is_finished

    def _check_identity(self, folder: Path, config: TrainConfig) -> None:
        """Refuse a run of other data, or under another critic, than what lies there now."""
        # The digest of a quantised model depends on the device too.
        own = {self._out / "caches"} | (set() if config.critic_quantization else {self._out / "critics"})
        made_here = [critic for critic in config.critics if Path(critic).parent in own]
        for identity in identities_of_run(folder):
            if identity.get("data") != self.data.digest:
                raise UserError(f"{folder} was trained on other data than {self.data.path}; give another out")
            # By their order: their folders may have been elsewhere. None where its objective did not ask them.
            recorded = [digest for name, digest in identity.items() if name.startswith("critic ")]
            for critic, digest in zip(config.critics, recorded, strict=False):
                is_known = critic in made_here or f"critic {critic}" not in identity and os.path.exists(critic)
                key = critic, identity["precision"]
                if is_known and digest != _once(self._read, key, digest_of_critic, *key):
                    raise UserError(f"{folder} was trained under another critic than {critic}; give another out")

    def _add(self, job: Job) -> None:
        if job not in self.missing:
            self.missing.append(job)


def _once(known: dict, key: Hashable, find: Callable, *arguments: Any) -> Any:
    """What ``find`` returns, found the first time only."""
    if key not in known:
        known[key] = find(*arguments)
    return known[key]


def _best_evaluation(run: Path) -> float:
    return min(row["cross_entropy"] for row in evaluations_of(run))


def digest_of_critic(critic: str, precision: str) -> str:
    """What the identity of a run that started now would say of a critic."""
    return critic_class(critic).digest_of(critic, torch.bfloat16 if precision == "bf16" else torch.float32)


def has_diverged(folder: Path) -> bool:
    """Whether a run gave up because its updates were no numbers."""
    return (folder / "refused").is_dir() and not (folder / "final").is_dir()


def point_name(grid: dict[str, list], point: Point) -> str:
    """A folder's name for a point of a grid."""
    last = [name.rpartition(".")[2] for name in grid]
    names = last if len(set(last)) == len(last) else list(grid)
    return ",".join(f"{name}={json.dumps(value)}" for name, value in zip(names, point, strict=True)).replace("/", "_")
