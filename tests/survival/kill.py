"""Kills runs until they are finished, and looks whether anything of that can be seen in them.

    python -m tests.survival.kill --kills 200 --seed 1

prints a table of where the kills hit, and exits with status 1 if any run differs from its uninterrupted twin. A kill is
SIGKILL to the whole process group, at a random time or while a random file system call of the process is slowed down.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .harness import Attempt, Job, Launcher, SlowCall, differences, last_step, newest_step, tiny_job

PLACES = (
    "start-up",
    "before the first checkpoint",
    "stepping",
    "evaluation",
    "writing the best player",
    "writing a checkpoint",
    "removing a checkpoint",
    "writing a line of metrics",
    "writing the final player",
)
PARTS = {
    "final": "writing the final player",
    "player": "writing the best player",
    "metrics": "writing a line of metrics",
}


@dataclass(frozen=True)
class Kill:
    """One kill: how it was timed, which process it hit, after how long and where, and the checkpoints around it."""

    is_aimed: bool
    is_executed: bool
    seconds: float
    place: str
    newest_before: int | None
    newest_after: int | None


@dataclass(frozen=True)
class Twin:
    """The uninterrupted run: where it lies, and how it spent its time and its file system calls."""

    run: Path
    startup_seconds: float
    training_seconds: float
    calls: list[str]


@dataclass
class Story:
    """What became of one run."""

    name: str
    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_twin(launcher: Launcher, job: Job, run: Path) -> Twin:
    """Run ``job`` from start to end in peace."""
    slow = launcher.slow_call(run, number=0)
    began = time.monotonic()
    attempt = launcher.fork(job.arguments(run), slow)
    attempt.wait_for(lambda: last_step(run) > 0)
    startup = time.monotonic() - began
    assert attempt.wait() == 0, f"the uninterrupted run failed:\n{attempt.errors}"
    return Twin(run, startup, time.monotonic() - began - startup, slow.calls)


@dataclass
class Killer:
    """Takes a run to its end through about ``kills`` kills.

    Args:
        aimed_share: Share of kills inside a slowed call; the others come at times drawn uniformly.
        executed_share: Share of attempts that are new processes rather than forks.
        final_kills: The last so many kills are aimed at the writing of the final player.
    """

    launcher: Launcher
    rng: random.Random
    kills: int
    aimed_share: float = 0.5
    executed_share: float = 0.0
    final_kills: int = 2

    def run(self, job: Job, twin: Twin, run: Path) -> Story:
        """Start, kill, start again; then let it finish and compare it with its twin."""
        began, story = time.monotonic(), Story(run.name)
        while not story.problems:
            before = newest_step(run)
            is_executed = self.rng.random() < self.executed_share
            slow, seconds = self._draw(len(story.kills), job, twin, run, before, is_executed)
            start = self.launcher.execute if is_executed else self.launcher.fork
            changed, born = modified(run / "metrics.jsonl"), time.time()
            attempt = start(job.arguments(run), slow)
            if len(story.kills) == self.kills:
                attempt.wait()
            elif slow is not None:
                attempt.wait_for(slow.marker.exists)
            else:
                attempt.wait_for(lambda: False, seconds)
            lived, status = time.time() - born, attempt.kill()
            after = newest_step(run)
            story.problems += self._check(job, run, attempt, status, before, after)
            if status == 0:
                break
            place = place_of_call(slow.marker) if slow else place_by_files(run, job, before, after, born, changed)
            story.kills.append(Kill(slow is not None, is_executed, lived, place, before, after))
        if not story.problems:
            in_background = job.settings.get("checkpoint_in_background", False)
            story.problems += differences(run, twin.run, in_background)
        if not story.problems:
            again = self.launcher.fork(job.arguments(run))
            if again.wait() != 0:
                story.problems.append(f"a finished run was resumed with status {again.poll()}: {again.errors[-500:]}")
            story.problems += differences(run, twin.run, in_background)
        story.seconds = time.monotonic() - began
        return story

    def _draw(
        self, done: int, job: Job, twin: Twin, run: Path, newest: int | None, is_executed: bool
    ) -> tuple[SlowCall | None, float]:
        """The next kill: a call to slow down, or a time in seconds.

        Both are uniform from the process's start to twice the average life that would use up the kills that are left.
        """
        kills_left = self.kills - done
        if kills_left <= 0:
            return None, 0.0
        if kills_left <= self.final_kills:
            calls = sum("/final" in call or "/.final" in call for call in twin.calls)
            number = self.rng.randint(1, calls)
            return self.launcher.slow_call(run, number, self.rng.random() < 0.5, only="final"), 0.0
        share_left = 1 - (newest or 0) / job.settings["steps"]
        share_of_life = 2 * share_left / max(1, kills_left - self.final_kills)
        if self.rng.random() < self.aimed_share:
            number = self.rng.randint(1, 10 + round(share_of_life * len(twin.calls)))
            return self.launcher.slow_call(run, number, self.rng.random() < 0.5), 0.0
        startup = twin.startup_seconds + (self.launcher.import_seconds if is_executed else 0)
        return None, self.rng.uniform(0, startup + share_of_life * twin.training_seconds)

    def _check(
        self, job: Job, run: Path, attempt: Attempt, status: int, before: int | None, after: int | None
    ) -> list[str]:
        """What is wrong after one life: it failed by itself, or more than the last steps were lost."""
        problems = []
        if status not in (0, -9):
            problems.append(f"exit status {status} instead of going on: {attempt.errors[-1000:]}")
        if "damaged" in attempt.errors:
            problems.append(f"a kill left a damaged checkpoint: {attempt.errors[-1000:]}")
        if (after or 0) < (before or 0):
            problems.append(f"the newest checkpoint was of step {before} and is of step {after}")
        lost = last_step(run) - (after or 0)
        may_lag = job.settings.get("checkpoint_in_background", False)  # where one takes long, the next is left out
        if lost > job.settings["checkpoint_every_steps"] and not may_lag:
            problems.append(f"{lost} steps were lost")
        return problems


def modified(path: Path) -> int:
    """When a file was last written, in nanoseconds; 0 for one that is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def place_of_call(marker: Path) -> str:
    """What the process was doing in its slowed call, by the path that it touched."""
    call, _, path = marker.read_text(encoding="utf-8").partition(" ")
    if "/checkpoints" in path:
        return "removing a checkpoint" if call in ("unlink", "remove", "rmdir") else "writing a checkpoint"
    for part, place in PARTS.items():
        if f"/{part}" in path or f"/.{part}" in path:
            return place
    return "start-up"


def place_by_files(run: Path, job: Job, before: int | None, after: int | None, born: float, changed: int) -> str:
    """What the process was doing when it was killed at a random time, by what it left; ``born`` is when it started."""
    hidden = [path for path in run.glob("checkpoints/.*") if modified(path) > born * 1e9]
    if hidden:
        return "writing a checkpoint" if hidden[0].name.endswith(".partial") else "removing a checkpoint"
    last = last_step(run)
    if modified(run / "metrics.jsonl") == changed or (before == after and last <= (after or 0)):
        return "start-up"
    if last == job.settings["steps"] and after == last:
        return "writing the final player"
    if any(modified(path) > born * 1e9 for path in run.glob(".player*")):
        return "writing the best player"
    if last % job.settings["eval_every_steps"] == 0 and last > (after or 0):
        return "evaluation"
    return "stepping" if after is not None else "before the first checkpoint"


# --- many runs -------------------------------------------------------------------------------------------------------


def jobs(data: Path, steps: int) -> dict[str, Job]:
    """Runs of every kind whose state differs: objectives that draw and remember, dropout, optimisers, accumulation."""
    base = tiny_job(data, steps=steps, log_every_steps=2)
    baseline = {"baseline.samples": 3, "baseline.ppo_refresh_every": 5}
    sampled = Job(base.data, {**base.settings, **baseline}, base.recipe)
    with_dropout = {**base.settings["player.settings"], "attention_dropout": 0.1}
    kinds = {
        "avatarl": base.but(seed=1),
        "reinforce": sampled.but(seed=2, objective="reinforce", checkpoint_every_steps=10, log_every_steps=1),
        "ppo": sampled.but(seed=3, objective="ppo"),
        "background": base.but(seed=4, player__settings=with_dropout, checkpoint_in_background=True),
        "dropout": base.but(seed=5, player__settings=with_dropout, keep_last=1, keep_every=30),
        "muon-accumulate": base.but(seed=6, gradient_accumulation_steps=2, optim__name="muon", log_every_steps=5),
        "background-ppo": sampled.but(
            seed=7, objective="ppo", checkpoint_in_background=True, checkpoint_every_steps=1, keep_last=3
        ),
        "cross-entropy": base.but(seed=8, objective="cross_entropy", checkpoint_every_steps=1, tensorboard=True),
    }
    return kinds


def make_data(folder: Path) -> Path:
    """A prepared folder with some hundred windows of text."""
    from avatarl.data.prepare import prepare

    folder.mkdir()
    random_words = random.Random(1).choices(["quick fox", "old oak", "blue sea", "cold night", "long road"], k=2400)
    documents = [" ".join(random_words[start : start + 40]) for start in range(0, len(random_words), 40)]
    lines = [json.dumps({"text": text}) for text in documents]
    (folder / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare([str(folder / "documents.jsonl")], folder / "prepared", tokenizer="bpe:300", valid_fraction=0.1, quiet=True)
    return folder / "prepared"


def kill_runs(
    launcher: Launcher, kinds: dict[str, Job], folder: Path, kills: int, kills_per_run: int, seed: int, **shares: float
) -> list[Story]:
    """Runs of each kind in turn until so many kills are done, or three runs have failed."""
    rng, twins, stories, done = random.Random(seed), {}, [], 0
    while done < kills and sum(bool(story.problems) for story in stories) < 3:
        kind = list(kinds)[len(stories) % len(kinds)]
        if kind not in twins:
            twins[kind] = run_twin(launcher, kinds[kind], folder / f"twin-{kind}")
        killer = Killer(launcher, rng, min(kills_per_run, max(5, kills - done)), **shares)
        run = folder / f"run-{len(stories) + 1}-{kind}"
        try:
            story = killer.run(kinds[kind], twins[kind], run)
        except AssertionError as error:  # a process that hangs
            story = Story(run.name, problems=[str(error)])
        stories.append(story)
        done += len(story.kills)
        problems = f"  {story.problems[0]}" if story.problems else ""
        result = "FAILED" if story.problems else "identical"
        print(f"{story.name:<24} {len(story.kills):>3} kills {story.seconds:6.1f} s  {result}{problems}", flush=True)
    return stories


def table(stories: list[Story], seconds: float) -> str:
    """Where the kills hit, and what became of the runs."""
    kills = [kill for story in stories for kill in story.kills]
    at_random = Counter(kill.place for kill in kills if not kill.is_aimed)
    aimed = Counter(kill.place for kill in kills if kill.is_aimed)
    rows = [(place, at_random[place], aimed[place], at_random[place] + aimed[place]) for place in PLACES]
    rows.append(("together", at_random.total(), aimed.total(), len(kills)))
    lines = [f"| {'killed while':<28} | {'random time':>11} | {'slowed call':>11} | {'together':>8} |"]
    lines.append(f"|{'-' * 30}|{'-' * 12}:|{'-' * 12}:|{'-' * 9}:|")
    lines += [f"| {place:<28} | {one:>11} | {other:>11} | {both:>8} |" for place, one, other, both in rows]
    executed = sum(kill.is_executed for kill in kills)
    failed = sum(bool(story.problems) for story in stories)
    summary = f"{len(kills)} kills ({executed} of fresh processes) in {len(stories)} runs, {failed} runs failed"
    return "\n".join([*lines, "", f"{summary}, {seconds:.0f} seconds"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.survival.kill", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="at least so many kills")
    parser.add_argument("--kills_per_run", type=int, default=25, help="about so many in a run")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of a run")
    parser.add_argument("--seed", type=int, default=1, help="decides when is killed, not what is trained")
    parser.add_argument("--executed_share", type=float, default=0.05, help="share of new processes; others are forked")
    parser.add_argument("--aimed_share", type=float, default=0.5, help="share of kills inside a slowed call")
    parser.add_argument("--folder", type=Path, help="keep all runs here, and a list of all kills")
    parser.add_argument("--kinds", nargs="+", help="only runs of these kinds, such as ppo (default: all in turn)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        data = make_data(folder / "data")
        with Launcher(folder / "logs") as launcher:
            stories = kill_runs(
                launcher,
                {kind: job for kind, job in jobs(data, options.steps).items() if kind in (options.kinds or [kind])},
                folder,
                options.kills,
                options.kills_per_run,
                options.seed,
                aimed_share=options.aimed_share,
                executed_share=options.executed_share,
            )
        record = [{"run": story.name, **dataclasses.asdict(kill)} for story in stories for kill in story.kills]
        (folder / "kills.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record), encoding="utf-8")
        print("\n" + table(stories, time.monotonic() - began))
    return int(any(story.problems for story in stories))


if __name__ == "__main__":
    sys.exit(main())
