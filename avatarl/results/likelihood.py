"""How likely a player finds held-out text, how often it is right and how sure; with critics, its rewards too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from avatarl.data import PreparedData, Windows
from avatarl.errors import UserError
from avatarl.models import check_same_vocabulary, open_critic
from avatarl.models.critics import CriticInputs
from avatarl.models.loading import check_window, head_weight, last_hidden, longest_sequence
from avatarl.objective import AvataRL, AvataRLConfig, linear_avatarl_loss
from avatarl.objective.config import require_choice, require_whole

from .players import Player

RELIABILITY_BINS = 15
FORECASTS = 16  # of a position: its most likely tokens, each with its probability
ACCURACY_RANKS = (1, FORECASTS)
WINDOWS_AT_ONCE = 8


class PositionScores(NamedTuple):
    """What is kept of each position (N,), in float32."""

    cross_entropy: Tensor  # nats
    entropy: Tensor  # nats
    confidence: Tensor  # probability of the most likely token
    rank: Tensor  # int64, how many tokens are more likely than the target
    top_probs: Tensor  # (N, R), probabilities of the R most likely tokens in falling order; of 16, or of all if fewer
    ties: Tensor | int = 1  # int64, how many tokens are as likely as the target, itself included


@torch.no_grad()
def evaluate_text(
    player: Player,
    data: str | Path,
    critic_names: Sequence[str],
    config: AvataRLConfig,
    split: str,
    block_size: int | None,
    max_windows: int | None,
) -> dict:
    """Evaluate a player on the windows of a split; :func:`~avatarl.results.evaluate` describes arguments and result."""
    require_choice("split", split, ("train", "valid"))
    prepared = PreparedData.open(data)
    tokenizer, device = prepared.load_tokenizer(), player.model.device
    check_same_vocabulary(tokenizer, player.tokenizer, player.name, role="model")
    block_size = player.context_length if block_size is None else block_size
    require_whole("block_size", block_size, minimum=1)
    options = dict(block_size=block_size, data=prepared, splits=[split], device=device)
    critics = [open_critic(name, tokenizer, **options) for name in critic_names]
    if critics:
        try:
            AvataRL(config).check_settings(len(tokenizer), [critic.limits for critic in critics])
        except ValueError as error:
            raise UserError(str(error)) from error
    longest = longest_sequence(player.model)
    if longest is not None and longest < block_size:
        raise UserError(f"block_size is {block_size}; expected at most {longest}, what {player.name} was made to read")
    check_window(player.model, block_size, player.name)
    windows = Windows(prepared.train if split == "train" else prepared.valid, block_size)
    count = len(windows) if max_windows is None else min(max_windows, len(windows))
    require_whole("max_windows", count, minimum=1)

    head = head_weight(player.model)
    generator = torch.Generator().manual_seed(1)  # of a sampled tail
    scores, rewards = [], {}
    for start in range(0, count, WINDOWS_AT_ONCE):
        indices = range(start, min(start + WINDOWS_AT_ONCE, count))
        inputs, targets = (tokens.to(device) for tokens in windows.batch(indices))
        hidden = last_hidden(player.model, inputs)
        scores.append(score_positions(hidden, head, targets, len(tokenizer)))
        if critics:
            batch = CriticInputs(inputs, split, indices)
            _, metrics = linear_avatarl_loss(
                hidden,
                head,
                [critic.answers(batch) for critic in critics],
                None,
                targets,
                config,
                vocab_size=len(tokenizer),
                num_valid=count * block_size,
                uniforms=torch.rand(targets.numel(), 1, generator=generator).to(device),
            )
            for name, value in metrics.items():
                rewards[name] = rewards.get(name, 0.0) + value.item()
    positions = PositionScores(*(torch.cat(column).cpu() for column in zip(*scores, strict=True)))
    if unknown := int(positions.cross_entropy.isnan().sum()):
        raise UserError(f"{player.name}: its logits are NaN at {unknown:,} of {count * block_size:,} positions")
    if math.isnan(rewards.get("loss", 0.0)):
        raise UserError(f"critic {', '.join(critic_names)}: logits are NaN in the {count:,} windows")
    num_bytes = prepared.text_bytes(split, 1, count * block_size + 1, tokenizer)  # windows lie one after the other
    result = summarise(positions, num_bytes) | {"windows": count, "block_size": block_size, "split": split}
    if not num_bytes:
        unknown = f"{data} was prepared before the bytes of such tokens were kept; prepare it anew"
        result["bits_per_byte_missing"] = unknown if num_bytes is None else "the targets stand for no text"
    return result | ({"rewards": rewards, "reward_settings": asdict(config)} if critics else {})


def score_positions(hidden: Tensor, head: Tensor, targets: Tensor, vocab_size: int) -> PositionScores:
    """Score windows (B, T) from hidden states (B, T, d), one window at a time to hold (T, vocabulary) at most."""
    columns = []
    for states, target in zip(hidden, targets, strict=True):
        logits = (states @ head[:vocab_size].t()).float()  # (T, V)
        log_probs, of_target = logits.log_softmax(-1), logits.gather(1, target.unsqueeze(1))  # (T, V), (T, 1)
        top_probs = log_probs.topk(min(FORECASTS, log_probs.shape[1]), dim=1).values.exp()  # (T, R)
        columns.append(
            PositionScores(
                -log_probs.gather(1, target.unsqueeze(1)).squeeze(1),
                -torch.linalg.vecdot(log_probs.exp(), log_probs),
                top_probs[:, 0],
                (logits > of_target).sum(1),
                top_probs,
                (logits == of_target).sum(1),
            )
        )
    return PositionScores(*(torch.cat(column) for column in zip(*columns, strict=True)))


def summarise(positions: PositionScores, num_bytes: int | None) -> dict:
    """The numbers of an evaluation, from every position's scores and the bytes of the targets' text, where known."""
    cross_entropy = positions.cross_entropy.double().mean().item()
    # Each of the tokens that are as likely as the target may stand at its place: it is there with a share of one.
    place, first = torch.arange(max(ACCURACY_RANKS)), positions.rank.unsqueeze(1)
    ties = torch.as_tensor(positions.ties).expand_as(positions.rank).unsqueeze(1)
    is_target = ((place >= first) & (place < first + ties)).double() / ties  # (N, 16)
    table = reliability_table(positions.confidence, is_target[:, 0])
    forecasts = positions.top_probs.shape[1]
    top_table = halving_reliability_table(positions.top_probs.flatten(), is_target[:, :forecasts].flatten())
    total = len(positions.rank)
    return {
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(cross_entropy) if cross_entropy < 700 else math.inf,
        "bits_per_byte": cross_entropy * total / math.log(2) / num_bytes if num_bytes else None,
        **{f"top{rank}_accuracy": is_target[:, :rank].sum(1).mean().item() for rank in ACCURACY_RANKS},
        "entropy": positions.entropy.double().mean().item(),
        "expected_calibration_error": calibration_error(table, total),
        "reliability": table,
        f"top{FORECASTS}_calibration_error": calibration_error(top_table, total),
        f"top{FORECASTS}_reliability": top_table,
        "tokens": total,
        "bytes": num_bytes,
    }


def reliability_table(confidence: Tensor, correct: Tensor) -> list[dict]:
    """Bins of equal width over the top token's probability: how sure the model was, how often it was right.

    Empty bins are left out. Source: Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """
    bins = (confidence * RELIABILITY_BINS).long().clamp(max=RELIABILITY_BINS - 1)
    return _rows_of_bins(bins, [index / RELIABILITY_BINS for index in range(RELIABILITY_BINS + 1)], confidence, correct)


def halving_reliability_table(confidence: Tensor, correct: Tensor) -> list[dict]:
    """Bins (1/2, 1], (1/4, 1/2] and so on, the last down to 0, from small to large: small probabilities apart too.

    Args:
        confidence: (M,) probabilities of forecasts.
        correct: (M,) in [0, 1], the share of each that came true.
    """
    inner = [2.0**-halvings for halvings in range(RELIABILITY_BINS - 1, 0, -1)]
    bins = torch.bucketize(confidence, torch.tensor(inner), out_int32=True)  # a bin's upper edge is its own
    return _rows_of_bins(bins, [0.0, *inner, 1.0], confidence, correct)


def _rows_of_bins(bins: Tensor, edges: Sequence[float], confidence: Tensor, correct: Tensor) -> list[dict]:
    """What lies in each bin that is not empty, of forecasts (M,) in bins (M,) between neighbouring edges."""
    forecasts = pd.DataFrame({"confidence": confidence.double().numpy(), "accuracy": correct.double().numpy()})
    of_bin = forecasts.groupby(bins.numpy())
    means = of_bin.mean()
    means.insert(0, "count", of_bin.size())
    return [{"from": edges[bin], "to": edges[bin + 1], **row} for bin, row in means.to_dict("index").items()]


def calibration_error(table: Sequence[Mapping[str, float]], positions: int) -> float:
    """Probability per position that lies in the wrong place: Σ over bins of |Σ probabilities − hits| / positions.

    Of one forecast a position it is 0 to 1, the expected calibration error; of several 0 to 2.
    """
    return sum(row["count"] / positions * abs(row["accuracy"] - row["confidence"]) for row in table)
