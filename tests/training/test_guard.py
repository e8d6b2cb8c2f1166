"""Updates that are not taken: counted on the device, logged, and after so many in a row the end of the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avatarl import UserError
from avatarl.data import PreparedData, WindowOrder, Windows
from avatarl.errors import RunFailed
from avatarl.run_dir.checkpoint import CHECKPOINTS, steps_found
from avatarl.training import GuardConfig, OptimConfig, Schedule, ScheduleConfig, train
from avatarl.training.guard import Guard
from avatarl.training.model import PlayerWithLoss
from avatarl.training.optim import Optimisers

from ..conftest import BLOCK
from .runs import Interrupted, assert_same_weights, lines_of, weights_of


@pytest.fixture
def spoil(monkeypatch):
    """``spoil(steps, what)``: the loss, or the gradient alone, of these steps is no number."""

    def arm(steps: set[int], what: str = "loss") -> None:
        real, calls = PlayerWithLoss.forward, 0

        def forward(self: PlayerWithLoss, *arguments, **named):
            nonlocal calls
            loss, metrics = real(self, *arguments, **named)
            calls += self.training
            if self.training and calls in steps:
                loss = loss * math.nan
                if what == "loss":
                    metrics["loss"] = metrics["loss"] * math.nan
            return loss, metrics

        monkeypatch.setattr(PlayerWithLoss, "forward", forward)

    return arm


@pytest.fixture
def rising(monkeypatch):
    """``rising(after_step)``: losses as logged go up and down a little, and are ten times as large after that step."""

    def arm(after_step: int) -> None:
        real = Guard.check

        def checked(self: Guard, step: int, loss: torch.Tensor, *arguments):
            level = 10.0 if step > after_step else 1.0
            return real(self, step, torch.full_like(loss, level + step % 3 / 100), *arguments)

        monkeypatch.setattr(Guard, "check", checked)

    return arm


def judge(guard: Guard, losses: list[float], norm: float = 1.0) -> list[bool]:
    steps = enumerate(losses, start=1)
    return [bool(guard.check(step, torch.tensor(loss), torch.tensor(norm))) for step, loss in steps]


def test_what_is_no_number_is_refused():
    guard = Guard(GuardConfig(), torch.device("cpu"))
    assert judge(guard, [1.0, math.nan, math.inf, -math.inf, 2.0]) == [False, True, True, True, False]
    assert judge(guard, [1.0], norm=math.inf) == [True]
    assert guard.num_skipped == 4 and not guard.must_stop
    assert sorted(guard.last_losses()) == [1.0, 2.0]


def test_so_many_in_a_row_stop_the_run_though_a_good_one_follows():
    guard = Guard(GuardConfig(stop_after=3), torch.device("cpu"))
    judge(guard, [1.0, math.nan, math.nan, 1.0, math.nan])
    assert not guard.must_stop
    judge(guard, [math.nan, math.inf, 1.0])
    assert guard.must_stop
    assert [row["step"] for row in guard.last_skipped()] == [5, 1, 2]


def test_a_spike_is_measured_in_robust_deviations():
    """The median of 1, 2, 3, 4, 5 is 3, and the median distance from it 1: the bar of 4 is a loss of 3 + 4 / 0.6745."""
    bar = 3 + 4 / 0.6745
    for loss, is_refused in ((bar - 0.01, False), (bar + 0.01, True), (-100.0, False)):
        guard = Guard(GuardConfig(spike_score=4.0, spike_window=5), torch.device("cpu"))
        assert judge(guard, [5.0, 1.0, 4.0, 2.0, 3.0, loss])[-1] is is_refused


def test_the_window_moves_with_accepted_losses_alone():
    guard = Guard(GuardConfig(spike_score=10.0, spike_window=3), torch.device("cpu"))
    assert judge(guard, [1.0, 100.0, 2.0]) == [False] * 3  # not full yet
    assert judge(guard, [3.0, 4.0, 1e6, math.nan, 5.0]) == [False, False, True, True, False]
    assert sorted(guard.last_losses()) == [3.0, 4.0, 5.0]


def test_equal_losses_are_no_spikes():
    guard = Guard(GuardConfig(spike_score=3.0, spike_window=4), torch.device("cpu"))
    assert not any(judge(guard, [2.0] * 10))


def test_a_row_that_is_over_does_not_end_the_resumed_run():
    guard, again = (Guard(GuardConfig(stop_after=3), torch.device("cpu")) for _ in range(2))
    judge(guard, [math.nan, math.nan, math.nan, 1.0])
    again.load_state_dict(guard.state_dict())
    assert guard.must_stop and not again.must_stop


def test_a_window_of_another_size_starts_empty():
    guard, wider = (
        Guard(GuardConfig(spike_score=1.0, spike_window=n, stop_after=n), torch.device("cpu")) for n in (2, 4)
    )
    judge(guard, [1.0, 1.0, math.nan])
    wider.load_state_dict(guard.state_dict())
    assert wider.num_skipped == 1 and wider.last_losses() == [] and len(wider.last_skipped()) == 1


def test_under_other_settings_only_the_number_of_refused_updates_stays():
    guard, again = (Guard(GuardConfig(spike_score=3.0, spike_window=2), torch.device("cpu")) for _ in range(2))
    judge(guard, [1.0, 1.0, math.nan, math.nan])
    again.load_state_dict(guard.state_dict(), is_same_run=False)
    assert again.num_skipped == 2 and again.last_losses() == [] and again.last_skipped() == []
    assert judge(again, [math.nan, math.nan, math.nan, 50.0]) == [True] * 3 + [False] and not again.must_stop


def test_its_state_survives_json():
    config = GuardConfig(spike_score=3.0, spike_window=4)
    guard, again = Guard(config, torch.device("cpu")), Guard(config, torch.device("cpu"))
    judge(guard, [0.1, 1 / 3, math.nan, math.inf, 5.0, 7.0, 1.0])
    again.load_state_dict(json.loads(json.dumps(guard.state_dict(), allow_nan=False)))
    assert again.state_dict() == guard.state_dict()
    assert judge(again, [9.0, math.nan]) == judge(guard, [9.0, math.nan])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_refused_update_is_skipped_counted_and_left_out_of_the_means(tiny_config, tmp_path: Path, spoil, what: str):
    spoil({3}, what)
    train(tiny_config(tmp_path, log_every_steps=4), quiet=True)
    first, _, second, _ = lines_of(tmp_path / "run")
    assert (first["skipped_steps"], second["skipped_steps"]) == (1, 1)
    assert all(math.isfinite(value) for line in (first, second) for value in line.values() if value != "train")
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run" / "final").values())


def test_a_run_with_skipped_steps_resumes_exactly(tiny_config, tmp_path: Path, spoil, interrupt):
    guard = GuardConfig(spike_score=1e-3, spike_window=2, stop_after=99)  # refuses any rise
    settings = dict(guard=guard, steps=10, log_every_steps=5, checkpoint_every_steps=4)
    train(tiny_config(tmp_path / "whole", **settings), quiet=True)
    interrupt(7)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, **settings), quiet=True)
    train(tiny_config(tmp_path, **settings), resume=True, quiet=True)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole" / "run")
    assert lines_of(tmp_path / "run")[-2]["skipped_steps"] > 0
    assert_same_weights(*(weights_of(folder / "run" / "final") for folder in (tmp_path, tmp_path / "whole")))


@pytest.mark.parametrize("log_every_steps", [1, 100])
def test_refused_updates_in_a_row_end_the_run_with_what_there_is_to_study(
    tiny_config, tmp_path: Path, data_folder: Path, spoil, log_every_steps: int
):
    spoil({3, 4, 5}, "gradient")
    config = tiny_config(
        tmp_path, guard=GuardConfig(stop_after=3), checkpoint_every_steps=1, log_every_steps=log_every_steps
    )
    with pytest.raises(RunFailed, match=r"norm nan at step 5, 3 skipped updates in a row; .*refused"):
        train(config, quiet=True)
    assert not (tmp_path / "run" / "final").exists()
    newest = tmp_path / "run" / CHECKPOINTS / f"step-{steps_found(tmp_path / 'run' / CHECKPOINTS)[-1]:08d}"
    weights = load_file(newest / "player.safetensors")
    assert newest.name == "step-00000004" and all(value.isfinite().all() for value in weights.values())

    statistics = json.loads((tmp_path / "run" / "refused" / "statistics.json").read_text())
    assert [row["step"] for row in statistics["refused"]] == [3, 4, 5]
    assert len(statistics["accepted_losses"]) == 2
    windows = Windows(PreparedData.open(data_folder).train, BLOCK)
    expected = WindowOrder(len(windows), config.seed).indices(2 * 4, 4)
    assert statistics["refused"][0]["windows"] == expected.tolist()
    saved = load_file(tmp_path / "run" / "refused" / "windows.safetensors")
    assert torch.equal(saved["step-00000003.inputs"], windows.batch(expected)[0])
    assert torch.equal(saved["step-00000003.targets"], windows.batch(expected)[1])


@pytest.mark.parametrize(
    "settings",
    [
        dict(schedules=ScheduleConfig(critic_weight=Schedule("first", end_step=6))),
        dict(schedules=ScheduleConfig(critic_weight=Schedule("first", 0.5, end_step=6))),
        dict(schedules=ScheduleConfig(smoothing=Schedule("first", 0.5, end_step=6))),
        dict(schedules=ScheduleConfig(entropy_coef=Schedule("linear", 2.0, start_step=6, end_step=8))),
        dict(critic="ema:0.9:6"),
    ],
    ids=["critics go", "critics weigh less", "smoothing jumps", "entropy begins to rise", "a critic comes"],
)
def test_losses_before_a_turn_of_the_schedule_say_nothing_about_those_after_it(
    tiny_config, tmp_path: Path, rising, settings: dict
):
    rising(after_step=6)
    guard = GuardConfig(spike_score=5.0, spike_window=3, stop_after=3)
    train(tiny_config(tmp_path, steps=12, guard=guard, log_every_steps=1, **settings), quiet=True)
    assert lines_of(tmp_path / "run")[-2]["skipped_steps"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        dict(objective="cross_entropy"),
        dict(critic="random:1m:3"),
        dict(optim=OptimConfig(learning_rate=1e-3, warmup_steps=2)),
        dict(micro_batch_size=2),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_losses_before_a_change_of_the_run_say_nothing_about_those_after_it(
    tiny_config, tmp_path: Path, rising, interrupt, changes: dict
):
    rising(after_step=6)
    guard = GuardConfig(spike_score=5.0, spike_window=3, stop_after=3)
    settings = dict(steps=12, guard=guard, log_every_steps=1, checkpoint_every_steps=2)
    interrupt(7)
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, **settings), quiet=True)
    train(tiny_config(tmp_path, **settings | changes), resume=True, allow_changes=True, quiet=True)
    assert lines_of(tmp_path / "run")[-2]["skipped_steps"] == 0


def test_a_rise_that_nothing_explains_ends_the_run(tiny_config, tmp_path: Path, rising):
    rising(after_step=6)
    guard = GuardConfig(spike_score=5.0, spike_window=3, stop_after=3)
    with pytest.raises(RunFailed, match="at step 9, 3 skipped updates in a row"):
        train(tiny_config(tmp_path, steps=12, guard=guard, log_every_steps=1), quiet=True)


def test_a_run_that_ends_on_no_number_fails(tiny_config, tmp_path: Path):
    """A step so long that the weights overflow: the gradient was finite, and only the evaluation shows it."""
    optim = OptimConfig(learning_rate=3e38, warmup_steps=0)
    config = tiny_config(tmp_path, objective="cross_entropy", optim=optim, steps=1)
    with pytest.raises(RunFailed, match="cross-entropy is nan at step 1; .*refused; try a smaller optim.learning_rate"):
        train(config, quiet=True)
    left = json.loads((tmp_path / "run" / "refused" / "evaluation.json").read_text())
    assert left["step"] == 1 and math.isnan(left["cross_entropy"])
    assert len(left["accepted_losses"]) == 1 and math.isfinite(left["accepted_losses"][0])
    assert not (tmp_path / "run" / "final").exists()


def test_nothing_is_read_from_the_device_in_a_step(monkeypatch):
    """On the device called meta, where there are no values, reading one raises."""
    guard = Guard(GuardConfig(spike_score=3.0), torch.device("meta"))
    skipped = guard.check(1, torch.zeros((), device="meta"), torch.ones((), device="meta"))
    assert skipped.device.type == "meta" and skipped.dtype == torch.bool
    with pytest.raises((RuntimeError, NotImplementedError)):
        guard.num_skipped  # noqa: B018
    layer = torch.nn.Linear(3, 3, bias=False, device="meta")
    layer.weight.grad = torch.zeros_like(layer.weight)
    muon = torch.optim.Muon(layer.parameters(), lr=0.1)
    Optimisers([muon], OptimConfig(), total_steps=3).step(1, skipped)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_after": 0}, "guard.stop_after is 0"),
        ({"spike_score": 0.0}, "guard.spike_score is 0.0; expected a number above 0, or null"),
        ({"spike_window": 1}, "guard.spike_window is 1"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        GuardConfig(**settings)
