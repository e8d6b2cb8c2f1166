"""Every loader of files from outside, fed with damaged and hostile ones: hundreds by default, ten thousand if slow."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from avatarl import AvataRLConfig, avatarl_loss
from avatarl.cli import main
from avatarl.data import PreparedData, Windows, prepare
from avatarl.data.tokenizer import (
    encode_texts,
    encode_with_bytes,
    end_of_text_id,
    resolve_tokenizer,
    token_byte_lengths,
)
from avatarl.errors import UserError
from avatarl.models import CriticCache, load_model, load_tokenizer
from avatarl.models.critic_cache import is_cache
from avatarl.results import draw_curves, evaluate, generate, read_metrics
from avatarl.results.report import report
from avatarl.run_dir.checkpoint import newest_good_checkpoint
from avatarl.run_dir.identity import identities_of_run
from avatarl.sanitise import OBEYED
from avatarl.training import TrainConfig
from avatarl.training.processes import Processes
from avatarl.training.resume import check_run_folder, load_checkpoint
from avatarl.training.setup import set_up

from ..conftest import BLOCK
from .damages import (
    damage_a_file,
    damage_cache,
    damage_generation,
    damage_metrics,
    damage_model,
    damage_prepared,
    damage_recipe,
    damage_run,
    damage_sources,
    damage_tokenizer,
    damage_what_is_reported,
    write_setting,
)
from .harness import EXPLOITED, Subject, fuzz
from .mutations import HOSTILE_TEXTS, PICKLE

SEED = 1
# Inputs of each subject in the default suite and in the slow one.
COUNTS = {
    "prepared folder": (150, 2600),
    "tokenizer folder": (130, 2400),
    "OpenAI tokenizer": (60, 1000),
    "tokenizer setting": (20, 200),
    "model": (80, 1400),
    "sharded model": (30, 500),
    "generate": (10, 200),
    "evaluate": (10, 200),
    "metrics": (100, 1600),
    "curves": (6, 100),
    "report": (60, 1000),
    "run folder": (60, 1200),
    "critic cache": (120, 1500),
    "sources": (40, 800),
    "recipe": (30, 600),
}


def test_the_counts_are_what_is_promised():
    short, long = (sum(counts) for counts in zip(*COUNTS.values(), strict=True))
    assert short >= 600 and long >= 10_000


def check(subject: Subject, size: str, tmp_path: Path, watch, monkeypatch) -> None:
    """Run the subject's cases; both outcomes must occur, or the fuzzing would prove nothing."""
    count = COUNTS[subject.name][size == "slow"]
    outcomes = fuzz(subject, count, SEED, tmp_path, watch, monkeypatch)
    assert outcomes.total() == count
    assert outcomes["refused"] > count / 10
    assert not list(tmp_path.rglob(EXPLOITED))


sizes = pytest.mark.parametrize("size", ["short", pytest.param("slow", marks=pytest.mark.slow)])
pytestmark = pytest.mark.usefixtures("limits")


# --- prepared folders -----------------------------------------------------------------------------------------------


def read_prepared(folder: Path) -> None:
    """What a run does before it trains; ids that are no tokens must have been refused by then."""
    data = PreparedData.open(folder)
    tokenizer = data.load_tokenizer()
    for stream in (data.train, data.valid):
        ids = stream.slice(0, len(stream))
        assert ((ids >= 0) & (ids < len(tokenizer))).all()
    assert data.end_of_text_id is None or data.end_of_text_id < len(tokenizer)


@sizes
def test_prepared_folders(data_folder: Path, size, tmp_path, watch, monkeypatch):
    subject = Subject("prepared folder", data_folder, damage_prepared, read_prepared)
    check(subject, size, tmp_path, watch, monkeypatch)


# --- caches of critics ------------------------------------------------------------------------------------------------


@sizes
def test_critic_caches(data_folder: Path, good_cache: Path, size, tmp_path, watch, monkeypatch):
    data = PreparedData.open(data_folder)
    player, targets = torch.zeros(4 * BLOCK, data.vocab_size), Windows(data.valid, BLOCK).batch(range(4))[1]

    def read(folder: Path) -> None:
        """What a run does with it; ids that are no tokens must have been refused by then."""
        is_cache(folder)
        stored = CriticCache.open(folder, data, BLOCK).rows("valid", range(4))
        loss, _ = avatarl_loss(player, stored.flat(player.shape[-1]), targets.flatten(), AvataRLConfig(top_k=3))
        assert loss.isfinite()

    check(Subject("critic cache", good_cache, damage_cache, read), size, tmp_path, watch, monkeypatch)


# --- tokenizers -----------------------------------------------------------------------------------------------------


def use_tokenizer(spec: str) -> None:
    tokenizer, _ = resolve_tokenizer(spec, lambda: ["quick fox, old oak"])
    texts = ["quick fox", "", "Ä 漢 🙂 <|endoftext|>"]
    assert [ids for ids, _ in encode_with_bytes(tokenizer, texts)] == encode_texts(tokenizer, texts)
    token_byte_lengths(tokenizer)
    end_of_text_id(tokenizer)


@sizes
def test_tokenizer_folders(data_folder: Path, size, tmp_path, watch, monkeypatch):
    def read(folder: Path) -> None:
        use_tokenizer(f"./{folder}")

    subject = Subject("tokenizer folder", data_folder / "tokenizer", damage_tokenizer, read)
    check(subject, size, tmp_path, watch, monkeypatch)


@sizes
def test_openai_tokenizer_folders(good_openai_tokenizer: Path, size, tmp_path, watch, monkeypatch):
    def read(folder: Path) -> None:
        use_tokenizer(f"./{folder}")

    subject = Subject("OpenAI tokenizer", good_openai_tokenizer, damage_a_file, read)
    check(subject, size, tmp_path, watch, monkeypatch)


@sizes
def test_tokenizer_settings(size, tmp_path, watch, monkeypatch):
    (tmp_path / "empty").mkdir()

    def read(folder: Path) -> None:
        use_tokenizer((folder / "setting").read_bytes().decode("utf-8", "surrogatepass"))

    check(Subject("tokenizer setting", tmp_path / "empty", write_setting, read), size, tmp_path, watch, monkeypatch)


# --- models ---------------------------------------------------------------------------------------------------------


def read_model(folder: Path) -> None:
    load_tokenizer(f"./{folder}")
    load_model(f"./{folder}")


@sizes
def test_models(good_model: Path, size, tmp_path, watch, monkeypatch):
    check(Subject("model", good_model, damage_model, read_model), size, tmp_path, watch, monkeypatch)


@sizes
def test_sharded_models(good_sharded_model: Path, size, tmp_path, watch, monkeypatch):
    check(Subject("sharded model", good_sharded_model, damage_model, read_model), size, tmp_path, watch, monkeypatch)


@sizes
def test_generation(good_model: Path, size, tmp_path, watch, monkeypatch):
    def read(folder: Path) -> None:
        for text in generate(f"./{folder}", "quick fox", max_new_tokens=2, device="cpu"):
            assert isinstance(text, str)

    check(Subject("generate", good_model, damage_generation, read), size, tmp_path, watch, monkeypatch)


@sizes
def test_evaluation(good_model: Path, data_folder: Path, size, tmp_path, watch, monkeypatch):
    def read(folder: Path) -> None:
        evaluate(f"./{folder}", data_folder, max_windows=1, device="cpu")

    check(Subject("evaluate", good_model, damage_model, read), size, tmp_path, watch, monkeypatch)


# --- metrics --------------------------------------------------------------------------------------------------------


@sizes
def test_metrics(good_run: Path, size, tmp_path, watch, monkeypatch):
    def read(folder: Path) -> None:
        [read_metrics(folder, event) for event in ("train", "eval")]

    check(Subject("metrics", good_run, damage_metrics, read), size, tmp_path, watch, monkeypatch)


@sizes
def test_curves(good_run: Path, size, tmp_path, watch, monkeypatch):
    def read(folder: Path) -> None:
        drawn = tmp_path / "curves.svg"
        drawn.unlink(missing_ok=True)
        names = HOSTILE_TEXTS[1:-1]
        draw_curves({name: folder for name in names[:2]} | {"_$x$": folder}, drawn, {names[3]: 4.0})

    check(Subject("curves", good_run, damage_metrics, read, writes=True), size, tmp_path, watch, monkeypatch)


@sizes
def test_reports(good_run_folder: Path, size, tmp_path, watch, monkeypatch):
    def read(folder: Path) -> None:
        report([folder], tmp_path / "report.md", evaluate=False)
        page = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert not OBEYED.search(page) and len(page) < 1_000_000

    subject = Subject("report", good_run_folder, damage_what_is_reported, read, writes=True)
    check(subject, size, tmp_path, watch, monkeypatch)


# --- sources --------------------------------------------------------------------------------------------------------


@sizes
def test_run_folders(good_run_folder: Path, run_config: TrainConfig, size, tmp_path, watch, monkeypatch):
    setup = set_up(run_config, Processes())

    def read(folder: Path) -> None:
        config = dataclasses.replace(run_config, out=str(folder))
        check_run_folder(folder, config, resume=True)
        checkpoint = newest_good_checkpoint(folder, lambda line: None, identities_of_run(folder))
        if checkpoint:
            load_checkpoint(checkpoint, setup)

    check(Subject("run folder", good_run_folder, damage_run, read), size, tmp_path, watch, monkeypatch)


def read_sources(folder: Path) -> None:
    source = folder / (folder / "chosen").read_text()
    prepare([str(source)], "new/out", tokenizer=f"./{folder}/tokenizer", quiet=True)
    PreparedData.open("new/out").load_tokenizer()
    shutil.rmtree("new")


@sizes
def test_sources(good_sources: Path, size, tmp_path, watch, monkeypatch):
    check(
        Subject("sources", good_sources, damage_sources, read_sources, writes=True), size, tmp_path, watch, monkeypatch
    )


# --- recipes --------------------------------------------------------------------------------------------------------


def read_recipe(folder: Path) -> None:
    """A recipe through the command line; what it says in one line is raised here, to be looked at as others are."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["train", "--config", str(folder / "recipe.yaml")])
    assert out.getvalue() == ""
    message = err.getvalue().removesuffix("\n")
    assert status == 2 and message.startswith("avatarl: "), f"status {status}: {message[-500:]}"
    raise AsItWasSaid(message)


class AsItWasSaid(UserError):
    """A message that another hand has not made inert."""

    def __init__(self, message: str) -> None:
        ValueError.__init__(self, message)


@sizes
def test_recipes(good_recipe: Path, size, tmp_path, watch, monkeypatch):
    check(Subject("recipe", good_recipe, damage_recipe, read_recipe), size, tmp_path, watch, monkeypatch)


# --- the fuzzing itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda _: {}["x"], "KeyError"),
        (lambda _: Path("left behind").write_text(""), "left behind"),
        (lambda _: __import__("pickle").loads(PICKLE.replace(b"touch exploited", b"true")), "pickle.find_class"),
        (lambda _: __import__("os").system("true"), "os.system"),
        (lambda folder: (_ for _ in ()).throw(AsItWasSaid("a\x1b[31m")), "holds"),
        (lambda folder: (_ for _ in ()).throw(AsItWasSaid("a\nb")), "several lines"),
        (lambda folder: __import__("time").sleep(60), "still busy"),
    ],
    ids=["error", "file", "pickle", "command", "escape", "lines", "hang"],
)
def test_what_no_loader_may_do_is_seen(good_run: Path, read: Callable, message: str, tmp_path, watch, monkeypatch):
    monkeypatch.setattr("tests.fuzz.harness.SECONDS_PER_CASE", 0.2)
    with pytest.raises(AssertionError, match=f"metrics, seed 1, case 0 .*{message}"):
        fuzz(Subject("metrics", good_run, damage_metrics, read), 1, SEED, tmp_path, watch, monkeypatch)
