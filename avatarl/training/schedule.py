"""Settings over the steps of a run: which critics answer, how much they weigh, ε and β. Functions of the step alone."""

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
    """What holds for a stretch of steps: the critics that answer, and the objective for these.

    A critic that does not answer yet, or no longer, costs nothing, and the text has its weight.
    """

    critics: tuple[Critic, ...]
    objective: Objective


class Schedules:
    """Stages and values of every optimiser step, counted from 1."""

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
            config: How the settings change.
            objective: What is minimised while all critics answer.
            critics: All critics of the run; each answers after its ``start_step``.
            total_steps: Of the run.
            device: Where values are wanted.

        Raises:
            UserError: A schedule ends after the run, or what it changes is not there.
        """
        self._config, self._objective, self._device = config, objective, device
        self._critics, self._total_steps = tuple(critics), total_steps
        self._stages: dict[tuple[Critic, ...], Stage] = {}
        for name, schedule in config.items():
            if schedule.end_step is not None and schedule.end_step > total_steps:
                raise UserError(f"schedules.{name}.end_step is {schedule.end_step}; the run takes {total_steps} steps")
            if not schedule.is_constant and schedule.start_step >= (schedule.end_step or total_steps):
                raise UserError(
                    f"schedules.{name}.start_step is {schedule.start_step}; the run takes {total_steps} steps"
                )
            if not schedule.is_constant and name != "critic_weight" and not objective.kind.is_rewarded:
                raise UserError(f"schedules.{name} changes nothing: objective {objective.name!r} has no {name}")
        most = objective.avatarl.smoothing * max(1.0, config.smoothing.final_fraction)
        if not config.smoothing.is_constant and most >= 1:
            raise UserError(
                f"schedules.smoothing.final_fraction is {config.smoothing.final_fraction}, which takes "
                f"avatarl.smoothing from {objective.avatarl.smoothing} to {most}; expected less than 1"
            )
        if not config.critic_weight.is_constant and not critics:
            raise UserError(f"schedules.critic_weight has no critic to weigh: objective {objective.name!r} asks none")
        self._check_starts()

    def over(self, total_steps: int) -> Schedules:
        """The same in a run of so many steps; raises as making one does."""
        return Schedules(self._config, self._objective, self._critics, total_steps, self._device)

    def _check_starts(self) -> None:
        """Refuse a critic that never answers."""
        for start in (critic.start_step for critic in self._critics):
            if start >= self._total_steps:
                raise UserError(f"critic ema judges from step {start + 1} on; the run takes {self._total_steps} steps")
            if start >= self.last_critic_step:
                raise UserError(
                    f"critic ema judges from step {start + 1} on; schedules.critic_weight is 0 after step "
                    f"{self.last_critic_step}"
                )

    @property
    def last_critic_step(self) -> int:
        """The last step in which a critic may answer."""
        schedule = self._config.critic_weight
        falls_to_nothing = not schedule.is_constant and schedule.final_fraction == 0 and schedule.end_step is not None
        return schedule.end_step if falls_to_nothing else self._total_steps

    def stage(self, step: int) -> Stage:
        """Which critics answer in ``step``."""
        answering = tuple(critic for critic in self._critics if critic.start_step < step <= self.last_critic_step)
        if answering not in self._stages:
            self._stages[answering] = Stage(answering, self._objective_of(answering))
        return self._stages[answering]

    def turns_after(self, step: int) -> bool:
        """Whether losses after ``step`` are of another kind than those before: critics come or go, a setting jumps or
        begins to fall."""
        moving = [schedule for _, schedule in self._config.items() if not schedule.is_constant]
        turns = {schedule.end_step if schedule.shape == "first" else schedule.start_step for schedule in moving}
        return step in turns or self.stage(step + 1) is not self.stage(step)

    def steps_of(self, critic: Critic, until: int | None = None) -> int:
        """In how many steps a critic answers: of the run, or of the first ``until``."""
        last = self.last_critic_step if until is None else min(until, self.last_critic_step)
        return max(0, last - critic.start_step)

    def values(self, step: int) -> Scheduled | None:
        """What the settings are in ``step``, on the device; None where all of them are as the objective says.

        They are written there by the device itself, which a copy would have to wait for.
        """
        if all(schedule.is_constant for _, schedule in self._config.items()):
            return None
        now = self._now(step)
        factors = [self._on_device(now["critic_weight"])] * len(self.stage(step).critics)
        return Scheduled(
            torch.stack(factors) if factors else torch.zeros(0, device=self._device),
            self._on_device(now["smoothing"] * self._objective.avatarl.smoothing),
            self._on_device(now["entropy_coef"] * self._objective.avatarl.entropy_coef),
        )

    def logged(self, step: int) -> dict[str, float]:
        """What of a line of metrics depends on the step: the values of settings that change, by their names."""
        now, settings = self._now(step), self._objective.avatarl
        values = {name: now[name] * getattr(settings, name) for name in ("smoothing", "entropy_coef")}
        values = {name: value for name, value in values.items() if not getattr(self._config, name).is_constant}
        if not self._config.critic_weight.is_constant or any(critic.start_step for critic in self._critics):
            values["critic_weight"] = now["critic_weight"] * sum(map(self._shares().get, self.stage(step).critics))
        return values

    def _now(self, step: int) -> dict[str, float]:
        return {name: factor(schedule, step, self._total_steps) for name, schedule in self._config.items()}

    def _on_device(self, value: float) -> Tensor:
        return torch.full((), value, device=self._device)

    def _shares(self) -> dict[Critic, float]:
        """Each critic's weight where all of them answer."""
        count = len(self._critics)
        if self._objective.name == "distillation":
            return dict.fromkeys(self._critics, (1 - self._objective.baseline.distillation_alpha) / max(1, count))
        return dict(zip(self._critics, self._objective.avatarl.critic_weights(count), strict=True))

    def _objective_of(self, answering: tuple[Critic, ...]) -> Objective:
        """The objective with these critics alone; the weights of the others are the text's."""
        if len(answering) == len(self._critics):
            return self._objective
        shares = self._shares()
        left = sum(share for critic, share in shares.items() if critic not in answering)
        avatarl, baseline = self._objective.avatarl, self._objective.baseline
        if self._objective.name == "distillation":
            baseline = dataclasses.replace(baseline, distillation_alpha=min(1.0, baseline.distillation_alpha + left))
        else:
            weights = tuple(shares[critic] for critic in answering)
            avatarl = dataclasses.replace(
                avatarl, critic_weight=weights or 0.0, reality_weight=avatarl.reality_weight + left
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
