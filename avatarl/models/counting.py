"""Parameters and floating-point operations, counted on the model itself."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


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


def forward_flops_per_token(model: PreTrainedModel, block: int) -> int:
    """Floating-point operations of one forward pass per token, head included, in sequences of ``block`` tokens.

    Two per weight of every matrix that multiplies, plus causal attention: scores and weighted values cost four per
    channel and earlier token, and a token has (block + 1) / 2 of those on average. Norms, activations and the softmax
    over the vocabulary are left out, as is usual (Kaplan et al., 2020, appendix B). Of experts, which lie stacked in
    one weight, a token meets ``num_experts_per_tok``.
    """
    matrices = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim * (block + 1) // 2
    # Experts and their router are plain parameters of modules of their own.
    others = [module for module in model.modules() if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding))]
    weights = [weight for module in others for weight in module.parameters(recurse=False) if weight.dim() > 1]
    met = getattr(config, "num_experts_per_tok", None)
    experts = sum(w.numel() * met // len(w) if met and w.dim() == 3 else w.numel() for w in weights)
    return 2 * (sum(map(_products, matrices)) + experts) + attention


def _products(matrix: nn.Linear | Conv1D) -> int:
    """Weights of a matrix, which a quantised one may hold several of in a byte."""
    return matrix.nx * matrix.nf if isinstance(matrix, Conv1D) else matrix.in_features * matrix.out_features


def training_flops_per_token(model: PreTrainedModel, block: int) -> int:
    """Forward and backward: three times :func:`forward_flops_per_token`. A critic adds one forward pass of its own."""
    return 3 * forward_flops_per_token(model, block)
