"""What is compared: arms by seeds from one base recipe. Field names are the keys of a comparison's YAML."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from avatarl.errors import UserError, nearest_name
from avatarl.objective.config import OBJECTIVES, AvataRLConfig, require_whole
from avatarl.options import make_parser, parse_settings
from avatarl.places import read_recipe
from avatarl.training.config import TrainConfig
from avatarl.untrusted import require_unicode

from .search import middle

# What every run of a comparison shares, or a seed decides, so that an arm cannot have its own.
SHARED = ("out", "data", "seed", "block_size", "eval_windows")
PRESETS = ("article", "released", "dense")
FIRST_CRITIC_SEED = 1001
CACHE_OPTIONS = {"kind": "top", "bytes_per_token": 134, "keep_top": 0, "seed": 1}  # of `avatarl critic cache`
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Settings = dict[str, Any]  # of a recipe, by dotted names; no setting that holds others is among them


@dataclass(frozen=True)
class TuningConfig:
    """The search that each arm goes through, the same for all.

    Args:
        grid: For each setting that is tuned, by its dotted name, the values that are tried, in rising order.
        seed: The seed of the runs of the search, none of the comparison's.
        arms: The arms that are tuned (None: all but those that say ``tuned_as``).
    """

    grid: dict[str, list[Any]] = field(default_factory=dict)
    seed: int = 0
    arms: list[str] | None = None

    def __post_init__(self):
        require_whole("tuning.seed", self.seed, minimum=0)
        if not self.grid:
            raise UserError("tuning.grid is empty; expected values to try by setting, such as optim.learning_rate")
        for name, values in self.grid.items():
            if name in SHARED:
                raise UserError(f"tuning.grid.{name} is given, which all runs share; set it in the base recipe")
            if not isinstance(values, list) or not values or len(set(map(str, values))) != len(values):
                raise UserError(f"tuning.grid.{name} is {values!r}; expected a list of different values")


@dataclass(frozen=True)
class ComparisonConfig:
    """A comparison.

    Args:
        arms: For each arm what it changes of the base recipe. Besides settings of a recipe: ``preset`` (article,
            released or dense) for those of ``avatarl``, and ``tuned_as`` (an arm) for the values that the search found
            for that one. ``critic`` may name one of ``critics``, or several.
        out: The folder to make, with every run in it.
        base: The recipe that all arms start from: its settings, or a file that holds them.
        data: A prepared data folder, in the place of the base recipe's.
        seeds: A run of each arm for each: initial weights, order of the data, dropout and draws.
        baseline: The arm that the others are compared with.
        critics: Critics that are trained first, on the same data: for each what it changes of the base recipe, its
            ``seed``, ``tuned_as`` as for arms, and ``cache`` (the options of ``avatarl critic cache``, or ``{}``) to
            store what it says.
        tuning: The search for each arm's settings (None: none).
        pairs: Minimal pairs to score every player on: a .jsonl file or a folder of them.
        workers: How many runs train at once (None: one on each GPU, or on each core of a CPU).
    """

    arms: dict[str, dict[str, Any]]
    out: str
    base: str | dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    baseline: str = "cross_entropy"
    critics: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuning: TuningConfig | None = None
    pairs: str | None = None
    workers: int | None = None

    def __post_init__(self):
        require_unicode("out", self.out)
        if not self.arms:
            raise UserError("arms is empty; expected what each arm changes of the base recipe, by its name")
        for kind, names in (("arm", self.arms), ("critic", self.critics)):
            for name, changes in names.items():
                if not NAME.fullmatch(str(name)):
                    raise UserError(f"{kind} is named {name!r}; expected letters, digits, '.', '_' and '-'")
                if not isinstance(changes, dict | None):
                    raise UserError(f"{kind} {name} is {changes!r}; expected settings by name, or {{}}")
        _require_arm("baseline", self.baseline, self.arms)
        for number in self.seeds:
            require_whole("seeds", number, minimum=0)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds is {self.seeds}; expected at least one, each once")
        if self.workers is not None:
            require_whole("workers", self.workers, minimum=1)
        if self.tuning is not None:
            if self.tuning.seed in self.seeds:
                raise UserError(f"tuning.seed is {self.tuning.seed}, one of seeds; expected another, which only tunes")
            for name in self.tuning.arms or ():
                _require_arm("tuning.arms", name, self.arms)
        taken = [("one of seeds", self.seeds), ("that of tuning", [self.tuning.seed] if self.tuning else [])]
        for name in self.critics:
            seed = self.seed_of_critic(name)
            for what, seeds in taken:
                if seed in seeds:
                    raise UserError(
                        f"critic {name} has the seed {seed}, {what}; expected another, so that it shares no initial "
                        "weights with a player"
                    )
        for kind, name in self._names():
            self._check_inheritance(kind, name)

    def _names(self) -> list[tuple[str, str]]:
        return [(kind, name) for kind, names in (("arm", self.arms), ("critic", self.critics)) for name in names]

    def given(self, kind: str, name: str) -> dict[str, Any]:
        """What an arm or a critic changes, as it was written."""
        return (self.arms if kind == "arm" else self.critics)[name] or {}

    def _check_inheritance(self, kind: str, name: str) -> None:
        """Refuse ``tuned_as`` of what is not tuned, and critics that are no names."""
        changes = self.given(kind, name)
        if not all(isinstance(critic, str) for critic in critics_of(changes)):
            raise UserError(f"{kind} {name}: critic is {changes['critic']!r}; expected a name, or several in a list")
        if "tuned_as" in changes:
            _require_arm(f"{kind} {name}: tuned_as", changes["tuned_as"], self.arms)
            if not self.is_tuned(changes["tuned_as"]):
                raise UserError(
                    f"{kind} {name}: tuned_as is {changes['tuned_as']!r}, which is not tuned; expected one that is"
                )

    def _check_order(self, kind: str, name: str, path: tuple[tuple[str, str], ...] = ()) -> None:
        """Walk to all that an arm or critic waits for; UserError where that is itself."""
        if (kind, name) in path:
            raise UserError(f"{kind} {name} waits for itself: its critics and tuned_as lead back to it")
        before = [("critic", critic) for critic in critics_of(self.untuned[kind, name]) if critic in self.critics]
        if "tuned_as" in self.given(kind, name):
            before.append(("arm", self.given(kind, name)["tuned_as"]))
        for each in before:
            self._check_order(*each, (*path, (kind, name)))

    def is_tuned(self, arm: str) -> bool:
        """Whether an arm goes through the search itself."""
        if self.tuning is None or "tuned_as" in self.given("arm", arm):
            return False
        return self.tuning.arms is None or arm in self.tuning.arms

    def grid_of(self, kind: str, name: str) -> dict[str, list[Any]]:
        """The part of the grid that a search decides for an arm or a critic, its own or the one that it inherits."""
        if "tuned_as" in self.given(kind, name):
            own = self.changes_of(kind, name)  # goes before what is inherited
            return {setting: values for setting, values in self.tuning.grid.items() if setting not in own}
        return self.tuning.grid if kind == "arm" and self.is_tuned(name) else {}

    def seed_of_critic(self, name: str) -> int:
        """What decides a critic's initial weights: its ``seed``, else one that depends on its place among critics."""
        return self.given("critic", name).get("seed", FIRST_CRITIC_SEED + list(self.critics).index(name))

    def base_settings(self) -> Settings:
        """The base recipe's settings by their dotted names, with ``data`` in its place.

        Raises:
            UserError: The file cannot be read.
        """
        nested = self.base
        if isinstance(nested, str):
            nested = read_recipe(nested)
        settings = by_dotted_names(nested)
        for name in ("out", "seed"):
            settings.pop(name, None)
        if self.data is not None:
            settings["data"] = self.data
        return settings

    def _start(self, kind: str, name: str) -> Settings:
        """The base with the changes of an arm, or of a critic, whose default objective is cross-entropy."""
        settings = self.base_settings()
        if kind == "critic":
            settings |= {"objective": "cross_entropy", "critic": None}
        return settings | self.changes_of(kind, name)

    @cached_property
    def runs(self) -> dict[tuple[str, str], list[TrainConfig]]:
        """Runs of each arm and critic, by kind and name: one in the middle of its grid, and one at each of its values.

        Raises:
            UserError: A setting is wrong, or a value of the grid is.
        """
        found = {}
        for kind, name in self._names():
            grid = self.grid_of(kind, name)
            start = self._start(kind, name) | dict(zip(grid, middle(grid), strict=True))
            tried = [{}, *({setting: value} for setting, values in grid.items() for value in values)]
            found[kind, name] = [make_run(start | changed, Path(self.out), seed=0) for changed in tried]
        return found

    @cached_property
    def untuned(self) -> dict[tuple[str, str], Settings]:
        """All settings of each arm and critic, by kind and name, but what a search finds.

        If no objective that is tried needs a critic none is named, so that nobody waits or pays for one.

        Raises:
            UserError: One is wrong, or a value of the grid is.
        """
        found = {}
        for key, runs in self.runs.items():
            needs_critic = any(OBJECTIVES[run.objective].needs_critic(run.avatarl, run.baseline) for run in runs)
            found[key] = self._start(*key) | ({} if needs_critic else {"critic": None})
        return found

    def cache_options(self, critic: str) -> Settings | None:
        """The options of a critic's cache; None where it has none.

        Raises:
            UserError: One is unknown.
        """
        given = self.given("critic", critic)
        if "cache" not in given:
            return None
        options = {} if given["cache"] is None else given["cache"]
        if not isinstance(options, dict):
            raise UserError(f"critic {critic}: cache is {options!r}; expected options by name, or {{}}")
        unknown = [option for option in options if option not in CACHE_OPTIONS]
        if unknown:
            raise UserError(f"critic {critic}: cache.{unknown[0]}; expected {', '.join(CACHE_OPTIONS)}")
        return {**CACHE_OPTIONS, **options}

    def cached_windows(self, critic: str) -> int | None:
        """The ``train_windows`` of a critic's cache: those of the runs that ask it, whatever it read itself.

        Raises:
            UserError: They ask for different ones.
        """
        asking = {key: settings for key, settings in self.untuned.items() if critic in critics_of(settings)}
        asked = {" ".join(key): settings.get("train_windows") for key, settings in asking.items()}
        if len(set(asked.values())) > 1:
            raise UserError(
                f"critic {critic} is cached, and {', '.join(f'{name} has {count}' for name, count in asked.items())} "
                "train_windows; a cache is of one number of them: expected a critic for each, or one without cache"
            )
        return next(iter(asked.values()), self.base_settings().get("train_windows"))

    def check(self) -> None:
        """Refuse at once what would be found only when its turn comes.

        Raises:
            UserError: A setting of an arm, a critic, a cache or the grid is wrong, or a search would replace it; or a
                critic is unknown, waits for itself or is there twice.
        """
        for kind, name in self._names():
            for critic in critics_of(self.untuned[kind, name]):
                self._check_critic(kind, name, critic)
            self._check_order(kind, name)
        for arm in filter(self.is_tuned, self.arms):
            for setting in by_dotted_names(self.given("arm", arm)):
                if setting in self.tuning.grid:
                    raise UserError(
                        f"arm {arm} gives {setting}, which is in tuning.grid, so that its search would replace it; "
                        "expected one of the two, or tuned_as, which keeps what the arm says itself"
                    )
        known: dict[str, str] = {}
        for critic in self.critics:
            run = make_run(self.untuned["critic", critic], Path(self.out), self.seed_of_critic(critic))
            tuned_as = self.given("critic", critic).get("tuned_as")
            if self.cache_options(critic) is not None:
                self.cached_windows(critic)
            twin = known.setdefault(repr((run, tuned_as, self.cache_options(critic))), critic)
            if twin != critic:
                raise UserError(f"critics {twin} and {critic} have the same seed and settings; expected another seed")

    def _check_critic(self, kind: str, name: str, critic: str) -> None:
        """Refuse what is neither a critic of this comparison nor anything that a run could open.

        Of ids on the hub only those with an owner are taken: one without looks like a mistyped critic.
        """
        from avatarl.models.critics import critic_class

        if critic in self.critics:
            return
        if critic_class(critic).is_trained_elsewhere and "/" not in critic and not os.path.exists(critic):
            raise UserError(
                f"{kind} {name}: critic is {critic!r}; expected one of critics, a folder, OWNER/NAME on the hub, "
                f"ema:DECAY:START_STEP or random:PRESET:SEED{nearest_name(critic, self.critics)}"
            )
        try:
            critic_class(critic).check_name(critic)
        except UserError as error:
            raise UserError(f"{kind} {name}: {error}") from error

    def changes_of(self, kind: str, name: str) -> Settings:
        """What an arm or a critic changes of the base recipe, by dotted names, its preset spelled out.

        Raises:
            UserError: It changes what all runs share.
        """
        given = dict(self.given(kind, name))
        for key in ("tuned_as", *(("cache", "seed") if kind == "critic" else ())):
            given.pop(key, None)
        changes = {}
        if (preset := given.pop("preset", None)) is not None:
            if preset not in PRESETS:
                raise UserError(f"{kind} {name}: preset is {preset!r}; expected one of {', '.join(PRESETS)}")
            changes = by_dotted_names({"avatarl": dataclasses.asdict(getattr(AvataRLConfig, preset)())})
        changes |= by_dotted_names(given)
        shared = [setting for setting in changes if setting in SHARED]
        if shared:
            raise UserError(f"{kind} {name} changes {shared[0]}, which all runs share; set it in the base recipe")
        return changes


def critics_of(changes: Mapping[str, Any]) -> list[str]:
    """The critics that settings name."""
    critic = changes.get("critic")
    return [] if critic is None else list(critic) if isinstance(critic, list) else [critic]


def by_dotted_names(nested: Mapping[str, Any], prefix: str = "") -> Settings:
    """Settings by their dotted names, whether they were nested, dotted already, or both.

    ``player.settings`` and ``critic_quantization`` are one setting each.
    """
    flat: Settings = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in ("player.settings", "critic_quantization"):
            flat |= by_dotted_names(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def make_run(settings: Settings, out: Path, seed: int) -> TrainConfig:
    """The run that settings describe.

    Raises:
        UserError: A setting is unknown, or its value is not accepted.
    """
    nested: dict[str, Any] = {}
    for name, value in copy.deepcopy({**settings, "out": str(out), "seed": seed}).items():
        *groups, last = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                raise UserError(f"{group} is {inner!r}, and {name} is given; expected its settings by name")
        inner[last] = value
    return TrainConfig(**parse_settings(_parser_of_recipes(), nested))


@cache
def _parser_of_recipes():
    parser = make_parser("avatarl compare", None)
    parser.add_class_arguments(TrainConfig)
    return parser


def _require_arm(field: str, name: object, arms: Mapping[str, Any]) -> None:
    if not isinstance(name, str) or name not in arms:
        raise UserError(
            f"{field} is {name!r}; expected one of the arms, {', '.join(arms)}{nearest_name(str(name), arms)}"
        )
