"""What is said of a difference is what it is: against scipy, against sums done by hand, and against chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from avatarl.comparison.statistics import by_seed, cost_to_reach, paired_difference, reached_within, spread

from .rows import curve, frame

# --- paired differences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_scipy_finds_the_same(count: int):
    rng = np.random.default_rng(count)
    values, baseline = rng.normal(4, 1, size=(2, count))
    found = paired_difference(dict(enumerate(values)), dict(enumerate(baseline)))
    expected = stats.ttest_rel(values, baseline)
    interval = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx((values - baseline).mean())
    assert (found.lower, found.upper) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(expected.pvalue)
    assert found.count == count


def test_a_difference_done_by_hand():
    """−1, −2 and −3: deviation 1, error 1/√3, t = −2√3 of two degrees of freedom, where p = 1 − t/√(2 + t²)."""
    found = paired_difference({1: 4.0, 2: 3.0, 3: 2.0}, {1: 5.0, 2: 5.0, 3: 5.0})
    half = 4.302653 / math.sqrt(3)  # of a table of Student's t: 0.975, two degrees of freedom
    assert (found.mean, found.lower, found.upper) == pytest.approx((-2, -2 - half, -2 + half), abs=1e-6)
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))


def test_pairs_are_those_of_the_same_seed():
    """Whatever order they come in, and without the seeds that only one of them has."""
    found = paired_difference({3: 1.0, 1: 2.0, 9: 100.0}, {1: 5.0, 2: -100.0, 3: 3.0})
    assert (found.mean, found.count) == (-2.5, 2)
    assert paired_difference({1: 1.0}, {2: 1.0}) is None
    assert paired_difference({}, {}) is None


def test_one_pair_has_a_difference_and_no_interval():
    found = paired_difference({7: 1.0}, {7: 3.0})
    assert (found.mean, found.count) == (-2.0, 1)
    assert all(map(math.isnan, (found.lower, found.upper, found.p)))


def test_pairs_that_do_not_vary():
    seeds = (1, 2, 3)
    same = paired_difference(dict.fromkeys(seeds, 2.5), dict.fromkeys(seeds, 2.5))
    assert same == (0.0, 0.0, 0.0, 1.0, 3)
    shifted = paired_difference({seed: seed + 0.5 for seed in seeds}, {seed: float(seed) for seed in seeds})
    assert shifted == (0.5, 0.5, 0.5, 0.0, 3)


def test_an_interval_holds_the_truth_19_times_of_20():
    """Of five seeds each; what a seed does to both runs of a pair is ten times what it does to one."""
    rng, draws, held, significant = np.random.default_rng(1), 2000, 0, 0
    for _ in range(draws):
        of_seed, noise = rng.normal(0, 10, 5), rng.normal(0, 1, (2, 5))
        values, baseline = (dict(enumerate(of_seed + each)) for each in noise + np.array([[-0.3], [0.0]]))
        found = paired_difference(values, baseline)
        held += found.lower <= -0.3 <= found.upper
        significant += (found.p < 0.05) == (not found.lower <= 0 <= found.upper)
    assert 0.93 <= held / draws <= 0.97
    assert significant == draws  # interval and p say the same


def test_seeds_without_a_finite_number_are_left_out():
    """As results.csv leaves them out, of a run that diverged."""
    numbers = [4.0, math.nan, None, math.inf, 5.0]
    rows = [{"arm": "a", "seed": seed, "loss": number} for seed, number in enumerate(numbers)]
    assert by_seed(frame(rows), "a", "loss") == {0: 4.0, 4: 5.0}
    assert by_seed(frame(rows), "a", "nothing") == by_seed(frame(rows), "b", "loss") == {}


def test_a_spread_is_that_of_a_sample():
    assert spread({1: 1.0, 2: 2.0, 3: 3.0}) == (2.0, 1.0, 3)
    one = spread({1: 4.0})
    assert one.mean == 4.0 and math.isnan(one.deviation) and one.count == 1
    assert spread({}) is None


def test_a_column_by_seed_leaves_out_what_is_not_there():
    rows = [
        {"arm": "a", "seed": 2, "x": 3},
        {"arm": "a", "seed": 1, "x": None},
        {"arm": "a", "seed": 3},
        {"arm": "b", "seed": 4, "x": 5.0},
    ]
    assert by_seed(frame(rows), "a", "x") == {2: 3.0}


# --- curves and what they cost ----------------------------------------------------------------------------------------


def test_what_was_reached_is_the_lowest_so_far():
    rows = frame(curve("a", 1, [5.0, 3.0, 4.0, 2.0]))
    assert reached_within(rows, "tokens", 300) == 3.0  # not the last, and the one at the budget itself counts
    assert reached_within(rows, "tokens", 299) == 3.0
    assert reached_within(rows, "seconds", 1e9) == 2.0
    assert reached_within(rows, "tokens", 99) is None  # before the first evaluation


@pytest.mark.parametrize(
    ("cost", "budget", "reached"),
    [
        ("tokens", 150, 4.0),  # half the way from 5 to 3
        ("flops", 1250, 4.5),
        ("tokens", 250, 3.0),  # from 3 to 4 it rises: the evaluation before is the lowest
        ("tokens", 375, 2.5),
        ("tokens", 325, 3.0),  # 3.5 by then, which is not the lowest
        ("tokens", 400, 2.0),
        ("tokens", 999, 2.0),  # nothing is known beyond the last
    ],
)
def test_a_budget_between_two_evaluations_lies_on_the_line(cost: str, budget: float, reached: float):
    assert reached_within(frame(curve("a", 1, [5.0, 3.0, 4.0, 2.0])), cost, budget) == pytest.approx(reached)


def test_nothing_is_reached_at_a_cost_that_is_unknown():
    assert reached_within(frame(curve("a", 1, [5.0, 3.0], before=None)), "all_flops", 1e9) is None


@pytest.mark.parametrize(
    ("scores", "wanted", "tokens"),
    [
        ([5.0, 3.0], 6.0, 100),  # already at the first evaluation
        ([5.0, 3.0], 5.0, 100),
        ([5.0, 3.0], 4.5, 125),  # a quarter of the way
        ([5.0, 3.0], 3.0, 200),
        ([5.0, 3.0], 2.9, None),
        ([5.0, 3.0, 6.0, 1.0], 3.5, 175),  # where it first was, though it rose again
        ([4.0, 6.0, 2.0], 3.0, 275),  # from the evaluation before, not from the lowest one
        ([5.0, 5.0, 5.0], 4.0, None),
    ],
)
def test_when_a_curve_first_was_so_low(scores: list[float], wanted: float, tokens: float | None):
    assert cost_to_reach(frame(curve("a", 1, scores)), "tokens", wanted) == tokens
