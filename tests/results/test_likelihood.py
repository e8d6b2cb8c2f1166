"""What an evaluation says of calibration, and its other numbers, from positions made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from avatarl.results.likelihood import PositionScores, score_positions, summarise


def scores(confidence: list[float], rank: list[int]) -> PositionScores:
    count, top = len(confidence), torch.tensor(confidence)
    return PositionScores(
        torch.ones(count), torch.full((count,), 0.5), top, torch.tensor(rank), top_probs=top.unsqueeze(1)
    )


def forecasts(top_probs: Tensor, rank: Tensor) -> PositionScores:
    """Positions of which the most likely tokens' probabilities (N, R) and the target's rank (N,) matter."""
    return PositionScores(rank.float(), rank.float(), top_probs[:, 0], rank, top_probs)


def test_a_calibrated_model_has_no_error():
    """Right in 3 of 4 where it is 75 % sure, and in 1 of 2 where it is 50 % sure."""
    result = summarise(scores([0.75] * 4 + [0.5] * 2, [0, 0, 0, 7, 0, 1]), num_bytes=6)
    assert result["expected_calibration_error"] == pytest.approx(0.0, abs=1e-9)
    assert [row["count"] for row in result["reliability"]] == [2, 4]


def test_an_always_wrong_model_errs_by_its_confidence():
    result = summarise(scores([1.0, 1.0, 0.9, 0.5], [1, 2, 3, 16]), num_bytes=4)
    assert result["expected_calibration_error"] == pytest.approx((1 + 1 + 0.9 + 0.5) / 4)
    assert (result["top1_accuracy"], result["top16_accuracy"]) == (0.0, 0.75)


def test_the_reliability_table_by_hand():
    """Bins are fifteenths: 0.06 → 0, 0.07 → 1, 0.5 and 0.52 → 7, 1.0 → the last."""
    result = summarise(scores([0.06, 0.07, 0.5, 0.52, 1.0], [0, 5, 0, 20, 0]), num_bytes=10)
    found = [(row["from"], row["to"], row["count"], row["accuracy"]) for row in result["reliability"]]
    assert found == [(0, 1 / 15, 1, 1.0), (1 / 15, 2 / 15, 1, 0.0), (7 / 15, 8 / 15, 2, 0.5), (14 / 15, 1.0, 1, 1.0)]
    assert [row["confidence"] for row in result["reliability"]] == pytest.approx([0.06, 0.07, 0.51, 1.0])
    expected = (1 * abs(1 - 0.06) + 1 * abs(0 - 0.07) + 2 * abs(0.5 - 0.51) + 0) / 5
    assert result["expected_calibration_error"] == pytest.approx(expected)


def test_the_summary_by_hand():
    positions = forecasts(torch.tensor([[0.5], [0.5]]), torch.tensor([0, 30]))
    positions = positions._replace(cross_entropy=torch.tensor([1.0, 3.0]), entropy=torch.tensor([0.25, 0.75]))
    result = summarise(positions, num_bytes=5)
    assert (result["cross_entropy"], result["entropy"], result["tokens"], result["bytes"]) == (2.0, 0.5, 2, 5)
    assert result["perplexity"] == pytest.approx(math.e**2)
    assert result["bits_per_byte"] == pytest.approx(4 / math.log(2) / 5)
    assert summarise(positions, num_bytes=0)["bits_per_byte"] is None
    assert summarise(positions._replace(cross_entropy=torch.full((2,), 1e4)), 1)["perplexity"] == math.inf


def slow_table(probs: list[list[float]], hits: list[list[float]]) -> tuple[float, list[dict]]:
    """top16_calibration_error and its table, one forecast after the other."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for row in zip(probs, hits, strict=True):
        for prob, hit in zip(*row, strict=True):
            halvings = 0
            while halvings < 14 and prob <= 0.5 ** (halvings + 1):
                halvings += 1
            bins.setdefault(halvings, []).append((prob, hit))
    table, error = [], 0.0
    for halvings, held in sorted(bins.items(), reverse=True):
        total, found = sum(prob for prob, _ in held), sum(hit for _, hit in held)
        table.append(
            {
                "from": 0.5 ** (halvings + 1) if halvings < 14 else 0.0,
                "to": 0.5**halvings,
                "count": len(held),
                "confidence": pytest.approx(total / len(held)),
                "accuracy": pytest.approx(found / len(held)),
            }
        )
        error += abs(total - found) / len(probs)
    return error, table


@pytest.mark.parametrize("vocabulary", [7, 60])
def test_the_forecasts_of_a_position_against_a_slow_loop(vocabulary: int):
    """From hidden states, at which some tokens are as likely as others; with fewer tokens than 16 all are forecasts."""
    generator = torch.Generator().manual_seed(4)
    logits = (12 * torch.rand(3, 50, vocabulary, generator=generator)).round() * 0.7
    targets = torch.randint(vocabulary, (3, 50), generator=generator)
    targets[:, ::2] = logits[:, ::2].argmax(-1)
    positions = score_positions(logits, torch.eye(vocabulary), targets, vocabulary)
    assert positions.top_probs.dtype == torch.float32 and torch.equal(positions.confidence, positions.top_probs[:, 0])
    probs, hits = [], []
    for row, target in zip(logits.flatten(0, 1).double().softmax(-1), targets.flatten().tolist(), strict=True):
        order = sorted(range(vocabulary), key=lambda token: -row[token])[:16]
        probs.append(row[order].float().tolist())
        # Of tokens that are as likely as the target each may stand at its place.
        hits.append([(row[token] == row[target]).item() / (row == row[target]).sum().item() for token in order])
    torch.testing.assert_close(positions.top_probs, torch.tensor(probs))
    error, table = slow_table(positions.top_probs.tolist(), hits)
    result = summarise(positions, num_bytes=1)
    assert result["top16_reliability"] == table and len(table) > 5
    assert result["top16_calibration_error"] == pytest.approx(error) and error > 0.1
    assert sum(row["count"] for row in table) == 150 * min(16, vocabulary)


@pytest.mark.parametrize("vocabulary, tied", [(64, 64), (64, 20), (64, 2), (8, 8)])
def test_ties_favour_nobody(vocabulary: int, tied: int):
    """As many tokens are the likeliest, the target one of them: it is at each of their places with the same share."""
    logits = torch.full((1, 3, vocabulary), -4.0)
    logits[..., :tied] = 1.0
    positions = score_positions(logits, torch.eye(vocabulary), torch.tensor([[0, 1, tied - 1]]), vocabulary)
    result = summarise(positions, num_bytes=1)
    assert result["top1_accuracy"] == pytest.approx(1 / tied)
    assert result["top16_accuracy"] == pytest.approx(min(16, tied) / tied)
    (row,) = result["reliability"]
    assert row["accuracy"] == pytest.approx(1 / tied)
    if tied == vocabulary:  # a uniform model is calibrated
        assert result["expected_calibration_error"] == pytest.approx(0, abs=1e-7)
        assert result["top16_calibration_error"] == pytest.approx(0, abs=1e-7)


def test_what_rounds_to_the_same_probability_is_no_tie():
    logits = torch.tensor([[[9.0, -9.000000, -9.000001]]])
    result = summarise(score_positions(logits, torch.eye(3), torch.tensor([[1]]), 3), num_bytes=1)
    assert result["top16_accuracy"] == 1 and score_positions(logits, torch.eye(3), torch.tensor([[1]]), 3).ties == 1


def test_a_bin_holds_its_upper_edge_and_the_last_one_all_below():
    edges = [[2.0**-halvings for halvings in range(16)], [0.0] * 16]
    result = summarise(forecasts(torch.tensor(edges), torch.tensor([0, 99])), num_bytes=1)
    error, table = slow_table(edges, [[True] + [False] * 15, [False] * 16])
    assert (result["top16_calibration_error"], result["top16_reliability"]) == (pytest.approx(error), table)
    assert error == (1 - 2.0**-15) / 2  # all but the first, which came true, of two positions
    assert [row["count"] for row in result["top16_reliability"]] == [18] + [1] * 14
    first, *_, last = result["top16_reliability"]
    assert (first["from"], first["to"], last["from"], last["to"]) == (0, 2.0**-14, 0.5, 1)


def test_forecasts_that_come_true_as_often_as_they_say_have_no_error():
    """In 8 positions the first of four forecasts is right 5 times, and each of the others once."""
    probs = torch.tensor([[5 / 8, 1 / 8, 1 / 8, 1 / 8]]).repeat(8, 1)
    result = summarise(forecasts(probs, torch.tensor([0, 0, 0, 0, 0, 1, 2, 3])), num_bytes=1)
    assert result["top16_calibration_error"] == pytest.approx(0, abs=1e-9)
    assert [row["accuracy"] for row in result["top16_reliability"]] == [1 / 8, 5 / 8]


def test_a_confident_forecast_that_is_wrong_errs_twice():
    """All probability is where nothing happens, and none where all happens."""
    probs = torch.tensor([[1.0, 0.0, 0.0]]).repeat(4, 1)
    result = summarise(forecasts(probs, torch.tensor([1, 2, 1, 2])), num_bytes=1)
    assert result["top16_calibration_error"] == 2 and result["expected_calibration_error"] == 1
    beyond = summarise(forecasts(probs, torch.tensor([16, 99, 16, 99])), num_bytes=1)
    assert beyond["top16_calibration_error"] == 1  # the text's token is none of the forecasts
