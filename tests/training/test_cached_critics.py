"""Training under cached critics: the live critic's losses, and no critic in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from avatarl import AvataRLConfig, UserError
from avatarl.cli import main
from avatarl.models import cache_critic, critics
from avatarl.objective import BaselineConfig
from avatarl.training import train

from ..conftest import BLOCK
from .runs import Interrupted, assert_same_weights, contents_of, lines_of, weights_of

LINEAR = dict(pool="arithmetic", threshold="none", top_k=4)
CASES = {
    "article": dict(avatarl=AvataRLConfig(top_k=4)),
    "no threshold": dict(avatarl=AvataRLConfig(top_k=4, threshold="none")),
    "mass": dict(avatarl=AvataRLConfig.released()),
    "arithmetic": dict(avatarl=AvataRLConfig(**LINEAR)),
    "expected reward": dict(objective="expected_reward"),
    "reinforce": dict(objective="reinforce"),
}


def make_cache(tmp_path: Path, critic: Path, data: Path, **settings) -> str:
    cache_critic(str(critic), data, tmp_path / "cache", block_size=BLOCK, precision="fp32", quiet=True, **settings)
    return str(tmp_path / "cache")


def assert_close_lines(ours: Path, theirs: Path, tolerance: float) -> None:
    for found, expected in zip(lines_of(ours), lines_of(theirs), strict=True):
        left_out = ("event", "estimated_share", "critic_flops")
        found, expected = ({name: line[name] for name in line if name not in left_out} for line in (found, expected))
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_the_losses_of_the_live_critic(tiny_config, tmp_path: Path, critic_cache: Path, monkeypatch, case: str):
    """Of a cache that holds the whole distribution, to the rounding of its numbers; over more than an epoch.

    With a threshold an action that lies on it may fall to the other side, which moves its position's whole loss.
    """
    settings = CASES[case] | dict(epochs=1.5, steps=None, micro_batch_size=64, eval_every_steps=3)
    train(tiny_config(tmp_path / "live", **settings), quiet=True)
    monkeypatch.setattr(critics, "load_model", None)  # nothing may ask for it
    summary = train(tiny_config(tmp_path / "cached", critic=str(critic_cache), **settings), quiet=True)
    assert_close_lines(tmp_path / "cached" / "run", tmp_path / "live" / "run", 2e-2 if case == "article" else 2e-3)
    assert summary["critic_flops"] == 0 and summary["cached_critic_flops"] > 0
    assert {(line["estimated_share"], line["critic_flops"]) for line in lines_of(tmp_path / "cached" / "run")} == {
        (0.0, 0)
    }


def test_a_smaller_cache_says_what_it_estimates(tiny_config, tmp_path: Path, critic_folder, data_folder):
    cache = make_cache(tmp_path, critic_folder, data_folder, bytes_per_token=22)
    train(tiny_config(tmp_path, critic=cache), quiet=True)
    assert all(0.1 < line["estimated_share"] < 0.9 for line in lines_of(tmp_path / "run"))


@pytest.mark.parametrize("objective", ["avatarl", "distillation"])
def test_drawn_tokens_train_too(tiny_config, tmp_path: Path, critic_folder, data_folder, objective: str):
    cache = make_cache(tmp_path, critic_folder, data_folder, kind="sample", bytes_per_token=70, keep_top=4)
    settings = dict(objective=objective, baseline=BaselineConfig(distillation_alpha=0.5))
    avatarl = AvataRLConfig(**LINEAR, tail="sample")
    train(tiny_config(tmp_path / "cached", critic=cache, avatarl=avatarl, **settings), quiet=True)
    avatarl = AvataRLConfig(**LINEAR, tail="dense")
    train(tiny_config(tmp_path / "live", avatarl=avatarl, **settings), quiet=True)
    found, expected = (lines_of(tmp_path / name / "run")[-1]["cross_entropy"] for name in ("cached", "live"))
    assert found == pytest.approx(expected, rel=0.02)  # one draw of 24 tokens a position for a whole distribution


def test_a_cached_and_a_live_critic(tiny_config, tmp_path: Path, critic_cache: Path, critic_folder: Path):
    weights = AvataRLConfig(top_k=4, threshold="none", critic_weight=(0.2, 0.1))
    names = dict(mixed=[str(critic_cache), "random:1m:7"], live=[str(critic_folder), "random:1m:7"])
    for name, both in names.items():
        train(tiny_config(tmp_path / name, critic=both, avatarl=weights), quiet=True)
    assert_close_lines(tmp_path / "mixed" / "run", tmp_path / "live" / "run", tolerance=2e-3)


def test_a_resumed_run_knows_its_cache(tiny_config, tmp_path: Path, critic_folder, data_folder, interrupt):
    settings = dict(
        critic=make_cache(tmp_path, critic_folder, data_folder, bytes_per_token=70), gradient_accumulation_steps=2
    )
    train(tiny_config(tmp_path / "whole", **settings), quiet=True)
    interrupt(6)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, **settings), quiet=True)
    before = contents_of(tmp_path / "run")
    kept = shutil.move(tmp_path / "cache", tmp_path / "kept")
    make_cache(tmp_path, critic_folder, data_folder, bytes_per_token=54)
    with pytest.raises(UserError, match="critic .*cache was [0-9a-f]{12} and is [0-9a-f]{12}"):
        train(tiny_config(tmp_path, **settings), resume=True, quiet=True)
    assert contents_of(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "cache")
    shutil.move(kept, tmp_path / "cache")
    train(tiny_config(tmp_path, **settings), resume=True, quiet=True)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole" / "run")
    assert_same_weights(*(weights_of(folder / "run" / "final") for folder in (tmp_path, tmp_path / "whole")))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(avatarl=AvataRLConfig(top_k=20)), "has 16 of its most likely tokens at a position; top_k=20"),
        (dict(avatarl=AvataRLConfig(**LINEAR, tail="sample")), "needs a cache with drawn tokens"),
        (dict(avatarl=AvataRLConfig(**LINEAR, tail="dense")), "tail='dense' needs a live critic"),
        (dict(objective="distillation"), "expected a cache of kind sample"),
        (dict(block_size=8), "a cache of windows of 16 tokens; expected block_size, 8"),
    ],
)
def test_what_a_cache_cannot_do_is_said_before_anything_is_written(
    tiny_config, tmp_path: Path, critic_folder, data_folder, settings, message
):
    cache = make_cache(tmp_path, critic_folder, data_folder, bytes_per_token=70)
    with pytest.raises(UserError, match=message):
        train(tiny_config(tmp_path, critic=cache, **settings), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_damaged_cache_ends_the_command_in_one_line(tiny_config, tmp_path: Path, critic_folder, data_folder, capsys):
    cache = Path(make_cache(tmp_path, critic_folder, data_folder, bytes_per_token=70))
    content = bytearray((cache / "train-00000.bin").read_bytes())
    content[1000] ^= 4
    (cache / "train-00000.bin").write_bytes(content)
    (tmp_path / "recipe.yaml").write_text(tiny_config(tmp_path, critic=str(cache)).as_yaml())
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train-00000.bin: changed since it was written (its SHA-256 is another); make it anew" in line
    (cache / "cache.json").rename(cache / "cache.partial.json")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert json.loads((cache / "cache.partial.json").read_text())["kind"] == "top"
    assert "not finished, it covers 0 of 499 windows" in capsys.readouterr().err
