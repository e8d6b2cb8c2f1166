"""The path from hidden states in every precision, alone and under autocast."""

import pytest
import torch

from avatarl import AvataRLConfig, linear_avatarl_loss
from avatarl.objective import OBJECTIVES, BaselineConfig, linear_objective_loss, make_objective, objective_loss

from .cases import (
    CONFIG,
    VOCABULARY,
    assert_same,
    errors,
    gradients,
    materialised,
    random_heads,
    small_chunks,
)


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
