"""The K largest logits of each row, exactly, in little more than one reading of the row.

``torch.topk`` keeps a partial order over the whole vocabulary and costs several readings. But the K largest of a row
lie in the K blocks with the largest maxima: one cheap reduction leaves K blocks to look into.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Below this many logits a row, torch.topk is as fast.
SMALL_VOCABULARY = 1024


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and token ids (N, k) of the largest logits (N, V), in falling order; ties are broken anyhow.

    Equal to ``logits.topk(k)``. NaN counts as largest, as there.
    """
    vocabulary = logits.shape[1]
    num_blocks = _num_blocks(vocabulary, k)
    if vocabulary < SMALL_VOCABULARY or 4 * num_blocks > vocabulary:
        return logits.topk(k, dim=1)
    # Block b holds the tokens b, b + num_blocks, b + 2·num_blocks, …: maxima are then taken over whole vectors. The
    # last tokens, too few for one more layer of blocks, are looked at in any case.
    size = vocabulary // num_blocks
    in_blocks = size * num_blocks
    maxima = logits[:, :in_blocks].unflatten(1, (size, num_blocks)).amax(dim=1)
    blocks = maxima.topk(k, dim=1, sorted=False).indices  # (N, k)
    layers = torch.arange(0, in_blocks, num_blocks, device=logits.device)
    candidates = (blocks.unsqueeze(2) + layers).flatten(1)  # (N, k · size)
    rest = torch.arange(in_blocks, vocabulary, device=logits.device).expand(logits.shape[0], -1)
    candidates = torch.cat([candidates, rest], dim=1)
    values, places = logits.gather(1, candidates).topk(k, dim=1)
    return values, candidates.gather(1, places)


def _num_blocks(vocabulary: int, k: int) -> int:
    """A power of two near √(k · V), where the maxima are about as many as the tokens of k blocks."""
    return max(k, 2 ** math.ceil(math.log2(vocabulary * k) / 2))
