"""The player together with its objective: one module that returns the loss, so that DDP or FSDP2 need only wrap it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from avatarl.models.loading import head_weight, last_hidden
from avatarl.objective import Objective, linear_objective_loss


class RewardedPlayer(nn.Module):
    """Tokens in, loss and metrics out.

    Critics are kept outside the module's own parameters: they are not trained, saved or wrapped with it.
    """

    def __init__(
        self,
        player: PreTrainedModel,
        objective: Objective,
        critics: Sequence[PreTrainedModel],
        vocab_size: int,
        loss_impl: str = "auto",
    ):
        super().__init__()
        self.player = player
        self.objective = objective
        self.vocab_size = vocab_size
        self.loss_impl = loss_impl
        self._critics = tuple(critics) if objective.needs_critic else ()
        self._snapshot: tuple[PreTrainedModel, ...] = ()

    def forward(
        self, input_ids: Tensor, targets: Tensor, num_valid: Tensor | int | None = None, uniforms: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of windows.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the tokens that follow.
            num_valid: Positions of the whole optimiser step (those of ``targets`` when None).
            uniforms: (B·T, S) in [0, 1), for the objectives that sample.
        """
        hidden = last_hidden(self.player, input_ids)
        with torch.no_grad():
            critic_hidden = [last_hidden(critic, input_ids) for critic in self._critics]
            snapshot = [(last_hidden(model, input_ids), head_weight(model)) for model in self._snapshot]
        return linear_objective_loss(
            self.objective,
            hidden,
            head_weight(self.player),
            critic_hidden,
            [head_weight(critic) for critic in self._critics],
            targets,
            vocab_size=self.vocab_size,
            num_valid=num_valid,
            snapshot=snapshot[0] if snapshot else None,
            uniforms=uniforms,
            impl=self.loss_impl,
        )

    @property
    def snapshot(self) -> PreTrainedModel | None:
        """The earlier player that ``ppo`` samples from."""
        return self._snapshot[0] if self._snapshot else None

    def refresh_snapshot(self) -> None:
        """Take the player as it is now as the policy that actions are sampled from."""
        if self.snapshot is None:
            self._snapshot = (copy.deepcopy(self.player).requires_grad_(False).eval(),)
        else:
            self.snapshot.load_state_dict(self.player.state_dict())
