"""The command line in process: a whole job end to end, and every mistake in one line that leaves nothing behind."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import pytest
import yaml

import avatarl.results
import avatarl.training
from avatarl import UserError, __version__, files
from avatarl.cli import COMMANDS, NOT_OPTIONS, main
from avatarl.data import PreparedData
from avatarl.errors import RunFailed
from avatarl.models import CriticCache
from avatarl.results import evaluate, generate

from .conftest import BLOCK, TINY, write_documents

RECIPE = {
    "block_size": BLOCK,
    "micro_batch_size": 4,
    "steps": 4,
    "precision": "fp32",
    "device": "cpu",
    "tensorboard": False,
    "eval_every_steps": 2,
    "eval_windows": 4,
    "log_every_steps": 1,
    "checkpoint_every_steps": 2,
    "player": {"settings": TINY},
    "avatarl": {"top_k": 4},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, data_folder: Path, critic_folder: Path) -> Callable[..., str]:
    """``recipe(**settings)`` writes a recipe outside of the working folder and returns its path."""

    def write(**settings) -> str:
        path = tmp_path / "recipe.yaml"
        common = {**RECIPE, "data": str(data_folder), "critic": str(critic_folder), "out": "run"}
        path.write_text(yaml.safe_dump({**common, **settings}), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def refused(here: Path, capsys) -> Callable[..., str]:
    """``refused(*arguments)``: status 2, one line on stderr, no file made or changed; returns the line."""

    def run(*arguments: object, status: int = 2) -> str:
        before = contents_of(here)
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        lines = err.splitlines()
        assert lines[-1].startswith("avatarl: ")
        assert len(lines) == 1
        assert contents_of(here) == before
        return lines[-1]

    return run


def contents_of(folder: Path) -> dict[str, tuple[bytes | None, int]]:
    """Every file's bytes, and every entry's time of change."""
    entries = sorted(folder.rglob("*"))
    return {str(path): (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns) for path in entries}


def status_of(*arguments: str) -> int:
    """The status of a command, which may leave through ``SystemExit`` as ``--help`` does."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(arguments: list[str], capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: avatarl COMMAND")
    assert all(f"\n  {name} " in out for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"avatarl {__version__}\n"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("demo", "--seed"),
        ("prepare", "--tokenizer"),
        ("train", "--avatarl.smoothing"),
        ("evaluate", "--max_windows"),
        ("generate", "--temperature"),
    ],
)
def test_each_command_has_its_own_help(command: str, option: str, capsys):
    assert status_of(command, "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: avatarl {command}" in out and option in out
    assert " ".join(out.split()).count(COMMANDS[command].summary) == 1


# The options that people write, besides the settings of recipes.
OWN = {
    "demo": ["source", "out", "seed"],
    "prepare": ["sources", "out", "tokenizer", "valid_fraction", "text_field", "processes"],
    "train": ["resume", "allow_changes"],
    "critic cache": ["critic", "data", "out", "block_size", "kind", "bytes_per_token", "keep_top", "train_windows"]
    + ["seed", "micro_batch_size", "precision", "critic_quantization", "device"],
    "verify": ["folders"],
    "plan": ["processes", "utilisation", "vocab_size", "critic_preset"],
    "evaluate": ["model", "data", "critic", "split", "block_size", "max_windows", "pairs", "tasks", "include_path"]
    + ["device"],
    "generate": ["model", "prompt", "samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "device"],
    "inspect": ["player", "critic", "text", "file", "position", "out", "device"],
    "report": ["runs", "out", "baseline", "data", "max_windows", "prompt", "sample_tokens", "evaluate", "device"],
    "compare": ["device"],
    "play": ["runs", "critic", "host", "port", "device"],
    "push": ["model", "repo", "private"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_parameter_of_a_command_is_explained_once(command: str, capsys):
    """By the docstring of its function, in words alone."""
    assert status_of(*command.split(), "--help") == 0
    out = capsys.readouterr().out
    options = re.findall(r"^  (--[\w.]+|\w+)(?: |$)", out, re.MULTILINE)
    assert len(options) == len(set(options)), options
    described = re.split(r"^  (?=--?\w|\w)", out.partition("options:")[2], flags=re.MULTILINE)
    assert not [each for each in described if re.search(r"``|:\w+:`|%\(|\\x", each)]
    module, name = COMMANDS[command].function.split(":")
    function = getattr(importlib.import_module(f"avatarl.{module}"), name)
    parameters = set(inspect.signature(function).parameters) - NOT_OPTIONS - {"config", "comparison", "avatarl"}
    assert parameters == {name.replace("prompt", "prompts") if command == "report" else name for name in OWN[command]}
    for option in OWN[command]:
        assert re.search(rf"^  (--)?{option}(\n| )", out, re.MULTILINE), option


RECIPE_TYPOS = (
    "micro_batch_sise: 4",
    "optim: {learning_rte: 1}",
    "objective: avatar",
    "player: {preset: 2m}",
    "steps: x",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_mistakes_are_answered_without_torch(command: str, tmp_path: Path):
    required = {"prepare": ["a"], "generate": ["m"], "evaluate": ["m"], "report": ["r"], "play": ["r"], "push": ["m"]}
    lines = [["--help"], [*required.get(command, []), "--sed", "1"], ["--device"]]
    if command in ("train", "plan"):
        for number, typo in enumerate(RECIPE_TYPOS):
            recipe = tmp_path / f"{number}.yaml"
            recipe.write_text(f"data: d\nout: {tmp_path}/o\n{typo}\n")
            lines.append(["--config", str(recipe)])
    if command == "compare":
        (tmp_path / "compare.yaml").write_text("data: d\nbase: {steps: 1}\narms: {a: {}}\nsedes: [1]\n")
        lines.append(["--config", str(tmp_path / "compare.yaml")])
    code = (
        "import json, sys\nfrom avatarl.cli import main\n"
        "def status(line):\n try:\n  return main(line)\n except SystemExit as end:\n  return end.code\n"
        "found = [status(line) for line in json.loads(sys.argv[1])]\n"
        "print(json.dumps([found, sorted({'torch', 'transformers'} & set(sys.modules))]))"
    )
    words = json.dumps([[*command.split(), *line] for line in lines])
    result = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, check=True, timeout=60)
    statuses, imported = json.loads(result.stdout.splitlines()[-1])
    assert (statuses, imported) == ([0] + [2] * (len(lines) - 1), []), result.stderr


def test_the_list_of_commands_needs_no_parser():
    code = (
        "import sys\nsys.argv = ['avatarl', '--help']\nimport runpy\n"
        "try:\n    runpy.run_module('avatarl', run_name='__main__')\n"
        "except SystemExit as end:\n    status = end.code\n"
        "print(status, sorted({'torch', 'transformers', 'numpy', 'jsonargparse'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.startswith("usage: avatarl COMMAND")
    assert result.stdout.splitlines()[-1] == "0 []"


# --- a whole job ----------------------------------------------------------------------------------------------------


def test_from_text_to_text(here: Path, tmp_path: Path, capsys):
    source = write_documents(tmp_path / "documents.jsonl", count=30, seed=1)
    assert main(["prepare", str(source), "--out", "data", "--tokenizer", "bpe:300", "--valid_fraction", "0.1"]) == 0
    assert "training tokens in" in capsys.readouterr().out

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": "data", "out": "nowhere", "steps": 999}), encoding="utf-8")
    train = ["train", "--config", str(recipe), "--steps", "4"]
    assert main([*train, "--out", "critic", "--objective", "cross_entropy"]) == 0
    assert main([*train, "--out", "run", "--critic", "critic", "--avatarl.smoothing", "0.3"]) == 0
    assert "best validation cross-entropy" in capsys.readouterr().out
    assert sorted(path.name for path in here.iterdir()) == ["critic", "data", "run"]
    saved = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert (saved["steps"], saved["objective"]) == (4, "avatarl")
    assert (saved["out"], saved["critic"]) == (str(here / "run"), str(here / "critic"))  # wherever it is read from
    assert saved["avatarl"]["smoothing"] == 0.3  # from the command line
    assert saved["avatarl"]["top_k"] == 4  # from the recipe

    assert main([*train, "--out", "run", "--critic", "critic", "--avatarl.smoothing", "0.3", "--resume"]) == 0
    assert "best validation cross-entropy" in capsys.readouterr().out

    options = ["--data", "data", "--device", "cpu", "--max_windows", "3"]
    assert main(["evaluate", "run", *options, "--critic", "critic", "--avatarl.top_k", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["windows"] == 3
    assert found["rewards"]["active_actions"] <= 7
    del found["rewards"], found["reward_settings"]
    assert found == evaluate("run", "data", max_windows=3, device="cpu")

    options = ["--samples", "2", "--max_new_tokens", "5", "--seed", "3", "--device", "cpu"]
    assert main(["generate", "run", "--prompt", "old oak", *options]) == 0
    expected = generate("run", "old oak", samples=2, max_new_tokens=5, seed=3, device="cpu")
    assert capsys.readouterr().out == "\n\n---\n\n".join(expected) + "\n"


def test_print_config_is_a_recipe(here: Path, tmp_path: Path, recipe, capsys):
    path = recipe(steps=7)
    assert status_of("train", "--config", path, "--avatarl.top_k", "9", "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["steps"], printed["avatarl"]["top_k"], printed["block_size"]) == (7, 9, BLOCK)
    assert printed["optim"]["learning_rate"] > 0
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(printed), encoding="utf-8")
    assert main(["train", "--config", str(tmp_path / "printed.yaml"), "--steps", "1"]) == 0
    assert not list(here.glob("*.yaml"))


def test_a_plan_finds_a_critic_that_another_recipe_makes(here: Path, recipe, capsys):
    path = Path(recipe(critic="runs/critic"))
    critic = {**RECIPE, "data": "d", "out": "runs/critic", "objective": "cross_entropy", "player": {"preset": "5m"}}
    (path.parent / "critic.yaml").write_text(yaml.safe_dump(critic), encoding="utf-8")
    assert main(["plan", "--config", str(path)]) == 0
    assert "critic.yaml" in capsys.readouterr().out


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_an_unknown_command_or_option_has_its_nearest_named(refused):
    assert "command is 'trian'; expected one of demo, prepare, train" in refused("trian")
    assert refused("trian").endswith("did you mean 'train'?")
    line = refused("train", "--data", "d", "--out", "o", "--steps", 1, "--optim.learning_rte", 1)
    assert line.endswith("optim.learning_rte is not a setting of avatarl train; did you mean 'optim.learning_rate'?")
    assert refused("prepare", "x.txt", "--out", "o", "--tokeniser", "gpt2").endswith("did you mean 'tokenizer'?")
    assert refused("evaluate", "x", "--data", "d", "--avatarl.topk", 1).endswith("did you mean 'avatarl.top_k'?")
    assert refused("generate", "x", "--temprature", 1).endswith("did you mean 'temperature'?")
    assert refused("demo", "--out", "o", "--sed", 1).endswith("did you mean 'seed'?")


def test_a_command_of_two_words_has_its_second_named(refused, capsys):
    assert refused("critic", "cahe") == "avatarl: critic is followed by 'cahe'; expected cache; did you mean 'cache'?"
    for words in (["critic"], ["critic", "--help"], ["critic", "cache", "--help"]):
        assert status_of(*words) == 0
        assert capsys.readouterr().out.startswith("usage: avatarl critic cache ")


@pytest.mark.parametrize("rank, printed", [("0", "a text\n"), ("1", "")])
def test_the_first_of_several_processes_prints_the_result(monkeypatch, capsys, rank: str, printed: str):
    monkeypatch.setattr(avatarl.results, "generate", wraps(generate)(lambda **_: ["a text"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert main(["generate", "model"]) == 0
    assert capsys.readouterr().out == printed


def test_libraries_are_told_to_be_quiet_unless_the_user_wants_otherwise(monkeypatch):
    monkeypatch.setattr(avatarl.results, "generate", wraps(generate)(lambda **_: [""]))
    names = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    assert main(["generate", "model"]) == 0
    assert [os.environ[name] for name in names] == ["1", "1", "info"]


def test_several_critics_are_given_at_once(refused):
    twice = ("--critic", "a", "--critic=b")
    several = "critic is given more than once; expected --critic {} for several"
    assert several.format("A B") in refused("evaluate", "x", "--data", "d", *twice)
    assert several.format("'[A, B]'") in refused("train", "--data", "d", "--out", "o", "--steps", 1, *twice)


def test_options_are_not_abbreviated(refused):
    assert "block is not a setting" in refused("train", "--data", "d", "--out", "o", "--steps", 1, "--block", 4)


def test_an_unknown_key_of_a_recipe_has_its_nearest_named(refused, recipe):
    line = refused("train", "--config", recipe(micro_batch_sise=3))
    assert "micro_batch_sise is not a setting of avatarl train; did you mean 'micro_batch_size'?" in line
    line = refused("train", "--config", recipe(avatarl={"smothing": 0.2}))
    assert "avatarl.smothing is not a setting of avatarl train; did you mean 'avatarl.smoothing'?" in line
    assert "names 'hiden_size'" in refused("train", "--config", recipe(player={"settings": {"hiden_size": 8}}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "many"}, "steps is 'many'; expected int or null"),
        ({"block_size": 2.5}, "block_size is '2.5'; expected int"),
        ({"data": 5}, "data is '5'; expected str"),
        ({"optim": {"learning_rate": "fast"}}, "optim.learning_rate is 'fast'; expected float"),
        ({"optim": None}, "optim is None; expected its settings by name"),
        ({"avatarl": [1]}, "avatarl is [1]; expected its settings by name"),
        ({"avatarl": {"pool": "geometrical"}}, "avatarl.pool is 'geometrical'; expected 'geometric', 'arithmetic'"),
        ({"avatarl": {"smoothing": 1}}, "smoothing is 1.0; expected a number in [0, 1)"),
        ({"avatarl": {"reality_weight": -0.1}}, "reality_weight is -0.1; expected a number of at least 0"),
        ({"avatarl": {"critic_weight": [0.2, -1]}}, "critic_weight is -1.0; expected a number of at least 0"),
        ({"avatarl": {"critic_weight": [0.2, 0.1]}}, "critic_weight has 2 entries for 1 critics"),
        ({"avatarl": {"top_k": 1000}}, "top_k is 1000; expected at most the vocabulary's"),
        ({"block_size": 10**6}, "block_size: 1000000 needs at least 1000001 tokens, but the train split has"),
        ({"objective": "cross-entropy"}, "did you mean 'cross_entropy'?"),
        ({"player": {"preset": "125m"}}, "player.preset is '125m'; expected one of 1m"),
        ({"critic": None}, "objective 'avatarl' needs a critic, and critic is empty"),
        ({"critic": "/no/such/critic"}, "/no/such/critic"),
        ({"data": "missing"}, "missing/manifest.json: no such file"),
        ({"epochs": 1.0}, "steps is 4 and epochs is 1.0; expected exactly one of them"),
        ({"device": "abacus"}, "device is 'abacus'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be_used_is_named(refused, recipe, settings: dict, message: str):
    assert message in refused("train", "--config", recipe(**settings))


def test_a_required_setting_is_asked_for(refused):
    assert "required: out" in refused("train", "--data", "d", "--steps", 1)
    assert "required: sources" in refused("prepare", "--out", "o")
    assert "required: model" in refused("generate")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\0", "cannot be read ('utf-8' codec"),
        (b"data: [d\nout:", "parsing"),
        (b"only words", "only words"),
        (b"", "config"),
    ],
    ids=["binary", "broken", "text", "empty"],
)
def test_a_recipe_that_is_none_is_refused(refused, tmp_path: Path, content: bytes, message: str):
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert message in refused("train", "--config", tmp_path / "recipe.yaml")


def test_a_missing_file_is_named(refused, tmp_path: Path, data_folder: Path):
    missing = tmp_path / "missing"
    assert f"{missing}.yaml" in refused("train", "--config", f"{missing}.yaml")
    assert f"{missing}.txt" in refused("prepare", f"{missing}.txt", "--out", "data")
    assert f"{missing}.txt" in refused("demo", f"{missing}.txt", "--out", "demo")
    assert str(missing) in refused("evaluate", missing, "--data", data_folder)
    assert str(missing) in refused("generate", missing)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"a\0b", "binary, not text"), ("é".encode("latin-1"), "not UTF-8 at byte 0")],
    ids=["empty", "binary", "not UTF-8"],
)
@pytest.mark.parametrize("command", ["prepare", "demo"])
def test_a_source_that_is_no_text_is_refused(refused, tmp_path: Path, command: str, content: bytes, message: str):
    (tmp_path / "source.txt").write_bytes(content)
    line = refused(command, tmp_path / "source.txt", "--out", "new/folder")
    assert message in line and "source.txt" in line


def test_a_validation_split_that_is_too_small_is_refused(refused, recipe, tmp_path: Path, data_folder: Path):
    (tmp_path / "short.txt").write_text("quick fox old oak " * 20)
    from avatarl.data import prepare

    prepare([str(tmp_path / "short.txt")], tmp_path / "short", tokenizer=str(data_folder / "tokenizer"), quiet=True)
    line = refused("train", "--config", recipe(data=str(tmp_path / "short")))
    assert f"block_size: {BLOCK} needs at least {BLOCK + 1} tokens, but the valid split has" in line


def test_a_tampered_prepared_folder_is_refused(refused, recipe, tmp_path: Path, data_folder: Path, critic_folder: Path):
    data = tmp_path / "tampered"
    shutil.copytree(data_folder, data)
    tokens = bytearray((data / "train-00000.bin").read_bytes())
    tokens[10] ^= 1
    (data / "train-00000.bin").write_bytes(tokens)
    for line in (
        refused("train", "--config", recipe(data=str(data))),
        refused("evaluate", critic_folder, "--data", data),
    ):
        assert "train-00000.bin: changed since it was prepared" in line


def test_verify_reads_what_seems_untouched(
    refused, tmp_path: Path, data_folder: Path, critic_folder: Path, critic_cache: Path, capsys, monkeypatch
):
    """Bits that rot change no times."""
    monkeypatch.setattr(files.Stamp, "of", lambda found: files.Stamp(found.st_size, 0, 0, 0))
    data, cache = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (data_folder, critic_cache))
    assert main(["verify", str(data), str(cache)]) == 0
    assert capsys.readouterr().out == f"{data} is as it was written\n{cache} is as it was written\n"
    damaged = {data: data / "valid-00000.bin", cache: cache / "train-00000.bin"}
    for path in damaged.values():
        content = bytearray(path.read_bytes())
        content[8] ^= 1
        path.write_bytes(content)
    CriticCache.open(cache, PreparedData.open(data), BLOCK)
    for folder, path in damaged.items():
        assert f"{path}: changed since it was " in refused("verify", folder)
    assert "a folder made by `avatarl prepare` is expected" in refused("verify", critic_folder)


def test_an_occupied_out_folder_is_refused(refused, here: Path, recipe, tmp_path: Path):
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_text("somebody's")
    source = write_documents(tmp_path / "documents.jsonl", count=3, seed=1)
    assert "out is run, which already holds files" in refused("train", "--config", recipe())
    assert "out: run exists and is not empty" in refused("prepare", source, "--out", "run")
    assert "out is run, which already holds files" in refused("demo", source, "--out", "run")


def test_an_out_that_is_not_utf8_is_refused_before_any_work(refused, here: Path, recipe, tmp_path: Path):
    source = write_documents(tmp_path / "documents.jsonl", count=3, seed=1)
    for command in (["train", "--config", recipe()], ["prepare", source], ["demo", source]):
        assert refused(*command, "--out", "caf\udce9").startswith("avatarl: out is caf\\udce9")


def test_a_model_without_safetensors_is_refused(
    refused, recipe, tmp_path: Path, data_folder: Path, critic_folder: Path
):
    folder = tmp_path / "pickled"
    shutil.copytree(critic_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for line in (
        refused("train", "--config", recipe(critic=str(folder))),
        refused("evaluate", folder, "--data", data_folder),
        refused("generate", folder),
    ):
        assert f"{folder} has no .safetensors file" in line


def test_a_critic_with_another_vocabulary_is_refused(refused, recipe, tmp_path: Path, critic_folder: Path):
    folder = tmp_path / "other"
    shutil.copytree(critic_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.get)[:-3:-1]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert f"critic {folder} has another vocabulary" in refused("train", "--config", recipe(critic=str(folder)))


def test_values_of_the_readers_are_named(refused, data_folder: Path, critic_folder: Path):
    assert "split is 'test'" in refused("evaluate", critic_folder, "--data", data_folder, "--split", "test")
    assert "block_size is 0" in refused("evaluate", critic_folder, "--data", data_folder, "--block_size", 0)
    judged = ("evaluate", critic_folder, "--data", data_folder, "--critic", critic_folder)
    assert "top_k is 1000; expected at most" in refused(*judged, "--avatarl.top_k", 1000)
    assert "temperature is -1.0" in refused("generate", critic_folder, "--temperature", -1)
    assert "seed is 9223372036854775808" in refused("generate", critic_folder, "--seed", 1 << 63)
    assert "samples is 'x'; expected int" in refused("generate", critic_folder, "--samples", "x")


# --- other ends -----------------------------------------------------------------------------------------------------


def test_debug_shows_the_traceback(here: Path, recipe, capsys):
    assert main(["train", "--config", recipe(avatarl={"smoothing": 1}), "--debug"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "UserError" in err
    assert err.splitlines()[-1] == "avatarl: smoothing is 1.0; expected a number in [0, 1)"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "avatarl: interrupted"),
        (RunFailed("loss is nan at step 3"), 1, "avatarl: loss is nan at step 3"),
        (OSError("disk\nfull"), 1, "avatarl: OSError: disk full"),
        (UserError("two\nlines"), 2, "avatarl: two lines"),
        (ValueError(), 1, "avatarl: ValueError: ValueError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_ends_a_run_decides_the_status(refused, recipe, monkeypatch, error, status: int, message: str):
    @wraps(avatarl.training.train)
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(avatarl.training, "train", fail)
    assert refused("train", "--config", recipe(), status=status) == message


def test_a_loss_that_is_no_number_is_a_failure_of_the_run(here: Path, recipe, capsys):
    optim = {"learning_rate": 3e38, "warmup_steps": 0, "clip_norm": None}
    assert main(["train", "--config", recipe(objective="cross_entropy", optim=optim)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("avatarl: ") and "try a smaller optim.learning_rate" in last
