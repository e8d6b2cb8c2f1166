"""All that a run resumes from: the numbers of state.json, and the tensors of models and optimisers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from avatarl.errors import UserError
from avatarl.models.critics import LiveCritic
from avatarl.run_dir.tensors import Held, SavedTensors, files_by_part, tensors_of_model

from .optim import KEPT, Optimisers, kept_by

LARGEST_COUNT = 1 << 62  # of what is counted in an array's numbers; FLOPs outgrow it


def start_of_run() -> dict:
    """How far a run is before its first step."""
    return {
        "step": 0,
        "best_cross_entropy": math.inf,
        "best_step": None,
        "best_player": None,  # size and SHA-256 of its files
        "cross_entropy": math.nan,  # of the last evaluation
        "seconds": 0.0,
        "unlogged": {
            "since_step": 0,
            "since_tokens": 0,
            "seconds": 0.0,
            "sums": {},
        },  # what the next line of metrics will hold
    }


def check_state(state: Mapping[str, Any], step: int) -> None:
    """Refuse a state that no run writes after ``step``: whoever writes one can write matching sums as well.

    Raises:
        ValueError: naming what it says.
        KeyError, TypeError, AttributeError: Something is missing, or of another kind.
    """
    unlogged, guard, best_step, best_player = (
        state[name] for name in ("unlogged", "guard", "best_step", "best_player")
    )
    best, losses, (accepted, refused, in_a_row) = state["best_cross_entropy"], guard["losses"], guard["counts"]
    reached = state.get("reached") or {}  # earlier versions do not say
    seconds, counts = [state["seconds"], unlogged["seconds"]], [accepted, refused, in_a_row, unlogged["since_step"]]
    numbers = [best, state["cross_entropy"], *seconds, *losses, *unlogged["sums"].values()]
    wrong = {
        "step": state["step"] != step or reached.get("step", step) != step,
        "best_step": best_step is not None and not (_is_count(best_step, step) and best_step > 0),
        "best_player": best_player is not None
        and (best_step is None or not all(map(_is_record, best_player.values()))),
        "best_cross_entropy": math.isnan(best) or best_player is not None and math.isinf(best),
        "a number": not all(type(number) in (int, float) for number in numbers),
        "seconds": not all(0 <= each < math.inf for each in seconds),
        "a loss": not all(map(math.isfinite, losses)),
        "a count": not all(_is_count(count, step) for count in counts) or in_a_row > refused,
        "what was read": not all(map(_is_count, (reached.get("windows", 0), reached.get("tokens", 0)))),
        "what was spent": not all(type(flops) is int and flops >= 0 for flops in _flops(reached)),
        "a refused step": not all(_is_refused(*map(float, row), step) for row in guard["last"]),
    }
    if found := next((name for name, is_wrong in wrong.items() if is_wrong), None):
        raise ValueError(f"{found} is none of a run after step {step}")


def _flops(reached: Mapping[str, Any]) -> list[Any]:
    return [reached.get("player_flops", 0), reached.get("critic_flops", 0), *reached.get("caches", {}).values()]


def _is_count(number: Any, most: int = LARGEST_COUNT) -> bool:
    return type(number) is int and 0 <= number <= most


def _is_refused(taken: float, _loss: float, _norm: float, step: int) -> bool:
    """Whether a row of the guard's last refused updates is of a step before, or of none."""
    return math.isnan(taken) or taken in range(1, step + 1)


def _is_record(record: Any) -> bool:
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
