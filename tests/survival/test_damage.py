"""A damaged checkpoint is noticed in one line and the one before it is used; with none left, nothing is touched."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import kill_before_final
from .harness import MANIFEST, Job, Launcher, checkpoints, differences
from .kill import Twin


def truncate(path: Path, before: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(1, path.stat().st_size)])


def flip_a_bit(path: Path, before: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def delete(path: Path, before: Path, rng: random.Random) -> None:
    path.unlink()


def empty(path: Path, before: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def lengthen(path: Path, before: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def replace_by_a_folder(path: Path, before: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def take_from_the_checkpoint_before(path: Path, before: Path, rng: random.Random) -> None:
    shutil.copyfile(before / path.name, path)


DAMAGES = [truncate, flip_a_bit, delete, empty, lengthen, replace_by_a_folder, take_from_the_checkpoint_before]
Damage = Callable[[Path, Path, random.Random], None]


def resume_damaged(launcher: Launcher, job: Job, twin: Twin, run: Path, damaged: Path) -> None:
    """Resume and check what is said and what is left."""
    attempt = launcher.fork(job.arguments(run))
    assert attempt.wait() == 0, attempt.errors
    notices = [line for line in attempt.errors.splitlines() if damaged.name in line]
    assert len(notices) == 1, attempt.errors
    assert not differences(run, twin.run)


def file_names(run: Path) -> list[str]:
    """The files of the newest checkpoint; beneath it, where it has folders."""
    newest = checkpoints(run)[-1]
    names = sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file())
    assert MANIFEST in names and len(names) > 2
    return names


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_file_is_noticed(launcher: Launcher, job: Job, twin: Twin, unfinished: Path, copy_of, damage: Damage):
    rng = random.Random(damage.__name__)
    run = copy_of(unfinished)
    before, newest = checkpoints(run)[-2:]
    damage(newest / rng.choice(file_names(run)), before, rng)
    resume_damaged(launcher, job, twin, run, newest)


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(3))
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_file_is_noticed(
    launcher: Launcher, job: Job, twin: Twin, unfinished: Path, tmp_path: Path, damage: Damage, repetition: int
):
    for name in file_names(unfinished):
        run = tmp_path / name / "run"
        shutil.copytree(unfinished, run)
        before, newest = checkpoints(run)[-2:]
        damage(newest / name, before, random.Random(f"{damage.__name__} {name} {repetition}"))
        resume_damaged(launcher, job, twin, run, newest)


def test_an_older_checkpoint_under_the_newest_name_is_noticed(
    launcher, job: Job, twin: Twin, unfinished: Path, copy_of
):
    run = copy_of(unfinished)
    before, newest = checkpoints(run)[-2:]
    shutil.rmtree(newest)
    shutil.copytree(before, newest)
    resume_damaged(launcher, job, twin, run, newest)


def test_a_checkpoint_without_its_manifest_is_not_used(launcher, job: Job, twin: Twin, unfinished: Path, copy_of):
    run = copy_of(unfinished)
    newest = checkpoints(run)[-1]
    (newest / MANIFEST).unlink()
    resume_damaged(launcher, job, twin, run, newest)


def test_the_checkpoint_of_another_run_is_never_gone_on_from(
    launcher: Launcher, job: Job, twin: Twin, unfinished: Path, copy_of, tmp_path: Path
):
    run = copy_of(unfinished)
    other = kill_before_final(launcher, job.but(seed=2), tmp_path / "other")
    newest = checkpoints(run)[-1]
    shutil.rmtree(newest)
    shutil.copytree(checkpoints(other)[-1], newest)
    resume_damaged(launcher, job, twin, run, newest)


@pytest.mark.slow
def test_two_damaged_checkpoints_are_passed_over(launcher, job: Job, twin: Twin, unfinished: Path, copy_of):
    run = copy_of(unfinished)
    before, newest = checkpoints(run)[-2:]
    one, other = newest / "player.safetensors", before / "player.safetensors"
    one.rename(run / "swapped")
    other.rename(one)
    (run / "swapped").rename(other)
    resume_damaged(launcher, job, twin, run, newest)


def test_when_all_are_damaged_nothing_is_touched(launcher: Launcher, job: Job, unfinished: Path, copy_of):
    run = copy_of(unfinished)
    rng = random.Random(5)
    for folder in checkpoints(run):
        flip_a_bit(folder / rng.choice(file_names(run)), folder, rng)
    before = tree(run)
    attempt = launcher.fork(job.arguments(run))
    assert attempt.wait() == 2, attempt.errors
    assert attempt.errors.splitlines()[-1].startswith("avatarl: ") and "damaged" in attempt.errors.splitlines()[-1]
    assert "Traceback" not in attempt.errors
    assert tree(run) == before


def tree(run: Path) -> dict[str, bytes | None]:
    """Everything in a folder except the lock, which whoever looks at a run takes."""
    paths = [path for path in run.rglob("*") if path.name != ".lock"]
    return {str(path.relative_to(run)): path.read_bytes() if path.is_file() else None for path in paths}
