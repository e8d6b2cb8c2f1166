"""The path from hidden states against the one from materialised logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avatarl import AvataRLConfig, avatarl_loss, linear_avatarl_loss
from avatarl.objective import OBJECTIVES, BaselineConfig, linear_objective_loss, make_objective, objective_loss
from avatarl.objective.fused import chunked

from .landscapes import oracle, settings_of

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
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", elements)


def assert_same(found, expected, rel=1e-12):
    """Two (loss, metrics) pairs."""
    assert found[0].item() == pytest.approx(expected[0].item(), rel=rel)
    assert set(found[1]) == set(expected[1])
    for name, value in expected[1].items():
        assert found[1][name].item() == pytest.approx(value.item(), rel=rel, abs=1e-14), name


@pytest.mark.parametrize("chunk_rows", [1, 5, 23, 1000])  # 5: chunks of 5, 5, 5, 5, 3
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_from_hidden_states(name, chunk_rows, monkeypatch):
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(critics=2)
    targets[[0, 7, 22]] = -100
    objective = make_objective(name, CONFIG, BaselineConfig(samples=3))
    snapshot = (hidden.detach() + 0.1, weight.detach() * 0.9) if objective.needs_snapshot else None
    uniforms = torch.rand(POSITIONS, 3, generator=torch.Generator().manual_seed(1)) if objective.num_draws else None
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


@pytest.mark.parametrize("config", [AvataRLConfig.article(), AvataRLConfig.article(threshold="none", top_k=64)])
def test_gpt2s_vocabulary_against_the_oracle(config, monkeypatch):
    """50,257 tokens, two chunks, from hidden states; the oracle has the gradient over the logits."""
    vocabulary = 50_257
    small_chunks(monkeypatch, 2 * vocabulary)
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(positions=3, vocabulary=vocabulary)
    logits, critic_logits = hidden @ weight.t(), critic_hidden[0] @ critic_weight[0].t()
    expected, by_logits = oracle("avatarl", logits, [critic_logits], targets, **settings_of(config))
    found, _ = linear_avatarl_loss(hidden, weight, critic_hidden, critic_weight, targets, config)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    by_hidden, by_weight = gradients(found, hidden, weight)
    assert torch.allclose(by_hidden, by_logits @ weight, atol=1e-14, rtol=1e-10)
    assert torch.allclose(by_weight, by_logits.t() @ hidden, atol=1e-14, rtol=1e-10)


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
    rows = chunked.chunk_rows(positions, VOCABULARY, torch.device("cpu"))
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
    monkeypatch.setattr(chunked, "_add_product", lambda *_: pytest.fail("the head's gradient was not asked for"))
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


def errors(found, exact):
    """Relative error of each gradient, ‖found − exact‖ / ‖exact‖."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_that_of_the_materialised_path(dtype, monkeypatch):
    """Judged against float64 on the same rounded inputs: no worse than logits at once, in the same dtype."""
    small_chunks(monkeypatch, 11 * 100)
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(positions=60, vocabulary=100, dtype=dtype)
    # Continuous rewards: with a threshold, rounding could decide who is paid.
    config = AvataRLConfig.article(top_k=100, threshold="none")
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wide_critic = ([x.double() for x in critic_hidden], [x.double() for x in critic_weight])
    exact_loss, _ = materialised(*wide, *wide_critic, targets, config)
    exact = gradients(exact_loss, *wide)
    found_loss, _ = linear_avatarl_loss(hidden, weight, critic_hidden, critic_weight, targets, config)
    plain_loss, _ = materialised(hidden, weight, critic_hidden, critic_weight, targets, config)
    assert found_loss.dtype == plain_loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    epsilon = torch.finfo(dtype).eps
    slack = epsilon / 4 if dtype in (torch.bfloat16, torch.float16) else 4 * epsilon  # sums in another order
    assert abs(found_loss - exact_loss) <= 1.1 * abs(plain_loss - exact_loss) + slack * exact_loss
    found, plain = gradients(found_loss, hidden, weight), gradients(plain_loss, hidden, weight)
    for one, other, gradient in zip(errors(found, exact), errors(plain, exact), found, strict=True):
        assert gradient.dtype == dtype
        assert one <= 1.1 * other + slack
        assert one <= 4 * epsilon


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"reinforce", "ppo"}))
def test_a_confident_player_in_half_precision(name, dtype):
    """At π(target) ≈ 0.99 the gradient is a small difference of large numbers: it must be taken before rounding."""
    hidden, weight, *_ = random_heads(positions=400, dtype=torch.float64)
    hidden, weight = (hidden * 3).to(dtype).detach(), weight.to(dtype).detach()
    largest, targets = (hidden.double() @ weight.double().t()).softmax(dim=1).max(dim=1)
    # Confident positions alone: one that is not would outweigh them all.
    targets[(largest < 0.98) | (largest > 0.999)] = -100
    assert (targets >= 0).sum() > 20
    critic_hidden, critic_weight = [hidden], [weight]  # it agrees with the player
    objective = make_objective(name, AvataRLConfig.article(top_k=4), BaselineConfig(distillation_alpha=0.5))
    rest = (critic_hidden, critic_weight, targets)
    narrow, wide = [[x.to(t).requires_grad_() for x in (hidden, weight)] for t in (dtype, torch.float64)]
    wide_rest = ([hidden.double()], [weight.double()], targets)
    exact = gradients(linear_objective_loss(objective, *wide, *wide_rest)[0], *wide)
    found = gradients(linear_objective_loss(objective, *narrow, *rest)[0], *narrow)
    plain_logits = narrow[0] @ narrow[1].t()
    plain = gradients(objective_loss(objective, plain_logits, [plain_logits.detach()], targets)[0], *narrow)
    for one, other in zip(errors(found, exact), errors(plain, exact), strict=True):
        assert one <= 1.2 * other + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["avatarl", "distillation", "expected_reward"])
@pytest.mark.parametrize("critic_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_player_and_critic_of_different_dtypes(name, dtype, critic_dtype):
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(dtype=torch.float64)
    expected, _ = linear_objective_loss(
        make_objective(name, CONFIG), hidden, weight, critic_hidden, critic_weight, targets
    )
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    critics = ([x.to(critic_dtype) for x in critic_hidden], [x.to(critic_dtype) for x in critic_weight])
    found, _ = linear_objective_loss(make_objective(name, CONFIG), hidden, weight, *critics, targets)
    found.backward()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


def test_head_gradient_is_summed_in_float32(monkeypatch):
    """Many chunks in bfloat16: each addition would round, were the sum held in bfloat16."""
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(positions=150, dtype=torch.bfloat16)
    inputs = (hidden, weight, critic_hidden, critic_weight, targets, CONFIG)
    whole = gradients(linear_avatarl_loss(*inputs)[0], weight)[0].float()
    small_chunks(monkeypatch, VOCABULARY)
    parts = gradients(linear_avatarl_loss(*inputs)[0], weight)[0].float()
    assert (parts - whole).norm() / whole.norm() < 4e-3


def test_a_gradient_scalers_factor_beyond_float16():
    """65,536 is the first factor of torch.amp.GradScaler and above float16's largest number."""
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(positions=1000, dtype=torch.float16)
    loss, _ = linear_avatarl_loss(hidden, weight, critic_hidden, critic_weight, targets, CONFIG)
    (by_hidden,) = gradients(loss * 65536.0, hidden)
    assert torch.isfinite(by_hidden).all() and by_hidden.abs().sum() > 0


def test_bfloat16_autocast(monkeypatch):
    """Products in bfloat16, the rest in float32; gradients in the inputs' own dtype."""
    small_chunks(monkeypatch, 6 * VOCABULARY)
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(dtype=torch.float32)
    exact = gradients(materialised(hidden, weight, critic_hidden, critic_weight, targets)[0], hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_avatarl_loss(hidden, weight, critic_hidden, critic_weight, targets, CONFIG)
        plain = materialised(hidden, weight, critic_hidden, critic_weight, targets)
    assert_same(found, plain, rel=1e-5)
    assert found[0].dtype == torch.float32
    found, plain = gradients(found[0], hidden, weight), gradients(plain[0], hidden, weight)
    assert all(gradient.dtype == torch.float32 for gradient in found)
    for one, other in zip(errors(found, exact), errors(plain, exact), strict=True):
        assert 0 < one <= 1.2 * other + 1e-3 and one < 0.03  # above 0: the products were taken in bfloat16


def test_bfloat16_states_and_float32_head_under_autocast():
    hidden, weight, critic_hidden, critic_weight, targets = random_heads(dtype=torch.float32)
    narrow = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_avatarl_loss(narrow, weight, critic_hidden, critic_weight, targets, CONFIG)
    by_hidden, by_weight = gradients(loss, narrow, weight)
    assert by_hidden.dtype == torch.bfloat16 and by_weight.dtype == torch.float32


def test_autocast_leaves_losses_and_float64_alone():
    """The materialised loss does not turn to bfloat16 inside; float64 stays float64, as autocast has it."""
    hidden, weight, critic_hidden, critic_weight, targets = random_heads()
    logits, critics = (hidden @ weight.t()).detach().float(), critic_hidden[0] @ critic_weight[0].t()
    for name in sorted(set(OBJECTIVES) - {"reinforce", "ppo"}):
        objective = make_objective(name, CONFIG)
        expected = objective_loss(objective, logits, critics, targets)
        with torch.autocast("cpu", torch.bfloat16):
            found = objective_loss(objective, logits, critics, targets)
        assert all(torch.equal(found[1][key], value) for key, value in expected[1].items()), name
    inputs = (hidden, weight, critic_hidden, critic_weight, targets, CONFIG)
    expected = linear_avatarl_loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_avatarl_loss(*inputs)[0], expected[0])


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
        r"critic_head_weight \(30, 5\) and head_weight \(31, 7\) have different vocabularies.*vocab_size",
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
