"""Forward and backward of losses from hidden states and head weights, ours and others', side by side.

    python benchmarks/loss.py                  # the bar's shape
    python benchmarks/loss.py --dtype bfloat16
    python benchmarks/loss.py --sweep          # one factor at a time
    python benchmarks/loss.py --shape 1024 4096 256 128 16 --dtype float32 --all

benchmarks/README.md says what is measured, and how. Shapes: N positions, V vocabulary, d and d_c widths, A actions.
"""

# ruff: noqa: E402 - torch waits for set_up_process()

from __future__ import annotations

from avatarl.process import set_up_process

set_up_process()

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import DEVICE, RESULTS, Ready, measure, record, version_of
from torch import Tensor

from avatarl.objective import AvataRLConfig, avatarl_loss, linear_avatarl_loss, linear_objective_loss, make_objective

COMPILED = "avatarl compiled"
REFERENCE, PLAIN = "F.linear_cross_entropy", "plain AvataRL"


@dataclass(frozen=True)
class Case:
    """What alternatives are compared at."""

    positions: int
    vocabulary: int
    width: int
    critic_width: int
    top_k: int
    dtype: str
    device: str
    table: str = "shape"  # which table of the README the row is for: bar, sweep or shape

    @property
    def small(self) -> Case:
        """The same kind of thing, done at once; of the same vocabulary, for which kernels may be compiled anew."""
        return dataclasses.replace(self, positions=8, width=16, critic_width=16)


BAR = {
    "cpu": dict(positions=4096, vocabulary=50257, width=768, critic_width=384, top_k=16),
    "cuda": dict(positions=16384, vocabulary=50257, width=768, critic_width=512, top_k=16),
}
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}
SWEEP_POSITIONS = {"cpu": (256, 1024, 2048), "cuda": (4096, 16384, 65536)}
SWEEP = [{"vocabulary": v} for v in (4096, 128256)]
SWEEP += [{"top_k": k} for k in (4, 64)]
SWEEP += [{"width": d, "critic_width": c} for d, c in ((256, 128), (768, 768), (1536, 512))]


class Inputs(NamedTuple):
    """One batch: the player's head takes part in the gradient, the critic's does not."""

    hidden: Tensor  # (N, d)
    head: Tensor  # (V, d)
    critic_hidden: Tensor  # (N, d_c)
    critic_head: Tensor  # (V, d_c)
    targets: Tensor  # (N,)


@functools.lru_cache(maxsize=1)
def make_inputs(case: Case) -> Inputs:
    """Random inputs with logits of standard deviation 2, the same for every alternative."""
    generator = torch.Generator(case.device).manual_seed(0)
    options = dict(generator=generator, device=case.device)

    def normal(rows: int, width: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, width, **options) * scale).to(getattr(torch, case.dtype))

    return Inputs(
        normal(case.positions, case.width).requires_grad_(),
        normal(case.vocabulary, case.width, 2 / case.width**0.5).requires_grad_(),
        normal(case.positions, case.critic_width),
        normal(case.vocabulary, case.critic_width, 2 / case.critic_width**0.5),
        torch.randint(case.vocabulary, (case.positions,), **options),
    )


# --- the alternatives ------------------------------------------------------------------------------------------------


def plain_avatarl(
    hidden: Tensor, head: Tensor, critic_hidden: Tensor, critic_head: Tensor, targets: Tensor, config: AvataRLConfig
) -> Tensor:
    """The AvataRL loss with the article's settings, written down as PyTorch has it, for autograd to differentiate."""
    logits = hidden @ head.t()  # (N, V)
    with torch.no_grad():
        critic_logits = critic_hidden @ critic_head.t()  # (N, V); their softmax would cancel in the consensus
        proposals = [scores.topk(config.top_k, dim=1).indices for scores in (logits, critic_logits)]
        actions = torch.cat([targets.unsqueeze(1), *proposals], dim=1)  # (N, A)
        repeated = (actions.unsqueeze(2) == actions.unsqueeze(1)).tril(-1).any(dim=2)  # (N, A)
        num_active = (~repeated).sum(dim=1, keepdim=True)

        reality = (config.smoothing / (num_active - 1)).repeat(1, actions.shape[1])
        reality[:, 0] = 1 - config.smoothing
        blend = config.reality_weight * reality.log() + config.critic_weight * critic_logits.gather(1, actions).float()
        consensus = blend.masked_fill(repeated, -torch.inf).softmax(dim=1)
        rewards = torch.where(consensus > 1 / num_active, config.reward_scale * consensus, 0.0)
        rewards *= (config.reward_cap / rewards.amax(dim=1, keepdim=True)).clamp(max=1)

    log_probs = logits.float().log_softmax(dim=1)  # (N, V)
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    return -((rewards * log_probs.gather(1, actions)).sum(dim=1) + config.entropy_coef * entropy).mean()


def plain_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of materialised logits."""
    return F.cross_entropy(hidden @ head.t(), targets)


def fused_avatarl(inputs: Inputs, config: AvataRLConfig, impl: str) -> Tensor:
    return linear_avatarl_loss(*inputs, config, impl=impl)[0]


def fused_cross_entropy(inputs: Inputs, config: AvataRLConfig, impl: str) -> Tensor:
    objective = make_objective("cross_entropy")
    return linear_objective_loss(objective, inputs.hidden, inputs.head, None, None, inputs.targets, impl=impl)[0]


def torch_linear_cross_entropy(inputs: Inputs, config: AvataRLConfig, chunked: bool) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("not in this version of PyTorch")
    options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
    return F.linear_cross_entropy(inputs.hidden, inputs.head, inputs.targets, **options)


def liger_cross_entropy(inputs: Inputs, config: AvataRLConfig) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(inputs.hidden, inputs.head, inputs.targets)


def liger_jsd(inputs: Inputs, config: AvataRLConfig) -> Tensor:
    """Jensen–Shannon divergence of player and critic over the whole vocabulary: nearest to ours in what it reads."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return liger_fused_linear_jsd(inputs.hidden, inputs.head, inputs.critic_hidden, inputs.critic_head)


def cut_cross_entropy(inputs: Inputs, config: AvataRLConfig) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(inputs.hidden, inputs.head, inputs.targets)


@torch.no_grad()
def bare_products(inputs: Inputs, config: AvataRLConfig) -> tuple[Tensor, Tensor]:
    """The matrix products that no version of ours can do without, in the inputs' dtype."""
    hidden, head, critic_hidden, critic_head, _ = inputs
    grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
    for rows in torch.arange(len(hidden), device="cpu").split(1024 if hidden.device.type == "cpu" else 4096):
        chunk = slice(int(rows[0]), int(rows[-1]) + 1)
        critic_hidden[chunk] @ critic_head.t()
        logits = hidden[chunk] @ head.t()
        torch.mm(logits, head, out=grad_hidden[chunk])
        grad_head.addmm_(logits.t(), hidden[chunk])
    return grad_hidden, grad_head


Loss = Callable[[Inputs, AvataRLConfig], Tensor | tuple[Tensor, Tensor]]  # or the gradients themselves


compiled = functools.cache(torch.compile)


def on_all(plain: Callable, transform: Callable = lambda plain: plain) -> Loss:
    return lambda inputs, config: transform(plain)(*inputs, config)


def on_players(plain: Callable, transform: Callable = lambda plain: plain) -> Loss:
    return lambda inputs, config: transform(plain)(inputs.hidden, inputs.head, inputs.targets)


# In the order of importance: the first ones get the remainder of the time.
LOSSES: dict[str, Loss] = {
    COMPILED: functools.partial(fused_avatarl, impl="compiled"),
    REFERENCE: functools.partial(torch_linear_cross_entropy, chunked=False),
    PLAIN: on_all(plain_avatarl),
    "avatarl chunked": functools.partial(fused_avatarl, impl="chunked"),
    "our cross-entropy compiled": functools.partial(fused_cross_entropy, impl="compiled"),
    "F.linear_cross_entropy chunked": functools.partial(torch_linear_cross_entropy, chunked=True),
    "F.cross_entropy of logits": on_players(plain_cross_entropy),
    "Liger cross-entropy": liger_cross_entropy,
    "Liger JSD": liger_jsd,
    "cut cross-entropy": cut_cross_entropy,
    "our cross-entropy chunked": functools.partial(fused_cross_entropy, impl="chunked"),
    "plain AvataRL torch.compile": on_all(plain_avatarl, compiled),
    "F.cross_entropy of logits torch.compile": on_players(plain_cross_entropy, compiled),
    "bare products": bare_products,
}
PACKAGES = {
    "Liger cross-entropy": "liger-kernel",
    "Liger JSD": "liger-kernel",
    "cut cross-entropy": "cut-cross-entropy",
}
CUDA_ONLY = set(PACKAGES)
WITH_ALL = {name for name in LOSSES if name.endswith("torch.compile")} | {"our cross-entropy chunked", "bare products"}
SWEPT = (COMPILED, REFERENCE, PLAIN)
MEMORY_OF = (COMPILED, REFERENCE, PLAIN, "avatarl chunked")


def build(name: str, case: Case) -> Ready:
    """One alternative, forward and backward, with the gradients of the player's hidden states and head."""
    package = PACKAGES.get(name)
    if package and not version_of(package):
        raise ImportError(f"{package} is not installed")
    config = AvataRLConfig.article(top_k=case.top_k)

    def run(inputs: Inputs) -> object:
        loss = LOSSES[name](inputs, config)
        return torch.autograd.grad(loss, (inputs.hidden, inputs.head)) if isinstance(loss, Tensor) else loss

    call = functools.partial(run, make_inputs(case))
    # What torch.compile makes of a small shape does not serve another.
    warm_up = call if name.endswith("torch.compile") else lambda: run(make_inputs(case.small))
    return Ready(call, warm_up, f"{package} {version_of(package)}" if package else "")


# --- the command -----------------------------------------------------------------------------------------------------


def check_plain(device: str) -> None:
    """The plain composition is the AvataRL loss: the same value and gradient, at a small shape in float32."""
    inputs = make_inputs(Case(64, 300, 16, 8, 16, "float32", device))
    config = AvataRLConfig.article()
    plain = plain_avatarl(*inputs, config)
    logits, critic_logits = inputs.hidden @ inputs.head.t(), inputs.critic_hidden @ inputs.critic_head.t()
    ours, _ = avatarl_loss(logits, critic_logits, inputs.targets, config)
    torch.testing.assert_close(plain, ours)
    wanted = (inputs.hidden, inputs.head)
    torch.testing.assert_close(torch.autograd.grad(plain, wanted), torch.autograd.grad(ours, wanted))


def main(arguments: Sequence[str] | None = None) -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="one factor at a time around a base shape")
    parser.add_argument("--shape", nargs=5, type=int, metavar=("N", "V", "d", "d_c", "K"), help="your own shape")
    parser.add_argument("--dtype", nargs="+", help="float32, bfloat16, … (default: the bar's on this device)")
    parser.add_argument(
        "--all", action="store_true", help="torch.compile of the plain ones, bare products; memory of all"
    )
    parser.add_argument("--seconds", type=float, default=240, help="about how long it takes")
    parser.add_argument("--device", default=DEVICE, choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    asked = parser.parse_args(arguments)

    check_plain(asked.device)
    names = [name for name in LOSSES if asked.device == "cuda" or name not in CUDA_ONLY]
    names = [name for name in names if (name in SWEPT if asked.sweep else asked.all or name not in WITH_ALL)]
    memory_of = [name for name in names if asked.all or name in MEMORY_OF]
    cases = make_cases(asked.device, asked.dtype, asked.sweep, asked.shape)
    for case, measured in measure(build, names, cases, asked.device, asked.seconds, memory_of):
        print(case, flush=True)
        record(asked.results / "loss.csv", case, measured)


def make_cases(device: str, dtypes: Sequence[str] | None, sweep: bool, shape: Sequence[int] | None) -> list[Case]:
    """The shapes to compare at; the bar's unless asked otherwise."""
    if shape:
        return [Case(*shape, dtype, device) for dtype in dtypes or DTYPES[device]]
    if not sweep:
        return [Case(**BAR[device], dtype=dtype, device=device, table="bar") for dtype in dtypes or DTYPES[device]]
    cases = []
    for dtype in dtypes or DTYPES[device][:1]:
        few, base_positions, many = SWEEP_POSITIONS[device]
        base = Case(**{**BAR[device], "positions": base_positions}, dtype=dtype, device=device, table="sweep")
        changes = [{}, {"positions": few}, {"positions": many}, *SWEEP]
        cases += [dataclasses.replace(base, **change) for change in changes]
    return cases


if __name__ == "__main__":
    main()
