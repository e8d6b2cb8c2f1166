"""Hidden states and heads that the tests of the path from hidden states share."""

import pytest
import torch

from avatarl import AvataRLConfig, avatarl_loss
from avatarl.objective import engine

POSITIONS, VOCABULARY, WIDTH, CRITIC_WIDTH = 23, 31, 7, 5
CONFIG = AvataRLConfig.article(top_k=4, threshold="none")


def random_heads(positions=POSITIONS, vocabulary=VOCABULARY, critics=1, dtype=torch.float64, seed=0):
    """hidden (N, d) and head weight (V, d) that require grad; lists of the critics' of other widths; targets (N,)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = normal(positions, WIDTH).requires_grad_(), normal(vocabulary, WIDTH).requires_grad_()
    widths = [CRITIC_WIDTH + i for i in range(critics)]
    critic_hidden = [normal(positions, width) for width in widths]
    critic_weight = [normal(vocabulary, width) for width in widths]
    return hidden, weight, critic_hidden, critic_weight, torch.randint(vocabulary, (positions,), generator=generator)


def materialised(hidden, weight, critic_hidden, critic_weight, targets, config=CONFIG, **kwargs):
    critics = [states @ head.t() for states, head in zip(critic_hidden, critic_weight, strict=True)]
    return avatarl_loss(hidden @ weight.t(), critics, targets, config, **kwargs)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def small_chunks(monkeypatch, elements):
    monkeypatch.setitem(engine.CHUNK_ELEMENTS, "cpu", elements)


def assert_same(found, expected, rel=1e-12):
    """Two (loss, metrics) pairs."""
    assert found[0].item() == pytest.approx(expected[0].item(), rel=rel)
    assert set(found[1]) == set(expected[1])
    for name, value in expected[1].items():
        assert found[1][name].item() == pytest.approx(value.item(), rel=rel, abs=1e-14), name


def errors(found, exact):
    """Relative error of each gradient, ‖found − exact‖ / ‖exact‖."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
