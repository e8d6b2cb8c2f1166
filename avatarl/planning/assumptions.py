"""What a plan takes from data and critics, and what it supposes where they do not exist yet."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from avatarl.data.dataset import MANIFEST, read_manifest
from avatarl.errors import UserError
from avatarl.models import PRESETS, PlayerConfig
from avatarl.models.critic_cache import RecordFormat, is_cache
from avatarl.models.critic_cache.read import read_manifest as read_cache_manifest
from avatarl.models.critic_cache.read import record_format
from avatarl.models.critics import RANDOM_CRITIC, parse_ema_critic
from avatarl.models.loading import one_line, resolve_model
from avatarl.models.players import player_shape
from avatarl.training.config import TrainConfig
from avatarl.untrusted import read_yaml

GPT2_VOCABULARY = 50_257


def data_facts(config: TrainConfig, vocab_size: int | None, warnings: list[str]) -> tuple[int, int]:
    """Tokens of the vocabulary and optimiser steps, from the data where it is there.

    Raises:
        UserError: ``epochs`` cannot be counted without the data, or ``vocab_size`` is not its.
    """
    if (Path(config.data) / MANIFEST).exists():
        manifest = read_manifest(Path(config.data))[1]
        if vocab_size is not None and vocab_size != manifest["vocab_size"]:
            raise UserError(
                f"vocab_size is {vocab_size}, but {config.data} has {manifest['vocab_size']}; leave vocab_size out"
            )
        windows = (manifest["tokens"]["train"] - 1) // config.block_size
        windows = min(windows, config.train_windows or windows)
        return manifest["vocab_size"], config.total_steps(windows)
    if config.steps is None:
        raise UserError(
            f"epochs is {config.epochs}, and {config.data} does not exist; expected steps, or data made by "
            f"`avatarl prepare`"
        )
    if vocab_size is None:
        vocab_size = GPT2_VOCABULARY
        warnings.append(f"{config.data} does not exist: supposing {vocab_size:,} tokens of vocabulary (--vocab_size)")
    return vocab_size, config.steps


def critic_shape(
    name: str,
    vocab_size: int,
    config: TrainConfig,
    preset: str | None,
    recipe: str | Path | None,
    warnings: list[str],
) -> PreTrainedConfig | RecordFormat | None:
    """The shape of a critic: as it lies on this machine, else as ``preset`` or a recipe says, else None.

    That of a cache is what it stores of a position, and that of an average the player's.

    Args:
        name: The critic, as a recipe names it.
        vocab_size: Tokens of the vocabulary.
        config: The run.
        preset: The size to suppose.
        recipe: A recipe's file; those beside it may make the critic.
        warnings: What is supposed is added here.

    Raises:
        UserError: It has fewer output rows than there are tokens, or names no random critic.
    """
    if is_cache(name):
        manifest = read_cache_manifest(Path(name))[1]
        if manifest["vocab_size"] != vocab_size:
            raise UserError(f"critic {name} is a cache of {manifest['vocab_size']} tokens; expected {vocab_size}")
        return record_format(manifest)
    if name.startswith("ema:"):
        parse_ema_critic(name)
        return player_shape(config.player, vocab_size, config.block_size)
    if name.startswith("random:"):
        match = RANDOM_CRITIC.fullmatch(name)
        if match is None:
            raise UserError(f"critic is {name!r}; expected random:PRESET:SEED, as random:1m:7")
        return player_shape(PlayerConfig(match[1]), vocab_size, config.block_size)
    try:
        # A name without a folder may be a hub id; the hub is not asked, only what was fetched before.
        shape = AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:  # a UserError too
        shape, absence = None, f"cannot be used ({one_line(error)})" if Path(name).exists() else "is not here"
    if shape is not None:
        rows = shape.get_text_config().vocab_size
        if rows < vocab_size:
            raise UserError(f"critic {name} has {rows} output rows for {vocab_size} tokens")
        return shape
    if preset is not None:
        warnings.append(f"critic {name} {absence}: supposing a player of preset {preset}")
        player = PlayerConfig(preset)
    elif made := _player_of_recipe_making(name, recipe):
        path, player = made
        warnings.append(f"critic {name} {absence}: supposing what {path} makes")
    else:
        warnings.append(
            f"critic {name} {absence}: its FLOPs, weights and activations ARE LEFT OUT; say its size by "
            f"--critic_preset {'|'.join(PRESETS)}"
        )
        return None
    return player_shape(player, vocab_size, config.block_size)


def _player_of_recipe_making(run: str, recipe: str | Path | None) -> tuple[Path, PlayerConfig] | None:
    """The recipe beside ``recipe`` whose output is ``run``, and the player it trains."""
    for path in sorted(Path(recipe).parent.glob("*.yaml")) if recipe else ():
        try:
            settings = read_yaml(path)
            if settings["out"] == run:
                return path, PlayerConfig(**settings.get("player", {}))
        except (OSError, ValueError, TypeError, KeyError):  # not a recipe of ours
            continue
    return None
