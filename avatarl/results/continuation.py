"""What the app's models do: players continue a prompt, and critics give the rewards of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from avatarl.errors import UserError

from .checkpoints import model_of, players_of
from .generate import Sampling, continue_ids, prompt_ids
from .inspect import settings_and_critics
from .inspector import Inspector, Position, shown_token
from .players import open_player

CONTEXT_CHARACTERS = 120  # shown before a chosen token


@dataclass(frozen=True)
class Continuation:
    """A prompt and the tokens that a player generated after it."""

    player: str
    prompt: str
    texts: list[str]  # of the generated tokens, white space visible
    positions: Sequence[Position]  # of these tokens; none without rewards

    def before(self, place: int) -> str:
        """The end of the text before a generated token."""
        return (self.prompt + "".join(self.texts[:place]).replace("␣", " "))[-CONTEXT_CHARACTERS:]


class Side:
    """A run on the page. One of its players is open at a time, the last one that was chosen."""

    def __init__(self, run: str, device: torch.device):
        """
        Raises:
            UserError: It has no player, or its first cannot be opened.
        """
        self.run, self.device, self.choices = run, device, list(players_of(run))
        self._open(self.choices[0])

    def generate(self, choice: str, prompt: str, sampling: Sampling, inspector: Inspector | None) -> Continuation:
        """Let one of the run's players continue a prompt; the inspector, where there is one, has the critics.

        Raises:
            UserError: The player cannot be opened, or the prompt is too long for it.
        """
        if choice != self.choice:
            self._open(choice)
        tokenizer = self.player.tokenizer
        read = prompt_ids(tokenizer, prompt)
        (ids,) = continue_ids(self.player, read, sampling)
        generated = ids[len(read) :]
        positions = ()
        if inspector is not None:
            positions = inspector.with_player(self.player).inspect_ids(ids).positions[-len(generated) :]
        return Continuation(self.player.name, prompt, [shown_token(tokenizer, token) for token in generated], positions)

    def _open(self, choice: str) -> None:
        with TemporaryDirectory() as scratch:
            model = model_of(self.run, choice, Path(scratch))
            self.player, self.choice = open_player(model, self.device, f"{self.run}, {choice}"), choice


def open_all(
    runs: Sequence[str], critics: Sequence[str] | None, device: torch.device
) -> tuple[list[Side], Inspector | None, str]:
    """The runs of a page; the critics and settings for both, which are the first one's; and why there are none.

    Raises:
        UserError: A run, or a critic that was named, cannot be opened, or they do not fit each other.
    """
    sides = [Side(run, device) for run in runs]
    try:
        config, names = settings_and_critics(runs[0], critics)
        inspector = Inspector.of(sides[0].player, names, config)
        for side in sides:
            inspector.with_player(side.player)
    except UserError as error:
        if critics is not None:
            raise
        return sides, None, str(error)
    return sides, inspector, ""
