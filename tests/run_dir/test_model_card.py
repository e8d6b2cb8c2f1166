"""The page of a finished player: what the Hub reads, what a person reads, and that neither can be led astray."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import xml.etree.ElementTree
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from avatarl.data import PreparedData
from avatarl.models import Critic
from avatarl.run_dir.curve import HEIGHT, WIDTH, draw_curve
from avatarl.run_dir.log import evaluations_of
from avatarl.run_dir.model_card import hub_dataset
from avatarl.sanitise import OBEYED
from avatarl.training import OptimConfig, TrainConfig, train
from avatarl.training.artifacts import card_of_player
from avatarl.training.processes import Processes
from avatarl.training.setup import Setup, set_up

from ..fuzz.mutations import HOSTILE_TEXTS
from ..training.runs import SPENT, Interrupted, lines_of
from ..training.test_config import read_config

PAGES = ("README.md", "curve.svg")


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory) -> tuple[TrainConfig, Path]:
    """A run of three evaluations."""
    config = tiny_config(tmp_path_factory.mktemp("finished"), steps=6, eval_every_steps=2, checkpoint_every_steps=6)
    train(config, quiet=True)
    return config, Path(config.out)


@pytest.fixture
def copied(finished, tmp_path: Path) -> TrainConfig:
    """The same run in another place."""
    shutil.copytree(finished[1], tmp_path / "run")
    return dataclasses.replace(finished[0], out=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def setup(finished) -> Setup:
    """The parts of the run."""
    return set_up(finished[0], Processes.of_this_run())


def card_of(run: Path, name: str = "final") -> str:
    return (run / name / "README.md").read_text(encoding="utf-8")


def recipe_of(card: str) -> str:
    """The last fenced block of a page."""
    fence, recipe = re.findall(r"^(`{3,})yaml\n(.*?)^\1$", card, re.MULTILINE | re.DOTALL)[-1]
    return recipe


# --- what it says ---------------------------------------------------------------------------------------------------


def test_the_hub_reads_the_front_matter(finished):
    data = ModelCard(card_of(finished[1])).data
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["avatarl"])
    (result,) = data.eval_results
    assert (result.metric_type, result.dataset_split) == ("cross_entropy", "validation")
    assert result.metric_value == round(lines_of(finished[1])[-1]["cross_entropy"], 4)
    assert data.model_name == "run" and data.datasets is None


@pytest.mark.parametrize(
    ("source", "dataset"),
    [
        ("hub:Skylion007/openwebtext", "Skylion007/openwebtext"),
        ("hub:wikitext@wikitext-2-raw-v1", "wikitext"),
        ("hub:../../secret", None),
        ("hub:a\nlicense: mit", None),
        ("python-docs", None),
        ("text/hub:x", None),
    ],
)
def test_a_dataset_of_the_hub_is_linked_by_its_id(source: str, dataset: str | None, tmp_path: Path, monkeypatch):
    assert hub_dataset(source) == dataset
    (tmp_path / "Skylion007" / "openwebtext").mkdir(parents=True)
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "team@lab").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_dataset(source) is None  # a folder comes before an id
    assert hub_dataset("hub:team@lab") is None


def test_the_evaluation_is_that_of_the_player(finished):
    for name, step in (("player", lines_of(finished[1])[-1]["step"]), ("final", 6)):
        (line,) = (line for line in lines_of(finished[1]) if line["event"] == "eval" and line["step"] == step)
        rows = dict(re.findall(r"^\| `(\w+)` \| ([-\d.e+]+) \|$", card_of(finished[1], name), re.MULTILINE))
        metrics = {key: value for key, value in line.items() if key not in ("event", "step", *SPENT)}
        assert {"expected_reward_share", "other_reward_share", "entropy"} < rows.keys() == metrics.keys()
        assert all(float(rows[key]) == pytest.approx(value, rel=1e-5) for key, value in metrics.items())
        spent = f"{line['player_flops']:.3g} of the player, {line['critic_flops']:.3g} of critics"
        assert f"\n| FLOPs until then | {spent} |\n" in card_of(finished[1], name)


def test_the_recipe_trains_it_again(finished, tmp_path: Path):
    config, run = finished
    (tmp_path / "recipe.yaml").write_text(recipe_of(card_of(run)) + "out: elsewhere\n")
    assert read_config(tmp_path / "recipe.yaml") == dataclasses.replace(config, out="elsewhere")
    assert str(run) not in card_of(run)


def test_the_page_says_where_the_data_came_from(finished, data_folder: Path):
    config, run = finished
    data, card = PreparedData.open(data_folder), card_of(run)
    assert f"| data | `{data.manifest['sources'][0]}` |" in card
    assert f"| {len(data.train):,} for training, {len(data.valid):,} for validation |" in card
    assert f"`{data.digest}`" in card and "| `bpe:300`, 300 entries |" in card


def test_changes_on_the_way_are_named(tiny_config, tmp_path: Path, interrupt):
    interrupt(7)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path), quiet=True)
    changed = tiny_config(tmp_path, optim=OptimConfig(learning_rate=2e-2, warmup_steps=2))
    train(changed, resume=True, allow_changes=True, quiet=True)
    assert "\n| changed | `from step 4: optim.learning_rate was 0.01 and is 0.02` |\n" in card_of(tmp_path / "run")


def test_a_run_that_was_interrupted_leaves_the_same_pages(tiny_config, tmp_path: Path, interrupt):
    whole, parts = (
        tiny_config(tmp_path / name, objective="cross_entropy", eval_every_steps=2) for name in ("whole", "parts")
    )
    train(whole, quiet=True)
    interrupt(7)
    with pytest.raises(Interrupted):
        train(parts, quiet=True)
    train(parts, resume=True, quiet=True)
    for path in (f"{folder}/{page}" for folder in ("player", "final") for page in PAGES):
        assert (tmp_path / "parts" / "run" / path).read_bytes() == (tmp_path / "whole" / "run" / path).read_bytes()


# --- what is not as it should be ------------------------------------------------------------------------------------


EVALUATION = {"step": 6, **dict.fromkeys(SPENT, 1), "cross_entropy": 2.0}


def with_manifest(parts: Setup, **entries) -> Setup:
    """The same parts on data whose manifest says something else."""
    return dataclasses.replace(parts, data=dataclasses.replace(parts.data, manifest={**parts.data.manifest, **entries}))


@pytest.mark.parametrize(
    "text", [*HOSTILE_TEXTS, "a\n---\n# Heading", "```\n\n# Heading"], ids=lambda text: ascii(text)[:30]
)
def test_nothing_from_outside_leaves_its_place(setup: Setup, text: str):
    hostile = with_manifest(setup, sources=[text, {"a": [1]}], tokenizer=text)
    hostile.config, hostile.critics = dataclasses.replace(hostile.config, out=text), [Critic(text)]
    (plain_front, plain), (front, page) = (
        card_of_player(parts, {**EVALUATION, name: 1.0}).split("\n---\n", maxsplit=1)
        for parts, name in ((setup, "metric"), (hostile, text))
    )
    assert not OBEYED.search(front + page)
    assert page.count("\n") == plain.count("\n")
    assert yaml.safe_load(front.removeprefix("---")).keys() == yaml.safe_load(plain_front.removeprefix("---")).keys()
    assert ModelCard(f"{front}\n---\n{page}").text.strip() == page.strip()


def test_a_long_list_of_sources_is_cut(setup: Setup):
    card = card_of_player(with_manifest(setup, sources=list("abcdefg")), EVALUATION)
    assert "\n| data | `a`, `b`, `c`, `d`, `e` and 2 more |\n" in card


def test_a_recipe_cannot_leave_its_fence(setup: Setup):
    critics = ["````\n# Heading", "\n```\n"]
    parts = dataclasses.replace(setup, config=dataclasses.replace(setup.config, critic=critics))
    card = card_of_player(parts, EVALUATION)
    assert yaml.safe_load(recipe_of(card))["critic"] == critics
    assert card.endswith("\n`````\n")


def test_pages_are_written_without_the_metrics_and_the_record(copied: TrainConfig):
    run = Path(copied.out)
    (run / "metrics.jsonl").unlink()
    (run / "final" / "model.safetensors").unlink()
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**environment, "versions": None}))
    train(copied, resume=True, quiet=True)
    assert "| made with | unknown |" in card_of(run)
    assert "nats per token at step 6 |" in card_of(run) and card_of(run).count("| `cross_entropy` |") == 1


def test_the_pages_may_be_edited(copied: TrainConfig):
    player = Path(copied.out) / "player"
    for page in PAGES:
        (player / page).write_text("mine")
    train(copied, resume=True, quiet=True)
    assert [(player / page).read_text() for page in PAGES] == ["mine", "mine"]


def test_only_numbers_of_evaluations_are_read(tmp_path: Path):
    good = {"event": "eval", "step": 2, "tokens": 64, "cross_entropy": 5.0}
    lines = [
        json.dumps(good),
        json.dumps({**good, "event": "train"}),
        json.dumps({**good, "step": 3, "loss": "high", "entropy": float("nan"), "critic_wins": 10**400}),
        json.dumps({**good, "step": 4, "tokens": 0}),
        json.dumps({**good, "step": 5, "cross_entropy": float("inf")}),
        json.dumps({**good, "step": "6"}),
        json.dumps([good]),
        "[" * 100_000 + '"event": "eval"',
        json.dumps({**good, "step": 7}),
        '{"event": "eval", "st',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    numbers = {"step": 2, "tokens": 64, "cross_entropy": 5.0}
    assert evaluations_of(tmp_path) == [numbers, {**numbers, "step": 3}, {**numbers, "step": 7}]


# --- the curve ------------------------------------------------------------------------------------------------------


def points_of(picture: str) -> list[tuple[float, float]]:
    (line,) = xml.etree.ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}polyline")
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def test_the_curve_has_every_evaluation(finished):
    points = points_of((finished[1] / "final" / "curve.svg").read_text())
    values = [line["cross_entropy"] for line in lines_of(finished[1]) if line["event"] == "eval"]
    assert len(points) == len(values) == 3
    heights = [HEIGHT - y for _, y in points]
    assert sorted(range(3), key=heights.__getitem__) == sorted(range(3), key=values.__getitem__)


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [1e29, 3.0, 1e-9], [5.0, 4.0, 4.5, 3.0]])
def test_the_curve_stays_in_its_picture(values: list[float]):
    tokens = [1000 * (i + 1) for i in range(len(values))]
    picture = draw_curve(tokens, values)
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in points_of(picture))
    assert [x for x, _ in points_of(picture)] == sorted({x for x, _ in points_of(picture)})
    assert f">{tokens[-1]:,} training tokens<" in picture and f">{max(values):.3f}<" in picture
    # A run that went on with smaller batches counts fewer tokens than before.
    assert all(0 < x < WIDTH for x, _ in points_of(draw_curve(tokens[::-1], values)))
