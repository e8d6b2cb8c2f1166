"""torch.compile in one graph, and a host that never waits for the device."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from avatarl import AvataRLConfig, avatarl_loss, linear_avatarl_loss
from avatarl.objective import OBJECTIVES, BaselineConfig, engine, linear_objective_loss, make_objective, objective_loss

from .cases import random_inputs

CONFIGS = {
    "article": AvataRLConfig.article(top_k=4),
    "released": AvataRLConfig.released(),
    "arithmetic": AvataRLConfig.article(top_k=4, pool="arithmetic", top_p=0.8),
}


def loss_and_gradient(function, *inputs, leaves):
    loss, metrics = function(*inputs)
    return loss.detach(), metrics, torch.autograd.grad(loss, leaves)


def assert_compiles(config, backend, shapes):
    torch._dynamo.reset()
    compiled = torch.compile(avatarl_loss, fullgraph=True, backend=backend)
    for positions, vocabulary in shapes:
        player, (critic,), targets = random_inputs(positions, vocabulary)
        targets[1] = -100
        expected = loss_and_gradient(avatarl_loss, player, critic, targets, config, leaves=player)
        found = loss_and_gradient(compiled, player, critic, targets, config, leaves=player)
        assert torch.allclose(found[0], expected[0], rtol=1e-12)
        assert torch.allclose(found[2][0], expected[2][0], rtol=1e-10, atol=1e-14)
        assert expected[2][0].abs().sum() > 0
        for name, value in expected[1].items():
            assert torch.allclose(found[1][name], value, rtol=1e-12), name


@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph(name):
    """fullgraph=True raises where Python would have to look at a value."""
    assert_compiles(CONFIGS[name], "aot_eager", [(6, 17)])


def test_one_graph_for_several_shapes():
    """The second shape makes the sizes symbols; the third compiles nothing new."""
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        assert_compiles(CONFIGS["article"], "aot_eager", [(6, 17), (9, 23), (11, 29)])


@pytest.mark.slow
def test_one_graph_with_inductor():
    assert_compiles(CONFIGS["article"], "inductor", [(6, 17)])


def test_linear_loss_in_one_graph(monkeypatch):
    monkeypatch.setitem(engine.CHUNK_ELEMENTS, "cpu", 4 * 17)
    torch._dynamo.reset()
    compiled = torch.compile(linear_avatarl_loss, fullgraph=True, backend="aot_eager")
    player, (critic,), targets = random_inputs(6, 17)
    weight = torch.eye(17, dtype=torch.float64).requires_grad_()
    inputs = (player, weight, critic, torch.eye(17, dtype=torch.float64), targets, CONFIGS["article"])
    expected = loss_and_gradient(linear_avatarl_loss, *inputs, leaves=(player, weight))
    found = loss_and_gradient(compiled, *inputs, leaves=(player, weight))
    assert torch.allclose(found[0], expected[0])
    assert all(torch.allclose(a, b) for a, b in zip(found[2], expected[2], strict=True))


@pytest.mark.parametrize(
    "loss, fullgraph", [(avatarl_loss, True), (linear_avatarl_loss, True), (linear_avatarl_loss, False)]
)
def test_settings_are_never_taken_for_others(loss, fullgraph):
    """Made inside of what is compiled or given to it, two at once, and new from call to call."""
    torch._dynamo.reset()
    player, critics, targets = random_inputs(6, 17, critics=2)
    inputs = (player, critics, targets)
    if loss is linear_avatarl_loss:
        head = torch.eye(17, dtype=torch.float64)
        inputs = (player, head, critics, [head, head], targets)

    def both(top_k, weight, given):
        made = dataclasses.replace(AvataRLConfig.released(top_k=top_k), critic_weight=(weight, 0.25))
        return torch.stack([loss(*inputs, config)[0] for config in (made, given)])

    compiled, seen = torch.compile(both, fullgraph=fullgraph, backend="eager"), set()
    for number in range(3):  # what has changed is a symbol to the compiler, if it is let
        call = 3 + number, 0.1 + number / 8, AvataRLConfig.article(top_k=2 + number, reward_cap=1.0 + number)
        expected = both(*call)
        torch.testing.assert_close(compiled(*call), expected)
        seen.update(expected.tolist())
    assert len(seen) == 6


# Operations for which a host waits: a value comes to Python, a shape depends on values, or a constant of Python's
# becomes a tensor (lift_fresh), which on a GPU is a copy that waits.
WAITS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
    "equal",
    "allclose",
    "lift_fresh",
    "index",  # with a mask
    "index_put",
    "index_put_",
)
MASKED = ("index", "index_put", "index_put_")


class Waits(TorchDispatchMode):
    """Lists the operations that would make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS and (name not in MASKED or _has_mask(args[1])):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def _has_mask(indices):
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def both_paths(name, config, device="cpu", dtype=torch.float32, positions=8, vocabulary=19):
    """Forward and backward of an objective from logits and from hidden states, every optional argument given."""
    objective = make_objective(name, config, BaselineConfig(samples=3))

    def normal(*shape, grad=False):
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=grad)

    player, critics = normal(positions, vocabulary, grad=True), [normal(positions, vocabulary) for _ in range(2)]
    hidden, weight = normal(positions, 5, grad=True), normal(vocabulary, 5, grad=True)
    critic_hidden, critic_weight = [normal(positions, 6) for _ in critics], [normal(vocabulary, 6) for _ in critics]
    snapshot, heads = normal(positions, vocabulary), (normal(positions, 5), normal(vocabulary, 5))
    targets = torch.full((positions,), 2, dtype=torch.int64, device=device)
    extra = {"uniforms": torch.rand(positions, 3, device=device)} if objective.num_uniforms else {}
    count = torch.full((), 5, device=device)

    def run():
        for num_valid in (None, 5, 5.0, count):
            common = dict(num_valid=num_valid, vocab_size=vocabulary - 2, **extra)
            earlier = {"snapshot_logits": snapshot} if objective.needs_snapshot else {}
            objective_loss(objective, player, critics, targets, **earlier, **common)[0].backward()
            earlier = {"snapshot": heads} if objective.needs_snapshot else {}
            linear_objective_loss(
                objective, hidden, weight, critic_hidden, critic_weight, targets, **earlier, **common
            )[0].backward()
        return player.grad, weight.grad

    return run


@pytest.mark.parametrize("vocabulary", [19, 2051])  # the largest of many logits are found by blocks
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_host_never_waits(name, config, vocabulary, monkeypatch):
    monkeypatch.setitem(engine.CHUNK_ELEMENTS, "cpu", 3 * vocabulary)
    run = both_paths(name, CONFIGS[config], vocabulary=vocabulary)
    with Waits() as waits:
        run()
    assert waits.seen == []


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.as_tensor(5.0, device=x.device),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_waiting_would_be_noticed(wait):
    with Waits() as waits:
        wait(torch.ones(3))
    assert waits.seen


@pytest.mark.parametrize("vocabulary", [19, 2051])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_nothing_depends_on_data(name, vocabulary):
    """Fake tensors have shapes and no values: whatever asked for a value would raise."""
    with FakeTensorMode():
        gradients = both_paths(name, CONFIGS["article"], vocabulary=vocabulary)()
        assert [tuple(gradient.shape) for gradient in gradients] == [(8, vocabulary), (vocabulary, 5)]
        with pytest.raises(DataDependentOutputException):
            gradients[0].sum().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_host_never_waits_for_a_gpu(name, config):
    run = both_paths(name, CONFIGS[config], device="cuda")
    run()  # libraries may wait while they set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
