"""The path from hidden states against the one from materialised logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avatarl import AvataRLConfig, linear_avatarl_loss
from avatarl.objective import OBJECTIVES, BaselineConfig, engine, linear_objective_loss, make_objective, objective_loss

from .cases import (
    CONFIG,
    CRITIC_WIDTH,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    assert_same,
    gradients,
    materialised,
    random_heads,
    small_chunks,
)


@pytest.mark.parametrize("chunk_rows", [1, 5, 23, 1000])  # 5: chunks of 5, 5, 5, 5, 3
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_from_hidden_states(name, chunk_rows, monkeypatch):
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(critics=2)
    targets[[0, 7, 22]] = -100
    objective = make_objective(name, CONFIG, BaselineConfig(samples=3))
    snapshot = (hidden.detach() + 0.1, weight.detach() * 0.9) if objective.needs_snapshot else None
    uniforms = torch.rand(POSITIONS, 3, generator=torch.Generator().manual_seed(1)) if objective.num_uniforms else None
    expected = objective_loss(
        objective,
        hidden @ weight.t(),
        [states @ head.t() for states, head in zip(critic_hidden, critic_weight, strict=True)],
        targets,
        snapshot_logits=None if snapshot is None else snapshot[0] @ snapshot[1].t(),
        uniforms=uniforms,
    )
    small_chunks(monkeypatch, chunk_rows * VOCABULARY)
    found = linear_objective_loss(
        objective, hidden, weight, critic_hidden, critic_weight, targets, snapshot=snapshot, uniforms=uniforms
    )
    assert_same(found, expected)
    for one, other in zip(gradients(found[0], hidden, weight), gradients(expected[0], hidden, weight), strict=True):
        assert torch.allclose(one, other, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize("positions", [0, 1, 2, 9, 10, 11, 40])
def test_ragged_sizes(positions, monkeypatch):
    small_chunks(monkeypatch, 4 * VOCABULARY + 3)
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(positions)
    found = linear_avatarl_loss(hidden, weight, critic_hidden[0], critic_weight[0], targets, CONFIG)
    expected = materialised(hidden, weight, critic_hidden, critic_weight, targets)
    assert_same(found, expected)
    for one, other in zip(gradients(found[0], hidden, weight), gradients(expected[0], hidden, weight), strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize(
    "positions, most, sizes",
    [(10, 4, [4, 4, 2]), (9, 4, [3, 3, 3]), (5, 2, [2, 2, 1]), (1, 4, [1]), (4, 0, [1, 1, 1, 1])],
)
def test_chunks_cover_all_positions_in_even_parts(positions, most, sizes, monkeypatch):
    small_chunks(monkeypatch, most * VOCABULARY)
    rows = engine.chunk_rows(positions, VOCABULARY, torch.device("cpu"))
    assert [len(part) for part in torch.arange(positions).split(rows)] == sizes


def test_leading_dimensions():
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(24)
    shaped = hidden.detach().reshape(2, 3, 4, WIDTH).requires_grad_()
    found = linear_avatarl_loss(
        shaped,
        weight,
        critic_hidden[0].reshape(2, 3, 4, CRITIC_WIDTH),
        critic_weight[0],
        targets.reshape(2, 3, 4),
        CONFIG,
    )
    expected = materialised(hidden, weight, critic_hidden, critic_weight, targets)
    assert_same(found, expected)
    (by_shape,), (flat,) = gradients(found[0], shaped), gradients(expected[0], hidden)
    assert torch.allclose(by_shape.reshape(24, WIDTH), flat)


def test_strided_inputs():
    hidden, weight, critic_hidden, critic_weight, targets = random_heads()
    strided = [x.detach().t().contiguous().t().requires_grad_() for x in (hidden, weight)]
    found = linear_avatarl_loss(*strided, critic_hidden, critic_weight, targets, CONFIG)
    expected = materialised(hidden, weight, critic_hidden, critic_weight, targets)
    for one, other in zip(gradients(found[0], *strided), gradients(expected[0], hidden, weight), strict=True):
        assert torch.allclose(one, other)


def test_padded_vocabulary(monkeypatch):
    """Padding rows of either head change nothing and get gradient 0."""
    small_chunks(monkeypatch, 6 * VOCABULARY)
    hidden, weight, critic_hidden, critic_weight, targets = random_heads()
    padded = torch.cat([weight.detach(), torch.full((3, WIDTH), 9.0, dtype=torch.float64)]).requires_grad_()
    critic_padded = torch.cat([critic_weight[0], torch.full((9, CRITIC_WIDTH), 9.0, dtype=torch.float64)])
    found = linear_avatarl_loss(hidden, padded, critic_hidden, [critic_padded], targets, CONFIG, vocab_size=VOCABULARY)
    expected = materialised(hidden, weight, critic_hidden, critic_weight, targets)
    assert_same(found, expected)
    by_hidden, by_padded = gradients(found[0], hidden, padded)
    expected_hidden, expected_weight = gradients(expected[0], hidden, weight)
    assert torch.allclose(by_hidden, expected_hidden) and torch.allclose(by_padded[:VOCABULARY], expected_weight)
    assert by_padded.shape == padded.shape and (by_padded[VOCABULARY:] == 0).all()


def test_tied_head_weight():
    """The head weight is the embedding too: both uses add up, also when the loss is scaled."""
    _, weight, critic_hidden, critic_weight, targets = random_heads()
    tokens = torch.arange(POSITIONS) % VOCABULARY

    def gradient(loss_of):
        hidden = torch.tanh(weight[tokens])
        loss, _ = loss_of(hidden, weight, critic_hidden, critic_weight, targets, CONFIG)
        return gradients(-2.5 * loss + weight.square().sum(), weight)[0]

    assert torch.allclose(gradient(linear_avatarl_loss), gradient(materialised), atol=1e-13)


def test_incoming_gradient_and_a_second_backward():
    hidden, weight, critic_hidden, critic_weight, targets = random_heads()
    loss, _ = linear_avatarl_loss(hidden, weight, critic_hidden, critic_weight, targets, CONFIG)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    for leaf, gradient in zip((hidden, weight), once, strict=True):
        assert torch.allclose(leaf.grad, 4 * gradient)


def test_gradient_of_one_input_only(monkeypatch):
    hidden, weight, critic_hidden, critic_weight, targets = random_heads()
    both = gradients(
        linear_avatarl_loss(hidden, weight, critic_hidden, critic_weight, targets, CONFIG)[0], hidden, weight
    )
    inputs = (critic_hidden, critic_weight, targets, CONFIG)
    (alone,) = gradients(linear_avatarl_loss(hidden.detach(), weight, *inputs)[0], weight)
    assert torch.equal(alone, both[1])
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *_: pytest.fail("the head's gradient was not asked for"))
    (alone,) = gradients(linear_avatarl_loss(hidden, weight.detach(), *inputs)[0], hidden)
    assert torch.equal(alone, both[0])
    assert not linear_avatarl_loss(hidden.detach(), weight.detach(), *inputs)[0].requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss, _ = linear_avatarl_loss(hidden, weight, *inputs)
        assert not loss.requires_grad


def test_critic_gets_no_gradient():
    hidden, weight, (critic_hidden,), (critic_weight,), targets = random_heads()
    critic_hidden.requires_grad_()
    critic_weight.requires_grad_()
    linear_avatarl_loss(hidden, weight, critic_hidden, critic_weight, targets, CONFIG)[0].backward()
    assert critic_hidden.grad is None and critic_weight.grad is None


def test_states_from_inference_mode_may_judge():
    """What a frozen critic computes under inference_mode can be used in training."""
    hidden, weight, (critic_hidden,), (critic_weight,), targets = random_heads()
    with torch.inference_mode():
        judged = critic_hidden + 0
    linear_avatarl_loss(hidden, weight, judged, critic_weight, targets, CONFIG)[0].backward()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("name", ["avatarl", "cross_entropy", "label_smoothing", "distillation", "expected_reward"])
def test_gradcheck(name, monkeypatch):
    small_chunks(monkeypatch, 2 * 7)
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(positions=3, vocabulary=7)
    targets[1] = -100
    objective = make_objective(name, AvataRLConfig.article(top_k=2))

    def loss(hidden, weight):
        return linear_objective_loss(objective, hidden, weight, critic_hidden, critic_weight, targets)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


class LargestOutput(TorchDispatchMode):
    """Remembers the largest number of elements that any operation answered with."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_of_all_logits_is_held(monkeypatch):
    positions, vocabulary, chunk_rows = 64, 200, 4
    small_chunks(monkeypatch, chunk_rows * vocabulary)
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(positions, vocabulary, critics=2)
    with LargestOutput() as seen:
        linear_avatarl_loss(hidden, weight, critic_hidden, critic_weight, targets, CONFIG)[0].backward()
    # The head's own gradient is (V, d); everything else fits a chunk. (N, V) would be 12,800.
    assert seen.numel == max(vocabulary * WIDTH, chunk_rows * vocabulary) == 1400
    with LargestOutput() as seen:
        materialised(hidden, weight, critic_hidden, critic_weight, targets)[0].backward()
    assert seen.numel == positions * vocabulary


def test_num_valid_and_ignored_positions(monkeypatch):
    small_chunks(monkeypatch, 4 * VOCABULARY)
    hidden, weight, critic_hidden, critic_weight, targets = random_heads()
    targets[::4] = -7
    inputs = (hidden, weight, critic_hidden, critic_weight, targets, CONFIG)
    found = linear_avatarl_loss(*inputs, ignore_index=-7, num_valid=torch.tensor(50))
    assert_same(found, materialised(*inputs, ignore_index=-7, num_valid=50))
    (by_hidden,) = gradients(found[0], hidden)
    assert (by_hidden[::4] == 0).all() and (by_hidden[1] != 0).any()
    for count in (0.5, torch.tensor(0.5, dtype=torch.float64), torch.tensor([3])):
        assert_same(
            linear_avatarl_loss(*inputs, ignore_index=-7, num_valid=count),
            materialised(*inputs, ignore_index=-7, num_valid=float(count)),
        )
    for nothing in (dict(ignore_index=-7, num_valid=0), dict(ignore_index=-7, num_valid=torch.tensor(0))):
        loss, metrics = linear_avatarl_loss(*inputs, **nothing)
        assert loss.item() == 0 and all(value.item() == 0 for value in metrics.values())
        assert all((gradient == 0).all() for gradient in gradients(loss, hidden, weight))


MISTAKES = {
    "impl": (lambda a: a | {"impl": "fast"}, r"impl is 'fast'; expected one of 'auto', "),
    "targets": (lambda a: a | {"targets": a["targets"][:-1]}, r"hidden \(23, 7\) do not fit targets \(22,\)"),
    "float targets": (lambda a: a | {"targets": a["targets"].float()}, "targets have dtype torch.float32"),
    "integer hidden": (lambda a: a | {"hidden": a["hidden"].long()}, "hidden has dtype torch.int64"),
    "integer head": (lambda a: a | {"head_weight": a["head_weight"].long()}, "head_weight has dtype torch.int64"),
    "head width": (
        lambda a: a | {"head_weight": a["head_weight"][:, :-1]},
        r"head_weight \(31, 6\) does not fit hidden \(23, 7\); expected \(V, 7\)",
    ),
    "head dimensions": (lambda a: a | {"head_weight": a["head_weight"][0]}, r"head_weight \(7,\) does not fit"),
    "mixed dtypes": (
        lambda a: a | {"head_weight": a["head_weight"].float()},
        "hidden is torch.float64 and head_weight torch.float32; expected one dtype",
    ),
    "critic dtypes": (
        lambda a: a | {"critic_hidden": a["critic_hidden"].float()},
        "critic_hidden is torch.float32 and critic_head_weight torch.float64",
    ),
    "critic positions": (
        lambda a: a | {"critic_hidden": a["critic_hidden"][1:]},
        r"critic_hidden \(22, 5\) do not fit targets \(23,\)",
    ),
    "critic vocabulary": (
        lambda a: a | {"critic_head_weight": a["critic_head_weight"][:-1]},
        r"critic_head_weight \(30, 5\) and head_weight of 31 rows have different vocabularies.*vocab_size",
    ),
    "critic without head": (
        lambda a: a | {"critic_head_weight": None},
        "1 critic_hidden but 0 critic_head_weight given",
    ),
    "no critic": (
        lambda a: a | {"critic_hidden": None, "critic_head_weight": None},
        "'avatarl' needs a critic and none is given",
    ),
    "vocab_size too large": (
        lambda a: a | {"vocab_size": 32},
        r"vocab_size is 32 but head_weight \(31, 7\) has 31 rows; expected 1 to 31",
    ),
    "vocab_size too small": (lambda a: a | {"vocab_size": 0}, "vocab_size is 0"),
    "top_k": (
        lambda a: a | {"config": AvataRLConfig.article(top_k=32)},
        "top_k is 32; expected at most the vocabulary's 31",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    hidden, weight, critic_hidden, critic_weight, targets = random_heads()
    arguments = dict(
        hidden=hidden,
        head_weight=weight,
        critic_hidden=critic_hidden[0],
        critic_head_weight=critic_weight[0],
        targets=targets,
        config=CONFIG,
    )
    linear_avatarl_loss(**arguments)
    change, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        linear_avatarl_loss(**change(arguments))


@pytest.mark.parametrize("name, missing", [("reinforce", "uniforms None"), ("ppo", "needs the snapshot's logits")])
def test_sampled_objectives_say_what_they_miss(name, missing):
    hidden, weight, critic_hidden, critic_weight, targets = random_heads()
    objective = make_objective(name, CONFIG, BaselineConfig(samples=3))
    inputs = (hidden, weight, critic_hidden, critic_weight, targets)
    with pytest.raises(ValueError, match=missing):
        linear_objective_loss(objective, *inputs)
    with pytest.raises(ValueError, match=rf"uniforms \(23, 2\) do not fit; '{name}' needs \(23, 3\)"):
        linear_objective_loss(objective, *inputs, snapshot=(hidden, weight), uniforms=torch.rand(23, 2))
    with pytest.raises(ValueError, match=r"snapshot \(23, 6\)|does not fit snapshot"):
        linear_objective_loss(objective, *inputs, snapshot=(hidden[:, :-1], weight), uniforms=torch.rand(POSITIONS, 3))
