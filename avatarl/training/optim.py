"""Optimisers and their learning rates: AdamW, or Muon for the matrices with AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from avatarl.device import local, pick_precision

from .config import OptimConfig
from .processes import Processes, whole

# What each keeps for a parameter between steps.
KEPT = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}


def kept_by(optimiser: Optimizer) -> set[str]:
    """The kinds of state that an optimiser keeps for a parameter."""
    return next(kinds for made, kinds in KEPT.items() if isinstance(optimiser, made))


@dataclass
class Optimisers:
    """One or two optimisers, stepped together, at the learning rate of the step."""

    optimisers: list[Optimizer]
    config: OptimConfig
    total_steps: int

    def step(self, step: int, skipped: Tensor | None = None) -> float:
        """Update the weights and free the gradients; return the learning rate.

        Args:
            step: The number of the optimiser step, counted from 1.
            skipped: bool (), on the device: whether to leave weights and state as they are.
        """
        learning_rate = self.config.learning_rate * learning_rate_factor(step - 1, self.config, self.total_steps)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate
            with _unless(skipped, optimiser):
                optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return learning_rate


class _FloatForBfloat16(TorchFunctionMode):
    """Casts to bfloat16 become casts to float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.bfloat16:
            function = Tensor.float
        return function(*args, **(kwargs or {}))


class PortableMuon(torch.optim.Muon):
    """PyTorch's Muon for sharded matrices and for CPUs without bfloat16.

    An update depends on the whole matrix. With shards (FSDP2), PyTorch would divide each product of the
    orthogonalisation, with an exchange for every one, and round differently for every number of processes; here each
    process gathers the whole matrix. PyTorch takes the products in bfloat16, which many CPUs emulate at fifteen times
    the time of float32 (docs/lab-log.md, 2026-11-30); there they are in float32.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One update; ``closure`` as in torch, for matrices without shards."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        with nullcontext() if muon_precision(parameters[0].device) == "bf16" else _FloatForBfloat16():
            if any(isinstance(parameter, DTensor) for parameter in parameters):
                return self._step_whole()
            return super().step(closure)

    def _step_whole(self) -> None:
        for group in self.param_groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                matrix = nn.Parameter(whole(parameter.detach()))
                matrix.grad = whole(parameter.grad)
                muon = torch.optim.Muon([matrix], **settings)
                state = self.state[parameter]
                if "momentum_buffer" in state:
                    muon.state[matrix]["momentum_buffer"] = whole(state["momentum_buffer"])
                muon.step()
                state.setdefault("momentum_buffer", torch.zeros_like(parameter.detach()))
                momentum = muon.state[matrix]["momentum_buffer"]
                for kept, new in ((parameter, matrix), (state["momentum_buffer"], momentum)):
                    divided = distribute_tensor(new.detach(), kept.device_mesh, kept.placements, src_data_rank=None)
                    local(kept.detach()).copy_(local(divided))


def muon_precision(device: torch.device) -> str:
    """The precision of Muon's products, ``bf16`` or ``fp32``; it depends on the device, not on the run's precision."""
    return pick_precision("auto", device)


@contextmanager
def _unless(skipped: Tensor | None, optimiser: Optimizer) -> Iterator[None]:
    """Undo the optimiser's step inside if ``skipped`` is set, without waiting for the device."""
    if skipped is None:
        yield
    elif isinstance(optimiser, torch.optim.AdamW):
        # The fused kernel reads this itself; it is meant for gradient scaling.
        optimiser.grad_scale, optimiser.found_inf = None, skipped.float()
        try:
            yield
        finally:
            del optimiser.grad_scale, optimiser.found_inf
    else:
        # Muon has no such flag: its weights and momenta, a part of all, are saved and restored.
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        weights = [local(parameter.detach()).clone() for parameter in parameters]
        momenta = [optimiser.state[parameter].get("momentum_buffer") for parameter in parameters]
        momenta = [None if momentum is None else local(momentum).clone() for momentum in momenta]
        yield
        for parameter, weight, momentum in zip(parameters, weights, momenta, strict=True):
            _put_back(parameter.detach(), weight, skipped)
            if (now := optimiser.state[parameter].get("momentum_buffer")) is not None:
                _put_back(now, torch.zeros_like(weight) if momentum is None else momentum, skipped)


def _put_back(tensor: Tensor, value: Tensor, condition: Tensor) -> None:
    part = local(tensor)
    part.copy_(torch.where(condition, value, part))


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float | None, processes: Processes) -> Tensor:
    """Scale all gradients so that their norm is at most ``clip_norm``; return the norm before (), float32.

    Summed in float64: on a CPU the float32 sum of a million squares is wrong in the fifth digit, and differently so for
    every way of dividing them among processes.
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [local(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
    square = _sum_of_squares([gradient for gradient in gradients if not isinstance(gradient, DTensor)])
    if parts:
        square = square + processes.mean(_sum_of_squares(parts)) * processes.count
    norm = square.sqrt().float()
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor | float:
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.stack(norms).square().sum() if norms else 0.0


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
        muon = PortableMuon(
            flat, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimisers.append(muon)
    return Optimisers(optimisers, config, total_steps)


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
