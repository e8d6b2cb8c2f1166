"""The player together with its loss: one module, so that DDP or FSDP2 need only wrap it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from avatarl.models.loading import head_weight, last_hidden
from avatarl.objective import Answers, HiddenAnswers, Objective, Scheduled
from avatarl.objective.engine import loss_from_hidden


class PlayerWithLoss(nn.Module):
    """Tokens and critics' answers in, loss and metrics out."""

    def __init__(self, player: PreTrainedModel, objective: Objective, vocab_size: int, compiled_loss: bool = False):
        """
        Args:
            player: The model that learns.
            objective: What is minimised; :meth:`Objective.check_settings` has accepted its critics.
            vocab_size: Tokens; heads may have more rows.
            compiled_loss: Whether the loss's passes over the logits go through torch.compile.
        """
        super().__init__()
        self.player = player
        self.objective = objective
        self.vocab_size = vocab_size
        self.compiled_loss = compiled_loss

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        answers: Sequence[Answers] = (),
        num_valid: Tensor | int | None = None,
        uniforms: Tensor | None = None,
        scheduled: Scheduled | None = None,
        snapshot: HiddenAnswers | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of windows.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the tokens that follow.
            answers: Each critic's answers for these windows.
            num_valid: Positions of the whole optimiser step (those of ``targets`` when None).
            uniforms: (B·T, S) in [0, 1), for objectives that sample.
            scheduled: Values of settings that change over time.
            snapshot: The earlier player's hidden states and head, for ``ppo``.
        """
        return loss_from_hidden(
            self.objective,
            HiddenAnswers(last_hidden(self.player, input_ids), head_weight(self.player)),
            answers,
            targets,
            self.vocab_size,
            num_valid=num_valid,
            snapshot=snapshot,
            uniforms=uniforms,
            scheduled=scheduled,
            compiled=self.compiled_loss,
        )


def add_metrics(sums: dict[str, Tensor | float], metrics: Mapping[str, Tensor], skipped: Tensor | None = None) -> None:
    """Add metrics () to ``sums`` on the device, or nothing if ``skipped`` () is set."""
    for name, value in metrics.items():
        value = value.detach() if skipped is None else value.detach().masked_fill(skipped, 0.0)
        sums[name] = sums[name] + value if name in sums else value
