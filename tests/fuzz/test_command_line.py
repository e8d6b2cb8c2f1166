"""Hostile input through real processes: one line, the right status, nothing changed, and an end."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from avatarl.sanitise import OBEYED

from .damages import HOSTILE_RECIPES, damage_model, damage_prepared, damage_recipe, sign_again
from .harness import EXPLOITED, contents_of
from .mutations import PICKLE, nested

SECONDS_PER_PROCESS = 120
FEWEST_REFUSALS = 50
OUTCOMES = ("refused", "worked")


@dataclass(frozen=True)
class Case:
    """A command line, and what is laid out in its working folder before it runs."""

    name: str
    arguments: list[str]
    good: list[Path]  # folders to copy, each by its own name
    damage: Callable[[Path], object] = lambda _: None
    note: str = ""  # begins a line that may be said before the refusal


def damaged(damage: Callable[[Path, random.Random], str], number: int, name: str) -> Callable[[Path], str]:
    """One of the in-process fuzzing's damages, to the folder ``name`` of the working folder."""
    return lambda folder: damage(folder / name, random.Random(number))


def writing(name: str, content: bytes) -> Callable[[Path], object]:
    """A file of this content in the working folder."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return write


def with_large_ids(folder: Path) -> None:
    """Token ids beyond the vocabulary, under a manifest that says they are right."""
    (folder / "prepared" / "train-00000.bin").write_bytes(b"\xff\xff" * 500)
    sign_again(folder / "prepared")


def with_pipe(folder: Path) -> None:
    """A folder of text with a pipe in it that nobody writes to."""
    (folder / "texts").mkdir()
    (folder / "texts" / "good.txt").write_text("quick fox " * 50)
    os.mkfifo(folder / "texts" / "waiting.txt")


def all_cases(data: Path, model: Path, sources: Path, recipe: Path, run: Path) -> list[Case]:
    """Sixty-odd cases; a few of the damages do no harm, and those commands work."""
    # Windows longer than the data: where the damage is harmless, training is refused by these.
    settings = {"data": "prepared", "out": "run", "critic": "model", "steps": 1, "block_size": 100_000, "device": "cpu"}
    harmless_recipe = yaml.safe_dump(settings).encode()
    train = ["train", "--config", "recipe.yaml"]
    in_recipe = ["train", "--config", "recipe/recipe.yaml"]
    prepare = ["--out", "new/out", "--tokenizer", "sources/tokenizer"]
    evaluate = ["evaluate", "model", "--data", "prepared", "--max_windows", "1", "--device", "cpu"]
    generate = ["generate", "model", "--max_new_tokens", "2", "--device", "cpu"]

    def train_on(damage: Callable[[Path], object]) -> Callable[[Path], None]:
        def both(folder: Path) -> None:
            writing("recipe.yaml", harmless_recipe)(folder)
            damage(folder)

        return both

    cases = [
        Case(f"recipe {number}", train, [], writing("recipe.yaml", content))
        for number, content in enumerate(HOSTILE_RECIPES)
    ]
    cases += [Case(f"damaged recipe {n}", in_recipe, [recipe], damaged(damage_recipe, n, "recipe")) for n in range(8)]
    for number in range(4):
        bad_data, bad_model = damaged(damage_prepared, number, "prepared"), damaged(damage_model, number, "model")
        cases += [
            Case(f"train on damaged data {number}", train, [data, model], train_on(bad_data)),
            Case(f"train with a damaged critic {number}", train, [data, model], train_on(bad_model)),
            Case(f"evaluate a damaged model {number}", evaluate, [data, model], bad_model),
            Case(f"evaluate on damaged data {number}", evaluate, [data, model], bad_data),
            Case(
                f"generate from a damaged model {number}",
                generate,
                [model],
                damaged(damage_model, 50 + number, "model"),
            ),
        ]
    for name, content in {
        "binary.txt": b"a\0b",
        "latin.txt": "é".encode("latin-1"),
        "torn.txt.gz": b"\x1f\x8b\x08\0\0",
        "torn.parquet": b"PAR1" + b"\0" * 20 + b"PAR1",
        "deep.jsonl": nested(100_000),
        "pickle.jsonl": PICKLE,
        "\x1b[31mred.txt": b"\0",
        "two\nlines.md": b"\xff",
    }.items():
        arguments = ["prepare", name, *prepare]
        cases.append(Case(f"prepare {name!a}", arguments, [sources], writing(name, content)))
    cases += [
        Case("prepare a pipe", ["prepare", "texts", *prepare], [sources], with_pipe),
        Case("prepare a device", ["prepare", "/dev/zero", *prepare], [sources]),
        Case(
            "prepare with a huge vocabulary",
            ["prepare", "sources/text.txt", *prepare[:3], "bpe:" + "9" * 30],
            [sources],
        ),
        Case("prepare into a file", ["prepare", "sources/text.txt", "--out", "sources/text.md/x"], [sources]),
        Case("prepare under a long name", ["prepare", "sources/text.txt", "--out", "x" * 300], [sources]),
        Case("demo of binary", ["demo", "a.txt", "--out", "new/demo"], [], writing("a.txt", b"\0")),
        Case("demo of nothing", ["demo", "a.txt", "--out", "new/demo"], [], writing("a.txt", b"")),
        Case(
            "demo of too little",
            ["demo", "a.txt", "--out", "new/demo"],
            [],
            writing("a.txt", b"quick fox"),
            "tokenizer 'bpe:4096': ",
        ),
        Case("demo in an occupied place", ["demo", "--out", "run"], [run]),
        Case("ids beyond the vocabulary", train, [data, model], train_on(with_large_ids)),
        Case("a prompt of escapes", [*generate, "--prompt", "\x1b[2J" * 50], [model]),
    ]
    return cases


@pytest.mark.slow
def test_sixty_processes(data_folder, good_model, good_sources, good_recipe, good_run, tmp_path: Path, capsys):
    cases = all_cases(data_folder, good_model, good_sources, good_recipe, good_run)
    folders = [tmp_path / str(number) for number in range(len(cases))]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(outcome_of, cases, folders))
    refusals, complaints = results.count("refused"), [result for result in results if result not in OUTCOMES]
    with capsys.disabled():
        print(f"\n{len(cases)} processes, {refusals} refusals")
    assert not complaints, "\n".join(complaints)
    assert refusals >= FEWEST_REFUSALS
    assert not list(tmp_path.rglob(EXPLOITED))


def outcome_of(case: Case, folder: Path) -> str:
    """Run one command: ``refused`` or ``worked``; else what was wrong about it, so that no case hides another."""
    folder.mkdir()
    for good in case.good:
        shutil.copytree(good, folder / good.name)
    case.damage(folder)
    before = contents_of(folder)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
    command = [sys.executable, "-m", "avatarl", *case.arguments]
    settings = dict(cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    try:
        result = subprocess.run(command, timeout=SECONDS_PER_PROCESS, **settings)
    except subprocess.TimeoutExpired as error:
        return f"{case.name}: still busy after {SECONDS_PER_PROCESS} s: {error.stderr}"
    said = result.stderr.decode("utf-8", "backslashreplace")
    where = f"{case.name}: status {result.returncode}, {said[-1000:]!r}"
    if "Traceback" in said or result.returncode not in (0, 2):
        return where
    if result.returncode == 0:
        return "worked"
    *above, line = said.removesuffix("\n").split("\n")
    # A Rust library that panics says so itself, before anybody can catch it.
    if above and "panicked at" not in said and not (case.note and len(above) == 1 and said.startswith(case.note)):
        return f"{where}: several lines"
    if not line.startswith("avatarl: ") or OBEYED.search(line) or result.stdout:
        return f"{where}: not one inert line"
    if contents_of(folder) != before:
        return f"{where}: files were changed"
    return "refused"
