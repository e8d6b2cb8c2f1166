"""Every recipe is one that the command line reads, and a pair of recipes compares objectives and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from avatarl import AvataRLConfig
from avatarl.comparison import ComparisonConfig
from avatarl.comparison.config import make_run
from avatarl.demo import PLAYER
from avatarl.models import PRESETS, PlayerConfig, build_player, count_parameters
from avatarl.objective import make_objective
from avatarl.options import make_parser, parse_settings
from avatarl.places import read_recipe
from avatarl.training import TrainConfig

from .training.test_config import read_config

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
COMPARISONS = sorted((FOLDER / "comparisons").glob("*.yaml"))
SIZES = [path.stem.removeprefix("article-") for path in RECIPES if path.stem.startswith("article-")]
OPEN_WEB_TEXT_VOCABULARY = 50_257
PARAMETERS = {"30m": 29_920_512, "124m": 123_551_232, "250m": 250_726_400}


def settings_of(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def needs_critic(config: TrainConfig) -> bool:
    return make_objective(config.objective, config.avatarl, config.baseline).needs_critic


def tokens_of(config: TrainConfig) -> int:
    return config.steps * config.windows_per_step * config.block_size


def test_the_recipes_are_where_they_are_looked_for():
    assert set(SIZES) == set(PARAMETERS)
    assert len(RECIPES) >= 7


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_reads_as_a_configuration(path: Path):
    config = read_config(path)
    assert isinstance(config, TrainConfig)
    assert path.stem == "demo" or Path(config.out).name == path.stem
    assert config.critic is not None or config.objective == "cross_entropy"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_to_run_it(path: Path):
    assert f"avatarl train --config recipes/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_comparison_is_one_whose_every_run_is_a_run(path: Path):
    parser = make_parser("avatarl compare", None)
    parser.add_class_arguments(ComparisonConfig)
    comparison = ComparisonConfig(**parse_settings(parser, read_recipe(path)))
    assert f"avatarl compare --config recipes/comparisons/{path.name}" in path.read_text(encoding="utf-8")
    for kind, names in (("arm", comparison.arms), ("critic", comparison.critics)):
        for name in names:
            changes = comparison.changes_of(kind, name)
            run = make_run({**comparison.base_settings(), **changes}, Path("run"), seed=1)
            assert run.critic or kind == "critic" or not needs_critic(run)


def test_the_demos_recipe_is_the_demos_player():
    assert read_config(FOLDER / "demo.yaml") == PLAYER


@pytest.mark.parametrize("size", SIZES)
def test_twins_differ_in_the_objective_alone(size: str):
    player, twin = settings_of(f"article-{size}"), settings_of(f"cross-entropy-{size}")
    different = {name for name in player.keys() | twin.keys() if player.get(name) != twin.get(name)}
    assert different == {"objective", "critic", "avatarl", "out"}
    assert (player["objective"], twin["objective"]) == ("avatarl", "cross_entropy")


@pytest.mark.parametrize("size", SIZES)
def test_the_articles_recipes_have_the_articles_rewards_and_tokens(size: str):
    config = read_config(FOLDER / f"article-{size}.yaml")
    assert config.avatarl == AvataRLConfig.article()
    assert config.critic == "runs/critic-30m"
    assert tokens_of(config) == pytest.approx(2.0e9, rel=0.005)


def test_the_articles_recipes_name_every_setting_of_the_rewards():
    """Written out, so that a changed default cannot change a recipe; only what the article lacks is left out."""
    left_out = {"top_p", "tail", "tail_samples", "temperature", "per_action_mean"}
    for size in SIZES:
        assert settings_of(f"article-{size}")["avatarl"].keys() == AvataRLConfig().__dict__.keys() - left_out


def test_the_critic_is_trained_where_the_articles_recipes_look_for_it():
    critic = read_config(FOLDER / "critic-30m.yaml")
    assert critic.out == "runs/critic-30m"
    assert critic.objective == "cross_entropy"
    assert tokens_of(critic) == pytest.approx(2.0e9, rel=0.005)


@pytest.mark.parametrize("size", SIZES)
def test_the_presets_have_the_sizes_of_their_names(size: str):
    """From the configuration's shape by hand: embedding, and per layer four projections, a gated layer, two norms."""
    config = read_config(FOLDER / f"article-{size}.yaml")
    assert config.player == PlayerConfig(preset=size)
    shape = PRESETS[config.player.preset]
    width, inner = shape.hidden_size, shape.intermediate_size
    layer = 4 * width * width + 3 * width * inner + 2 * width
    assert OPEN_WEB_TEXT_VOCABULARY * width + shape.num_hidden_layers * layer + width == PARAMETERS[size]
    assert PARAMETERS[size] == pytest.approx(float(size[:-1]) * 1e6, rel=0.01)


def test_the_count_by_hand_is_the_models(tokenizer):
    shape = PRESETS["1m"]
    width, inner = shape.hidden_size, shape.intermediate_size
    layer = 4 * width * width + 3 * width * inner + 2 * width
    expected = len(tokenizer) * width + shape.num_hidden_layers * layer + width
    assert count_parameters(build_player(PlayerConfig(preset="1m"), tokenizer, 16, seed=1)).total == expected
