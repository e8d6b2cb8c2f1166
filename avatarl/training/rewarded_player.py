"""The player together with its objective: one module that returns the loss, so that DDP or FSDP2 need only wrap it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from avatarl.models.loading import head_weight, last_hidden
from avatarl.objective import Objective, Scheduled, StoredCritic, linear_objective_loss

from .processes import local


class HiddenAndHead(NamedTuple):
    """What the objective needs of a model that only judges."""

    hidden: Tensor  # (B, T, d)
    head: Tensor  # (V, d)


class FrozenModel(nn.Module):
    """A model that is read and never trained: a critic, or an earlier player. Its weights may be divided (FSDP2)."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> HiddenAndHead:
        """Hidden states of windows (B, T), and the head."""
        return HiddenAndHead(last_hidden(self.model, input_ids), head_weight(self.model))


class AveragedPlayer(FrozenModel):
    """The player's own moving average as a critic: after each step θ̄ ← decay · θ̄ + (1 − decay) · θ.

    It begins as a copy of the player after ``start_step``, and judges from the step after that.
    """

    def __init__(self, model: PreTrainedModel, decay: float, start_step: int):
        """``model`` is one like the player, whose weights are replaced."""
        super().__init__(model)
        self.decay, self.start_step = decay, start_step
        self.has_started = False

    @torch.no_grad()
    def follow(self, player: nn.Module, step: int) -> None:
        """Take in the player as it is after ``step``, which is 0 before the first one."""
        if step < self.start_step:
            return
        if isinstance(self, FSDPModule):
            self.reshard()  # what was gathered of the earlier one is no longer wanted
        averages = [local(weight) for weight in self.model.parameters()]  # tied ones once
        weights = [local(weight) for weight in player.parameters()]
        if self.has_started:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        else:
            torch._foreach_copy_(averages, weights)
        self.has_started = True


class RewardedPlayer(nn.Module):
    """Tokens in, loss and metrics out.

    Critics and snapshot are kept outside the module's own parameters: they are not trained or wrapped with it.
    """

    def __init__(
        self,
        player: PreTrainedModel,
        objective: Objective,
        critics: Sequence[PreTrainedModel | FrozenModel | None],
        vocab_size: int,
        loss_impl: str = "auto",
        snapshot: FrozenModel | None = None,
    ):
        """
        Args:
            player: The model that learns.
            objective: What it learns by.
            critics: The models that judge, for objectives that need one; None for one whose answers come with the
                windows.
            vocab_size: Tokens; heads may have more rows.
            loss_impl: What computes the loss.
            snapshot: What holds the earlier player that ``ppo`` samples from; made when first asked for if None.
        """
        super().__init__()
        self.player = player
        self.objective = objective
        self.vocab_size = vocab_size
        self.loss_impl = loss_impl
        frozen = (FrozenModel(critic) if isinstance(critic, PreTrainedModel) else critic for critic in critics)
        self._critics = list(frozen) if objective.needs_critic else []
        self._judging = tuple(range(len(self._critics)))
        self._snapshot = (snapshot,) if snapshot else ()

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        num_valid: Tensor | int | None = None,
        uniforms: Tensor | None = None,
        stored: Sequence[StoredCritic] = (),
        scheduled: Scheduled | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of windows.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the tokens that follow.
            num_valid: Positions of the whole optimiser step (those of ``targets`` when None).
            uniforms: (B·T, S) in [0, 1), for the objectives that sample.
            stored: What caches hold of these windows (B, T), for each of the judging critics that has one.
            scheduled: Values of settings that change over time.
        """
        hidden = last_hidden(self.player, input_ids)
        answers, heads, held = [], [], iter(stored)
        for critic in (self._critics[i] for i in self._judging):
            states, head = (next(held), None) if critic is None else critic(input_ids)
            answers.append(states)
            heads.append(head)
        snapshot = [model(input_ids) for model in self._snapshot]
        return linear_objective_loss(
            self.objective,
            hidden,
            head_weight(self.player),
            answers,
            heads,
            targets,
            vocab_size=self.vocab_size,
            num_valid=num_valid,
            snapshot=snapshot[0] if snapshot else None,
            uniforms=uniforms,
            scheduled=scheduled,
            impl=self.loss_impl,
        )

    def consult(self, judging: tuple[int, ...], objective: Objective) -> None:
        """Let these critics judge from now on, by an objective for so many."""
        self._judging, self.objective = judging, objective

    def dismiss_critics(self) -> None:
        """Forget the critics that do not judge, and their memory."""
        self._critics = [critic if i in self._judging else None for i, critic in enumerate(self._critics)]

    def follow(self, step: int) -> None:
        """Let the averages take in the player as it is after ``step``."""
        for average in self.averages:
            average.follow(self.player, step)

    def start_averages(self, step: int) -> None:
        """Begin those that should have begun by ``step`` and have not: before the first step, or under new settings."""
        for average in self.averages:
            if not average.has_started:
                average.follow(self.player, step)

    @property
    def averages(self) -> list[AveragedPlayer]:
        """The critics that are averages of the player."""
        return [critic for critic in self._critics if isinstance(critic, AveragedPlayer)]

    @property
    def snapshot(self) -> FrozenModel | None:
        """The earlier player that ``ppo`` samples from."""
        return self._snapshot[0] if self._snapshot else None

    @torch.no_grad()
    def refresh_snapshot(self) -> None:
        """Take the player as it is now as the policy that actions are sampled from."""
        if self.snapshot is None:
            self._snapshot = (FrozenModel(copy.deepcopy(self.player)),)
            return
        if isinstance(self.snapshot, FSDPModule):
            self.snapshot.reshard()  # what was gathered of the earlier one is no longer wanted
        current = self.player.state_dict()
        for name, tensor in self.snapshot.model.state_dict().items():
            tensor.copy_(current[name])
