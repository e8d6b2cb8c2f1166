"""What the Triton kernels must do, on small shapes that still cross their tiles.

Not collected by itself: test_triton.py runs this file in processes of its own, under Triton's interpreter and on a GPU.
Whether Triton interprets or compiles is settled when it is first imported, and other tests import it to compile.
"""

import pytest
import torch
import triton

from avatarl import AvataRLConfig
from avatarl.objective import linear_objective_loss, make_objective
from avatarl.objective import top_k as blocks
from avatarl.objective.fused import chunked, triton_kernels
from avatarl.objective.kernels import PLAIN
from avatarl.objective.protocol import Rows

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
KERNELS = triton_kernels.TritonKernels()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Positions, vocabulary, padding. With tiles of 16: below one, one, one and a bit, several and a bit.
SHAPES = [(1, 1, 0), (2, 15, 1), (2, 16, 0), (3, 17, 3), (2, 131, 3), (0, 131, 0)]
# 4 layers of 32 blocks (K = 4) and 3 more tokens.
BLOCKS_VOCABULARY = 131
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of ∞ − ∞ and log 0 under the interpreter


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton_kernels, "STATISTICS_TILE", 16)
    monkeypatch.setattr(triton_kernels, "GRADIENT_TILE", 16)
    monkeypatch.setattr(blocks, "SMALL_VOCABULARY", 8)


def random_logits(positions, vocabulary, dtype=torch.float32, seed=0, padding=0, spread=3.0):
    """(N, V) on the device; with ``padding``, columns of a wider tensor whose other columns hold 99."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(positions, vocabulary, generator=generator) * spread).to(DEVICE, dtype)
    return torch.nn.functional.pad(logits, (0, padding), value=99.0)[:, :vocabulary]


def exact_log_probs(logits, temperature):
    return (logits.double() / temperature).log_softmax(dim=1).clamp(min=-(2.0**64))


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("positions, vocabulary, padding", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype, positions, vocabulary, padding, temperature):
    logits = random_logits(positions, vocabulary, dtype, padding=padding)
    largest, log_total, entropy = KERNELS.statistics(logits, temperature)
    assert largest.dtype == log_total.dtype == entropy.dtype == torch.float32
    assert torch.equal(largest, logits.amax(dim=1).float())
    log_probs = exact_log_probs(logits, temperature)
    assert torch.allclose(log_total.double(), -log_probs.amax(dim=1), rtol=1e-6, atol=1e-6)
    assert torch.allclose(entropy.double(), -(log_probs.exp() * log_probs).sum(dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["rising", "falling", "one far above", "equal"])
def test_statistics_of_far_apart_logits(order):
    """Every logit, none, or one a new maximum; sums are rescaled by factors down to 0."""
    logits = torch.linspace(-3e4, 3e4, 53, device=DEVICE).repeat(2, 1)
    logits[1] /= 1e3
    if order == "falling":
        logits = logits.flip(1)
    elif order == "one far above":
        logits[:, 20] = 1e38
    elif order == "equal":
        logits[0], logits[1] = torch.finfo(torch.float32).min, 7.0
    largest, log_total, entropy = KERNELS.statistics(logits, 1.0)
    log_probs = exact_log_probs(logits, 1.0)
    assert torch.equal(largest, logits.amax(dim=1))
    assert torch.allclose(log_total.double(), -log_probs.amax(dim=1), rtol=1e-6)
    assert torch.allclose(entropy.double(), -(log_probs.exp() * log_probs).sum(dim=1), rtol=1e-5, atol=1e-6)


def impossible_logits(dtype=torch.float32):
    """Rows with some −∞: at the first tokens, at the last, a whole tile, all but one."""
    logits = random_logits(4, 53, dtype)
    logits[0, :3] = logits[1, -3:] = logits[2, 16:33] = -torch.inf
    logits[3, :40] = logits[3, 41:] = -torch.inf
    return logits


@pytest.mark.parametrize("dtype", DTYPES)
def test_impossible_tokens(dtype):
    logits = impossible_logits(dtype)
    largest, log_total, entropy = KERNELS.statistics(logits, 1.3)
    log_probs = exact_log_probs(logits, 1.3)
    assert torch.equal(largest, logits.amax(dim=1).float())
    assert torch.allclose(log_total.double(), -log_probs.amax(dim=1), rtol=1e-6)
    assert torch.allclose(entropy.double(), -(log_probs.exp() * log_probs).sum(dim=1), rtol=1e-5, atol=1e-6)
    bonus = torch.full_like(entropy, 1e6)
    gradient = KERNELS.gradient_(logits.clone(), 1.3, largest, entropy, bonus)
    assert gradient.isfinite().all() or dtype == torch.float16
    assert (gradient[logits == -torch.inf] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 20, 52, slice(None)])
def test_not_a_number_stays_one(value, where):
    logits = random_logits(2, 53)
    logits[0, where] = value
    found, expected = KERNELS.statistics(logits, 1.0), PLAIN.statistics(logits, 1.0)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert torch.allclose(one, other, rtol=1e-5, equal_nan=True)
        assert one[0].isfinite() == (value == -torch.inf and where != slice(None)) and one[1].isfinite()
    gradients = [kernels.gradient_(logits.clone(), 1.0, *expected[:2], None) for kernels in (KERNELS, PLAIN)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("with_bonus", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("positions, vocabulary, padding", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(dtype, positions, vocabulary, padding, temperature, with_bonus):
    logits = random_logits(positions, vocabulary, dtype, padding=padding)
    wide = logits.double()
    shifted = (wide - wide.amax(dim=1, keepdim=True)) / temperature
    constant, bonus = (torch.linspace(low, 1, positions, device=DEVICE) for low in (-1, 0.5))
    factor = constant.unsqueeze(1) + bonus.unsqueeze(1) * shifted if with_bonus else constant.unsqueeze(1)
    largest = logits.amax(dim=1).float()
    found = KERNELS.gradient_(logits, temperature, largest, constant, bonus if with_bonus else None)
    assert found is logits and found.dtype == dtype
    epsilon = torch.finfo(dtype).eps  # the interpreter cuts off bfloat16's last bits where a GPU rounds them
    assert torch.allclose(found.double(), shifted.exp() * factor, rtol=max(epsilon, 1e-5), atol=1e-6)
    if padding and positions:
        assert (logits.as_strided((positions, padding), logits.stride(), vocabulary) == 99).all()


CONFIGS = {
    "article": AvataRLConfig.article(top_k=4),
    "one proposal": AvataRLConfig.article(top_k=1, threshold="none"),
    "one proposal above the mean": AvataRLConfig.article(top_k=1),
    "one proposal, arithmetic": AvataRLConfig.article(top_k=1, pool="arithmetic"),
    "many proposals": AvataRLConfig.article(top_k=15, threshold="none"),
    "no threshold": AvataRLConfig.article(top_k=4, threshold="none"),
    "released": AvataRLConfig.released(),
    "arithmetic": AvataRLConfig.article(top_k=4, pool="arithmetic"),
    "arithmetic, everything kept": AvataRLConfig.article(top_k=4, pool="arithmetic", threshold="none"),
    "no cap": AvataRLConfig.article(top_k=4, threshold="none", reward_cap=None, reward_scale=1),
    "cap out of reach": AvataRLConfig.article(top_k=4, threshold="none", reward_cap=1000, reward_scale=2),
    "critic only": AvataRLConfig.article(top_k=4, threshold="none", reality_weight=0, critic_weight=1),
    "text only": AvataRLConfig.article(top_k=4, threshold="none", reality_weight=1, critic_weight=0),
    "arithmetic, text only": AvataRLConfig(top_k=4, pool="arithmetic", reality_weight=1, critic_weight=0, smoothing=0),
    "no smoothing": AvataRLConfig.article(top_k=4, smoothing=0, threshold="none"),
    "critics propose alone": AvataRLConfig.article(top_k=4, player_proposes=False),
    "tail cut": AvataRLConfig.article(top_k=4, top_p=0.5, threshold="none"),
    "tail not cut": AvataRLConfig.article(top_k=4, top_p=1, threshold="none"),
}


def assert_same_judgement(player, critics, targets, config):
    """Also where probabilities are stored as the kernels find them: masked ones earn exactly nothing."""
    actions, valid, rewards, *_ = KERNELS.judge(player, critics, targets, config)
    expected_actions, expected_valid, expected_rewards, *_ = PLAIN.judge(player, critics, targets, config)
    assert torch.equal(actions, expected_actions) and torch.equal(valid, expected_valid)
    assert valid.dtype == torch.bool and rewards.dtype == expected_rewards.dtype
    assert torch.allclose(rewards, expected_rewards, rtol=2e-5, atol=1e-7)
    assert (rewards[~valid] == 0).all()
    return valid, rewards


def critics_like(player, count):
    return [random_logits(*player.shape, player.dtype, seed=7 + i, padding=i) for i in range(count)]


@pytest.mark.parametrize("num_critics, vocabulary", [(1, 17), (2, BLOCKS_VOCABULARY)])  # torch.topk; blocks
@pytest.mark.parametrize("name", CONFIGS)
def test_judge(name, num_critics, vocabulary):
    player = random_logits(3, vocabulary, padding=2)
    critics = critics_like(player, num_critics)
    targets = torch.arange(3, device=DEVICE) * 3
    targets[0] = critics[0][0].argmax()
    valid, rewards = assert_same_judgement(player, critics, targets, CONFIGS[name])
    assert (rewards > 0).any() and not valid.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_judge_in_other_dtypes(dtype):
    player = random_logits(5, BLOCKS_VOCABULARY, dtype)
    critics, targets = critics_like(player, 2), torch.arange(5, device=DEVICE)
    for name in ("no threshold", "arithmetic"):
        assert_same_judgement(player, critics, targets, CONFIGS[name])
    assert_same_judgement(player, [critics[0], critics[1].float()], targets, CONFIGS["released"])


def test_critics_with_their_own_weights_and_none():
    player = random_logits(3, BLOCKS_VOCABULARY)
    critics, targets = critics_like(player, 3), torch.arange(3, device=DEVICE)
    for pool in ("geometric", "arithmetic"):
        weighted = AvataRLConfig(top_k=4, pool=pool, threshold="none", critic_weight=(0.2, 0, 0.1))
        assert_same_judgement(player, critics, targets, weighted)
        critics[1][:, ::2] = -torch.inf  # 0 · −∞, were it not left out
        assert_same_judgement(player, critics, targets, weighted)
    assert_same_judgement(player, [], targets, CONFIGS["text only"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_list_the_same(name):
    """Most columns repeat others; with one proposal, the target is alone."""
    player = random_logits(2, BLOCKS_VOCABULARY)
    targets = player.argmax(dim=1)
    valid, _ = assert_same_judgement(player, [player.clone()], targets, CONFIGS[name])
    assert valid.sum(dim=1).max() <= CONFIGS[name].top_k


@pytest.mark.parametrize("name", [name for name in CONFIGS if "text only" not in name])
def test_impossible_actions(name):
    """Targets, or everything but the target, that the critic rules out; under "no smoothing" the experts veto all."""
    player = random_logits(5, BLOCKS_VOCABULARY)
    (critic,), targets = critics_like(player, 1), torch.arange(5, device=DEVICE)
    critic[targets[:3], targets[:3]] = -torch.inf
    critic[1, 50:] = -torch.inf
    critic[3] = -torch.inf
    critic[3, 3] = 1.0
    player[4, 10:] = -torch.inf
    _, rewards = assert_same_judgement(player, [critic], targets, CONFIGS[name])
    assert rewards.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [name for name in CONFIGS if "text only" not in name])
def test_a_critic_that_says_no_number(name, value):
    """A comparison with it is false; no action may go unpaid for that."""
    player = random_logits(3, BLOCKS_VOCABULARY)
    critics, targets = critics_like(player, 2), torch.arange(3, device=DEVICE)
    critics[1][1, 77] = value
    for kernels in (KERNELS, PLAIN):
        rewards = kernels.judge(player, critics, targets, CONFIGS[name]).rewards
        assert rewards[1].isnan().any() and rewards[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_offset_that_all_logits_share_changes_nothing(name):
    """Eighths, which are exact at a million."""
    player = (random_logits(3, BLOCKS_VOCABULARY) * 8).round() / 8
    critics = [(critic * 8).round() / 8 for critic in critics_like(player, 2)]
    if "text only" in name:
        critics = []
    near, far = (
        KERNELS.judge(
            player + offset, [critic + offset for critic in critics], torch.arange(3, device=DEVICE), CONFIGS[name]
        )
        for offset in (0.0, 2.0**20)
    )
    assert torch.equal(near.actions, far.actions) and torch.equal(near.valid, far.valid)
    assert torch.allclose(near.rewards, far.rewards, rtol=1e-5)
    for temperature in (1.0, 1.3):
        (_, *expected), (largest, *found) = (KERNELS.statistics(player + x, temperature) for x in (0.0, 2.0**20))
        assert all(torch.allclose(one, other, rtol=1e-5) for one, other in zip(found, expected, strict=True))
        written = [
            KERNELS.gradient_(player + x, temperature, (player + x).amax(dim=1), expected[0], expected[1])
            for x in (0.0, 2.0**20)
        ]
        assert torch.allclose(*written, rtol=1e-5)


def test_a_rows_blocks_are_read_in_one_pass(monkeypatch):
    """Settings that need the critic's normaliser get it from the pass that finds the maxima."""
    passes, read_rows = [], triton_kernels.read_rows

    def spy(logits, tile, **wanted):
        passes.append((tile, wanted))
        return read_rows(logits, tile, **wanted)

    monkeypatch.setattr(triton_kernels, "read_rows", spy)
    player = random_logits(2, BLOCKS_VOCABULARY)
    arguments = (player, critics_like(player, 1), torch.zeros(2, dtype=torch.int64, device=DEVICE))
    for name, normalised in (("article", False), ("arithmetic", True)):
        passes.clear()
        KERNELS.judge(*arguments, CONFIGS[name])
        assert passes == [
            (32, dict(statistics=False, maxima=True)),
            (32, dict(statistics=normalised, maxima=True)),
        ]


def random_heads(dtype, positions=8, vocabulary=BLOCKS_VOCABULARY + 3, seed=0):
    """hidden (N, d) and head weight (V, d) that require grad, and two critics'."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    hidden, weight = normal(positions, 8).requires_grad_(), normal(vocabulary, 8).requires_grad_()
    return hidden, weight, [normal(positions, 5), normal(positions, 6)], [normal(vocabulary, 5), normal(vocabulary, 6)]


def loss_and_gradients(impl, name, config, heads, targets, dtype):
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in heads[:2])
    critics = [[x.to(dtype) for x in tensors] for tensors in heads[2:]]
    loss, metrics = linear_objective_loss(
        make_objective(name, config), hidden, weight, *critics, targets, vocab_size=weight.shape[0] - 3, impl=impl
    )
    return loss, metrics, torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize(
    "name, config",
    [("avatarl", config) for config in ("no threshold", "released", "arithmetic")]
    + [(name, "no threshold") for name in ("cross_entropy", "label_smoothing", "distillation", "expected_reward")],
)
def test_the_same_loss_as_chunked(name, config, monkeypatch):
    """A padded vocabulary, ignored positions, two critics, chunks of 3, 3 and 2 rows."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(chunked.CHUNK_ELEMENTS, device, 3 * BLOCKS_VOCABULARY)
    heads = random_heads(torch.float32)
    targets = torch.arange(8, device=DEVICE) * 13
    targets[[0, 4, 7]] = -100
    arguments = (name, CONFIGS[config], heads, targets, torch.float32)
    expected, found = (loss_and_gradients(impl, *arguments) for impl in ("chunked", "triton"))
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        assert found[1][key].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7), key
    for one, other in zip(found[2], expected[2], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6) and other.abs().sum() > 0


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.bfloat16) for name in ("avatarl", "cross_entropy", "expected_reward")] + [("avatarl", torch.float16)],
)
def test_as_exact_as_chunked_in_half_precision(name, dtype):
    """Excess error over float64 from the same half-precision states; all tokens active, as ties may fall either way."""
    heads = random_heads(dtype, vocabulary=23)
    config = AvataRLConfig.article(top_k=20, threshold="none")
    targets = torch.arange(8, device=DEVICE)
    exact, plain, found = (
        loss_and_gradients(impl, name, config, heads, targets, of)
        for impl, of in (("chunked", torch.float64), ("chunked", dtype), ("triton", dtype))
    )
    epsilon = torch.finfo(dtype).eps
    assert found[0].item() == pytest.approx(plain[0].item(), rel=1e-5)
    assert found[0].item() == pytest.approx(exact[0].item(), rel=4 * epsilon)
    for one, other, truth in zip(found[2], plain[2], exact[2], strict=True):
        errors = [((x.double() - truth).norm() / truth.norm()).item() for x in (one, other)]
        # Under the interpreter bfloat16 is cut off and not rounded: twice the error, always to one side.
        assert one.dtype == dtype and errors[0] <= (2.5 if DEVICE == "cpu" else 1.2) * errors[1] + epsilon


@pytest.mark.parametrize("positions", [0, 1])
def test_few_positions(positions):
    heads = random_heads(torch.float32, positions)
    targets = torch.zeros(positions, dtype=torch.int64, device=DEVICE)
    arguments = ("avatarl", CONFIGS["article"], heads, targets, torch.float32)
    expected, found = (loss_and_gradients(impl, *arguments) for impl in ("chunked", "triton"))
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for one, other in zip(found[2], expected[2], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_float64_is_left_to_the_plain_kernels():
    targets = torch.arange(8, device=DEVICE)
    arguments = ("avatarl", CONFIGS["article"], random_heads(torch.float32), targets, torch.float64)
    expected, found = (loss_and_gradients(impl, *arguments) for impl in ("chunked", "triton"))
    assert found[0].dtype == torch.float64 and torch.equal(found[0], expected[0])
    assert all(torch.equal(one, other) for one, other in zip(found[2], expected[2], strict=True))


def test_rows_are_an_objectives_to_overwrite():
    """The gradient lies where the logits were."""
    logits = random_logits(3, 53)
    weights = torch.ones(3, device=DEVICE)
    rows = Rows(logits, [], torch.arange(3, device=DEVICE), weights, kernels=KERNELS)
    assert make_objective("cross_entropy").score(rows, with_gradient=True).gradient is logits
