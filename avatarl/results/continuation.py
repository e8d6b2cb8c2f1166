"""What the app's models do: players continue a prompt, and critics give the rewards of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from avatarl.errors import UserError
from avatarl.models import Critic, check_same_vocabulary, open_critic
from avatarl.objective import AvataRLConfig

from .checkpoints import model_of, players_of
from .generate import Sampling, continue_ids, prompt_ids
from .inspect import settings_and_critics
from .inspector import Inspector, Position, shown_token
from .players import Player, open_player

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


@dataclass(frozen=True)
class Rewards:
    """The critics of a page and the settings of their rewards."""

    critics: list[Critic]
    names: list[str]
    config: AvataRLConfig
    player: Player  # whose vocabulary they have

    @classmethod
    def open(cls, side: Side, critics: Sequence[str] | None) -> Rewards:
        """The named critics, else those that the side's run was trained with; under its settings either way.

        Raises:
            UserError: There is none, or one cannot be opened.
        """
        config, names = settings_and_critics(side.run, critics)
        opened = [open_critic(name, side.player.tokenizer, device=side.device) for name in names]
        return cls(opened, names, config, side.player)

    def inspector(self, player: Player) -> Inspector:
        """A player with these critics.

        Raises:
            UserError: The player reads other tokens than the critics, or the settings do not fit them.
        """
        check_same_vocabulary(self.player.tokenizer, player.tokenizer, player.name, role="player")
        return Inspector(player.model, self.critics, player.tokenizer, self.config, [player.name, *self.names])


class Side:
    """A run on the page. One of its players is open at a time, the last one that was chosen."""

    def __init__(self, run: str, device: torch.device):
        """
        Raises:
            UserError: It has no player, or its first cannot be opened.
        """
        self.run, self.device, self.choices = run, device, list(players_of(run))
        self._open(self.choices[0])

    def generate(self, choice: str, prompt: str, sampling: Sampling, rewards: Rewards | None) -> Continuation:
        """Let one of the run's players continue a prompt.

        Raises:
            UserError: The player cannot be opened, or the prompt is too long for it.
        """
        if choice != self.choice:
            self._open(choice)
        tokenizer = self.player.tokenizer
        read = prompt_ids(tokenizer, prompt)
        (ids,) = continue_ids(self.player, read, sampling)
        generated = ids[len(read) :]
        positions = rewards.inspector(self.player).inspect_ids(ids).positions[-len(generated) :] if rewards else ()
        return Continuation(self.player.name, prompt, [shown_token(tokenizer, token) for token in generated], positions)

    def _open(self, choice: str) -> None:
        with TemporaryDirectory() as scratch:
            model = model_of(self.run, choice, Path(scratch))
            self.player, self.choice = open_player(model, self.device, f"{self.run}, {choice}"), choice


def open_all(
    runs: Sequence[str], critics: Sequence[str] | None, device: torch.device
) -> tuple[list[Side], Rewards | None, str]:
    """The runs of a page, the critics for both, and why there are none.

    Raises:
        UserError: A run, or a critic that was named, cannot be opened, or they do not fit each other.
    """
    sides = [Side(run, device) for run in runs]
    try:
        rewards = Rewards.open(sides[0], critics)
        for side in sides:
            rewards.inspector(side.player)
    except UserError as error:
        if critics is not None:
            raise
        return sides, None, str(error)
    return sides, rewards, ""
