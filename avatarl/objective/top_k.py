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
    num_blocks = blocks_to_search(logits.shape[1], k)
    if num_blocks is None:
        return logits.topk(k, dim=1)
    # A block's tokens lie num_blocks apart: maxima are then taken over whole vectors.
    in_blocks = logits.shape[1] // num_blocks * num_blocks
    return top_k_in_blocks(logits, logits[:, :in_blocks].unflatten(1, (-1, num_blocks)).amax(dim=1), k)


def top_k_in_blocks(logits: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`top_k` of logits (N, V) whose B block maxima (N, B) are known.

    Block b holds the tokens b, b + B, b + 2·B, …. The last tokens, too few for one more layer of blocks, are looked at
    in any case.
    """
    vocabulary, num_blocks = logits.shape[1], maxima.shape[1]
    in_blocks = vocabulary // num_blocks * num_blocks
    blocks = maxima.topk(k, dim=1, sorted=False).indices  # (N, k)
    layers = torch.arange(0, in_blocks, num_blocks, device=logits.device)
    candidates = (blocks.unsqueeze(2) + layers).flatten(1)  # (N, k · layers)
    rest = torch.arange(in_blocks, vocabulary, device=logits.device).expand(logits.shape[0], -1)
    candidates = torch.cat([candidates, rest], dim=1)
    values, places = logits.gather(1, candidates).topk(k, dim=1)
    return values, candidates.gather(1, places)


def blocks_to_search(vocabulary: int, k: int) -> int | None:
    """How many blocks to cut a row into, a power of two; None where ``torch.topk`` over the row is as fast.

    It is near √(k · V), where the maxima are about as many as the tokens of k blocks.
    """
    num_blocks = 2 ** math.ceil(math.log2(vocabulary * k) / 2)
    return None if vocabulary < SMALL_VOCABULARY or 4 * num_blocks > vocabulary else num_blocks
