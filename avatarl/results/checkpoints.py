"""The players of a run as ordinary model folders: the best, the last, and that of every checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from avatarl.data import PreparedData
from avatarl.errors import UserError, nearest_name
from avatarl.models import PlayerConfig, build_player, load_tokenizer
from avatarl.places import CONFIG, require_found
from avatarl.run_dir.checkpoint import (
    CHECKPOINTS,
    damage_of,
    is_complete,
    read_manifest,
    step_folder,
    steps_found,
)
from avatarl.run_dir.model_card import write_model_folder
from avatarl.run_dir.tensors import load_player, tensors_of_model
from avatarl.untrusted import refusing

from .runs import read_settings

PLAYERS = {"best": "player", "final": "final"}  # the folders of a run that are models


def players_of(model: str | Path) -> dict[str, str | Path]:
    """Where each player of a run lies, by its name: ``best``, ``final`` and the complete checkpoints as ``step 500``.

    A model that is no run has one, ``model``.

    Raises:
        UserError: It is a run that has no player yet.
    """
    run = Path(model)
    if not os.path.isfile(run / CONFIG):
        return {"model": model}
    players = {name: run / folder for name, folder in PLAYERS.items() if os.path.isdir(run / folder)}
    checkpoints = {f"step {step}": step_folder(run / CHECKPOINTS, step) for step in steps_found(run / CHECKPOINTS)}
    players |= {name: folder for name, folder in checkpoints.items() if is_complete(folder)}
    if not players:
        raise UserError(f"{run} has no player yet; expected a run that was evaluated or has saved a checkpoint")
    return players


def model_of(model: str | Path, player: str, scratch: Path) -> str | Path:
    """The model folder, or hub id, of one of :func:`players_of`; that of a checkpoint is written into ``scratch``.

    Raises:
        UserError: There is no such player, or the checkpoint is damaged.
    """
    players = players_of(model)
    if player not in players:
        raise UserError(
            f"{model} has no player {player!r}; expected one of {', '.join(players)}{nearest_name(player, players)}"
        )
    if not player.startswith("step "):
        return players[player]
    folder = scratch / Path(players[player]).name
    write_checkpoint_model(Path(model), Path(players[player]), folder)
    return folder


def write_checkpoint_model(run: Path, checkpoint: Path, out: Path) -> None:
    """Write the player of a run's checkpoint as a model folder, whole or not at all.

    Args:
        run: The run folder.
        checkpoint: One of its checkpoints, saved by one process or by several.
        out: The folder to write, in one that is there.

    Raises:
        UserError: The checkpoint is damaged or of another model, or the run's settings or tokenizer cannot be read.
    """
    if damage := damage_of(checkpoint):
        raise UserError(f"{checkpoint} is damaged ({damage}); expected a checkpoint as the run wrote it")
    settings = read_settings(run)
    tokenizer = _tokenizer_of(run, settings)
    with refusing(f"{run / CONFIG} is not what a run writes (", ")"):
        player = build_player(PlayerConfig(**settings["player"]), tokenizer, settings["block_size"], seed=0)
    with refusing(f"{checkpoint} holds no player of this run (", ")"):
        load_player([checkpoint / name for name in read_manifest(checkpoint)["files"]], player)
    write_model_folder(out, player, tensors_of_model(player), tokenizer, pages={})


def _tokenizer_of(run: Path, settings: dict) -> PreTrainedTokenizerBase:
    """The run's tokenizer, from one of its model folders or, before there is any, from its data."""
    for folder in PLAYERS.values():
        if os.path.isdir(run / folder):
            return load_tokenizer(run / folder)
    with refusing(f"{run} has no player yet, and its data cannot be read for the tokenizer (", ")"):
        require_found(run / CONFIG, {"data": settings["data"]})
        return PreparedData.open(settings["data"]).load_tokenizer()
