"""Settings of the objectives, their presets and their checks. The words are those of docs/method.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from avatarl.errors import UserError

DEFAULT_TAIL = {"geometric": "renormalise", "arithmetic": "target"}


@dataclass(frozen=True)
class AvataRLConfig:
    """Settings of the AvataRL objective; the defaults are the article's.

    Args:
        top_k: How many tokens each model proposes at a position.
        top_p: Cut each model's proposals to the shortest prefix with this probability (None: keep all ``top_k``).
        smoothing: ε, the share of the reality expert that the other active actions divide among them.
        pool: How the experts are blended, ``geometric`` (logarithmic pool) or ``arithmetic`` (linear pool).
        tail: What becomes of a critic's probability outside of the active actions. ``renormalise`` spreads it over all
            of these in proportion, ``target`` gives it to the target; with the arithmetic pool, ``dense`` leaves it
            where it is, and ``sample`` does so in expectation, by sampled tokens that join the actions. None is
            ``renormalise`` for the geometric pool (the article) and ``target`` for the arithmetic one.
        tail_samples: Tokens that ``sample`` draws from each live critic (a cached one has its own).
        reality_weight: w_R, the weight of the text.
        critic_weight: w_C, the weight of the critic: a number, split evenly over several critics, or one per critic.
        reward_scale: A reward is this times the consensus probability, before the cap.
        threshold: Which actions keep their reward: ``mean`` (consensus above 1/n), ``mass`` (above S/n, S being the
            blend's mass before normalisation; the released code) or ``none``.
        reward_cap: A position whose largest reward is above this is scaled down to it (None: no cap).
        entropy_coef: β, the weight of the policy's entropy in the loss (nats).
        temperature: The loss takes the policy at logits divided by this.
        per_action_mean: Divide a position's reward term by its number of active actions (the released code).
        player_proposes: Whether the player's own proposals are among the actions, or the critics' alone.

    Raises:
        UserError: A value is out of its range; the message names the field, the value and what is accepted.
    """

    top_k: int = 16
    top_p: float | None = None
    smoothing: float = 0.1
    pool: Literal["geometric", "arithmetic"] = "geometric"
    tail: Literal["renormalise", "target", "sample", "dense"] | None = None
    tail_samples: int = 16
    reality_weight: float = 0.7
    critic_weight: float | tuple[float, ...] = 0.3
    reward_scale: float = 100.0
    threshold: Literal["mean", "mass", "none"] = "mean"
    reward_cap: float | None = 1.5
    entropy_coef: float = 0.01
    temperature: float = 1.0
    per_action_mean: bool = False
    player_proposes: bool = True

    @classmethod
    def article(cls, **overrides) -> AvataRLConfig:
        """The method as the article states it (the defaults of this class)."""
        return cls(**overrides)

    @classmethod
    def released(cls, **overrides) -> AvataRLConfig:
        """The method as the released function computes it (tokenbender/avataRL at d291d9b)."""
        preset = dict(top_k=4, threshold="mass", entropy_coef=0.0, temperature=1.01, per_action_mean=True)
        return cls(**{**preset, **overrides})

    @classmethod
    def dense(cls, **overrides) -> AvataRLConfig:
        """The whole mixture of a fifth text and four fifths critics; nothing is cut or capped.

        The gradient is that of ``distillation`` with α = 0.2. Under cached critics take ``tail="sample"``, as all that
        follows did. It is for scarce text, read many times, under several critics as good as the player, or smaller,
        that saw nothing else: validation cross-entropy then was 2.65 and 3.02 % (four critics, two texts) and 3.17 %
        (eight) below that of tuned training without critics, for five and nine times the compute (125 k tokens, a
        player of 1.27 M parameters, n = 5 each, p < 0.0001); calibration was better on one of the texts. One critic
        brought 1 %, an overfitted one nothing (62 k tokens, n = 2); at one epoch it does not pay (docs/results.md).
        """
        preset = dict(pool="arithmetic", tail="dense", smoothing=0.0, reality_weight=0.2, critic_weight=0.8)
        whole = dict(threshold="none", reward_scale=1.0, reward_cap=None, entropy_coef=0.0)
        return cls(**{**preset, **whole, **overrides})

    def __post_init__(self):
        if isinstance(self.critic_weight, list):  # YAML has no tuples
            object.__setattr__(self, "critic_weight", tuple(self.critic_weight))
        require_kinds(self)
        require_whole("top_k", self.top_k, minimum=1)
        require_number("smoothing", self.smoothing, lambda x: 0 <= x < 1, "a number in [0, 1)")
        if self.top_p is not None:
            require_number("top_p", self.top_p, lambda x: 0 < x <= 1, "a number in (0, 1], or null")
        if self.reward_cap is not None:
            require_number("reward_cap", self.reward_cap, lambda x: x > 0, "a number above 0, or null")
        require_whole("tail_samples", self.tail_samples, minimum=1)
        for name in ("reality_weight", "entropy_coef"):
            require_number(name, getattr(self, name), lambda x: x >= 0, "a number of at least 0")
        for name in ("reward_scale", "temperature"):
            require_number(name, getattr(self, name), lambda x: x > 0, "a number above 0")
        for weight in self._weights_as_given():
            require_number("critic_weight", weight, lambda x: x >= 0, "a number of at least 0, or one per critic")
        self._check_weights_together()
        self._check_tail()

    def _weights_as_given(self) -> tuple[float, ...]:
        return self.critic_weight if isinstance(self.critic_weight, tuple) else (self.critic_weight,)

    def _check_weights_together(self) -> None:
        total = self.reality_weight + sum(self._weights_as_given())
        if total == 0:
            raise UserError("reality_weight and critic_weight are both 0; at least one expert needs a weight above 0")
        if self.pool == "arithmetic" and not math.isclose(total, 1, abs_tol=1e-6):
            raise UserError(
                f"pool='arithmetic' mixes probabilities, so reality_weight + critic_weight must be 1; "
                f"found {self.reality_weight} + {self.critic_weight}"
            )
        if self.pool == "arithmetic" and self.threshold == "mass":
            raise UserError("threshold='mass' is defined for pool='geometric' only; use 'mean' or 'none'")

    def _check_tail(self) -> None:
        if self.threshold == "mass" and self.tail_rule != "renormalise":
            raise UserError(f"threshold='mass' is defined for tail='renormalise' only; found {self.tail_rule!r}")
        if self.tail_rule in ("renormalise", "target"):
            return
        if self.pool == "geometric" or self.threshold != "none":
            raise UserError(
                f"tail={self.tail!r} keeps all that a critic believes, as a part of a sum of probabilities: it needs "
                f"pool='arithmetic' and threshold='none'; found {self.pool!r} and {self.threshold!r}"
            )
        if self.per_action_mean:
            raise UserError(f"per_action_mean divides by the active actions, which tail={self.tail!r} goes beyond")

    @property
    def needs_critic(self) -> bool:
        """Whether any critic has a weight above 0."""
        return any(weight > 0 for weight in self._weights_as_given())

    @property
    def tail_rule(self) -> str:
        """``tail``, or the pool's own rule where that is None."""
        return self.tail or DEFAULT_TAIL[self.pool]

    def critic_weights(self, num_critics: int) -> tuple[float, ...]:
        """Return one weight for each of ``num_critics`` critics.

        Raises:
            UserError: ``critic_weight`` has another number of entries, or is above 0 and there is no critic.
        """
        if not isinstance(self.critic_weight, tuple):
            if num_critics == 0 and self.critic_weight > 0:
                raise UserError(f"critic_weight is {self.critic_weight} but no critic is given; give one, or weight 0")
            return (self.critic_weight / num_critics,) * num_critics if num_critics else ()
        if num_critics == 0 and not self.needs_critic:  # those that weigh nothing are not asked
            return ()
        if len(self.critic_weight) != num_critics:
            raise UserError(f"critic_weight has {len(self.critic_weight)} entries for {num_critics} critics")
        return self.critic_weight


@dataclass(frozen=True)
class BaselineConfig:
    """Settings of the other objectives.

    Args:
        label_smoothing: ``label_smoothing``: the share of the target spread over the whole vocabulary.
        distillation_alpha: ``distillation``: the weight α of cross-entropy; KL(critic‖player) has 1−α.
        samples: ``reinforce`` and ``ppo``: actions drawn from the policy at each position.
        ppo_clip: ``ppo``: the ratio to the snapshot is clipped to [1−c, 1+c].
        ppo_refresh_every: ``ppo``: optimiser steps between two snapshots of the policy.
    """

    label_smoothing: float = 0.1
    distillation_alpha: float = 0.5
    samples: int = 16
    ppo_clip: float = 0.2
    ppo_refresh_every: int = 4

    def __post_init__(self):
        require_number("label_smoothing", self.label_smoothing, lambda x: 0 <= x < 1, "a number in [0, 1)")
        require_number("distillation_alpha", self.distillation_alpha, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        require_whole("samples", self.samples, minimum=1)
        require_number("ppo_clip", self.ppo_clip, lambda x: 0 < x < 1, "a number in (0, 1)")
        require_whole("ppo_refresh_every", self.ppo_refresh_every, minimum=1)


@dataclass(frozen=True)
class ObjectiveKind:
    """What an objective uses.

    Args:
        settings: The settings that it depends on, or groups of them, by their names in a recipe.
        needs_critic: Whether the loss depends on a critic under given settings.
        is_rewarded: Whether it uses the reward landscape.
        is_sampled: Whether it draws actions.
        needs_snapshot: Whether it needs an earlier policy.
    """

    settings: tuple[str, ...] = ()
    needs_critic: Callable[[AvataRLConfig, BaselineConfig], bool] = lambda avatarl, baseline: False
    is_rewarded: bool = False
    is_sampled: bool = False
    needs_snapshot: bool = False


def _rewarded(*settings: str, **kind: bool) -> ObjectiveKind:
    needs_critic = lambda avatarl, baseline: avatarl.needs_critic  # noqa: E731
    return ObjectiveKind(("avatarl.", *settings), needs_critic, is_rewarded=True, **kind)


# The objectives by name; :mod:`.objectives` has a class for each.
OBJECTIVES = {
    "avatarl": _rewarded(),
    "cross_entropy": ObjectiveKind(),
    "label_smoothing": ObjectiveKind(("baseline.label_smoothing",)),
    "distillation": ObjectiveKind(
        ("baseline.distillation_alpha",), lambda _, baseline: baseline.distillation_alpha < 1
    ),
    "expected_reward": _rewarded(),
    "reinforce": _rewarded("baseline.samples", is_sampled=True),
    "ppo": _rewarded(
        *("baseline.samples", "baseline.ppo_clip", "baseline.ppo_refresh_every"), is_sampled=True, needs_snapshot=True
    ),
}


# What fields of these types are in words, and of each class of settings its fields with what they accept.
_WORDS = {bool: "one of True, False", str: "text", list: "a list", dict: "settings by name", NoneType: "null"}
_KINDS: dict[type, list[tuple[str, tuple[type, ...], tuple[str, ...], str]]] = {}


def require_kinds(settings: object, group: str = "") -> None:
    """Raise a UserError naming a field whose value is of no kind that its annotation names: a flag, a choice, a group.

    Numbers are left to :func:`require_number` and :func:`require_whole`, which know their range.
    """
    if type(settings) not in _KINDS:
        _KINDS[type(settings)] = _kinds_of(type(settings))
    for name, types, choices, words in _KINDS[type(settings)]:
        value = getattr(settings, name)
        if not isinstance(value, types) and not (isinstance(value, str) and value in choices):
            raise UserError(f"{group}{name} is {value!r}; expected {words}")


def _kinds_of(settings: type) -> list[tuple[str, tuple[type, ...], tuple[str, ...], str]]:
    """Each field that is no number, with the types and the choices that it accepts, and these in words."""
    kinds = []
    for name, hint in get_type_hints(settings).items():
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if int in parts or float in parts:
            continue
        choices = tuple(choice for part in parts if get_origin(part) is Literal for choice in get_args(part))
        types = tuple(get_origin(part) or part for part in parts if get_origin(part) is not Literal)
        words = [f"one of {', '.join(map(repr, choices))}"] if choices else []
        words += [_WORDS.get(kind, kind.__name__) for kind in types]
        kinds.append((name, types, choices, " or ".join(words)))
    return kinds


def require_number(field: str, value: float, accepts: Callable[[float], bool], what: str) -> None:
    """Raise a UserError naming ``field`` unless ``value`` is a finite number that ``accepts`` says yes to."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not -math.inf < value < math.inf or not accepts(value):
        raise UserError(f"{field} is {value!r}; expected {what}")


def require_whole(field: str, value: int, minimum: int) -> None:
    """Raise a UserError naming ``field`` unless ``value`` is a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(f"{field} is {value!r}; expected a whole number of at least {minimum}")


def require_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a UserError naming ``field`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UserError(f"{field} is {value!r}; expected one of {', '.join(map(repr, choices))}")
