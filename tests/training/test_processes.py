"""Two processes: the run of one, to float32 rounding, however the player is held; and back to one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open

from avatarl.errors import RunFailed
from avatarl.files import File
from avatarl.objective import OBJECTIVES
from avatarl.run_dir.checkpoint import CHECKPOINTS
from avatarl.training import GuardConfig, OptimConfig, Schedule, ScheduleConfig, TrainConfig, train
from avatarl.training.optim import Optimisers
from avatarl.training.processes import meet

from .runs import Interrupted, assert_same_weights, lines_of, weights_of

# Sixteen windows a step, so that two processes take micro-batches of another size and number than one.
COMMON = dict(
    micro_batch_size=4, gradient_accumulation_steps=4, steps=20, log_every_steps=1, eval_every_steps=10, eval_windows=7
)
LONG = dict(checkpoint_every_steps=20)
FALLING = ScheduleConfig(critic_weight=Schedule("linear", end_step=15))
# The tiny player has one layer and few tokens, and few thresholds to fall to another side of.
CASES: dict[str, dict] = {
    **{f"ddp {name}": dict(objective=name, parallel="ddp", **LONG) for name in sorted(OBJECTIVES)},
    **{f"fsdp {name}": dict(objective=name, parallel="fsdp", **LONG) for name in sorted(OBJECTIVES)},
    "fsdp, critic divided": dict(parallel="fsdp", shard_critics=True, **LONG),
    # Muon makes a rounding as large as a gradient: at a higher rate it moves a token over the edge of a top K in time.
    "fsdp, muon": dict(parallel="fsdp", optim=OptimConfig(name="muon", learning_rate=1e-3, warmup_steps=2), **LONG),
    "fsdp, spikes": dict(parallel="fsdp", guard=GuardConfig(spike_score=1e-3, spike_window=2, stop_after=99), **LONG),
}
ELASTIC = {
    parallel: dict(parallel=parallel, objective="ppo", checkpoint_every_steps=4, keep_last=9)
    for parallel in ("ddp", "fsdp")
}
# A cache is read by each process for its own windows; an average is kept by each, in the parts that it holds.
CRITICS = {
    "ddp, cached": dict(parallel="ddp", critic="CACHE", **LONG),
    "ddp, average": dict(parallel="ddp", critic="ema:0.5:3", **LONG),
    "fsdp, average": dict(parallel="fsdp", critic="ema:0.5:3", schedules=FALLING, **LONG),
    "fsdp, cached and live": dict(parallel="fsdp", critic=["CACHE", "random:1m:7"], **LONG),
}
BACKGROUND = dict(parallel="fsdp", checkpoint_every_steps=20, checkpoint_in_background=True)


def interrupt_after(steps: int) -> Callable[[], None]:
    """The optimiser step after so many more fails; call what is returned to make all work again."""
    real, taken = Optimisers.step, 0

    def step(self: Optimisers, *arguments) -> float:
        nonlocal taken
        taken += 1
        if taken > steps:
            raise Interrupted
        return real(self, *arguments)

    Optimisers.step = step
    return lambda: setattr(Optimisers, "step", real)


def process(rank: int, count: int, rendezvous: str, jobs: list[tuple[TrainConfig, bool, int | None]]) -> None:
    """Train by each configuration, perhaps resuming, perhaps only for some steps."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ["XDG_CACHE_HOME"] = os.devnull  # nothing is remembered
    read, look_through = set(), File.look_through
    File.look_through = lambda file, *how, **more: read.add(file.path.name) or look_through(file, *how, **more)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    for config, resume, steps in jobs:
        if steps is None:
            train(config, resume=resume, quiet=True)
            continue
        repair = interrupt_after(steps)
        try:
            train(config, resume=resume, quiet=True)
        except Interrupted:
            repair()
    Path(f"{rendezvous}-{rank}-read").write_text(" ".join(read))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def cases(critic_cache: Path) -> dict[str, dict]:
    """All cases, with the place of the cache."""

    def placed(critic):
        return (
            [placed(name) for name in critic]
            if isinstance(critic, list)
            else critic.replace("CACHE", str(critic_cache))
        )

    return CASES | {name: {**case, "critic": placed(case["critic"])} for name, case in CRITICS.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_config, cases) -> Path:
    """Every case as ``CASE/2/run`` by two processes, started once for all of them."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = [(tiny_config(folder / name / "2", **COMMON, **case), False, None) for name, case in cases.items()]
    for name, case in ELASTIC.items():
        config = tiny_config(folder / f"elastic {name}", **COMMON, **case)
        repair = interrupt_after(6)
        with pytest.raises(Interrupted):
            train(config, quiet=True)  # one process takes steps 1 to 6, two go on from 4
        repair()
        jobs.append((config, True, 7))
    jobs.append((tiny_config(folder / "background", **COMMON, **BACKGROUND), False, None))
    mp.spawn(process, (2, str(folder / "rendezvous"), jobs), nprocs=2)
    return folder


def assert_same_numbers(ours: Path, theirs: Path) -> None:
    ours, theirs = lines_of(ours), lines_of(theirs)
    assert [(line["event"], line["step"]) for line in ours] == [(line["event"], line["step"]) for line in theirs]
    for left, right in zip(ours, theirs, strict=True):
        assert left == {
            name: value if name == "event" else pytest.approx(value, 2e-5, 1e-6) for name, value in right.items()
        }


@pytest.mark.parametrize("case", [*CASES, *CRITICS])
def test_two_processes_train_as_one(runs: Path, tiny_config, cases, tmp_path: Path, case: str):
    train(tiny_config(tmp_path, **COMMON, **cases[case]), quiet=True)
    assert_same_numbers(runs / case / "2" / "run", tmp_path / "run")
    ours, theirs = weights_of(runs / case / "2" / "run" / "final"), weights_of(tmp_path / "run" / "final")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)  # twenty steps of 1e-2


def test_one_process_reads_data_and_caches_for_all(runs: Path):
    first, second = (set((runs / f"rendezvous-{rank}-read").read_text().split()) for rank in (0, 1))
    assert {"train-00000.bin", "valid-00000.bin", "tokenizer.json", "log_frequencies.bin"} <= first
    assert not second


def test_refusing_spikes_is_refusing_the_same_ones(runs: Path):
    lines = [line for line in lines_of(runs / "fsdp, spikes" / "2" / "run") if line["event"] == "train"]
    assert lines[-1]["skipped_steps"] > 0


@pytest.mark.parametrize("parallel", ELASTIC)
def test_a_run_goes_on_with_another_number_of_processes(runs: Path, tiny_config, tmp_path: Path, parallel: str):
    """One process to step 4, two to step 8, one to the end; ppo, whose snapshot is as old as a whole interval."""
    run = runs / f"elastic {parallel}" / "run"
    files = {path.name for path in (run / CHECKPOINTS / "step-00000008").iterdir()}
    parts = {"player", "optimiser", "snapshot"}
    expected = {f"{part}-0000{rank}-of-00002.safetensors" for part in parts for rank in (1, 2)}
    if parallel == "ddp":
        expected = {f"{part}.safetensors" for part in parts}
    assert files == expected | {"state.json", "manifest.json"}
    train(tiny_config(runs / f"elastic {parallel}", **COMMON, **ELASTIC[parallel]), resume=True, quiet=True)
    train(tiny_config(tmp_path, **COMMON, **ELASTIC[parallel]), quiet=True)
    assert_same_numbers(run, tmp_path / "run")
    resumed = json.loads((run / "environment.json").read_text())["resumed"]
    assert [(start["step"], start["processes"]) for start in resumed] == [(4, 2), (8, 1)]


def test_divided_parts_hold_their_own_rows(runs: Path):
    rows = []
    for rank in (1, 2):
        path = (
            runs
            / "fsdp avatarl"
            / "2"
            / "run"
            / CHECKPOINTS
            / "step-00000020"
            / f"player-0000{rank}-of-00002.safetensors"
        )
        with safe_open(path, "pt") as file:
            rows.append(file.get_tensor("model.embed_tokens.weight"))
    whole = weights_of(runs / "fsdp avatarl" / "2" / "run" / "final")["model.embed_tokens.weight"]
    assert torch.equal(torch.cat(rows), whole)


def test_writing_in_the_background_with_two_processes(runs: Path):
    ours, theirs = (weights_of(runs / name / "run" / "final") for name in ("background", "fsdp avatarl/2"))
    assert_same_weights(ours, theirs)


@pytest.mark.slow
def test_four_processes_train_as_one(tiny_config, tmp_path: Path):
    config = tiny_config(tmp_path / "4", **COMMON, **CASES["fsdp avatarl"])
    mp.spawn(process, (4, str(tmp_path / "rendezvous"), [(config, False, None)]), nprocs=4)
    train(tiny_config(tmp_path, **COMMON, **CASES["fsdp avatarl"]), quiet=True)
    assert_same_numbers(tmp_path / "4" / "run", tmp_path / "run")


def test_processes_meet_in_a_store_that_dead_ones_have_used():
    """What torchrun keeps over a restart: names, a meeting and addresses of processes that are gone."""
    store = dist.HashStore()
    for attempt in range(2):
        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(lambda rank: meet(store, rank, 3, patience_seconds=30), range(3)))
        found[0].set("address of 0", f"attempt {attempt}")
        assert {each.get("address of 0").decode() for each in found} == {f"attempt {attempt}"}


def test_a_process_that_waits_in_vain_says_so():
    with pytest.raises(RunFailed, match="process 1 of 2 waited 0 seconds for the others"):
        meet(dist.HashStore(), 1, 2, patience_seconds=0.2)
