"""Processes side by side: how many, with what in their environment, and how they end."""

from __future__ import annotations

import csv
import errno
import itertools
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from avatarl.comparison import workers as module
from avatarl.comparison.config import make_run
from avatarl.comparison.progress import Job, Progress
from avatarl.comparison.workers import Workers, _visible_gpus
from avatarl.data import PreparedData
from avatarl.errors import RunFailed, RunStopped, UserError
from avatarl.lock import RunLock

from ..survival.harness import MANIFEST, ROOT, environment, last_step
from ..training.runs import assert_same_weights, weights_of
from .conftest import BASE, CROSS_ENTROPY

PATIENCE_SECONDS = 300.0
HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# What a job does in the place of avatarl: its first word, in its folder, perhaps when another file is there.
STANDS_FOR_AVATARL = """#!/bin/sh
shift 2  # -m avatarl
folder=$2
echo "$CUDA_VISIBLE_DEVICES" "$OMP_NUM_THREADS" > "$folder.environment"
while [ -n "$3" ] && [ ! -e "$3" ]; do sleep 0.02; done
case $1 in
    make) touch "$folder.going"; sleep 0.2; echo $(ls "${folder%/*}" | grep -c going) > "$folder.beside"
        rm "$folder.going"; mkdir "$folder"; echo first; echo made it;;
    nothing) echo all well;;
    fail) echo "it went on"; echo "avatarl: something is wrong" >&2; exit 3;;
    silent) exit 4;;
    diverge) mkdir -p "$folder/refused"; exit 1;;
    wait) trap 'mkdir "$folder"; echo saved; exit 143' TERM; touch "$folder.begun"; while :; do sleep 0.02; done;;
esac
"""


class Office:
    """Workers whose jobs are lines of a shell script."""

    def __init__(self, out: Path):
        self.out, self.said = out, []

    def job(self, name: str, what: str = "make", when: Path | None = None) -> Job:
        folder = self.out / "jobs" / name
        return Job(f"jobs/{name}", folder, (what, str(folder), *([] if when is None else [str(when)])))

    def work(self, jobs: list[Job], count: int | None = 1) -> None:
        looks = itertools.count()

        def look() -> list[Job]:
            assert next(looks) < 30, "it does not end"
            return [job for job in jobs if not job.folder.exists()]

        with Workers(self.out, count, self.said.append) as workers:
            workers.work_until(look)

    def left(self, name: str, kind: str) -> str:
        return (self.out / "jobs" / f"{name}.{kind}").read_text().strip()


@pytest.fixture
def office(tmp_path: Path, monkeypatch) -> Office:
    script = tmp_path / "stands-for-avatarl"
    script.write_text(STANDS_FOR_AVATARL)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "_visible_gpus", lambda: [])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return Office(tmp_path / "out")


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[Callable]:
    """A signal that reaches nobody else fails the test, not the process that runs it."""

    def unexpected(number: int, _frame) -> None:
        raise AssertionError(f"signal {number} was not handled")

    before = {number: signal.signal(number, unexpected) for number in HEEDED}
    yield unexpected
    for number, handler in before.items():
        signal.signal(number, handler)


def test_so_many_at_once_and_all_of_them(office: Office):
    names = "abcde"
    office.work([office.job(name) for name in names], count=2)
    beside = [int(office.left(name, "beside")) for name in names]
    assert max(beside) == 2
    assert len(office.said) == 5 and all("made it (" in line for line in office.said)
    assert (office.out / "logs" / "jobs-c.log").read_text() == "first\nmade it\n"


def test_the_first_of_what_is_missing_begins_first(office: Office):
    office.work([office.job("b"), office.job("a"), office.job("c")])
    assert [line.split(":")[0] for line in office.said] == ["jobs/b", "jobs/a", "jobs/c"]
    assert [office.left(name, "beside") for name in "abc"] == ["1"] * 3


def test_a_log_is_not_written_through_a_link(office: Office, tmp_path: Path):
    (office.out / "logs").mkdir(parents=True)
    (tmp_path / "outside").write_text("precious")
    (office.out / "logs" / "jobs-a.log").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="jobs-a.log is a link"):
        office.work([office.job("a")])
    assert (tmp_path / "outside").read_text() == "precious"


def test_a_look_that_finds_more_is_worked_on_too(office: Office):
    first, then = office.job("first"), office.job("then")
    with Workers(office.out, 1, office.said.append) as workers:
        workers.work_until(
            lambda: [job for job in ([then] if first.folder.exists() else [first]) if not job.folder.exists()]
        )
    assert then.folder.exists()


def test_nothing_missing_starts_nothing(office: Office):
    office.work([])
    assert office.said == [] and not office.out.exists()


@pytest.mark.parametrize(
    "what, message",
    [
        ("fail", r"jobs/bad ended with status 3: avatarl: something is wrong \(.*logs/jobs-bad.log\)"),
        ("silent", "jobs/bad ended with status 4: said nothing"),
        ("nothing", r"jobs/bad ended well and left nothing to go on with \(.*logs/jobs-bad.log\)"),
    ],
)
def test_a_job_that_fails_is_told_and_the_others_are_stopped(office: Office, what: str, message: str):
    begun = office.out / "jobs" / "good.begun"
    with pytest.raises(RunFailed, match=message):
        office.work([office.job("good", "wait"), office.job("bad", what, when=begun)], count=2)
    assert (office.out / "logs" / "jobs-good.log").read_text() == "saved\n", "asked to stop, and waited for"


def test_a_run_that_gave_up_is_no_failure_of_its_process(office: Office):
    office.work([office.job("a", "diverge"), office.job("b")])
    assert office.said[0].startswith("jobs/a: gave up") and "made it" in office.said[1]


@pytest.mark.parametrize("number", HEEDED)
def test_a_signal_stops_the_jobs_and_waits_for_them(office: Office, own_handlers, number: signal.Signals):
    begun = [office.out / "jobs" / f"{name}.begun" for name in "ab"]

    def send() -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not all(path.exists() for path in begun) and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(RunStopped, match="the same command goes on") as stopped:
        office.work([office.job(name, "wait") for name in "abc"], count=2)
    thread.join()
    assert stopped.value.signum == number
    assert [(office.out / "logs" / f"jobs-{name}.log").read_text() for name in "ab"] == ["saved\n"] * 2
    assert not (office.out / "logs" / "jobs-c.log").exists()
    assert signal.getsignal(number) is own_handlers, "as it was before"


def test_a_signal_while_a_job_is_being_started_stops_that_one_too(office: Office, monkeypatch):
    start = module.subprocess.Popen

    def start_and_signal(*arguments, **settings):
        process = start(*arguments, **settings)
        while not (office.out / "jobs" / "a.begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(module.subprocess, "Popen", start_and_signal)
    with pytest.raises(RunStopped):
        office.work([office.job("a", "wait")])
    assert (office.out / "logs" / "jobs-a.log").read_text() == "saved\n"


def test_a_signal_after_the_last_job_is_not_lost(office: Office):
    with pytest.raises(RunStopped), Workers(office.out, 1, office.said.append):
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_nohup_ignores_stays_ignored(office: Office):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Workers(office.out, 1, office.said.append):
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_each_start_of_a_job_has_a_log_of_its_own(office: Office):
    """A process of before may still write into its own."""
    for start in range(3):
        office.work([office.job("a")])
        office.job("a").folder.rmdir()
        (office.out / "logs" / "jobs-a.log").write_text(f"start {start}")
    logs = {path.name: path.read_text() for path in (office.out / "logs").iterdir()}
    assert logs == {"jobs-a.1.log": "start 0", "jobs-a.2.log": "start 1", "jobs-a.log": "start 2"}


def test_a_log_that_cannot_be_written_is_named_where_a_job_fails(office: Office, monkeypatch):
    """As on a full disk, where a process cannot say why it ended."""
    real = Path.open

    def full(path: Path, mode: str = "r", *rest, **options):
        if path.suffix == ".log" and mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunFailed, match=r"status 4: said nothing \(its log cannot be written: No space left on device"):
        office.work([office.job("bad", "silent")])


def of_a_run(job: Job) -> Job:
    """As if it trained, into a folder that is there."""
    recipe = SimpleNamespace(as_yaml=lambda: "")
    job.folder.mkdir(parents=True)
    return replace(job, recipe=recipe, arguments=(*job.arguments, "", "--config", str(job.folder) + ".yaml"))


def test_a_run_that_a_killed_comparison_left_is_waited_for(office: Office, monkeypatch):
    job = of_a_run(office.job("a", "nothing"))
    lock = RunLock(job.folder)
    lock.__enter__()
    waited = []

    def sleep(seconds: float) -> None:
        if seconds == 1 and not waited:  # the lock's pause, not that of who watches processes
            waited.append(seconds)
            lock.__exit__()
        real(min(seconds, 0.01))

    real = time.sleep
    monkeypatch.setattr("avatarl.lock.time.sleep", sleep)
    with pytest.raises(RunFailed, match="ended well and left nothing"), Workers(office.out, 1, print) as workers:
        workers.work_until(lambda: [job])
    assert waited


def test_who_holds_a_run_is_said_where_waiting_does_not_help(office: Office, monkeypatch):
    monkeypatch.setattr(module, "SAVE_SECONDS", 0)
    job = of_a_run(office.job("a", "nothing"))
    with RunLock(job.folder), Workers(office.out, 1, print) as workers:
        with pytest.raises(UserError, match=rf"jobs/a is being written by process {os.getpid()} on .*; wait for it"):
            workers.work_until(lambda: [job])


# --- the environment -------------------------------------------------------------------------------------------------


def workers_with(monkeypatch, tmp_path: Path, gpus: list[str], cores: int, count: int | None) -> Workers:
    monkeypatch.setattr(module, "_visible_gpus", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    return Workers(tmp_path, count, print)


@pytest.mark.parametrize(
    "gpus, cores, count, expected_count, threads, named",
    [
        ([], 8, None, 8, "1", [None, None]),
        ([], 8, 3, 3, "2", [None, None, None]),
        ([], 2, 5, 5, "1", [None] * 5),
        (["0", "1"], 8, None, 2, "4", ["0", "1"]),
        (["2", "GPU-x"], 8, 4, 4, "2", ["2", "GPU-x", "2", "GPU-x"]),
        (["0", "1", "2"], 8, 1, 1, "8", ["0"]),
    ],
)
def test_each_has_a_gpu_or_some_cores(
    monkeypatch, tmp_path: Path, gpus: list, cores: int, count, expected_count: int, threads: str, named: list
):
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANOTHER", "stays")
    workers = workers_with(monkeypatch, tmp_path, gpus, cores, count)
    assert workers.count == expected_count
    environments = [workers._environment(slot) for slot in range(len(named))]
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in environments] == named
    assert {each["OMP_NUM_THREADS"] for each in environments} == {threads}
    assert {each["ANOTHER"] for each in environments} == {"stays"}
    assert "OMP_NUM_THREADS" not in os.environ


def test_threads_that_the_user_chose_stay(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert workers_with(monkeypatch, tmp_path, [], 8, 2)._environment(0)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    "named, count, gpus",
    [(None, 2, ["0", "1"]), ("3,GPU-x", 2, ["3", "GPU-x"]), ("", 0, []), (None, 0, []), ("5,1,2", 1, ["5"])],
)
def test_gpus_are_named_as_for_this_process(monkeypatch, named: str | None, count: int, gpus: list[str]):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert _visible_gpus() == gpus


def test_a_gpu_that_is_free_again_is_given_to_the_next(office: Office, monkeypatch):
    monkeypatch.setattr(module, "_visible_gpus", lambda: ["4", "7"])
    long = office.job("long", when=office.out / "jobs" / "third.beside")
    office.work([office.job("first"), long, office.job("second"), office.job("third")], count=None)
    named = {name: office.left(name, "environment").split()[0] for name in ("first", "long", "second", "third")}
    assert named == {"first": "4", "long": "7", "second": "4", "third": "4"}


# --- avatarl itself --------------------------------------------------------------------------------------------------


def test_a_run_is_trained_by_its_recipe(compared, data: PreparedData, tmp_path: Path):
    comparison = compared(arms={"cross_entropy": CROSS_ENTROPY}, seeds=[3])
    [job] = Progress.of(comparison, data).missing
    said = []
    with Workers(tmp_path / "out", 1, said.append) as workers:
        workers.work_until(lambda: Progress.of(comparison, data).missing)
    assert (job.folder / "final" / "model.safetensors").is_file()
    recipe = tmp_path / "out" / "recipes" / "runs-cross_entropy-seed-3.yaml"
    assert yaml.safe_load(recipe.read_text()) == job.recipe.as_dict()
    log = (tmp_path / "out" / "logs" / "runs-cross_entropy-seed-3.log").read_text()
    last = log.splitlines()[-1]
    assert last.startswith("best validation cross-entropy") and "Traceback" not in log
    assert len(said) == 1 and said[0].startswith(f"runs/cross_entropy/seed-3: {last} (")


def test_a_run_that_cannot_be_trained_says_why(tmp_path: Path):
    out, folder = tmp_path / "out", tmp_path / "out" / "runs" / "arm" / "seed-1"
    config = make_run({**BASE, "data": str(tmp_path / "nowhere")}, folder, seed=1)
    job = Job("runs/arm/seed-1", folder, ("train", "--config", str(out / "recipes" / "a.yaml"), "--resume"), config)
    with pytest.raises(RunFailed, match=r"seed-1 ended with status 2: avatarl: .*nowhere.*runs-arm-seed-1.log"):
        with Workers(out, 1, print) as workers:
            workers.work_until(lambda: [job])


# --- a comparison that is stopped ------------------------------------------------------------------------------------


def start(config: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "avatarl", "compare", "--config", str(config), "--device", "cpu"]
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)


def results_of(out: Path) -> list[dict[str, str]]:
    """The lines of results.csv without what no two runs share."""
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_comparison_that_is_stopped_goes_on_to_the_same_results(
    compared, data: PreparedData, tmp_path: Path, number: signal.Signals
):
    """Stopped while two runs train, neither of which has saved anything yet; killed, its runs save all the same."""
    base = {**BASE, "steps": 600, "checkpoint_every_steps": 600, "eval_every_steps": 300, "log_every_steps": 5}
    recipe = {"data": str(data.path), "base": base, "seeds": [1], "workers": 2}
    recipe["arms"] = {"cross_entropy": CROSS_ENTROPY, "smooth": {"objective": "label_smoothing"}}
    for name in ("whole", "cut"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "out": str(tmp_path / name)}))
    whole = start(tmp_path / "whole.yaml", tmp_path / "whole.log")
    assert whole.wait(PATIENCE_SECONDS) == 0, (tmp_path / "whole.log").read_text()

    runs = [tmp_path / "cut" / "runs" / arm / "seed-1" for arm in recipe["arms"]]
    cut, log = start(tmp_path / "cut.yaml", tmp_path / "cut.log"), tmp_path / "cut.log"
    end = time.monotonic() + PATIENCE_SECONDS
    while not all((run / "metrics.jsonl").exists() and last_step(run) >= 5 for run in runs):
        assert cut.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.01)
    cut.send_signal(number)
    assert cut.wait(PATIENCE_SECONDS) == (143 if number == signal.SIGTERM else -9), log.read_text()
    assert "Traceback" not in log.read_text()
    if number == signal.SIGTERM:
        assert log.read_text().splitlines()[-1].startswith("avatarl: stopped; the runs that were going on have saved")
        for run in runs:
            assert list(run.glob(f"checkpoints/*/{MANIFEST}")) and not (run / "final").exists()
    assert not (tmp_path / "cut" / "results.csv").exists()

    again = start(tmp_path / "cut.yaml", log)
    assert again.wait(PATIENCE_SECONDS) == 0, log.read_text()
    for run in runs:
        logs = tmp_path / "cut" / "logs"
        said = [(logs / f"runs-{run.parent.name}-seed-1{number}.log").read_text() for number in (".1", "")]
        assert "stopped after step" in said[0] and "best validation" in said[1] and "Traceback" not in "".join(said)
        for model in ("final", "player"):
            other = tmp_path / "whole" / run.relative_to(tmp_path / "cut") / model
            assert_same_weights(weights_of(run / model), weights_of(other))
    assert results_of(tmp_path / "cut") == results_of(tmp_path / "whole")
