"""What a run leaves besides checkpoints: the best and the last player, or what there is to study after a failure."""

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

from .processes import whole
from .setup import Setup
from .state import Progress

WEIGHTS = "model.safetensors"  # of a model folder


def write_player(setup: Setup, progress: Progress, name: str) -> dict[str, dict] | None:
    """Write the player, just evaluated, as a model folder of the run.

    Returns size and SHA-256 of its files by name, in the process that writes them.
    """
    weights = whole_weights(setup)
    if not setup.processes.is_main:
        return None
    run = Path(setup.config.out)
    curve = evaluations_of(run)
    if not curve or curve[-1]["step"] != progress.step:  # somebody removed the metrics
        curve.append({"step": progress.step, **progress.spent, "cross_entropy": progress.cross_entropy})
    tokens, cross_entropies = zip(*((line["tokens"], line["cross_entropy"]) for line in curve), strict=True)
    card = card_of_player(setup, {**curve[-1], **progress.spent})
    pages = {CARD_FILE: card, CURVE_FILE: draw_curve(tokens, cross_entropies)}
    write_model_folder(run / name, setup.player, weights, setup.tokenizer, pages)
    return describe_folder(run / name)


def card_of_player(setup: Setup, evaluation: Mapping[str, float]) -> str:
    """The model card of the evaluated player."""
    facts = {
        "total": setup.parameters.total,
        "non_embedding": setup.parameters.non_embedding,
        "precision": setup.precision,
        "critics": [critic.name for critic in setup.critics],
        "unique_tokens": setup.unique_tokens,
        "data_digest": setup.data.digest,
        "vocab_size": setup.data.vocab_size,
    }
    return model_card(Path(setup.config.out), setup.config.as_dict(), evaluation, setup.data.manifest, facts)


def whole_weights(setup: Setup) -> dict[str, Tensor]:
    """The player's weights in host memory, gathered from all processes; each of them has to call this."""
    return {name: whole(tensor.detach()).cpu() for name, tensor in tensors_of_model(setup.player).items()}


def check_players(setup: Setup, progress: Progress) -> None:
    """Check the best player, and write the last one unless it is there already.

    Raises:
        RunFailed: The best player is damaged or gone, and was of an earlier step.
    """
    run, weights = Path(setup.config.out), whole_weights(setup)
    to_write = []
    if setup.processes.is_main:
        if progress.best_player and describe_folder(run / "player") != progress.best_player:
            if progress.best_step != progress.step:
                raise RunFailed(
                    f"{run / 'player'}, the best player, of step {progress.best_step}, was changed or removed, and "
                    f"there is no copy of it; {run / 'final'}, of step {progress.step}, is not affected"
                )
            to_write.append("player")
        if not is_final_complete(run, weights):
            to_write.append("final")
    for name in setup.processes.broadcast(to_write):
        write_player(setup, progress, name)


def is_final_complete(run: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether the last player's folder has all files of a player, and these weights."""
    try:
        saved = load_file(run / "final" / WEIGHTS)
        best, final = ({path.name for path in (run / name).iterdir()} for name in ("player", "final"))
        return best <= final and len(saved) == len(weights) and all(torch.equal(saved[n], weights[n]) for n in saved)
    except (OSError, SafetensorError, KeyError, RuntimeError):
        return False


def describe_folder(folder: Path) -> dict[str, dict]:
    """Size and SHA-256 of each file of a model folder except its card and picture, which the user may edit."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    paths = [path for path in paths if path.is_file() and path.name not in (CARD_FILE, CURVE_FILE)]
    return {path.name: describe(path) for path in paths}


def save_skipped_windows(setup: Setup, progress: Progress) -> str:
    """Save windows and statistics of the last skipped updates; return what to tell the user."""
    batches, skipped, tokens = setup.batches, setup.guard.last_skipped(), {}
    for row in skipped:
        first = progress.windows - (progress.step - row["step"] + 1) * setup.windows_per_step
        indices = batches.order.indices(first, setup.windows_per_step)
        inputs, targets = batches.windows.batch(indices)
        row["windows"] = indices.tolist()
        tokens |= {f"step-{row['step']:08d}.inputs": inputs, f"step-{row['step']:08d}.targets": targets}
    statistics = {"refused": skipped, "accepted_losses": setup.guard.last_losses()}
    folder = _write_for_study(setup, "statistics.json", statistics, tokens)
    last = skipped[-1]
    return (
        f"loss is {last['loss']:.6g} and the gradient's norm {last['grad_norm']:.6g} at step {last['step']}, "
        f"{len(skipped)} skipped updates in a row; windows and statistics are in {folder}; "
        "try a smaller optim.learning_rate"
    )


def save_failed_evaluation(setup: Setup, step: int, values: Mapping[str, float]) -> str:
    """Save an evaluation that is not finite; return what to tell the user."""
    statistics = {"step": step, **values, "accepted_losses": setup.guard.last_losses()}
    folder = _write_for_study(setup, "evaluation.json", statistics)
    return (
        f"validation cross-entropy is {values['cross_entropy']} at step {step}; it and the last losses are in "
        f"{folder}; try a smaller optim.learning_rate"
    )


def _write_for_study(
    setup: Setup, name: str, statistics: Mapping[str, object], tokens: Mapping[str, Tensor] | None = None
) -> Path:
    """Write the run's folder ``refused``, in the process that writes."""

    def fill(folder: Path) -> None:
        (folder / name).write_text(json.dumps(statistics, indent=1), encoding="utf-8")
        if tokens:
            save_file(dict(tokens), folder / "windows.safetensors")

    folder = Path(setup.config.out) / "refused"
    if setup.processes.is_main:
        replace_folder(folder, fill)
    return folder
