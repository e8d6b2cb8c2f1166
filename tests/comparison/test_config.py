"""What a comparison may be, how its settings are read, and that each mistake is named."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import yaml

from avatarl import AvataRLConfig, UserError
from avatarl.comparison import ComparisonConfig, TuningConfig
from avatarl.comparison.config import SHARED, by_dotted_names, critics_of, make_run

from .conftest import CROSS_ENTROPY

GRID = {"optim.learning_rate": [0.001, 0.01]}
TUNING = TuningConfig(grid=GRID, seed=9)


def comparison(**settings) -> ComparisonConfig:
    given = dict(out="out", data="data", base={"steps": 3}, arms={"cross_entropy": CROSS_ENTROPY, "other": {}})
    return ComparisonConfig(**{**given, **settings})


def test_a_comparison_is_accepted():
    comparison(
        arms={"cross_entropy": CROSS_ENTROPY, "A.b-c_1": None, "other": {"critic": ["one", "ema:0.9:3"]}},
        seeds=[3, 1],
        critics={"one": {"tuned_as": "cross_entropy", "cache": {}}, "two": None},
        tuning=TUNING,
        workers=2,
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"out": "caf\udce9"}, r"out is caf\\udce9, which is not UTF-8; a path in UTF-8 is expected"),
        ({"arms": {}}, "arms is empty; expected"),
        ({"arms": {"cross_entropy": {}, "a/b": {}}}, "arm is named 'a/b'; expected letters"),
        ({"arms": {"cross_entropy": {}, "": {}}}, "arm is named ''"),
        ({"arms": {"cross_entropy": {}, "..": {}}}, "arm is named '..'"),
        ({"arms": {"cross_entropy": {}, "a\n": {}}}, "arm is named"),
        ({"arms": {"cross_entropy": 3}}, "arm cross_entropy is 3; expected settings by name"),
        ({"critics": {"a b": {}}}, "critic is named 'a b'"),
        ({"critics": {"one": []}}, r"critic one is \[\]; expected settings by name"),
        ({"baseline": "crossentropy"}, "baseline is 'crossentropy'; expected one of the arms, cross_entropy, other.*"),
        ({"baseline": "crossentropy"}, "did you mean 'cross_entropy'"),
        ({"seeds": []}, "seeds is .*; expected at least one"),
        ({"seeds": [1, 2, 1]}, r"seeds is \[1, 2, 1\]; expected at least one, each once"),
        ({"seeds": [1, -2]}, "seeds is -2; expected"),
        ({"seeds": [7], "critics": {"one": {"seed": 7}}}, "critic one has the seed 7, one of seeds; expected another"),
        (
            {"tuning": TUNING, "critics": {"one": {"seed": 9}}},
            "critic one has the seed 9, that of tuning; expected another, so that it shares no initial weights",
        ),
        ({"seeds": [1, 2.5]}, "seeds is 2.5; expected"),
        ({"workers": 0}, "workers is 0; expected"),
        ({"tuning": TUNING, "seeds": [8, 9]}, "tuning.seed is 9, one of seeds; expected another"),
        ({"tuning": TuningConfig(grid=GRID, seed=9, arms=["another"])}, "tuning.arms is 'another'; expected one of"),
        ({"tuning": TUNING, "arms": {"cross_entropy": {"tuned_as": "no"}}}, "tuned_as is 'no'; expected one of"),
        ({"tuning": TUNING, "critics": {"one": {"tuned_as": "no"}}}, "critic one: tuned_as is 'no'; expected one of"),
        ({"critics": {"one": {"tuned_as": "other"}}}, "tuned_as is 'other', which is not tuned; expected"),
        (
            {
                "tuning": TuningConfig(grid=GRID, seed=9, arms=["other"]),
                "arms": {"cross_entropy": {}, "other": {"tuned_as": "cross_entropy"}},
            },
            "arm other: tuned_as is 'cross_entropy', which is not tuned",
        ),
        (
            {"tuning": TUNING, "arms": {"cross_entropy": {"tuned_as": "b"}, "b": {"tuned_as": "c"}, "c": {}}},
            "arm cross_entropy: tuned_as is 'b', which is not tuned",
        ),
        ({"tuning": TUNING, "arms": {"cross_entropy": {"tuned_as": "cross_entropy"}}}, "which is not tuned"),
    ],
)
def test_a_mistake_is_named(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        comparison(**settings)


TAUGHT = {"objective": "avatarl"}


@pytest.mark.parametrize(
    "settings",
    [
        {"critics": {"one": {**TAUGHT, "critic": "one"}}},
        {"critics": {"one": {**TAUGHT, "critic": ["o/x", "two"]}, "two": {**TAUGHT, "critic": "one"}}},
        {
            "tuning": TUNING,
            "critics": {"one": {"tuned_as": "pupil"}},
            "arms": {"cross_entropy": {}, "pupil": {"critic": "one"}},
        },
        {
            "tuning": TUNING,
            "critics": {"one": {**TAUGHT, "critic": "two"}, "two": {"tuned_as": "pupil"}},
            "arms": {"cross_entropy": {}, "pupil": {"critic": ["one"]}},
        },
    ],
)
def test_what_waits_for_itself_is_named(settings: dict):
    with pytest.raises(UserError, match="waits for itself: its critics and tuned_as lead back"):
        comparison(**settings).check()


@pytest.mark.parametrize("changes", [{"optim.learning_rate": 0.1}, {"optim": {"learning_rate": 0.1}}])
def test_an_arm_with_a_search_gives_nothing_that_the_search_decides(changes: dict):
    arms = {"cross_entropy": CROSS_ENTROPY, "other": {**CROSS_ENTROPY, **changes}}
    with pytest.raises(UserError, match="arm other gives optim.learning_rate, which is in tuning.grid.*tuned_as"):
        comparison(arms=arms, tuning=TUNING).check()
    comparison(arms=arms, tuning=dataclasses.replace(TUNING, arms=["cross_entropy"])).check()
    comparison(arms={**arms, "other": {**arms["other"], "tuned_as": "cross_entropy"}}, tuning=TUNING).check()


def test_every_value_of_the_grid_is_looked_at():
    grid = {"optim.learning_rate": [0.1, 0.2], "optim.weight_decay": [0.1, 0.2, 0.3, -1.0]}
    with pytest.raises(UserError, match="weight_decay is -1.0; expected a number of at least 0"):
        comparison(tuning=TuningConfig(grid=grid, seed=9)).check()


def test_values_of_the_grid_may_need_each_other():
    grid = {"schedules.smoothing.shape": ["first", "linear"], "schedules.smoothing.end_step": [1, 2]}
    comparison(tuning=TuningConfig(grid=grid, seed=9)).check()


@pytest.mark.parametrize(
    "critic, message",
    [
        ("onne", "arm other: critic is 'onne'; expected one of critics, a folder, .*; did you mean 'one'?"),
        (["one", "ema:2:1"], "arm other: critic is 'ema:2:1'; expected .*ema:DECAY:START_STEP"),
        ("random:1m", "arm other: critic is 'random:1m'; expected .*random:PRESET:SEED"),
        ("runs/of/nobody", "runs/of/nobody: no such folder"),
        ("tests/nobody", "tests/nobody: no such folder"),
        ("tests", "tests is neither; expected a run folder"),
    ],
)
def test_a_critic_that_no_run_could_open_is_named(monkeypatch, critic: str | list, message: str):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(UserError, match=message):
        comparison(critics={"one": {}}, arms={"cross_entropy": CROSS_ENTROPY, "other": {"critic": critic}}).check()


def test_critics_that_a_run_can_open_are_accepted(player_folder: Path, tmp_path: Path):
    (tmp_path / "cache.json").touch()
    critics = ["one", "owner/name", "ema:0.9:3", "random:1m:7", str(player_folder), str(tmp_path)]
    comparison(critics={"one": {}}, arms={"cross_entropy": {}, "other": {"critic": critics}}).check()


def test_critics_of_a_seed_differ_in_their_settings():
    def check(one: dict, two: dict) -> None:
        comparison(tuning=TUNING, critics={"one": {"seed": 7, **one}, "two": {"seed": 7, **two}}).check()

    for same in ({}, {"steps": 4, "cache": {}}, {"tuned_as": "cross_entropy"}):
        with pytest.raises(UserError, match="critics one and two have the same seed and settings; expected another"):
            check(same, same)
    with pytest.raises(UserError, match="the same seed and settings"):
        check({}, {"steps": 3})  # the base's
    for other in ({"steps": 4}, {"cache": {}}, {"tuned_as": "cross_entropy"}):
        check({}, other)


def test_a_cache_is_of_one_number_of_windows():
    def check(teacher: dict) -> None:
        arms = {"cross_entropy": CROSS_ENTROPY, "few": {"critic": "t", "train_windows": 3}, "all": {"critic": "t"}}
        comparison(arms=arms, critics={"t": teacher}).check()

    check({})
    with pytest.raises(UserError, match="critic t is cached, and arm few has 3, arm all has None train_windows"):
        check({"cache": {}})


@pytest.mark.parametrize(
    "changes, grid, is_asked",
    [
        ({}, {}, True),
        (CROSS_ENTROPY, {}, False),
        ({"avatarl.critic_weight": 0.0, "avatarl.reality_weight": 1.0}, {}, False),
        ({"avatarl.critic_weight": 0.0}, {"avatarl.critic_weight": [0.0, 0.3]}, True),
        ({"objective": "distillation", "baseline.distillation_alpha": 1.0}, {}, False),
        ({"objective": "distillation"}, {"baseline.distillation_alpha": [1.0, 0.5]}, True),
    ],
)
def test_only_what_asks_a_critic_names_one(changes: dict, grid: dict, is_asked: bool):
    tuning = TuningConfig(grid=grid, seed=9, arms=["searched"]) if grid else None
    arms = {"cross_entropy": CROSS_ENTROPY, "searched": {k: v for k, v in changes.items() if k not in grid}}
    given = comparison(base={"steps": 3, "critic": "one"}, arms=arms, critics={"one": {}}, tuning=tuning)
    assert given.untuned["arm", "searched"]["critic"] == ("one" if is_asked else None)
    assert given.untuned["arm", "cross_entropy"]["critic"] is None


def test_a_critic_may_be_tuned_as_an_arm_that_does_not_ask_it():
    comparison(
        base={"steps": 3, "critic": "one"},
        arms={"cross_entropy": CROSS_ENTROPY, "other": {"tuned_as": "cross_entropy"}},
        critics={"one": {"tuned_as": "cross_entropy"}},
        tuning=TUNING,
    ).check()


@pytest.mark.parametrize("changes", [{"tuned_as": None}, {"tuned_as": ["other"]}, {"critic": 5}, {"critic": [["a"]]}])
def test_names_that_are_none_are_named(changes: dict):
    with pytest.raises(UserError, match="tuned_as|critic"):
        comparison(tuning=TUNING, critics={"one": {}}, arms={"cross_entropy": {}, "other": changes})


def test_two_that_wait_for_the_same_are_no_circle():
    comparison(
        critics={"one": {}, "two": {"critic": "one"}, "three": {"critic": ["one", "two"]}},
        arms={"cross_entropy": {}, "other": {"critic": ["three", "one", "one"]}},
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "tuning.grid is empty; expected"),
        ({"grid": {"steps": []}}, r"tuning.grid.steps is \[\]; expected a list of different values"),
        ({"grid": {"steps": 3}}, "tuning.grid.steps is 3; expected"),
        ({"grid": {"steps": [3, 4, 3]}}, "tuning.grid.steps is .*different"),
        ({"grid": GRID, "seed": -1}, "tuning.seed is -1; expected"),
    ],
)
def test_a_mistake_of_the_search_is_named(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        TuningConfig(**settings)


@pytest.mark.parametrize("name", SHARED)
def test_what_all_runs_share_is_not_tuned(name: str):
    with pytest.raises(UserError, match=f"tuning.grid.{name}"):
        TuningConfig(grid={name: [1, 2]}, seed=9)


def test_which_arms_are_tuned():
    arms = {"cross_entropy": None, "a": {"tuned_as": "cross_entropy"}, "b": {}}
    tuned = comparison(arms=arms, tuning=TUNING)
    assert [name for name in arms if tuned.is_tuned(name)] == ["cross_entropy", "b"]
    tuned = comparison(arms=arms, tuning=TuningConfig(grid=GRID, seed=9, arms=["a", "cross_entropy"]))
    assert [name for name in arms if tuned.is_tuned(name)] == ["cross_entropy"]
    assert not any(comparison(arms={"cross_entropy": None, "b": {}}).is_tuned(name) for name in ("cross_entropy", "b"))


# --- settings --------------------------------------------------------------------------------------------------------

NESTED = {
    "steps": 3,
    "optim": {"learning_rate": 0.1, "name": "muon"},
    "schedules": {"smoothing": {"shape": "linear"}},
    "player": {"preset": "1m", "settings": {"hidden_size": 8, "attention_dropout": 0.1}},
    "critic_quantization": {"load_in_8bit": True},
}
DOTTED = {
    "steps": 3,
    "optim.learning_rate": 0.1,
    "optim.name": "muon",
    "schedules.smoothing.shape": "linear",
    "player.preset": "1m",
    "player.settings": {"hidden_size": 8, "attention_dropout": 0.1},
    "critic_quantization": {"load_in_8bit": True},
}


def test_settings_that_hold_others_are_taken_apart_but_for_those_of_a_library():
    assert by_dotted_names(NESTED) == by_dotted_names(DOTTED) == DOTTED
    assert by_dotted_names({"optim.name": "adamw", "optim": {"beta1": 0.5}}) == {
        "optim.name": "adamw",
        "optim.beta1": 0.5,
    }


def test_a_base_may_be_nested_dotted_or_a_file(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(NESTED))
    for base in (NESTED, DOTTED, str(tmp_path / "base.yaml")):
        assert comparison(base=base).base_settings() == {**DOTTED, "data": "data"}


def test_out_seed_and_data_are_the_comparison_s_own():
    base = {"steps": 3, "out": "elsewhere", "seed": 7, "data": "other"}
    assert comparison(base=base).base_settings() == {"steps": 3, "data": "data"}
    assert comparison(base=base, data=None).base_settings() == {"steps": 3, "data": "other"}


def test_a_recipe_s_numbers_are_numbers(tmp_path: Path):
    """``1e-3`` is text to YAML 1.1."""
    (tmp_path / "base.yaml").write_text("steps: 3\noptim: {learning_rate: 1e-3}\n")
    settings = comparison(base=str(tmp_path / "base.yaml")).base_settings()
    assert make_run(settings, Path("run"), seed=1).optim.learning_rate == 0.001


@pytest.mark.parametrize(
    "text, message",
    [(None, "no such file"), ("- steps\n", "expected settings by name"), ("a: [", "cannot be read .while parsing")],
)
def test_a_base_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "base.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"base.yaml.*{message}"):
        comparison(base=str(path)).base_settings()


@pytest.mark.parametrize("preset", ["article", "released", "dense"])
def test_a_preset_is_spelled_out_and_later_settings_replace_its_own(preset: str):
    changes = {"avatarl.top_k": 7, "preset": preset, "avatarl": {"smoothing": 0.25}, "steps": 5}
    settings = comparison(arms={"cross_entropy": {}, "other": changes}).changes_of("arm", "other")
    run = make_run({"data": "data", **settings}, Path("run"), seed=1)
    whole = dataclasses.replace(getattr(AvataRLConfig, preset)(), top_k=7, smoothing=0.25)
    assert (run.avatarl, run.steps) == (whole, 5)
    assert {f"avatarl.{name}" for name in dataclasses.asdict(whole)} <= settings.keys(), "what is left out is inherited"
    assert "preset" in changes, "what was given stays as it was"


def test_a_preset_goes_before_the_base():
    given = comparison(base={"steps": 3, "avatarl.smoothing": 0.4}, arms={"cross_entropy": {"preset": "article"}})
    settings = given.base_settings() | given.changes_of("arm", "cross_entropy")
    assert make_run(settings, Path("run"), seed=1).avatarl == AvataRLConfig.article()


def test_an_unknown_preset_is_named():
    with pytest.raises(UserError, match="arm other: preset is 'densest'; expected one of article, released, dense"):
        comparison(arms={"cross_entropy": {}, "other": {"preset": "densest"}}).changes_of("arm", "other")


@pytest.mark.parametrize("name", SHARED)
def test_an_arm_changes_nothing_that_all_share(name: str):
    given = comparison(arms={"cross_entropy": {}, "other": {"steps": 3, name: 1}})
    with pytest.raises(UserError, match=f"arm other changes {name}, which all runs share"):
        given.changes_of("arm", "other")


def test_a_critic_has_its_own_seed_and_shares_the_rest():
    given = comparison(critics={"one": {"seed": 7, "cache": {}, "steps": 9}, "two": {"block_size": 8}})
    assert given.changes_of("critic", "one") == {"steps": 9}
    with pytest.raises(UserError, match="critic two changes block_size"):
        given.changes_of("critic", "two")


def test_critics_are_named_alone_or_in_a_list():
    assert critics_of({}) == critics_of({"critic": None}) == []
    assert critics_of({"critic": "one"}) == ["one"]
    assert critics_of({"critic": ["one", "two"]}) == ["one", "two"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optim.learningrate": 0.1}, "optim.learningrate is not a setting.*did you mean 'optim.learning_rate'"),
        ({"stepz": 1}, "stepz is not a setting"),
        ({"steps": "many"}, "steps is 'many'; expected"),
        ({"avatarl.top_k": 0}, "top_k is 0; expected"),
        ({"objective": "cross-entropy"}, "objective is .*did you mean 'cross_entropy'"),
        ({"optim": 3}, "optim"),
        ({"epochs": 2}, "steps is 3 and epochs is 2"),
    ],
)
def test_a_setting_of_a_run_that_is_wrong_is_named(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        make_run({"data": "data", "steps": 3, **settings}, Path("run"), seed=1)


@pytest.mark.parametrize("group", [None, "muon"])
def test_a_group_that_is_none_is_named(group: str | None):
    with pytest.raises(UserError, match="optim"):
        make_run({"data": "data", "steps": 3, "optim": group, "optim.learning_rate": 0.1}, Path("run"), seed=1)


def test_a_run_has_the_settings_the_folder_and_the_seed():
    run = make_run({**DOTTED, "data": "data", "critic_quantization": None}, Path("run"), seed=5)
    assert (run.data, run.out, run.seed, run.steps) == ("data", "run", 5, 3)
    assert (run.optim.learning_rate, run.optim.name, run.schedules.smoothing.shape) == (0.1, "muon", "linear")
    assert run.player.settings == NESTED["player"]["settings"]


def test_making_a_run_leaves_the_settings_alone():
    settings = {"data": "data", "steps": 3, "player.settings": {"hidden_size": 8}, "player.settings.head_dim": 4}
    before = copy.deepcopy(settings)
    make_run(settings, Path("run"), seed=1)
    assert settings == before
