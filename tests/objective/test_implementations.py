"""What computes the linear loss: the choice by name, and the same losses from each."""

import shutil

import pytest
import torch

from avatarl import AvataRLConfig, linear_avatarl_loss
from avatarl.objective import OBJECTIVES, BaselineConfig, LiveAnswers, engine, linear_objective_loss, make_objective
from avatarl.objective.objectives import LossInputs
from avatarl.objective.policy import compute_dtype

from .cases import CONFIG, POSITIONS, VOCABULARY, errors, gradients, random_heads

compiles_cpp = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def sampled_inputs(objective, hidden, weight):
    """The snapshot and the draws that an objective asks for."""
    found = {}
    if objective.needs_snapshot:
        found["snapshot"] = (hidden.detach() + 0.1, weight.detach() * 0.9)
    if objective.num_uniforms:
        found["uniforms"] = torch.rand(POSITIONS, objective.num_uniforms, generator=torch.Generator().manual_seed(1))
    return found


def test_what_impl_means():
    assert [engine.is_compiled(impl) for impl in ("auto", "chunked", "compiled")] == [False, False, True]


@pytest.mark.parametrize("critics", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_metrics_have_the_names_that_the_objective_says(name, critics):
    weight = 0.3 if critics else 0.0
    objective = make_objective(
        name, AvataRLConfig.article(top_k=2, critic_weight=weight), BaselineConfig(distillation_alpha=1.0)
    )
    logits = [LiveAnswers(torch.randn(3, 7)) for _ in range(critics)]
    uniforms = torch.rand(3, objective.num_uniforms)
    targets = torch.zeros(3, dtype=torch.long)
    inputs = LossInputs(torch.randn(3, 7), logits, targets, torch.ones(3), torch.randn(3, 7), uniforms)
    names = tuple(objective.loss_and_gradient(inputs, with_gradient=False).metrics)
    assert names == objective.metric_names([None] * critics)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_one_node_of_a_graph(name, monkeypatch):
    """However many chunks there are: no break, no unrolling, and the eager result."""
    monkeypatch.setitem(engine.CHUNK_ELEMENTS, "cpu", 4 * VOCABULARY)
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(critics=2)
    targets[3] = -100
    objective = make_objective(name, CONFIG, BaselineConfig(samples=3))
    extra = sampled_inputs(objective, hidden, weight)
    graphs = []

    def loss(hidden, weight):
        return linear_objective_loss(objective, hidden, weight, critic_hidden, critic_weight, targets, **extra)

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    expected, metrics = loss(hidden, weight)
    found, found_metrics = torch.compile(loss, fullgraph=True, backend=backend)(hidden, weight)
    assert torch.equal(found, expected)
    assert all(torch.equal(found_metrics[key], value) for key, value in metrics.items())
    for one, other in zip(gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert torch.equal(one, other) and other.abs().sum() > 0
    called = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("chunked_sums" in str(target) for target in called) == 1
    assert not any("topk" in str(target) or "softmax" in str(target) for target in called)


def test_autocast_around_a_compiled_graph():
    """A compiled graph runs with autocast off; the products must be in bfloat16 all the same."""
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(dtype=torch.float32)

    def loss(hidden, weight):
        return linear_avatarl_loss(hidden, weight, critic_hidden, critic_weight, targets, CONFIG)[0]

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = loss(hidden, weight), torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight)
    assert torch.equal(found, expected) and found != loss(hidden, weight)
    for one, other in zip(gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert torch.equal(one, other) and one.dtype == torch.float32


def test_the_operator_keeps_its_word():
    """Fake shapes and dtypes, no aliasing, nothing mutated: PyTorch's own check of an operator."""
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(dtype=torch.bfloat16)
    hidden = hidden.detach().t().contiguous().t()  # strides that a gradient must not take over
    for wants in ((True, True), (False, True), (False, False)):
        arguments = (
            make_objective("avatarl", CONFIG).spec,
            [2, 2],
            [hidden.detach(), weight.detach(), *critic_hidden, *critic_weight],
            targets,
            torch.full((POSITIONS,), 1 / POSITIONS),
            None,
            [],
            *wants,
            False,
        )
        torch.library.opcheck(torch.ops.avatarl.chunked_sums.default, arguments)


@compiles_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels(dtype, monkeypatch):
    """As good as the plain ones, judged against float64; chunks of two sizes, a padded vocabulary, a temperature."""
    monkeypatch.setitem(engine.CHUNK_ROWS, "cpu", 8)  # 8, 8, 7
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(dtype=dtype)
    targets = targets.clamp(max=VOCABULARY - 3)
    targets[3] = -100
    for config in (AvataRLConfig.article(top_k=20, threshold="none"), AvataRLConfig.released(top_k=20)):
        inputs = (critic_hidden, critic_weight, targets, config)
        wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        wide_critic = [[x.double() for x in critic_hidden], [x.double() for x in critic_weight]]
        exact, _ = linear_avatarl_loss(*wide, *wide_critic, targets, config, vocab_size=VOCABULARY - 2)
        plain, _ = linear_avatarl_loss(hidden, weight, *inputs, vocab_size=VOCABULARY - 2)
        found, _ = linear_avatarl_loss(hidden, weight, *inputs, vocab_size=VOCABULARY - 2, impl="compiled")
        assert found.dtype == compute_dtype(dtype)
        epsilon = torch.finfo(dtype).eps
        assert found.item() == pytest.approx(exact.item(), rel=4 * epsilon)
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
        exact = gradients(exact, *wide)
        plain, found = (gradients(loss, hidden, weight) for loss in (plain, found))
        for one, other in zip(errors(found, exact), errors(plain, exact), strict=True):
            assert one <= 1.2 * other + epsilon / 4


@compiles_cpp
def test_compiled_kernels_and_impossible_tokens():
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(dtype=torch.float32)
    weight = torch.cat([weight.detach(), torch.full((1, weight.shape[1]), -torch.inf)]).requires_grad_()
    critic_weight = [torch.cat([critic_weight[0], critic_weight[0][:1]])]
    hidden = hidden.detach().abs().requires_grad_()  # the last token's logit is −∞ everywhere
    inputs = (hidden, weight, critic_hidden, critic_weight, targets, CONFIG)
    plain, found = (linear_avatarl_loss(*inputs, impl=impl) for impl in ("chunked", "compiled"))
    assert found[0].item() == pytest.approx(plain[0].item(), rel=1e-5)
    assert found[1]["entropy"].item() == pytest.approx(plain[1]["entropy"].item(), rel=1e-5)
