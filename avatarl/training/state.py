"""All that a run resumes from: the numbers of state.json, and the tensors of models and optimisers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from avatarl.errors import UserError
from avatarl.models.critics import LiveCritic
from avatarl.run_dir.tensors import Held, SavedTensors, files_by_part, tensors_of_model

from .optim import KEPT, Optimisers, kept_by

LARGEST_COUNT = 1 << 62  # of windows, tokens and the like; FLOPs may be more


@dataclass
class Progress:
    """How far a run is: what the loop carries from step to step, and state.json of a checkpoint holds."""

    step: int = 0
    # Counted step by step, since the settings of earlier steps may have been others:
    windows: int = 0  # read, and so the place of the next one in the endless order
    tokens: int = 0
    player_flops: int = 0
    critic_flops: int = 0
    cache_flops: dict[str, int] = field(default_factory=dict)  # that each critic cache took, by its digest
    # Evaluations:
    cross_entropy: float = math.nan  # of the last one
    best_cross_entropy: float = math.inf
    best_step: int | None = None
    best_player: dict[str, dict] | None = None  # size and SHA-256 of its files
    # Lines of metrics:
    seconds: float = 0.0  # of training, up to the last line
    logged_tokens: int = 0  # up to the last line
    unlogged_seconds: float = 0.0  # since the last line
    sums: dict[str, Tensor | float] = field(default_factory=dict)  # of metrics since the last line

    @property
    def spent(self) -> dict[str, int]:
        """Training tokens and FLOPs so far, without evaluations and without cached critics."""
        return {name: getattr(self, name) for name in ("tokens", "player_flops", "critic_flops")}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], step: int) -> Progress:
        """Read state.json of the checkpoint after ``step``. It may be forged, with digests that match.

        Raises:
            ValueError: A value is none of a run after ``step``; it is named.
            KeyError, TypeError, AttributeError: An entry is missing or of another type.
        """
        progress, guard = cls(**{each.name: state[each.name] for each in fields(cls)}), state["guard"]
        best, best_step, best_player = progress.best_cross_entropy, progress.best_step, progress.best_player
        seconds, losses = [progress.seconds, progress.unlogged_seconds], guard["losses"]
        numbers = [best, progress.cross_entropy, *seconds, *losses, *progress.sums.values()]
        flops = [progress.player_flops, progress.critic_flops, *progress.cache_flops.values()]
        accepted, skipped, in_a_row = guard["counts"]
        wrong = {
            "step": progress.step != step,
            "best_step": best_step is not None and not (_is_count(best_step, step) and best_step > 0),
            "best_player": best_player is not None
            and (best_step is None or not all(map(_is_file_record, best_player.values()))),
            "best_cross_entropy": math.isnan(best) or best_player is not None and math.isinf(best),
            "a number": not all(type(number) in (int, float) for number in numbers),
            "seconds": not all(0 <= each < math.inf for each in seconds),
            "a loss": not all(map(math.isfinite, losses)),
            "windows or tokens": not all(map(_is_count, (progress.windows, progress.tokens, progress.logged_tokens))),
            "FLOPs": not all(type(each) is int and each >= 0 for each in flops),
            "a count of the guard": not all(_is_count(each, step) for each in (accepted, skipped, in_a_row))
            or in_a_row > skipped,
            "a skipped step": not all(_is_skipped_step(*map(float, row), step) for row in guard["last"]),
        }
        if found := next((name for name, is_wrong in wrong.items() if is_wrong), None):
            raise ValueError(f"{found} is none of a run after step {step}")
        return progress


def _is_count(number: Any, most: int = LARGEST_COUNT) -> bool:
    return type(number) is int and 0 <= number <= most


def _is_skipped_step(step: float, _loss: float, _norm: float, taken: int) -> bool:
    """Whether a row of the guard's last skipped updates is of an earlier step, or empty."""
    return math.isnan(step) or step in range(1, taken + 1)


def _is_file_record(record: Any) -> bool:
    return _is_count(record["bytes"]) and isinstance(record["sha256"], str)


# --- tensors ---------------------------------------------------------------------------------------------------------


def tensors_of_run(
    player: PreTrainedModel, optimisers: Optimisers, critics: Mapping[str, LiveCritic]
) -> dict[str, dict[str, Held]]:
    """Every tensor that a run resumes from, by file and name; views, not copies."""
    parts = {"player": tensors_of_model(player), "optimiser": optimiser_tensors(player, optimisers)}
    parts |= {name: tensors_of_model(critic.model) for name, critic in critics.items() if critic.has_started}
    return {part: {name: Held.of(tensor) for name, tensor in named.items()} for part, named in parts.items()}


def optimiser_tensors(player: nn.Module, optimisers: Optimisers) -> dict[str, Tensor]:
    """The optimisers' state for each parameter, as ``PARAMETER.KIND``; a parameter has one optimiser."""
    names = {id(parameter): name for name, parameter in player.named_parameters()}
    return {
        f"{names[id(parameter)]}.{kind}": value
        for optimiser in optimisers.optimisers
        for parameter, state in optimiser.state.items()
        for kind, value in state.items()
    }


def load_tensors(
    files: Sequence[Path], player: PreTrainedModel, optimisers: Optimisers, critics: Mapping[str, LiveCritic]
) -> None:
    """Load what :func:`tensors_of_run` saved.

    An optimiser that keeps another kind of state than was saved starts anew, and so does a critic or snapshot that was
    not saved: the run was started with others.

    Raises:
        UserError: The files hold tensors of another model.
    """
    saved = {part: SavedTensors(paths) for part, paths in files_by_part(files).items()}
    nothing = SavedTensors([])
    saved.get("player", nothing).copy_into(tensors_of_model(player))
    for name, critic in critics.items():
        if name in saved:
            saved[name].copy_into(tensors_of_model(critic.model))
        critic.has_started = name in saved
    kept = saved.get("optimiser", nothing)
    names = {id(parameter): name for name, parameter in player.named_parameters()}
    for optimiser in optimisers.optimisers:
        for parameter in (parameter for group in optimiser.param_groups for parameter in group["params"]):
            owner = names[id(parameter)]
            kinds = kept.kinds_of(owner)
            if kinds and set(kinds) not in KEPT.values():
                raise UserError(f"the checkpoint is not valid: it holds {kinds} of {owner}")
            if set(kinds) == kept_by(optimiser):
                optimiser.state[parameter] = {kind: kept.read_like(parameter, f"{owner}.{kind}") for kind in kinds}
