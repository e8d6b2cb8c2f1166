"""Settings over the steps of a run: which critics are active, their weight, ε and β. Functions of the step alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from avatarl.errors import UserError
from avatarl.models import Critic
from avatarl.objective import Objective, Scheduled, make_objective

from .config import Schedule, ScheduleConfig


class Stage(NamedTuple):
    """A stretch of steps with the same active critics. The weight of inactive ones goes to the text."""

    last_step: int
    critics: tuple[Critic, ...]  # the active ones
    objective: Objective  # for these critics


class Schedules:
    """The stages of a run, and the values of scheduled settings in every optimiser step, counted from 1."""

    def __init__(
        self,
        config: ScheduleConfig,
        objective: Objective,
        critics: Sequence[Critic],
        total_steps: int,
        device: torch.device | str = "cpu",
    ):
        """
        Args:
            config: How settings change.
            objective: The objective with all critics.
            critics: All critics of the run; each is active after its ``start_step``.
            total_steps: Of the run.
            device: Where values are wanted.

        Raises:
            UserError: A schedule ends after the run, or the objective lacks what it changes.
        """
        self._config, self._objective, self._device = config, objective, device
        self._critics, self._total_steps = tuple(critics), total_steps
        self._check()
        weight = config.critic_weight
        falls_to_zero = not weight.is_constant and weight.final_fraction == 0 and weight.end_step is not None
        self.last_critic_step = weight.end_step if falls_to_zero else total_steps
        for critic in critics:
            if critic.start_step >= self.last_critic_step:
                is_short = critic.start_step >= total_steps
                reason = f"the run takes {total_steps} steps" if is_short else "schedules.critic_weight is 0 by then"
                raise UserError(f"critic {critic.name} starts after step {critic.start_step}; {reason}")
        # Steps after which losses are of another kind: a setting jumps or starts to fall, critics come or go.
        moving = [schedule for _, schedule in config.items() if not schedule.is_constant]
        self.are_constant = not moving
        self.stages = self._stages()
        self.turning_steps = {stage.last_step for stage in self.stages[:-1]}
        self.turning_steps |= {each.end_step if each.shape == "first" else each.start_step for each in moving}

    def _check(self) -> None:
        config, objective, total_steps = self._config, self._objective, self._total_steps
        for name, schedule in config.items():
            if schedule.end_step is not None and schedule.end_step > total_steps:
                raise UserError(f"schedules.{name}.end_step is {schedule.end_step}; the run takes {total_steps} steps")
            if not schedule.is_constant and schedule.start_step >= (schedule.end_step or total_steps):
                raise UserError(
                    f"schedules.{name}.start_step is {schedule.start_step}; the run takes {total_steps} steps"
                )
            if not schedule.is_constant and name != "critic_weight" and not objective.kind.is_rewarded:
                raise UserError(f"schedules.{name} has no effect: objective {objective.name!r} has no {name}")
        most = objective.avatarl.smoothing * max(1.0, config.smoothing.final_fraction)
        if not config.smoothing.is_constant and most >= 1:
            raise UserError(
                f"schedules.smoothing.final_fraction is {config.smoothing.final_fraction}, which takes "
                f"avatarl.smoothing from {objective.avatarl.smoothing} to {most}; expected less than 1"
            )
        if not config.critic_weight.is_constant and not self._critics:
            raise UserError(f"schedules.critic_weight has no effect: objective {objective.name!r} uses no critic")

    def over(self, total_steps: int) -> Schedules:
        """The same schedules in a run of ``total_steps``; raises as making one does."""
        return Schedules(self._config, self._objective, self._critics, total_steps, self._device)

    def _stages(self) -> list[Stage]:
        ends = {self.last_critic_step, self._total_steps, *(critic.start_step for critic in self._critics)} - {0}
        stages = []
        for end in sorted(ends):
            active = tuple(critic for critic in self._critics if critic.start_step < end <= self.last_critic_step)
            stages.append(Stage(end, active, self._objective_with(active)))
        return stages

    def stage(self, step: int) -> Stage:
        """The stage that ``step`` belongs to."""
        return next(stage for stage in self.stages if step <= stage.last_step)

    def active_steps(self, critic: Critic, after: int = 0) -> int:
        """In how many of the run's steps after step ``after`` a critic is active."""
        return max(0, self.last_critic_step - max(after, critic.start_step))

    def values(self, step: int) -> Scheduled | None:
        """The scheduled settings of ``step``, on the device; None if no setting changes.

        The device itself fills them in; a copy from the host would have to wait.
        """
        if self.are_constant:
            return None
        now = self._factors(step)
        weights = [self._on_device(now["critic_weight"])] * len(self.stage(step).critics)
        return Scheduled(
            torch.stack(weights) if weights else torch.zeros(0, device=self._device),
            self._on_device(now["smoothing"] * self._objective.avatarl.smoothing),
            self._on_device(now["entropy_coef"] * self._objective.avatarl.entropy_coef),
        )

    def logged(self, step: int) -> dict[str, float]:
        """The values of settings that change, for a line of metrics."""
        now, settings = self._factors(step), self._objective.avatarl
        values = {name: now[name] * getattr(settings, name) for name in ("smoothing", "entropy_coef")}
        values = {name: value for name, value in values.items() if not getattr(self._config, name).is_constant}
        if not self._config.critic_weight.is_constant or any(critic.start_step for critic in self._critics):
            active = self.stage(step).critics
            weights = [weight for critic, weight in self._weights() if critic in active]
            values["critic_weight"] = now["critic_weight"] * sum(weights)
        return values

    def _factors(self, step: int) -> dict[str, float]:
        return {name: factor(schedule, step, self._total_steps) for name, schedule in self._config.items()}

    def _on_device(self, value: float) -> Tensor:
        return torch.full((), value, device=self._device)

    def _weights(self) -> list[tuple[Critic, float]]:
        """Each critic with its weight where all of them are active."""
        count = len(self._critics)
        if self._objective.name == "distillation":
            weights = ((1 - self._objective.baseline.distillation_alpha) / max(1, count),) * count
        else:
            weights = self._objective.avatarl.critic_weights(count)
        return list(zip(self._critics, weights, strict=True))

    def _objective_with(self, active: Sequence[Critic]) -> Objective:
        """The objective with the active critics alone; the text gets the weights of the others."""
        if len(active) == len(self._critics):
            return self._objective
        inactive = sum(weight for critic, weight in self._weights() if critic not in active)
        avatarl, baseline = self._objective.avatarl, self._objective.baseline
        if self._objective.name == "distillation":
            alpha = min(1.0, baseline.distillation_alpha + inactive)
            baseline = dataclasses.replace(baseline, distillation_alpha=alpha)
        else:
            avatarl = dataclasses.replace(
                avatarl,
                critic_weight=tuple(weight for critic, weight in self._weights() if critic in active) or 0.0,
                reality_weight=avatarl.reality_weight + inactive,
            )
        return make_objective(self._objective.name, avatarl, baseline)


def factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """What the setting is multiplied by in optimiser step ``step``, counted from 1."""
    end = total_steps if schedule.end_step is None else schedule.end_step
    if schedule.shape == "constant":
        return 1.0
    if schedule.shape == "first":
        return 1.0 if step <= end else schedule.final_fraction
    progress = min(1.0, max(0.0, (step - 1 - schedule.start_step) / (end - schedule.start_step)))
    fall = (1 - math.cos(math.pi * progress)) / 2 if schedule.shape == "cosine" else progress
    return 1 - (1 - schedule.final_fraction) * fall
