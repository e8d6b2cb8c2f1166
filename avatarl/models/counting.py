"""Parameters and floating-point operations, counted on the model itself."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .loading import evaluating, last_hidden

TRIED_TOKENS = 13  # a number that is no width of a layer, so that products over pairs of tokens can be told from others


class ParameterCount(NamedTuple):
    """Parameters, each counted once however often it is used."""

    total: int
    embedding: int  # token and position tables, and the head where it is not tied to them

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding


def count_parameters(model: PreTrainedModel) -> ParameterCount:
    """Count the parameters of ``model``; tied ones once."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    embedding = {id(module.weight): module.weight.numel() for module in (*tables, model.get_output_embeddings())}
    return ParameterCount(sum(unique.values()), sum(embedding.values()))


def forward_flops_per_token(model: PreTrainedModel, block_size: int) -> int:
    """Floating-point operations of one forward pass per token, head included, in sequences of ``block_size`` tokens.

    Two per weight of every matrix that multiplies, as often as it does, plus causal attention where the model really
    has it: scores and weighted values cost four per channel and earlier token, and a token has (block_size + 1) / 2 of
    those on average; a window that attention is confined to is not subtracted. Norms, activations, scans of state-space
    layers and the softmax over the vocabulary are left out, as is usual (Kaplan et al., 2020, appendix B). Of experts,
    which lie stacked in one weight, a token meets ``num_experts_per_tok``.
    """
    met = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    rows, per_pair = _tried(model, block_size)
    products = 0
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            products += _products(module) * rows.get(module, 1)
        elif not isinstance(module, nn.Embedding):
            # Experts and their router are plain parameters of modules of their own.
            for name, weight in module.named_parameters(recurse=False):
                is_stack = met and weight.dim() == 3 and not isinstance(module, nn.Conv1d)
                if weight.dim() > 1 and not name.endswith("bias"):
                    products += weight.numel() * met // len(weight) if is_stack else weight.numel()
    return 2 * products + per_pair * (block_size + 1) // 2


@torch.no_grad()
def _tried(model: PreTrainedModel, block_size: int) -> tuple[dict[nn.Module, int], int]:
    """How often each matrix multiplies a token, and what a pair of tokens costs in attention: of a short forward pass.

    Configurations name neither: hybrids attend in some layers only, and some models go through their layers again.
    """
    length = min(TRIED_TOKENS, block_size)
    rows: Counter[nn.Module] = Counter()

    def count(matrix: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        rows[matrix] += inputs[0].numel() // inputs[0].shape[-1]

    matrices = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    hooks = [matrix.register_forward_hook(count) for matrix in matrices]
    try:
        with evaluating(model), _PairProducts(length) as attention:
            last_hidden(model, torch.zeros(1, length, dtype=torch.long, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {matrix: max(1, count // length) for matrix, count in rows.items()}, attention.per_pair


class _PairProducts(TorchDispatchMode):
    """Counts FLOPs of the products that have a term for each pair of ``length`` tokens: scores and weighted values."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.per_pair = length, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if "scaled_dot_product" in name:
            query, _, value = args[:3]  # (B, heads, T, channels) each
            self.per_pair += 2 * query.shape[0] * query.shape[1] * (query.shape[-1] + value.shape[-1])
        elif name in ("bmm", "baddbmm"):
            left, right = args[-2:]  # (batch, n, k) and (batch, k, m)
            sides = [*left.shape[1:], right.shape[-1]]
            if sides.count(self.length) > 1:
                self.per_pair += 2 * len(left) * math.prod(sides) // self.length**2
        return function(*args, **(kwargs or {}))


def _products(matrix: nn.Linear | Conv1D) -> int:
    """Weights of a matrix, which a quantised one may hold several of in a byte."""
    return matrix.nx * matrix.nf if isinstance(matrix, Conv1D) else matrix.in_features * matrix.out_features


def training_flops_per_token(model: PreTrainedModel, block_size: int) -> int:
    """Forward and backward: three times :func:`forward_flops_per_token`. A critic adds one forward pass of its own."""
    return 3 * forward_flops_per_token(model, block_size)
