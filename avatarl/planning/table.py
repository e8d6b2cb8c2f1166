"""A plan as text."""

from __future__ import annotations

from .hardware import GIB
from .plan import Plan


def plan_table(plan: Plan) -> str:
    """The plan in some twenty lines."""
    is_cpu, hardware = plan.hardware.kind == "cpu", plan.hardware
    several = f"{plan.processes} × " if plan.processes > 1 else ""
    peak = f"{'' if is_cpu else several}{hardware.flops[plan.precision] / 1e12:,.3g} TFLOP/s ({hardware.source})"
    flops = " + ".join(f"{amount:.2e} {model}" for model, amount in plan.flops.items() if amount)
    if plan.flops["critic"]:
        flops += f" = {sum(plan.flops.values()):.2e}, {plan.critic_share:.0%} of them the critic's"
    kept = f", {plan.checkpoints} kept: {_bytes(plan.checkpoints * plan.checkpoint)}" if plan.checkpoints > 1 else ""
    rows = [(part, amount) for part, amount in plan.memory.items() if amount >= 2**16]  # 0.1 MiB
    rows += [("all tensors", plan.total_memory), ("beside them, about", hardware.outside_tensors)]
    whose = f"{plan.processes} processes" if is_cpu and plan.processes > 1 else "one process"
    verdict = "fits in" if plan.fits else "! DOES NOT FIT in"
    lines = [
        f"{plan.objective} on {several}{hardware.name}, {plan.precision}{f', {plan.parallel}' if several else ''}",
        "",
        f"  parameters   {plan.parameters.total:,} ({plan.parameters.non_embedding:,} outside the embedding)",
        f"  tokens       {plan.tokens:,} in {plan.steps:,} steps of {plan.tokens // plan.steps:,}",
        f"  FLOPs        {flops}",
        f"  speed        {plan.tokens_per_second:,.0f} tokens per second, supposing {plan.utilisation:.0%} of {peak}",
        f"  time         {_duration(plan.hours)} of training",
        f"  checkpoint   {_bytes(plan.checkpoint)}{kept}",
        f"  model        {_bytes(plan.model_folder)}, the finished folder",
        "",
        f"  memory of one process, with {plan.windows} windows at a time; highest in the {plan.moment} phase",
        *(f"    {part:<22}{_bytes(amount):>12}" for part, amount in rows),
        f"  {_bytes(plan.needed_memory)} for {whose} {verdict} {_bytes(hardware.memory)}",
        *(f"  ! {warning}" for warning in plan.warnings),
    ]
    return "\n".join(lines)


def _bytes(amount: int) -> str:
    """In MiB, or GiB from 1 GiB on."""
    return f"{amount / GIB:,.2f} GiB" if amount >= GIB else f"{amount / 2**20:,.1f} MiB"


def _duration(hours: float) -> str:
    """In the unit that suits."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} seconds"
    return f"{60 * hours:.1f} minutes" if hours < 2 else f"{hours:,.1f} hours"
