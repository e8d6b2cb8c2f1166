"""Players in the lm-evaluation-harness, by its own command and by ours; skipped where it is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from avatarl import UserError
from avatarl.cli import main
from avatarl.models import PlayerConfig
from avatarl.results import open_tasks, read_pairs, run_tasks, score_pairs
from avatarl.training import train

from ..conftest import TINY

PAIRS = {
    "order": [("old oak", "oak old"), ("the wise owl", "the owl wise"), ("red barn tall ship", "red barn ship tall")],
    "noun": [("quick fox", "quick sea"), ("cold night", "cold owl"), ("old oak", "old oak"), ("long road", "long fox")],
}
LONE_TASK = {
    "task": "lone",
    "dataset_path": "json",
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "",
    "doc_to_target": 0,
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A folder of minimal pairs in BLiMP's format."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, sentences in PAIRS.items():
        records = [{"sentence_good": good, "sentence_bad": bad, "UID": name} for good, bad in sentences]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def tasks(tmp_path: Path, pairs: Path) -> Path:
    """A folder with tasks of the harness: the pairs, written as BLiMP's are; one from the Hub; a group and a tag."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    local = {"dataset_kwargs": {"data_files": {"validation": str(pairs / "*.jsonl")}}}
    prompt = {"doc_to_text": "{{sentence_good}}", "doc_to_target": "{{sentence_bad}}", "doc_to_choice": None}
    generation = {"output_type": "generate_until", "generation_kwargs": {"until": ["."], "max_gen_toks": 4}}
    exact = {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    for number, config in enumerate(
        [
            LONE_TASK | local,
            LONE_TASK | local | {"task": "tagged", "tag": "a_tag"},
            LONE_TASK | local | generation | prompt | exact | {"task": "generating"},
            LONE_TASK | {"task": "from_hub", "dataset_path": "nobody/nothing"},
            {"group": "a_group", "task": ["lone"]},
        ]
    ):
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def _harness():
    pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed (avatarl[eval])")


# --- without the harness --------------------------------------------------------------------------------------------


def test_a_harness_that_is_not_installed_is_named_in_one_line(tmp_path: Path, monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    assert main(["evaluate", str(tmp_path), "--tasks", "blimp", "--include_path", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("avatarl: tasks need the lm-evaluation-harness (")
    assert line.endswith("); pip install 'avatarl[eval]'\n")
    assert line.count("\n") == 1


def test_a_folder_of_tasks_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="include_path is 'nowhere'; expected a folder with tasks of the harness"):
        open_tasks("blimp", "nowhere")


def test_a_produced_player_names_what_older_readers_know(tiny_config, tmp_path: Path, tokenizer):
    """Generation with a cache, and a tokenizer class that transformers 4 has too."""
    train(tiny_config(tmp_path, objective="cross_entropy", steps=1, eval_every_steps=1), quiet=True)
    player = tmp_path / "run" / "player"
    assert json.loads((player / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    opened = AutoTokenizer.from_pretrained(player)
    assert opened.get_vocab() == tokenizer.get_vocab()
    assert (opened.bos_token_id, opened.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_pretrained(player)
    assert model.config.use_cache and model.generation_config.use_cache


# --- with it --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("_harness")
def test_the_harness_and_minimal_pairs_agree(player_folder: Path, pairs: Path, tasks: Path, monkeypatch, capsys):
    """The same sentences, nothing before the first word; the harness gives a tie to the first of the choices."""
    ours = score_pairs(player_folder, read_pairs(pairs), device="cpu")
    assert ours["ties"] == 1 and 0 < ours["accuracy"] < 1
    command = ["evaluate", str(player_folder), "--device", "cpu", "--include_path", str(tasks), "--tasks"]
    assert main([*command, "lone,generating"]) == 0
    found = json.loads(capsys.readouterr().out)["harness"]
    assert found["results"]["lone"]["acc,none"] == pytest.approx(ours["accuracy"] + 0.5 * ours["ties"] / ours["pairs"])
    assert found["results"]["generating"]["exact_match,none"] == 0.0
    assert found["n-samples"]["lone"] == {"original": 7, "effective": 7}

    grouped = run_tasks(player_folder, open_tasks("a_group, a_tag", tasks), device="cpu")
    assert grouped["results"]["lone"]["acc,none"] == grouped["results"]["tagged"]["acc,none"]
    assert grouped["results"]["lone"] == found["results"]["lone"]

    assert main([*command, "lone,tagget"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("tasks names 'tagget', which neither the harness nor include_path has; did you mean 'tagged'?")
    with pytest.raises(UserError, match="Duplicate task 'lone'"):
        open_tasks("a_group,lone", tasks)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="task 'from_hub' needs its data from the Hugging Face Hub.*expected a network"):
        open_tasks("from_hub", tasks)


@pytest.mark.slow
@pytest.mark.usefixtures("_harness")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_the_harnesss_own_command_takes_a_produced_player(
    tiny_config, tmp_path: Path, pairs: Path, tasks: Path, architecture: str
):
    player = PlayerConfig(architecture=architecture, settings={} if architecture == "gpt2" else TINY)
    train(tiny_config(tmp_path, objective="cross_entropy", steps=4, player=player), quiet=True)
    folder = tmp_path / "run" / "player"
    command = f"-m lm_eval run --model hf --model_args pretrained={folder} --tasks lone,generating --device cpu"
    paths = ["--include_path", str(tasks), "--output_path", str(tmp_path / "found")]
    subprocess.run([sys.executable, *command.split(), *paths], check=True, capture_output=True, timeout=300)
    (written,) = (tmp_path / "found").rglob("*.json")
    found = json.loads(written.read_text())["results"]
    ours = score_pairs(folder, read_pairs(pairs), device="cpu")
    assert found["lone"]["acc,none"] == pytest.approx(ours["accuracy"] + 0.5 * ours["ties"] / ours["pairs"])
