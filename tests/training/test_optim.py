"""Every parameter has one optimiser, only matrices decay, and the learning rate rises and falls as it says."""

from __future__ import annotations

import math

import pytest
import torch

from avatarl.models import PlayerConfig, build_player
from avatarl.training import GuardConfig, OptimConfig
from avatarl.training.guard import Guard
from avatarl.training.optim import Optimisers, PortableMuon, build_optimisers, clip_gradients
from avatarl.training.processes import Processes

from ..conftest import BLOCK, TINY

PLAYERS = {
    "llama": PlayerConfig(settings=TINY),
    "untied": PlayerConfig(settings={**TINY, "tie_word_embeddings": False}),
    "qwen3": PlayerConfig(architecture="qwen3", settings=TINY),  # with norms of queries and keys
    "gpt2": PlayerConfig(architecture="gpt2", settings={"n_embd": 16, "n_layer": 1, "n_head": 2}),  # with biases
}


@pytest.fixture(params=PLAYERS)
def player(request, tokenizer):
    """A tiny player of each kind."""
    return build_player(PLAYERS[request.param], tokenizer, BLOCK, seed=1)


def groups_of(optimisers: Optimisers) -> list[dict]:
    return [group for optimiser in optimisers.optimisers for group in optimiser.param_groups]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(player, name: str):
    groups = groups_of(build_optimisers(player, OptimConfig(name=name), total_steps=10))
    covered = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(covered) == sorted(id(parameter) for parameter in player.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_matrices_decay_and_vectors_do_not(player, name: str):
    for group in groups_of(build_optimisers(player, OptimConfig(name=name, weight_decay=0.3), total_steps=10)):
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.dim() == 2 else 0.0)


def test_muon_has_exactly_the_matrices_that_are_no_embedding(player):
    adamw, muon = build_optimisers(player, OptimConfig(name="muon"), total_steps=10).optimisers
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    found = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    embedding_names = ("embed_tokens", "lm_head", "wte", "wpe")
    expected = {
        id(parameter)
        for name, parameter in player.named_parameters()
        if parameter.dim() == 2 and not any(part in name for part in embedding_names)
    }
    assert found == expected and len(expected) >= 4


def muon_update(gradient: torch.Tensor, learning_rate: float) -> torch.Tensor:
    """The first update of Muon in float64, by the formulas of its authors' post, with the size of AdamW's."""
    x = (0.05 * 0.95 + 0.05) * gradient.double()  # Nesterov's momentum from a buffer of zeros
    x = x / x.norm()
    if gradient.shape[0] > gradient.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    if gradient.shape[0] > gradient.shape[1]:
        x = x.T
    return -learning_rate * 0.2 * max(gradient.shape) ** 0.5 * x


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_muon_is_exact_where_bfloat16_is_emulated(monkeypatch, shape):
    """Products in float32 there, and PyTorch's own, in bfloat16, where the device has them."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    updates = {}
    for name, kind in (("fp32", PortableMuon), ("bf16", PortableMuon), ("torch", torch.optim.Muon)):
        monkeypatch.setattr("avatarl.training.optim.pick_precision", lambda *_, name=name: name)
        matrix = torch.nn.Parameter(torch.zeros(shape))
        matrix.grad = gradient.clone()
        kind([matrix], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw").step()
        updates[name] = matrix.detach()
    expected = muon_update(gradient, 0.1)
    torch.testing.assert_close(updates["fp32"].double(), expected, rtol=1e-4, atol=1e-6)
    assert (updates["bf16"] - expected).abs().max() > 1e-4  # what the first could not tell from the second
    assert torch.equal(updates["bf16"], updates["torch"])


def learning_rates(config: OptimConfig, total_steps: int) -> list[float]:
    """The learning rate of each step, taken as the trainer takes it."""
    optimisers = build_optimisers(_LikeAPlayer(), config, total_steps)
    rates = []
    for step in range(1, total_steps + 1):
        rates.append(optimisers.step(step))
        assert {group["lr"] for group in groups_of(optimisers)} == {rates[-1]}
    return rates


class _LikeAPlayer(torch.nn.Module):
    """An embedding, a matrix and a vector."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = torch.nn.Embedding(4, 2), torch.nn.Linear(2, 2)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.embedding


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_fraction(name: str, decay: str, fraction: float):
    config = OptimConfig(name=name, learning_rate=0.02, warmup_steps=10, decay=decay, final_lr_fraction=fraction)
    rates = learning_rates(config, total_steps=200)
    assert 0 < rates[0] < 0.005
    assert rates[10] == max(rates) == 0.02
    rise, fall = rates[:11], rates[10:]
    assert all(later > earlier for earlier, later in zip(rise, rise[1:], strict=False))
    assert all(later < earlier for earlier, later in zip(fall, fall[1:], strict=False))
    assert rates[-1] == pytest.approx(0.02 * fraction, abs=0.021 / 190)  # a step short of where it falls to
    halfway = rates[10 + 95]
    assert halfway == pytest.approx(0.02 * (1 + fraction) / 2)
    quarter = (1 + math.cos(math.pi / 4)) / 2 if decay == "cosine" else 0.75
    assert rates[57] == pytest.approx(0.02 * (fraction + (1 - fraction) * quarter), rel=0.01)


@pytest.mark.parametrize("total_steps", [1, 2, 5])
def test_a_run_shorter_than_its_warm_up_still_reaches_the_peak(total_steps: int):
    rates = learning_rates(OptimConfig(learning_rate=0.02, warmup_steps=50), total_steps)
    assert rates[-1] == 0.02 and all(rate > 0 for rate in rates)


def test_without_warm_up_the_first_step_is_at_the_peak():
    rates = learning_rates(OptimConfig(learning_rate=0.02, warmup_steps=0), total_steps=4)
    assert rates[0] == 0.02 > rates[1]


def test_muon_changes_every_parameter(tokenizer):
    player = build_player(PLAYERS["llama"], tokenizer, BLOCK, seed=1)
    optimisers = build_optimisers(player, OptimConfig(name="muon", warmup_steps=0), total_steps=4)
    before = {name: parameter.detach().clone() for name, parameter in player.named_parameters()}
    ids = torch.arange(2 * BLOCK).reshape(2, BLOCK)
    player(input_ids=ids, labels=ids).loss.backward()
    optimisers.step(1)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in player.named_parameters())
    assert all(parameter.grad is None for parameter in player.parameters())


def test_gradients_are_clipped_to_a_norm_that_is_summed_exactly():
    """A million squares summed in float32 on a CPU are off in the fifth digit."""
    parameters = [torch.nn.Parameter(torch.zeros(1000, 1000)), torch.nn.Parameter(torch.zeros(3))]
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = torch.cat([parameter.grad.flatten() for parameter in parameters])
    exact = before.double().norm()
    assert clip_gradients(parameters, None, Processes()).item() == pytest.approx(exact.item(), rel=1e-7)
    norm = clip_gradients(parameters, 0.5, Processes())
    after = torch.cat([parameter.grad.flatten() for parameter in parameters])
    assert norm.item() == pytest.approx(exact.item(), rel=1e-7)
    torch.testing.assert_close(after, before * (0.5 / exact).float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_end_of_a_step_does_not_wait_for_the_gpu(tokenizer, name: str):
    player = build_player(PLAYERS["llama"], tokenizer, BLOCK, seed=1).cuda()
    optimisers = build_optimisers(player, OptimConfig(name=name), total_steps=9)
    guard = Guard(GuardConfig(spike_score=3.0), torch.device("cuda"))
    for step in range(1, 4):
        for parameter in player.parameters():
            parameter.grad = torch.ones_like(parameter)
        try:
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first one makes the state
            norm = clip_gradients(player.parameters(), 1.0, Processes())
            optimisers.step(step, guard.check(step, norm, norm))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("gradient", ["nan", "finite"])
def test_a_refused_step_changes_neither_weights_nor_state(tokenizer, name: str, gradient: str):
    """As the first step and as a later one; the step after it is as if it had never been."""
    ids = torch.arange(2 * BLOCK).reshape(2, BLOCK)
    players = {}
    for refused_steps in ((), (1, 3)):
        player = build_player(PLAYERS["llama"], tokenizer, BLOCK, seed=1)
        optimisers = build_optimisers(player, OptimConfig(name=name, warmup_steps=0), total_steps=9)
        for step in range(1, 5):
            if step not in refused_steps and not refused_steps and step in (1, 3):
                continue
            player(input_ids=ids, labels=ids).loss.backward()
            if step in refused_steps and gradient == "nan":
                for parameter in player.parameters():
                    parameter.grad.fill_(math.nan)
            optimisers.step(step, torch.tensor(step in refused_steps))
        players[refused_steps] = player, optimisers
    (plain, plain_optimisers), (careful, careful_optimisers) = players.values()
    for ours, theirs in zip(plain.parameters(), careful.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(plain_optimisers.optimisers, careful_optimisers.optimisers, strict=True):
        for left, right in zip(ours.state.values(), theirs.state.values(), strict=True):
            assert all(torch.equal(left[kind], right[kind]) for kind in left)
