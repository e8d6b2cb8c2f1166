"""What a run leaves besides checkpoints: the best and the last player or, if it gave up, what there is to study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from avatarl.durable import replace_folder
from avatarl.errors import RunFailed
from avatarl.run_dir.checkpoint import describe
from avatarl.run_dir.curve import draw_curve
from avatarl.run_dir.log import evaluations_of
from avatarl.run_dir.model_card import CARD_FILE, CURVE_FILE, model_card, write_model_folder
from avatarl.run_dir.tensors import tensors_of_model

from .guard import Guard
from .processes import whole
from .setup import Setup

WEIGHTS = "model.safetensors"  # of a model folder


def write_player(parts: Setup, name: str, step: int, cross_entropy: float) -> dict | None:
    """The player as it is after ``step`` and its evaluation, as a model folder of the run.

    Returns size and SHA-256 of its files by name, in the process that writes them.
    """
    weights = whole_weights(parts)
    if not parts.processes.is_main:
        return None
    run = Path(parts.config.out)
    curve = evaluations_of(run)
    if not curve or curve[-1]["step"] != step:  # somebody took the metrics away
        curve.append({"step": step, **parts.spent_until(step), "cross_entropy": cross_entropy})
    tokens, cross_entropies = zip(*((line["tokens"], line["cross_entropy"]) for line in curve), strict=True)
    pages = {CARD_FILE: card_of_player(parts, curve[-1]), CURVE_FILE: draw_curve(tokens, cross_entropies)}
    write_model_folder(run / name, parts.player, weights, parts.tokenizer, pages)
    return describe_folder(run / name)


def card_of_player(parts: Setup, evaluation: Mapping[str, float]) -> str:
    """The model card of the player as it was evaluated."""
    facts = {
        "total": parts.parameters.total,
        "non_embedding": parts.parameters.non_embedding,
        "precision": parts.precision,
        "critics": [critic.name for critic in parts.critics],
        "unique_tokens": parts.sizes["unique_tokens"],
        "data_digest": parts.data.digest,
        "vocab_size": parts.data.vocab_size,
    }
    return model_card(Path(parts.config.out), parts.config.as_dict(), evaluation, parts.data.manifest, facts)


def whole_weights(parts: Setup) -> dict[str, Tensor]:
    """The player's weights in host memory, with what other processes hold of them; every process has to ask."""
    return {name: whole(tensor.detach()).cpu() for name, tensor in tensors_of_model(parts.player).items()}


def check_players(parts: Setup, progress: dict) -> None:
    """Write the last player, unless it is there as it was trained, and look whether the best one is.

    Raises:
        RunFailed: It is not, and was an earlier one, which nothing else holds.
    """
    run, is_last_best = Path(parts.config.out), progress["best_step"] == progress["step"]
    weights = whole_weights(parts)
    damaged = []
    if parts.processes.is_main:
        if progress["best_player"] and describe_folder(run / "player") != progress["best_player"]:
            if not is_last_best:
                raise RunFailed(
                    f"{run / 'player'}, the best player, of step {progress['best_step']}, is not as the run wrote it, "
                    f"and nothing else holds it; {run / 'final'}, of step {progress['step']}, does not depend on it"
                )
            damaged.append("player")
        if not is_final_as_trained(run, weights):
            damaged.append("final")
    for name in parts.processes.from_main(damaged):
        write_player(parts, name, progress["step"], progress["cross_entropy"])


def is_final_as_trained(run: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether the last player has all of a player's files, and these weights."""
    try:
        saved = load_file(run / "final" / WEIGHTS)
        has_all = {path.name for path in (run / "player").iterdir()} <= {
            path.name for path in (run / "final").iterdir()
        }
        return has_all and len(saved) == len(weights) and all(torch.equal(saved[name], weights[name]) for name in saved)
    except (OSError, SafetensorError, KeyError, RuntimeError):
        return False


def describe_folder(folder: Path) -> dict[str, dict]:
    """Size and SHA-256 of each file of a model folder but its card and picture, which only people read.

    The card names the run's folder, and its owner may write into it.
    """
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    paths = [path for path in paths if path.is_file() and path.name not in (CARD_FILE, CURVE_FILE)]
    return {path.name: describe(path) for path in paths}


def leave_for_study(parts: Setup, guard: Guard) -> str:
    """Save the windows and statistics of the refused updates, and say what happened."""
    run, refused = Path(parts.config.out), guard.last_refused()
    places = {row["step"]: parts.windows_of_step(row["step"]) for row in refused}
    indices = {step: parts.order.indices(windows.start, len(windows)) for step, windows in places.items()}
    statistics = {
        "refused": [{**row, "windows": indices[row["step"]].tolist()} for row in refused],
        "accepted_losses": guard.last_losses(),
    }
    tokens = {}
    for step, chosen in indices.items():
        inputs, targets = parts.windows.batch(chosen)
        tokens |= {f"step-{step:08d}.inputs": inputs, f"step-{step:08d}.targets": targets}

    def fill(folder: Path) -> None:
        (folder / "statistics.json").write_text(json.dumps(statistics, indent=1), encoding="utf-8")
        save_file(tokens, folder / "windows.safetensors")

    if parts.processes.is_main:
        replace_folder(run / "refused", fill)
    last = refused[-1]
    return (
        f"loss is {last['loss']:.6g} and the gradient's norm {last['grad_norm']:.6g} at step {last['step']}, "
        f"{len(refused)} refused updates in a row; windows and statistics are in {run / 'refused'}; "
        "try a smaller optim.learning_rate"
    )


def leave_evaluation(parts: Setup, guard: Guard, step: int, values: Mapping[str, float]) -> str:
    """Save an evaluation that is no number where refused updates are saved, and say what happened."""
    run, statistics = Path(parts.config.out), {"step": step, **values, "accepted_losses": guard.last_losses()}

    def fill(folder: Path) -> None:
        (folder / "evaluation.json").write_text(json.dumps(statistics, indent=1), encoding="utf-8")

    if parts.processes.is_main:
        replace_folder(run / "refused", fill)
    return (
        f"validation cross-entropy is {values['cross_entropy']} at step {step}; it and the last losses are in "
        f"{run / 'refused'}; try a smaller optim.learning_rate"
    )
