"""Players opened for reading: a model with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avatarl.device import pick_device
from avatarl.errors import UserError
from avatarl.models.loading import check_rows, load_model, load_tokenizer


class Player(NamedTuple):
    """An opened model."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def context_length(self) -> int:
        """The longest sequence that the model was made for.

        Raises:
            UserError: Its configuration does not say.
        """
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not length:
            raise UserError(
                "block_size is not given and the model's configuration states no context length; give block_size"
            )
        return length


def open_player(model: str | Path | Player, device: str | torch.device = "auto", name: str = "") -> Player:
    """Open a run's best player, a model folder or a hub id, in float32 and eval mode.

    Args:
        model: A run folder, a model folder or a hub id. A player that is open already is returned as it is.
        device: ``cpu``, ``cuda`` or ``auto``, or a device that was picked before.
        name: How messages call it; ``model`` when empty.

    Raises:
        UserError: It cannot be opened, or its tokenizer has more tokens than the model.
    """
    if isinstance(model, Player):
        return model
    chosen = pick_device(device) if isinstance(device, str) else device
    tokenizer = load_tokenizer(model)
    opened = load_model(model, torch.float32, chosen)
    check_rows(opened, tokenizer, str(model))
    return Player(name or str(model), opened, tokenizer)
