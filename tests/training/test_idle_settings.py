"""What plays no part in a run is not stored as if it did, asked for by its readers, or held against its resumption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from avatarl import AvataRLConfig, UserError
from avatarl.objective import OBJECTIVES, BaselineConfig, make_objective, objective_loss
from avatarl.results.inspect import settings_and_critics, trained_with
from avatarl.results.report import report
from avatarl.run_dir.identity import flatten, settings_digest
from avatarl.training import GuardConfig, TrainConfig, train
from avatarl.training.config import idle_settings

from .runs import Interrupted, lines_of

NO_CRITIC = {
    "cross_entropy": dict(objective="cross_entropy"),
    "label_smoothing": dict(objective="label_smoothing"),
    "distillation of the text alone": dict(objective="distillation", baseline=BaselineConfig(distillation_alpha=1.0)),
    "no weight": dict(avatarl=AvataRLConfig(top_k=4, critic_weight=0.0)),
    "no weights": dict(objective="reinforce", avatarl=AvataRLConfig(top_k=4, critic_weight=(0.0, 0.0))),
}


@pytest.mark.parametrize("case", NO_CRITIC)
def test_a_critic_that_is_not_asked_is_said_and_not_stored(tiny_config, tmp_path: Path, capfd, case: str):
    quantisation = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    settings = dict(critic=["no such/model", "nowhere"], critic_quantization=quantisation, **NO_CRITIC[case])
    config = tiny_config(tmp_path, steps=1, **settings)
    train(config)
    said = capfd.readouterr().err
    assert f"critic is no such/model, nowhere; objective {config.objective!r} uses none" in said
    run = tmp_path / "run"
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["critic"] is None and stored["critic_quantization"] is None
    assert "nowhere" not in (run / "environment.json").read_text()
    assert "nowhere" not in (run / "player" / "README.md").read_text()
    assert trained_with(run)[1] == []
    assert lines_of(run)[-1]["critic_flops"] == 0
    train(config, resume=True, quiet=True)


def test_readers_do_not_ask_for_what_an_earlier_version_stored(tiny_config, tmp_path: Path):
    run = tmp_path / "run"
    train(tiny_config(tmp_path, steps=1, objective="cross_entropy"), quiet=True)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(stored | {"critic": "a stranger's"}))
    assert trained_with(run)[1] == []
    with pytest.raises(UserError, match="critic is not given"):
        settings_and_critics(run)
    report([run], tmp_path / "report.md", evaluate=False, quiet=True)
    assert "stranger" not in (tmp_path / "report.md").read_text()


def test_other_settings_that_play_no_part_are_no_other_run(tiny_config, tmp_path: Path, interrupt):
    """As a run of an earlier version stored them, too."""
    common = dict(objective="cross_entropy", guard=GuardConfig(spike_window=7))
    train(tiny_config(tmp_path / "whole", **common), quiet=True)
    interrupt(7)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, **common), quiet=True)
    run = tmp_path / "run"
    stored = yaml.safe_load((run / "config.yaml").read_text()) | {"critic": "a stranger's"}
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    environment = json.loads((run / "environment.json").read_text())
    manifest_identity = dict(environment["identity"])
    environment["identity"]["settings"] = settings_digest(stored)
    environment["resumed"] = [
        environment | {"step": 0, "changes": []},
        {**environment, "identity": manifest_identity, "step": 0, "changes": []},
    ]
    (run / "environment.json").write_text(json.dumps(environment))
    others = common | dict(
        avatarl=AvataRLConfig(top_k=5), baseline=BaselineConfig(samples=9), critic="another", guard=GuardConfig()
    )
    train(tiny_config(tmp_path, **others), resume=True, quiet=True)
    assert lines_of(run) == lines_of(tmp_path / "whole" / "run")
    assert json.loads((run / "environment.json").read_text())["resumed"][-1]["changes"] == []


def test_settings_that_play_a_part_from_now_on_are_named(tiny_config, tmp_path: Path):
    train(tiny_config(tmp_path, objective="cross_entropy"), quiet=True)
    changed = tiny_config(tmp_path, avatarl=AvataRLConfig(top_k=5, threshold="none"), steps=9)
    with pytest.raises(UserError, match=r"avatarl.top_k was 4 and is 5; critic was None and is '.*'; objective was"):
        train(changed, resume=True, quiet=True)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_what_an_objective_depends_on_is_what_it_says(name: str):
    generator = torch.Generator().manual_seed(3)
    player, critic, snapshot = (3 * torch.randn(6, 40, generator=generator, dtype=torch.float64) for _ in range(3))
    targets = torch.randint(40, (6,), generator=generator)

    def result(avatarl: dict, baseline: dict) -> tuple:
        settings = AvataRLConfig(**{"top_k": 4, "threshold": "none", **avatarl}), BaselineConfig(**baseline)
        objective = make_objective(name, *settings)
        draws = torch.rand(6, objective.num_uniforms, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        kwargs = dict(uniforms=draws if objective.num_uniforms else None)
        kwargs["snapshot_logits"] = snapshot if objective.needs_snapshot else None
        loss, _ = objective_loss(objective, player, critic if objective.needs_critic else None, targets, **kwargs)
        return round(loss.item(), 9), objective.num_uniforms

    changed = {"label_smoothing": 0.3, "distillation_alpha": 0.9, "samples": 5, "ppo_clip": 0.01}
    depends = {f"baseline.{field}" for field in changed if result({}, {field: changed[field]}) != result({}, {})}
    depends |= {"avatarl.temperature"} if result({"temperature": 1.5}, {}) != result({}, {}) else set()
    recipe = flatten(TrainConfig(data="", out="", objective=name, critic="one", steps=1).as_dict())
    asked = {"avatarl.temperature", *(f"baseline.{field}" for field in changed)} - idle_settings(recipe)
    assert asked == depends
    assert ("baseline.ppo_refresh_every" in idle_settings(recipe)) == (name != "ppo")
    assert ("critic" in idle_settings(recipe)) == (name in ("cross_entropy", "label_smoothing"))
    assert "guard.spike_window" in idle_settings(recipe) and "steps" not in idle_settings(recipe)
