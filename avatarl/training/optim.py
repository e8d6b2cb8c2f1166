"""Optimisers and their learning rates: AdamW, or Muon for the matrices with AdamW for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel

from .config import OptimConfig


@dataclass
class Optimisers:
    """One or two optimisers and their schedules, stepped together."""

    optimisers: list[Optimizer]
    schedules: list[LRScheduler]

    def step(self) -> None:
        """Update the weights, then the learning rate, and forget the gradients."""
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        for schedule in self.schedules:
            schedule.step()

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.schedules[0].get_last_lr()[0]

    def state_dict(self) -> dict:
        return {
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
        }

    def load_state_dict(self, state: dict) -> None:
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)


def build_optimisers(player: PreTrainedModel, config: OptimConfig, total_steps: int) -> Optimisers:
    """Optimisers for every parameter of ``player``, each exactly once, with warm-up and decay over ``total_steps``."""
    matrices, embeddings, vectors = split_parameters(player)
    # Muon takes two-dimensional weights only; stacked ones (experts) are AdamW's.
    flat = [parameter for parameter in matrices if parameter.dim() == 2] if config.name == "muon" else []
    others = [parameter for parameter in matrices if all(parameter is not taken for taken in flat)] + embeddings
    adamw_groups = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in adamw_groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    optimisers: list[Optimizer] = [adamw]
    if config.name == "muon":
        # With this adjustment an update has AdamW's typical size, so one learning rate serves both.
        muon = torch.optim.Muon(
            flat, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimisers.append(muon)
    schedules = [
        LambdaLR(optimiser, lambda step: learning_rate_factor(step, config, total_steps)) for optimiser in optimisers
    ]
    return Optimisers(optimisers, schedules)


def learning_rate_factor(step: int, config: OptimConfig, total_steps: int) -> float:
    """The learning rate of optimiser step ``step``, counted from 0, as a fraction of the highest.

    It rises in equal steps from above 0 to 1 at step ``warmup_steps``, then falls towards ``final_lr_fraction``, where
    it would be at step ``total_steps``. (Schedules of transformers start at 0 or at the final fraction: at a fraction
    of 0 their first step changes nothing.)
    """
    warmup = min(config.warmup_steps, total_steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / (total_steps - warmup))
    fall = (1 - math.cos(math.pi * progress)) / 2 if config.decay == "cosine" else progress
    return 1 - (1 - config.final_lr_fraction) * fall


def split_parameters(player: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The player's parameters as matrices between the embeddings, embedding tables with the head, and the rest."""
    tables = [module for module in player.modules() if isinstance(module, nn.Embedding)]
    table_ids = {id(module.weight) for module in (*tables, player.get_output_embeddings())}
    parameters = [parameter for parameter in player.parameters() if parameter.requires_grad]
    embeddings = [parameter for parameter in parameters if id(parameter) in table_ids]
    matrices = [parameter for parameter in parameters if id(parameter) not in table_ids and parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters if id(parameter) not in table_ids and parameter.dim() < 2]
    assert len(parameters) == len(matrices) + len(embeddings) + len(vectors)
    return matrices, embeddings, vectors
