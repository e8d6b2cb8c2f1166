"""The whole job in miniature: what it leaves, whether its comparison is fair, and where its numbers come from."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

import avatarl.data
import avatarl.demo
import avatarl.results
import avatarl.training
from avatarl import UserError
from avatarl.data import PreparedData
from avatarl.demo import demo
from avatarl.errors import RunStopped
from avatarl.models import PlayerConfig
from avatarl.results import evaluate, read_metrics
from avatarl.training import OptimConfig
from avatarl.training.optim import Optimisers

from .conftest import BLOCK, TINY

HOSTILE = ["``````text", "[red]not a colour[/red] [/bold] [link=x]", "<|endoftext|> in a line", "| a | b |", "# *x* \\"]
METRICS = ("cross_entropy", "bits_per_byte", "top1_accuracy", "expected_calibration_error")


def write_source(path: Path, documents: int = 40, seed: int = 3) -> Path:
    """Documents of words and of what is markup elsewhere, between lines of ``<|endoftext|>``."""
    rng = random.Random(seed)
    texts = [
        "\n".join(rng.choices([*HOSTILE, "quick fox old oak", "blue sea cold night"], k=6)) for _ in range(documents)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def tiny_demo() -> None:
    """The demo with a player, a block and steps that take a second."""
    tiny = dataclasses.replace(
        avatarl.demo.PLAYER,
        player=PlayerConfig(settings=TINY),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
        block_size=BLOCK,
        micro_batch_size=4,
        steps=6,
        eval_every_steps=3,
        eval_windows=4,
        log_every_steps=2,
        checkpoint_every_steps=3,
        device="cpu",
        precision="fp32",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(avatarl.demo, "PLAYER", tiny)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_demo) -> tuple[Path, dict, str]:
    """A finished demo, in a folder and from a source that look like markup: its folder, result and source."""
    folder = tmp_path_factory.mktemp("demo") / "[red]a[" / "bold]"
    source = str(write_source(folder / "[link=x]y[" / "bold].txt"))
    return folder / "out", demo(source, folder / "out", seed=5), source


def config_of(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))


def test_everything_lies_under_one_folder(finished):
    out, results, source = finished
    runs = {"critic", "avatarl", "cross_entropy"}
    assert {path.name for path in out.iterdir()} == runs | {
        "data", "results.json", "results.md", "curves.png", "samples.md"
    }  # fmt: skip
    for name in runs:
        assert (out / name / "player" / "model.safetensors").is_file()
        assert [line["step"] for line in read_metrics(out / name, "eval")] == [3, 6]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "results.json").read_text()) == results
    assert (results["source"], results["seed"]) == (source, 5)
    assert list(results["runs"]) == ["critic", "avatarl", "cross_entropy"]


def test_player_and_twin_differ_in_the_objective_alone(finished):
    out, results, _ = finished
    player, twin = config_of(out / "avatarl"), config_of(out / "cross_entropy")
    different = {name for name in player.keys() | twin.keys() if player.get(name) != twin.get(name)}
    assert different == {"objective", "critic", "out"}
    assert (player["objective"], twin["objective"]) == ("avatarl", "cross_entropy")
    assert player["critic"] == str(out / "critic")
    assert player["seed"] == 5
    training = {name: run["training"] for name, run in results["runs"].items()}
    assert training["avatarl"]["tokens"] == training["cross_entropy"]["tokens"] == 6 * 4 * BLOCK
    assert training["avatarl"]["parameters"] == training["cross_entropy"]["parameters"]


def test_the_critic_shares_neither_weights_nor_order(finished):
    out, _, _ = finished
    critic, twin = config_of(out / "critic"), config_of(out / "cross_entropy")
    assert critic["objective"] == "cross_entropy"
    assert critic["seed"] != twin["seed"]
    assert critic["player"]["settings"]["num_hidden_layers"] == avatarl.demo.CRITIC_LAYERS


def test_the_results_are_those_of_evaluate(finished):
    out, results, _ = finished
    for name, run in results["runs"].items():
        critic = None if name == "critic" else str(out / "critic")
        assert run["evaluation"] == evaluate(out / name, out / "data", critic=critic)
    first, second = (results["runs"][name]["evaluation"] for name in ("avatarl", "cross_entropy"))
    assert first["tokens"] == second["tokens"]
    assert results["avatarl_minus_cross_entropy"] == {name: first[name] - second[name] for name in METRICS}


def test_the_unigram_entropy_by_hand(finished):
    out, results, _ = finished
    data = PreparedData.open(out / "data")
    counts = Counter(data.train.slice(0, len(data.train)).tolist())
    total = sum(counts.values())
    expected = -sum(count / total * math.log(count / total) for count in counts.values())
    assert results["unigram_entropy"] == pytest.approx(expected)
    assert results["tokens"] == {"train": total, "valid": len(data.valid)}
    assert results["vocab_size"] == data.vocab_size


def test_the_table_has_a_row_for_each_run(finished):
    out, results, _ = finished
    lines = (out / "results.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[0] for row in rows] == ["run", "---", "critic", "avatarl", "cross_entropy"]
    assert len({len(row) for row in rows}) == 1
    for row in rows[2:]:
        assert row[1] == f"{results['runs'][row[0]]['evaluation']['cross_entropy']:.3f}"
    assert f"{results['unigram_entropy']:.3f} nats" in lines[-1]


def test_samples_are_fenced_whatever_they_hold(finished, monkeypatch, tmp_path: Path):
    """Every model answers every prompt, and a text of back quotes does not close its own fence."""
    out, _, _ = finished
    prompts = []

    def hostile(run, prompt, **_):
        prompts.append((Path(run).name, prompt))
        return [prompt + "\n``````\n" + "\n".join(HOSTILE) + "\n# end"]

    monkeypatch.setattr(avatarl.results, "generate", hostile)
    runs = {name: str(out / name) for name in ("avatarl", "cross_entropy")}
    avatarl.demo.write_samples(tmp_path / "samples.md", PreparedData.open(out / "data"), runs)
    assert {name for name, _ in prompts} == set(runs)
    asked = [prompt for name, prompt in prompts if name == "avatarl"]
    assert asked[0] == "" and 2 <= len(asked) <= 4
    outside, fence = [], None
    for line in (tmp_path / "samples.md").read_text(encoding="utf-8").splitlines():
        ticks = len(line) - len(line.lstrip("`"))
        if fence is None and ticks >= 3:
            fence = ticks
        elif fence is not None and ticks >= fence and line == "`" * ticks:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    assert "# end" not in outside
    assert sum(line.startswith("## ") for line in outside) == len(asked)
    assert [line for line in outside if line.startswith("**")] == ["**avatarl**", "**cross_entropy**"] * len(asked)


def test_prompts_end_with_their_document(tmp_path: Path, monkeypatch, finished):
    """Documents are shorter here than a prompt."""
    from avatarl.data import prepare

    out, _, _ = finished
    (tmp_path / "short.txt").write_text("\n<|endoftext|>\n".join(f"w{i}" for i in range(200)))
    prepare([str(tmp_path / "short.txt")], tmp_path / "data", tokenizer=str(out / "data" / "tokenizer"), quiet=True)
    prompts = []
    monkeypatch.setattr(avatarl.results, "generate", lambda run, prompt, **_: prompts.append(prompt) or ["text"])
    avatarl.demo.write_samples(tmp_path / "samples.md", PreparedData.open(tmp_path / "data"), {"run": "run"})
    assert len(prompts) == 4
    assert all(prompt.strip().startswith("w") and "<|" not in prompt for prompt in prompts[1:])


# --- a demo that was stopped ------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """Stands for whatever stops a demo; no error that somebody might expect."""


def stop_at(monkeypatch, place: str, calls: int) -> None:
    """Let a call of something that the demo does fail; ``step`` is an optimiser step of its runs."""
    owners = {"prepare": avatarl.data, "evaluate": avatarl.results, "step": Optimisers}
    owner = owners.get(place, avatarl.demo)
    real, left = getattr(owner, place), iter(range(calls - 1))

    def stop(*arguments, **options):
        if next(left, None) is None:
            raise Stopped
        return real(*arguments, **options)

    monkeypatch.setattr(owner, place, stop)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_demo) -> tuple[Path, dict, Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    source = write_source(folder / "source.txt")
    return source, demo(str(source), folder / "out", quiet=True), folder / "out"


@pytest.mark.parametrize(
    ("place", "calls"),
    [("prepare", 1), ("step", 5), ("step", 11), ("evaluate", 2), ("write_samples", 1), ("results_table", 1)],
)
def test_the_same_command_goes_on_where_a_demo_was_stopped(
    uninterrupted, tmp_path: Path, monkeypatch, place: str, calls: int
):
    source, expected, whole = uninterrupted
    out = tmp_path / "new" / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, place, calls)
        with pytest.raises(Stopped):
            demo(str(source), out, quiet=True)
    if place == "prepare":  # and what a killed process leaves
        (out / ".data.unfinished-1").mkdir(parents=True)
    done = {path: path.stat().st_mtime_ns for path in out.glob("*/final/model.safetensors")}
    result = demo(str(source), out, quiet=True)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    for found in (result, expected):
        found["seconds"] = 0
        for run in found["runs"].values():
            run["training"]["seconds"] = 0
    assert result == expected
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert (out / "samples.md").read_text() == (whole / "samples.md").read_text()


def test_a_signal_says_that_the_same_command_goes_on(uninterrupted, tmp_path: Path, monkeypatch):
    def stopped(*_, **__) -> None:
        raise RunStopped(15, "critic stopped after step 3 of 6")

    monkeypatch.setattr(avatarl.training, "train", stopped)
    with pytest.raises(RunStopped, match="out stopped; run the same command to resume it") as stop:
        demo(str(uninterrupted[0]), tmp_path / "out", quiet=True)
    assert stop.value.signum == 15


def test_a_finished_demo_is_named_as_one(uninterrupted):
    source, _, out = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(UserError, match="files; give another folder with --out .it holds results.json of a finished"):
        demo(str(source), out, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_an_unfinished_demo_goes_on_with_its_own_source_and_seed_alone(uninterrupted, tmp_path: Path, monkeypatch):
    source, out = uninterrupted[0], tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, "step", 5)
        with pytest.raises(Stopped):
            demo(str(source), out, quiet=True)
    other = write_source(tmp_path / "other.txt", seed=9)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"with --out .it holds an unfinished demo of \['.*source.txt"):
        demo(str(other), out, quiet=True)
    with pytest.raises(UserError, match="critic was started under other settings: seed was 2 and is 8; give another"):
        demo(str(source), out, seed=7, quiet=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("names", [["samples.md"], ["critic/mine"], ["data/mine"], ["avatarl/x", "data/manifest.json"]])
def test_folders_that_look_like_a_demo_s_are_not_written_into(uninterrupted, tmp_path: Path, names: list[str]):
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    with pytest.raises(UserError):
        demo(str(uninterrupted[0]), out, quiet=True)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == set(names)
    assert all((out / name).read_text() == "{}" for name in names)


@pytest.mark.parametrize("name", ["samples.md", "curves.png", "results.md"])
def test_a_link_is_refused_before_any_work(uninterrupted, tmp_path: Path, monkeypatch, name: str):
    monkeypatch.setattr(avatarl.training, "train", lambda *_, **__: pytest.fail("it has begun"))
    out = Path(shutil.copytree(uninterrupted[2], tmp_path / "out"))
    (out / "results.json").unlink()
    (out / name).unlink()
    (tmp_path / "outside").write_text("precious")
    (out / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"{name} is a link"):
        demo(str(uninterrupted[0]), out, quiet=True)
    assert (tmp_path / "outside").read_text() == "precious"


# --- refusals -------------------------------------------------------------------------------------------------------


def test_an_occupied_folder_is_refused_and_untouched(tmp_path: Path):
    source = write_source(tmp_path / "source.txt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for out in (tmp_path / "out", source):
        before = source.read_bytes()
        with pytest.raises(UserError, match="already holds files; give another folder with --out"):
            demo(str(source), out, quiet=True)
        assert source.read_bytes() == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("text", ["quick fox old oak", "   \n"], ids=["short", "empty"])
def test_a_source_that_cannot_be_used_leaves_nothing_behind(tmp_path: Path, exists: bool, text: str):
    source = tmp_path / "source.txt"
    source.write_text(text)
    out = tmp_path / "out" if exists else tmp_path / "new" / "out"
    if exists:
        out.mkdir()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="expected more than 16 of each|holds no text"):
        demo(str(source), out, quiet=True)
    assert set(tmp_path.rglob("*")) == before


def test_quiet_prints_nothing_and_a_short_text_is_not_read_too_often(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setattr(avatarl.demo, "MOST_EPOCHS", 1)
    monkeypatch.setattr(avatarl.demo, "PLAYER", dataclasses.replace(avatarl.demo.PLAYER, steps=10_000))
    source = write_source(tmp_path / "source.txt", documents=25)
    results = demo(str(source), tmp_path / "out", quiet=True)
    windows = (results["tokens"]["train"] - 1) // BLOCK
    assert results["runs"]["avatarl"]["training"]["steps"] == max(1, windows // 4)
    assert capfd.readouterr() == ("", "")
