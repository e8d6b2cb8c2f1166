"""What every loss over logits promises: counts, ignored positions, precisions, offsets, refusals."""

import pytest
import torch

from avatarl import AvataRLConfig, avatarl_loss, reward_landscape
from avatarl.objective import OBJECTIVES, BaselineConfig, make_objective, objective_loss

from .cases import CONFIGS, extras, random_inputs

BASELINE = BaselineConfig(label_smoothing=0.2, distillation_alpha=0.3, samples=5, ppo_clip=0.1)
FEW = ("article", "released", "per action", "hot", "arithmetic, top-p", "critics propose alone")


def run_objective(name, config, player, critics, targets, **kwargs):
    """Loss, metrics and gradient of any objective, with uniforms and a snapshot where it needs them."""
    objective = make_objective(name, config, BASELINE)
    extra = extras(objective, player)
    player.grad = None
    loss, metrics = objective_loss(objective, player, critics, targets, **extra, **kwargs)
    loss.backward()
    return loss, metrics, player.grad.clone(), extra


@pytest.mark.parametrize("name", ["cross_entropy", "label_smoothing", "distillation", "avatarl", "expected_reward"])
def test_gradcheck(name):
    player, critics, targets = random_inputs(positions=5, vocabulary=9)
    objective = make_objective(name, AvataRLConfig.article(top_k=2), BASELINE)
    assert torch.autograd.gradcheck(lambda z: objective_loss(objective, z, critics, targets)[0], (player,))


def test_with_the_text_as_only_expert_it_is_cross_entropy():
    player, critics, targets = random_inputs()
    config = AvataRLConfig.article(top_k=4, critic_weight=0.0, smoothing=0.0, reward_cap=1.0, entropy_coef=0.0)
    found = run_objective("avatarl", config, player, critics, targets)
    expected = run_objective("cross_entropy", config, player, critics, targets)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-12)
    assert torch.allclose(found[2], expected[2], atol=1e-15)


def test_cross_entropy_is_pytorchs():
    player, critics, targets = random_inputs()
    targets[3] = -100
    loss, _, gradient, _ = run_objective("cross_entropy", None, player, critics, targets)
    player.grad = None
    expected = torch.nn.functional.cross_entropy(player, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item()) and torch.allclose(gradient, player.grad)


def test_reinforce_and_ppo_estimate_the_exact_gradient():
    """Averaged over many draws the sampled gradients are expected_reward's (ppo at ratio 1, before clipping acts)."""
    player, critics, targets = random_inputs(positions=2, vocabulary=7, spread=1.0)
    config = AvataRLConfig.article(top_k=2, threshold="none")
    exact = run_objective("expected_reward", config, player, critics, targets)[2]
    draws, samples = 60_000, 4
    many = player.detach().repeat(draws, 1).requires_grad_()
    critic, target = critics[0].repeat(draws, 1), targets.repeat(draws)
    uniforms = torch.rand(2 * draws, samples, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for name, extra in (("reinforce", {}), ("ppo", {"snapshot_logits": many.detach()})):
        objective = make_objective(name, config, BaselineConfig(samples=samples))
        many.grad = None
        objective_loss(objective, many, critic, target, uniforms=uniforms, num_valid=2, **extra)[0].backward()
        gradients = many.grad.reshape(draws, 2, 7)
        standard_error = gradients.std(0) / draws**0.5
        assert ((gradients.mean(0) - exact).abs() < 5 * standard_error + 1e-12).all(), name


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_ignored_positions_count_nothing(name):
    player, critics, targets = random_inputs()
    ignored = torch.arange(24) % 3 == 0
    masked = targets.masked_fill(ignored, -7)
    loss, metrics, gradient, _ = run_objective(name, CONFIGS["article"], player, critics, masked, ignore_index=-7)
    assert (gradient[ignored] == 0).all()
    everything = run_objective(name, CONFIGS["article"], player, critics, targets)
    # A position's own loss does not know of the others: the mean over the rest is what is left.
    alone = [
        run_objective_at(name, CONFIGS["article"], player, critics, targets, i) for i in range(24) if not ignored[i]
    ]
    assert loss.item() == pytest.approx(sum(alone) / len(alone), rel=1e-9)
    assert torch.allclose(gradient[~ignored] * 16 / 24, everything[2][~ignored])
    assert metrics["entropy"].item() > 0


def run_objective_at(name, config, player, critics, targets, i):
    """The loss at one position, with the draws it has among all positions."""
    mask = torch.full_like(targets, -100)
    mask[i] = targets[i]
    return run_objective(name, config, player, critics, mask)[0].item()


def test_nothing_valid_gives_zero():
    player, (critic,), targets = random_inputs()
    loss, metrics = avatarl_loss(player, critic, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0 and (player.grad == 0).all()
    assert all(value.item() == 0 for value in metrics.values())


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_one_by_eight_is_eight_by_one(name):
    player, critics, targets = random_inputs()
    targets[5:9] = -100
    whole_loss, whole_metrics, whole, extra = run_objective(name, CONFIGS["article"], player, critics, targets)
    player.grad = None
    parts, objective = [], make_objective(name, CONFIGS["article"], BASELINE)
    for rows in torch.arange(24).split(3):
        part_extra = {key: value[rows] for key, value in extra.items()}
        loss, metrics = objective_loss(
            objective, player[rows], [c[rows] for c in critics], targets[rows], num_valid=20, **part_extra
        )
        loss.backward()
        parts.append(metrics)
    assert torch.allclose(player.grad, whole, atol=1e-15)
    for key, value in whole_metrics.items():
        assert sum(part[key] for part in parts).item() == pytest.approx(value.item(), abs=1e-12)


def test_num_valid_may_live_on_the_device():
    player, (critic,), targets = random_inputs()
    as_number, _ = avatarl_loss(player, critic, targets, num_valid=48)
    as_tensor, _ = avatarl_loss(player, critic, targets, num_valid=torch.tensor(48))
    assert as_number.item() == as_tensor.item()
    assert as_number.item() == pytest.approx(avatarl_loss(player, critic, targets)[0].item() / 2)


COUNTS = (0.5, 3, 7.3, torch.tensor(0.5), torch.tensor(3), torch.tensor(7.3, dtype=torch.float64))
COUNTS += (torch.tensor([2.5], dtype=torch.float64), torch.tensor(3, dtype=torch.int32))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_count_divides_and_none_changes_the_dtype(dtype, count):
    """A mean over processes may be below 1, and comes in the dtype of whoever counted."""
    player, (critic,), targets = random_inputs(dtype=dtype)
    one, _ = avatarl_loss(player, critic, targets, num_valid=1)
    loss, metrics = avatarl_loss(player, critic, targets, num_valid=count)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == expected and {value.dtype for value in metrics.values()} == {expected}
    assert loss.item() * float(count) == pytest.approx(one.item(), rel=1e-12 if dtype == torch.float64 else 1e-6)
    gradients = [torch.autograd.grad(each, player)[0].double() for each in (one, loss)]
    assert gradients[1].norm() * float(count) == pytest.approx(gradients[0].norm().item(), rel=1e-2)


@pytest.mark.parametrize("nothing", [0, 0.0, torch.tensor(0), torch.tensor(0.0, dtype=torch.float64)])
def test_a_count_of_nothing_gives_zero(nothing):
    player, (critic,), targets = random_inputs()
    loss, metrics = avatarl_loss(player, critic, targets, num_valid=nothing)
    loss.backward()
    assert loss == 0 and (player.grad == 0).all() and not any(metrics.values())


@pytest.mark.parametrize("config", FEW)
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_an_offset_that_all_logits_share_changes_nothing(name, config):
    """In float32, where a logit of a million has four bits behind the point."""
    player, critics, targets = random_inputs(critics=2, dtype=torch.float32)
    found = []
    for offset in (0.0, 2.0**20):
        shifted = [((logits.detach() * 8).round() / 8 + offset) for logits in (player, *critics)]
        found.append(run_objective(name, CONFIGS[config], shifted[0].requires_grad_(), shifted[1:], targets))
    (loss, metrics, gradient, _), (moved, moved_metrics, moved_gradient, _) = found
    assert moved.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    for key, value in metrics.items():
        assert moved_metrics[key].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), key
    assert (moved_gradient - gradient).norm() <= 1e-5 * gradient.norm()


def test_padded_vocabulary_gets_no_gradient():
    player, (critic,), targets = random_inputs()
    pad = torch.full((24, 3), 99.0, dtype=torch.float64)
    padded = torch.cat([player.detach(), pad], 1).requires_grad_()
    loss, _ = avatarl_loss(padded, torch.cat([critic, pad], 1), targets, vocab_size=29)
    loss.backward()
    plain, _ = avatarl_loss(player, critic, targets)
    plain.backward()
    assert loss.item() == plain.item()
    assert torch.equal(padded.grad[:, :29], player.grad) and (padded.grad[:, 29:] == 0).all()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_impossible_tokens_do_no_harm(name):
    player, critics, targets = random_inputs()
    for logits in (player.data, *critics):
        logits[torch.arange(24), (targets + 1) % 29] = -torch.inf
    loss, metrics, gradient, _ = run_objective(name, CONFIGS["article"], player, critics[:1], targets)
    assert torch.isfinite(gradient).all()
    if name not in ("label_smoothing", "distillation"):  # these do want every token
        assert torch.isfinite(loss) and all(torch.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_lower_precision_follows_float64(dtype, tolerance):
    player, (critic,), targets = random_inputs(dtype=dtype, vocabulary=200)
    loss, _ = avatarl_loss(player, critic, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and player.grad.dtype == dtype
    wide = player.detach().double().requires_grad_()
    expected, _ = avatarl_loss(wide, critic.double(), targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # only the gradient is rounded to dtype
    assert torch.allclose(player.grad.double(), wide.grad, atol=tolerance / 24, rtol=tolerance)


def test_player_and_critic_may_differ_in_dtype():
    player, (critic,), targets = random_inputs(dtype=torch.float32)
    loss, _ = avatarl_loss(player, critic.bfloat16(), targets)
    loss.backward()
    assert torch.isfinite(player.grad).all()


def test_leading_dimensions_and_incoming_gradient():
    player, (critic,), targets = random_inputs()
    shaped = player.detach().reshape(2, 3, 4, 29).requires_grad_()
    loss, _ = avatarl_loss(shaped, critic.reshape(2, 3, 4, 29), targets.reshape(2, 3, 4))
    (3 * loss).backward()
    flat, _ = avatarl_loss(player, critic, targets)
    flat.backward()
    assert torch.allclose(shaped.grad.reshape(24, 29), 3 * player.grad)


def test_rewards_and_critic_get_no_gradient():
    player, (critic,), targets = random_inputs()
    critic.requires_grad_()
    loss, metrics = avatarl_loss(player, critic, targets)
    loss.backward()
    assert critic.grad is None
    assert not any(value.requires_grad for value in metrics.values())


def test_without_autograd():
    player, (critic,), targets = random_inputs()
    with torch.no_grad():
        loss, _ = avatarl_loss(player, critic, targets)
    assert not loss.requires_grad
    assert loss.item() == avatarl_loss(player, critic, targets)[0].item()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z, c, t: (z, c, t[:-1]), r"\(24, 29\).*targets \(23,\)"),
        (lambda z, c, t: (z, c[:, :-1], t), r"\(24, 28\).*\(24, 29\).*vocab_size"),
        (lambda z, c, t: (z, c, t.float()), "targets have dtype torch.float32"),
        (lambda z, c, t: (z.long(), c, t), "player_logits has dtype torch.int64"),
        (lambda z, c, t: (z, c.int(), t), "critic_logits has dtype torch.int32"),
    ],
)
def test_shape_and_dtype_mistakes(change, message):
    player, (critic,), targets = random_inputs()
    with pytest.raises(ValueError, match=message):
        avatarl_loss(*change(player, critic, targets))
    with pytest.raises(ValueError, match=message):
        reward_landscape(*change(player, critic, targets))


def test_mistakes_of_size():
    player, (critic,), targets = random_inputs()
    with pytest.raises(ValueError, match="top_k is 30; expected at most the vocabulary's 29"):
        avatarl_loss(player, critic, targets, AvataRLConfig.article(top_k=30))
    with pytest.raises(ValueError, match="vocab_size is 30"):
        avatarl_loss(player, critic, targets, vocab_size=30)
    with pytest.raises(ValueError, match="2 entries for 1 critics"):
        avatarl_loss(player, critic, targets, AvataRLConfig.article(critic_weight=(0.1, 0.2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_tokens_do_no_harm_to_a_large_entropy_bonus(dtype):
    player, critics, targets = random_inputs(dtype=dtype)
    for logits in (player.data, *critics):
        logits[torch.arange(24), (targets + 1) % 29] = -torch.inf
    config = AvataRLConfig.article(top_k=4, entropy_coef=10.0, temperature=0.1)
    loss, _ = avatarl_loss(player, critics[0], targets, config, num_valid=1)
    loss.backward()
    assert torch.isfinite(player.grad).all()
