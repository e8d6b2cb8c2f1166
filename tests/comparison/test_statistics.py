"""Differences between arms: against SciPy, against numbers worked out by hand, and against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from avatarl.comparison.statistics import by_seed, cost_to_reach, paired_difference, reached_within, spread


def curve(*scores: float) -> list[dict]:
    """Evaluations at 100, 200, … tokens."""
    return [
        {"tokens": 100 * (place + 1), "flops": 1000.0 * (place + 1), "all_flops": None, "cross_entropy": score}
        for place, score in enumerate(scores)
    ]


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_the_difference_is_that_of_a_paired_t_test(count: int):
    rng = np.random.default_rng(count)
    values, baseline = rng.normal(1, 0.3, (2, count))
    found = paired_difference(dict(enumerate(values)), dict(enumerate(baseline)))
    expected = stats.ttest_rel(values, baseline)
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found.lower, found.upper) == pytest.approx((interval.low, interval.high))
    assert (found.mean, found.count) == (pytest.approx((values - baseline).mean()), count)


def test_a_difference_by_hand():
    # Pairs −1, −2, −3: mean −2, standard error 1/√3, t = −3.4641 with 2 degrees of freedom; t of 97.5 % is 4.3027.
    found = paired_difference({1: 1.0, 2: 1.0, 3: 1.0, 9: 5.0}, {3: 4.0, 1: 2.0, 2: 3.0, 8: 0.0})
    assert found.count == 3
    assert found.mean == pytest.approx(-2)
    assert (found.lower, found.upper) == pytest.approx((-4.4841, 0.4841), abs=1e-4)
    assert found.p == pytest.approx(0.0742, abs=1e-4)


def test_pairs_that_say_little():
    assert paired_difference({1: 1.0}, {2: 1.0}) is None
    one = paired_difference({1: 1.0}, {1: 3.0})
    assert (one.mean, one.count) == (-2, 1) and all(map(math.isnan, (one.lower, one.upper, one.p)))
    assert paired_difference({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0})[:4] == (0, 0, 0, 1)
    assert paired_difference({1: 1.5, 2: 2.5}, {1: 1.0, 2: 2.0})[:4] == (0.5, 0.5, 0.5, 0)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng, held = np.random.default_rng(1), 0
    for _ in range(2000):
        shared = rng.normal(0, 5, 5)  # what a seed does to both is not in the difference
        values, baseline = shared + rng.normal(-0.2, 0.1, 5), shared + rng.normal(0, 0.1, 5)
        found = paired_difference(dict(enumerate(values)), dict(enumerate(baseline)))
        held += found.lower <= -0.2 <= found.upper
    assert abs(held / 2000 - 0.95) < 0.015


def test_a_spread_is_the_samples():
    assert spread({}) is None
    assert spread({1: 2.0, 2: 4.0, 3: 9.0}) == (5.0, pytest.approx(math.sqrt(13)), 3)
    assert math.isnan(spread({1: 2.0}).deviation)


def test_a_column_by_seed_leaves_out_what_is_not_there():
    rows = [{"arm": "a", "seed": 1, "x": 2}, {"arm": "a", "seed": 2, "x": None}, {"arm": "b", "seed": 1, "x": 3}]
    assert by_seed(rows, "a", "x") == {1: 2.0}
    assert by_seed(rows, "a", "y") == {}


def test_what_was_reached_is_the_lowest_so_far():
    falling_and_rising = curve(5.0, 3.0, 4.0, 2.0)
    assert reached_within(falling_and_rising, "tokens", 300) == 3.0
    assert reached_within(falling_and_rising, "tokens", 399) == 3.0
    assert reached_within(falling_and_rising, "flops", 4000.0) == 2.0
    assert reached_within(falling_and_rising, "flops", 4000.0 * (1 - 1e-12)) == 2.0
    assert reached_within(falling_and_rising, "tokens", 99) is None
    assert reached_within(falling_and_rising, "all_flops", 1e9) is None


def test_the_cost_of_a_score_lies_between_two_evaluations():
    falling_and_rising = curve(5.0, 3.0, 4.0, 2.0)
    assert cost_to_reach(falling_and_rising, "tokens", 5.5) == 100
    assert cost_to_reach(falling_and_rising, "tokens", 5.0) == 100
    assert cost_to_reach(falling_and_rising, "tokens", 4.5) == 125
    assert cost_to_reach(falling_and_rising, "tokens", 3.0) == 200
    assert cost_to_reach(falling_and_rising, "tokens", 2.5) == 375
    assert cost_to_reach(falling_and_rising, "tokens", 1.9) is None
    assert cost_to_reach([], "tokens", 1.9) is None
