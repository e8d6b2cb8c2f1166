"""Tables say what small rows say when they are added up by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from avatarl.comparison.statistics import Difference, paired_difference
from avatarl.comparison.tables import (
    CROSS_ENTROPY,
    budget_table,
    compared,
    cost_table,
    count_of_p,
    interval_text,
    on_edge,
    outcome_table,
    p_text,
    quality_table,
    tuning_table,
    verdict,
)
from avatarl.results.reporter import Cell, Metric, Table, signed

from .rows import curve, frame, result

ACCURACY = Metric("top1_accuracy", "accuracy", "%", 1, +1, 100)
ENTROPY = Metric("entropy", "entropy", "nats", 1)


def cells_of(table: Table) -> dict[str, list[Cell]]:
    ((_, rows),) = table.sections
    return {row.name: list(row.cells) for row in rows}


def results_of(**arms: dict[int, float]) -> pd.DataFrame:
    return frame([result(arm, seed, value) for arm, values in arms.items() for seed, value in values.items()])


# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "metric", "said"),
    [
        ((-2.0, -3.0, -1.0), CROSS_ENTROPY, "better"),
        ((+2.0, +1.0, +3.0), CROSS_ENTROPY, "worse"),
        ((-2.0, -3.0, -1.0), ACCURACY, "worse"),
        ((+2.0, +1.0, +3.0), ACCURACY, "better"),
        ((+2.0, +1.0, +3.0), ENTROPY, ""),  # of which neither more nor less is better
        ((-2.0, -5.0, +1.0), CROSS_ENTROPY, ""),
        ((+2.0, +0.0, +4.0), ACCURACY, ""),  # an end at zero holds zero
        ((-2.0, -4.0, +0.0), CROSS_ENTROPY, ""),
        ((-2.0, math.nan, math.nan), CROSS_ENTROPY, ""),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(interval: tuple, metric: Metric, said: str):
    assert verdict(Difference(*interval, 0.04, 5), metric) == said


def test_a_number_stands_with_its_paired_difference():
    values, baseline = {1: 0.5, 2: 0.25}, {1: 0.25, 2: 0.0, 3: 0.9}
    shown = "+25.0 [+25.0 to +25.0], p < 0.0001"
    assert compared(ACCURACY, values, baseline, 2) == Cell("37.5 ± 17.7", shown, "better")
    assert compared(ACCURACY, values, baseline, 3) == Cell("37.5 ± 17.7", f"{shown}, in 2 of 3 seeds", "better")
    assert compared(ACCURACY, values, None, 3) == Cell("37.5 ± 17.7")
    assert compared(ACCURACY, values, {7: 0.1}, 1) == Cell("37.5 ± 17.7")  # no common seed
    assert compared(ACCURACY, {2: 0.25}, baseline, 1) == Cell("25.0", "+25.0")
    assert compared(ACCURACY, {2: 0.25}, baseline, 3) == Cell("25.0", "+25.0, in 1 of 3 seeds")
    assert compared(ACCURACY, {}, baseline, 3) == Cell("—")


def test_p_is_that_of_the_pairs():
    """Differences of 0.1 and 0.2: t = 3 of one degree of freedom, where p = 1 − 2 atan(3)/π = 0.2048."""
    cell = compared(CROSS_ENTROPY, {1: 1.1, 2: 1.2}, {1: 1.0, 2: 1.0}, 2)
    assert cell == Cell("1.1500 ± 0.0707", "+0.1500 [−0.4853 to +0.7853], p 0.2")


def test_signs_are_typographic_and_zero_has_none():
    assert [signed(number, 2) for number in (-0.125, 0.5, -0.001, 0.001, 0.0)] == [
        "−0.12",
        "+0.50",
        "0.00",
        "0.00",
        "0.00",
    ]
    assert signed(-1234.5, 1) == "−1,234.5"
    assert interval_text(Difference(-1, -2.5, 0.5, 0.1, 3), 1) == "−2.5 to +0.5"
    assert interval_text(Difference(-1, math.nan, math.nan, math.nan, 1), 1) == "—"


@pytest.mark.parametrize(
    ("p", "said"),
    [
        (0.741, "0.74"),
        (0.04999, "0.05"),
        (0.00274, "0.0027"),
        (0.0001, "0.0001"),
        (0.00009, "< 0.0001"),
        (0, "< 0.0001"),
        (math.nan, "—"),
    ],
)
def test_p_has_two_digits(p: float, said: str):
    assert p_text(p) == said


# --- outcome ----------------------------------------------------------------------------------------------------------


def test_the_outcome_is_added_up_by_hand():
    """Half an interval is 4.302653 · deviation/√3 where there are three pairs, 12.7062 · deviation/√2 where two."""
    table = outcome_table(
        results_of(
            cross_entropy={1: 5.0, 2: 5.2, 3: 5.4},
            wide={3: 2.4, 2: 3.2, 1: 4.0},  # −1, −2, −3
            better={1: 4.9, 2: 5.09, 3: 5.28},  # −0.10, −0.11, −0.12
            worse={1: 5.1, 2: 5.31, 3: 5.52},
            sure={1: 4.0, 2: 4.1999, 3: 4.4001},
            short={2: 5.0, 3: 5.0, 4: 9.0},  # −0.2, −0.4 of 5.3 on the mean; nobody has its fourth seed
            alone={1: 4.0},
            elsewhere={9: 4.0},
        ),
        "cross_entropy",
    )
    evaluations = ("best evaluation", "final evaluation")
    assert table.columns == ["cross-entropy", "difference", "95 % interval", "p", *evaluations, "seeds"]
    assert {arm: [*cells[:4], cells[-1]] for arm, cells in cells_of(table).items()} == {
        "cross_entropy": [Cell("5.2000 ± 0.2000"), Cell("—"), Cell("—"), Cell("—"), Cell("3")],
        "wide": [
            Cell("3.2000 ± 0.8000"),
            Cell("−2.0000", "−38.46 %"),
            Cell("−4.4841 to +0.4841"),
            Cell("0.074"),
            Cell("3"),
        ],
        "better": [
            Cell("5.0900 ± 0.1900"),
            Cell("−0.1100", "−2.12 %", "better"),
            Cell("−0.1348 to −0.0852"),
            Cell("0.0027"),
            Cell("3"),
        ],
        "worse": [
            Cell("5.3100 ± 0.2100"),
            Cell("+0.1100", "+2.12 %", "worse"),
            Cell("+0.0852 to +0.1348"),
            Cell("0.0027"),
            Cell("3"),
        ],
        "sure": [
            Cell("4.2000 ± 0.2001"),
            Cell("−1.0000", "−19.23 %", "better"),
            Cell("−1.0002 to −0.9998"),
            Cell("< 0.0001"),
            Cell("3"),
        ],
        "short": [
            Cell("6.3333 ± 2.3094"),
            Cell("−0.3000", "−5.66 %"),
            Cell("−1.5706 to +0.9706"),
            Cell("0.2"),
            Cell("3", "2 in pairs"),
        ],
        "alone": [Cell("4.0000"), Cell("−1.0000", "−20.00 %"), Cell("—"), Cell("—"), Cell("1")],
        "elsewhere": [Cell("4.0000"), Cell("—"), Cell("—"), Cell("—"), Cell("1")],
    }
    ((_, rows),) = table.sections
    assert [(row.name, row.unit) for row in rows if row.is_marked] == [("cross_entropy", "baseline")]


def test_the_final_evaluation_stands_beside_the_best():
    rows = [
        result(arm, seed, 5.0, best_cross_entropy=best + seed, final_cross_entropy=final + seed + 0.1 * moves * seed)
        for arm, best, final, moves in (("base", 3.0, 4.0, False), ("arm", 2.0, 5.0, True))
        for seed in (1, 2)
    ]
    cells = cells_of(outcome_table(frame(rows), "base"))
    assert cells["base"][4:6] == [Cell("4.5000 ± 0.7071"), Cell("5.5000 ± 0.7071")]
    best = Cell("3.5000 ± 0.7071", "−1.0000 [−1.0000 to −1.0000], p < 0.0001", "better")
    final = Cell("6.6500 ± 0.7778", "+1.1500 [+0.5147 to +1.7853], p 0.028", "worse")
    assert cells["arm"][4:6] == [best, final]
    without = [{**row, "final_cross_entropy": None} for row in rows]
    assert outcome_table(frame(without), "base").columns[4:] == ["best evaluation", "seeds"]


def test_comparisons_are_counted():
    rows = results_of(base={1: 5.0, 2: 5.1}, arm={1: 4.0, 2: 4.2}, alone={1: 3.0})
    runs = zip(rows["arm"], rows["seed"], rows["cross_entropy"], strict=True)
    curves = frame([row for arm, seed, score in runs for row in curve(arm, seed, [score])])
    tables = outcome_table(rows, "base"), budget_table(rows, curves, "base"), quality_table(rows, "base")
    assert [count_of_p(table) for table in tables] == [3, 4, 7]  # of the arm that has two pairs
    assert count_of_p(outcome_table(rows[:2], "base")) == 0


# --- at equal cost ----------------------------------------------------------------------------------------------------


def test_at_equal_cost_the_budget_is_the_baselines():
    """300 tokens, 3,000 FLOPs, 30 s. Two seeds: all scores of the second are one higher."""
    curves = [
        *curve("cross_entropy", 1, [5.0, 4.0, 4.5]),
        *curve("cross_entropy", 2, [6.0, 5.0, 5.5]),
        *curve("article", 1, [6.0, 3.5, 3.0, 0.0], flops=20, before=1500),
        *curve("article", 2, [7.0, 4.5, 4.0, 0.0], flops=20, before=1500),
        *curve("slow", 1, [3.0, 2.0], seconds=1.0, before=None),
        *curve("slow", 3, [0.0, 0.0]),  # the baseline has no such seed
    ]
    runs = dict.fromkeys((row["arm"], row["seed"]) for row in curves)
    table = budget_table(frame([result(*run, 1.0) for run in runs]), frame(curves), "cross_entropy")
    assert [name.split(",")[0] for name in table.columns[:2]] == ["equal tokens", "equal FLOPs"]
    assert cells_of(table) == {
        "cross_entropy": [Cell("4.5000 ± 0.7071")] * 4 + [Cell("200")],
        "article": [
            Cell("3.5000 ± 0.7071", "−1.0000 [−1.0000 to −1.0000], p < 0.0001", "better"),
            Cell("5.2500 ± 0.7071", "+0.7500 [+0.7500 to +0.7500], p < 0.0001", "worse"),  # half the way from 6 to 3.5
            Cell("—"),  # 3,500 FLOPs before its first evaluation
            Cell("3.5000 ± 0.7071", "−1.0000 [−1.0000 to −1.0000], p < 0.0001", "better"),
            Cell("180", "90 %"),  # from 6 to 3.5 within a hundred tokens it passes 4 after 80
        ],
        "slow": [*[Cell("2.0000", "−2.0000, in 1 of 2 seeds")] * 2, Cell("—"), Cell("—"), Cell("100", "50 %")],
    }


def arms_in(curves: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in curves))


def test_tokens_to_the_baselines_best():
    curves = [
        *(row for seed in (1, 2) for row in curve("base", seed, [5.0, 4.0])),
        *curve("half", 1, [3.0]),
        *curve("half", 2, [4.5]),
        *(row for seed in (1, 2) for row in curve("never", seed, [4.5, 4.1])),
        *curve("alone", 7, [1.0]),
        *({**row, "tokens": row["tokens"] * 10**5} for row in curve("large", 1, [9.0, 4.0])),
    ]
    table = budget_table(frame([result(arm, 1, 1.0) for arm in arms_in(curves)]), frame(curves), "base")
    assert {arm: cells[-1] for arm, cells in cells_of(table).items()} == {
        "base": Cell("200"),
        "half": Cell("100 in 1 of 2", "50 %"),
        "never": Cell("never"),
        "alone": Cell("—"),
        "large": Cell("20.00 M", "10000000 %"),
    }


# --- the other tables -------------------------------------------------------------------------------------------------


def test_quality_is_judged_in_its_own_direction():
    changes = {"expected_calibration_error": 0.02, "entropy": 1.0, "top1_accuracy": 0.03, "other_reward_share": None}
    rows = []
    for seed in (1, 2, 3):
        base = {"expected_calibration_error": 0.05, "entropy": 3.0, "top1_accuracy": 0.25, "other_reward_share": None}
        rows.append(result("base", seed, 5.0, **base))
        moved = {name: base[name] + change + 1e-4 * seed for name, change in changes.items() if change}
        rows.append(result("arm", seed, 5.0, **{**base, **moved}))
    table = quality_table(frame(rows), "base")
    cells = dict(zip(table.columns, cells_of(table)["arm"], strict=True))
    assert cells["calibration error, % of probability"] == Cell(
        "7.02 ± 0.01", "+2.02 [+2.00 to +2.04], p < 0.0001", "worse"
    )
    assert cells["top-1 accuracy, % of tokens"] == Cell("28.02 ± 0.01", "+3.02 [+3.00 to +3.04], p < 0.0001", "better")
    assert cells["entropy, nats"] == Cell("4.000 ± 0.000", "+1.000 [+1.000 to +1.000], p < 0.0001")
    assert cells["best player at, M tokens"] == Cell("3.00 ± 0.00", "0.00 [0.00 to 0.00], p 1")
    # What no run has measured is no column, what some have is one.
    assert not {"minimal pairs, % right", "reward on other tokens, % of the reward"} & cells.keys()
    rows[0]["minimal_pairs_accuracy"] = 0.5
    assert "minimal pairs, % right" in quality_table(frame(rows), "base").columns


def test_costs_are_means_over_seeds():
    rows = [
        result("base", 1, 5.0, seconds=10.0, player_flops=1e15),
        result("base", 2, 5.0, seconds=30.0, player_flops=3e15),
        result("arm", 1, 5.0, seconds=150.0, critic_flops=5e14, critic_training_flops=1.5e17, tokens=12_345_678),
        result("outside", 1, 5.0, seconds=20.0, critic_training_flops=None),
        result("outside", 2, 5.0, seconds=20.0, critic_training_flops=1e15),
    ]
    table = cost_table(frame(rows), "base")
    assert table.columns[2:5] == [
        "PFLOPs of the player",
        "PFLOPs of critics' forward passes",
        "PFLOPs of critics' training",
    ]
    cells = cells_of(table)
    assert cells["base"] == [Cell(text) for text in ("1,000", "4,000", "2.000", "0", "0", "20.000")]
    assert cells["arm"][1:] == [
        Cell("12,345,678"),
        Cell("0.000"),
        Cell("0.500"),
        Cell("150"),
        Cell("150", "7.50 ×"),
    ]
    assert cells["outside"][4:] == [Cell("—"), Cell("20.000", "1.00 ×")]
    small = cost_table(frame([result("base", 1, 5.0, player_flops=2.5e9)]), "base")
    assert small.columns[2] == "GFLOPs of the player"
    assert cells_of(small)["base"][2] == Cell("2.500")


def tried(rate: float, score: float, is_chosen: int, arm: str = "a", **others) -> dict:
    return {"arm": arm, "optim.learning_rate": rate, **others, "cross_entropy": score, "is_chosen": is_chosen}


def test_the_search_is_shown_in_order_with_its_edges():
    rows = [
        tried(0.1, math.inf, 0),
        tried(0.03, 3.5, 1),
        tried(0.003, 4.0, 0),
        tried(0.1, 3.25, 1, arm="b"),
        tried(0.03, 3.5, 0, arm="b"),
    ]
    (first, of_first), (second, of_second) = tuning_table(frame(rows)).sections
    assert (first, second) == ("a", "b")
    assert [(row.name, *(cell.text for cell in row.cells), row.is_marked) for row in of_first] == [
        ("0.003", "4.0000", "", False),
        ("0.03", "3.5000", "yes", True),
        ("0.1", "gave up", "", False),
    ]
    assert tuning_table(frame(rows)).corner == "optim.learning_rate"
    assert tuning_table(frame([tried(0.1, 3.0, 1, decay=2)])).sections[0][1][0].name == "0.1, 2"
    assert of_second[-1].cells[1].text == "yes, at the edge of optim.learning_rate"
    assert of_second[0].cells[1].text == ""


def test_an_edge_is_one_of_numbers_of_which_several_were_tried():
    names = ("optim.learning_rate", "decay", "name")
    rows = [tried(rate, 3.0, 0, decay=0.1, name=name) for rate in (1, 2, 3) for name in "ab"]
    assert on_edge(rows[0], frame(rows), names) == ["optim.learning_rate"]
    assert on_edge(rows[2], frame(rows), names) == []
    assert on_edge(rows[4], frame(rows), names) == ["optim.learning_rate"]


def test_the_cells_are_those_of_the_paired_test():
    """The outcome's interval is that of :func:`paired_difference`, not one of two independent samples."""
    base, arm = {seed: 10.0 * seed for seed in range(5)}, {seed: 10.0 * seed - 1 + 0.01 * seed for seed in range(5)}
    cells = cells_of(outcome_table(results_of(base=base, arm=arm), "base"))["arm"]
    expected = paired_difference(arm, base)
    assert cells[2].text == f"−{-expected.lower:.4f} to −{-expected.upper:.4f}"
    assert cells[1].verdict == "better"
