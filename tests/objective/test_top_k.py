"""Top-K by block maxima against torch.topk."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avatarl.objective.answers import top_k


class TopKWidths(TorchDispatchMode):
    """Remembers how many numbers a row each ``topk`` looked at."""

    def __init__(self):
        super().__init__()
        self.widths = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.topk:
            self.widths.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


def assert_top_k(logits, k):
    values, tokens = top_k(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(logits.gather(1, tokens), values)
    assert all(len(set(row)) == k for row in tokens.tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])  # bfloat16 has many ties
@pytest.mark.parametrize("k", [1, 4, 16, 64, 300])
@pytest.mark.parametrize("vocabulary", [1023, 1024, 1031, 4096, 4099, 50_257])
def test_the_largest_in_falling_order(vocabulary, k, dtype):
    generator = torch.Generator().manual_seed(vocabulary + k)
    assert_top_k(torch.randn(3, vocabulary, generator=generator).to(dtype), k)


@pytest.mark.parametrize("place", [0, 2048, 4096, 4098])  # 4,098 is among the last, in no block
def test_neighbours_and_last_tokens(place):
    """All of the largest in one block's neighbourhood, at the first and at the last tokens."""
    logits = torch.zeros(2, 4099)
    logits[:, place : place + 16] = torch.arange(min(16, 4099 - place)) + 1.0
    assert top_k(logits, 1)[1].tolist() == [[min(place + 15, 4098)]] * 2
    assert_top_k(logits, 16)


def test_all_in_one_block():
    logits = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    logits[:, 5::256] += 100  # tokens 5, 261, 517, …: a block of the 256 that V = 4,096 and K = 16 have
    assert_top_k(logits, 16)
    assert set((top_k(logits, 16)[1] % 256).flatten().tolist()) == {5}


def test_impossible_tokens_and_columns_of_a_wider_tensor():
    logits = torch.full((2, 5000), -torch.inf)
    logits[0, [3, 4090]] = torch.tensor([1.0, 2.0])
    assert_top_k(logits[:, :4097], 16)


def test_not_a_number_counts_as_largest():
    logits = torch.randn(2, 4096)
    logits[1, 77] = torch.nan
    values, tokens = top_k(logits, 4)
    assert tokens[1, 0] == 77 and values[1, 0].isnan() and torch.equal(values[1, 1:], logits[1].topk(4).values[1:])


def test_torch_sees_only_maxima_and_candidates():
    with TopKWidths() as seen:
        top_k(torch.randn(2, 50_257), 16)
    assert seen.widths and max(seen.widths) <= 1024
