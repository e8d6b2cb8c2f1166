"""The rewards of every candidate of every position of a text, and why: the reward landscape with names on it.

A text is read as training reads it: cut into windows of the context's length, the first of which begins with the
end-of-text token. Everything is computed in float64 from logits in float32.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from avatarl.data.tokenizer import encode_texts, encode_with_bytes, end_of_text_id
from avatarl.errors import UserError
from avatarl.models import Critic, check_same_vocabulary, open_critic
from avatarl.models.critics import CriticInputs
from avatarl.models.loading import head_weight, last_hidden, resolve_model
from avatarl.objective import AvataRL, AvataRLConfig, HiddenAnswers, LiveAnswers, RewardLandscape, reward_landscape
from avatarl.objective.objectives import LossInputs
from avatarl.sanitise import visible

from .inspect import settings_and_critics
from .players import Player, open_player

MOST_TOKENS = 2048  # of a text: a page of so many positions has three megabytes
KEPT_PROPOSALS = 32  # of each model, for changed settings on a page, where there is no model any more
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # the byte-level alphabet
BYTE_FALLBACK = re.compile("<0x[0-9A-F]{2}>")  # a byte among SentencePiece's tokens
WHITE_SPACE_BYTES = ("\n", "\t", "\r")  # of which it may have no other token
WHITE_SPACE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class Action:
    """One candidate of a position."""

    token: int
    text: str  # with white space visible
    proposed_by: tuple[str, ...]  # "text", "player", "critic" (of several: "critic 1", "critic 2" …)
    policy: float  # the player's π
    reality: float  # p_R
    critic: tuple[float, ...]  # p_C of each critic, over the whole vocabulary
    consensus: float  # p
    reward: float
    gradient: float  # ∂L/∂z of the position's own loss: below 0, the token is pushed up


@dataclass(frozen=True)
class Position:
    """One token of the text, and what each candidate earns in its place."""

    token: int
    text: str  # with white space visible
    actions: tuple[Action, ...]  # the text's token first, then what the player and the critics propose
    threshold: float | None  # a consensus up to here earns nothing; None without a threshold
    cross_entropy: float  # nats
    entropy: float  # nats, of the player's policy
    expected_reward: float  # Σ π r
    expected_reward_share: float  # Σ π r / max r
    other_reward_share: float  # of the position's reward, to other tokens than the text's
    disagreement: float | None  # log p_C of the critic's favourite over the text's token, nats (mean over critics)


@dataclass(frozen=True)
class Inspection:
    """A text and the rewards of its candidates."""

    player: str
    critics: tuple[str, ...]
    config: AvataRLConfig
    positions: tuple[Position, ...]
    summary: dict[str, float]  # means over the positions, in the words of docs/metrics.md
    answers: tuple[dict[str, Any], ...]  # of each position, from :func:`answers_of`
    texts: dict[int, str]  # of every token in ``answers``, with white space visible

    def disagreements(self, count: int) -> list[int]:
        """The places of the positions where critics and text disagree most, the worst first."""
        places = [place for place, position in enumerate(self.positions) if position.disagreement]
        return sorted(places, key=lambda place: -self.positions[place].disagreement)[:count]

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers; without ``answers`` and their texts."""
        plain = dataclasses.asdict(dataclasses.replace(self, answers=(), texts={}))
        del plain["answers"], plain["texts"]
        return plain


class Inspector:
    """A player and its critics, opened once for many texts."""

    def __init__(
        self,
        player: PreTrainedModel,
        critics: Sequence[Critic],
        tokenizer: PreTrainedTokenizerBase,
        config: AvataRLConfig,
        names: Sequence[str],
    ):
        """
        Args:
            player: The model whose policy is shown, in eval mode.
            critics: The critics.
            tokenizer: Of all of them.
            config: The settings. A sampled tail is shown by its expectation, ``dense``.
            names: Of the player and each critic.

        Raises:
            UserError: The settings do not fit the vocabulary or the critics.
        """
        if config.tail_rule == "sample":
            config = dataclasses.replace(config, tail="dense")
        try:
            AvataRL(config).check_settings(len(tokenizer), [critic.limits for critic in critics])
        except ValueError as error:
            raise UserError(str(error)) from error
        self.player, self.critics, self.tokenizer, self.config = player, list(critics), tokenizer, config
        self.names = tuple(names)
        self.shown = cache(partial(shown_token, tokenizer))
        context = Player("", player, tokenizer).context_length
        self.block_size = min([context, *(critic.longest for critic in critics if critic.longest)])

    @classmethod
    def open(
        cls,
        player: str | Path,
        critics: Sequence[str] | None = None,
        config: AvataRLConfig | None = None,
        device: str = "auto",
    ) -> Inspector:
        """Open models by their names.

        Args:
            player: A run folder (its best player), a model folder or a hub id.
            critics: The same, for each critic; None for those that the run was trained with.
            config: The settings; None for those that the run was trained with, or the article's.
            device: ``cpu``, ``cuda`` or ``auto``.

        Raises:
            UserError: One cannot be opened, or they do not fit each other.
        """
        resolve_model(player)  # a mistyped player is not to be blamed on the critic
        config, critics = settings_and_critics(player, critics, config)
        return cls.of(open_player(player, device), critics, config)

    @classmethod
    def of(cls, player: Player, critics: Sequence[str], config: AvataRLConfig) -> Inspector:
        """Open the critics of a player; :meth:`open` describes them."""
        opened = [open_critic(name, player.tokenizer, device=player.model.device) for name in critics]
        return cls(player.model, opened, player.tokenizer, config, [player.name, *map(str, critics)])

    def with_player(self, player: Player) -> Inspector:
        """Another player with the same critics and settings.

        Raises:
            UserError: The player reads other tokens than the critics, or the settings do not fit them.
        """
        check_same_vocabulary(self.tokenizer, player.tokenizer, player.name, role="player")
        return Inspector(player.model, self.critics, player.tokenizer, self.config, [player.name, *self.names[1:]])

    def inspect(self, text: str) -> Inspection:
        """Compute the rewards of a text; of its first token too where there is an end-of-text token to read before it.

        Raises:
            UserError: It has no token with another before it, or too many.
        """
        (ids,) = encode_texts(self.tokenizer, [text])
        if len(ids) > MOST_TOKENS:
            ((_, lengths),) = encode_with_bytes(self.tokenizer, [text])
            fitting = len(text.encode("utf-8")[: lengths[:MOST_TOKENS].sum()].decode("utf-8"))
            raise UserError(
                f"text has {len(ids):,} tokens; expected at most {MOST_TOKENS:,}, which its first {fitting:,} "
                "characters have"
            )
        end_id = end_of_text_id(self.tokenizer)
        return self.inspect_ids(ids if end_id is None else [end_id, *ids])

    def inspect_ids(self, ids: Sequence[int]) -> Inspection:
        """Compute the rewards at every token of ``ids`` but the first, which is only read.

        Raises:
            UserError: There are fewer than two.
        """
        if len(ids) < 2:
            raise UserError("text has no token to look at; give some text")
        # Windows of at most block_size + 1 tokens, each beginning with the last one of the window before.
        starts = range(0, len(ids) - 1, self.block_size)
        windows = [self._inspect_window(list(ids[start : start + self.block_size + 1])) for start in starts]
        positions, answers, metrics = (sum(parts, []) for parts in zip(*windows, strict=True))
        summary = {name: math.fsum(line[name] for line in metrics) / len(metrics) for name in metrics[0]}
        texts = {token: self.shown(token) for of_position in answers for token in of_position["tokens"]}
        return Inspection(self.names[0], self.names[1:], self.config, tuple(positions), summary, tuple(answers), texts)

    @torch.no_grad()
    def _inspect_window(self, ids: list[int]) -> tuple[list[Position], list[dict], list[dict[str, float]]]:
        """Every position of a window of T + 1 tokens, what its landscape is computed from, and its metrics."""
        window, config = torch.tensor(ids, device=self.player.device), self.config
        inputs, targets = window[None, :-1], window[1:]
        hidden = HiddenAnswers(last_hidden(self.player, inputs), head_weight(self.player))
        of_critics = [critic.answers(CriticInputs(inputs)) for critic in self.critics]
        player, *critics = every = [self._logits(each) for each in (hidden, *of_critics)]
        for name, logits in zip(self.names, every, strict=True):
            if not logits.amax().isfinite():
                raise UserError(f"{name}: its logits are NaN or infinite, so they have no softmax")
        landscape = reward_landscape(player, critics, targets, config)
        live = [LiveAnswers(logits) for logits in critics]
        loss_inputs = LossInputs(player.clone(), live, targets, weights=torch.ones_like(player[:, 0]))
        loss = AvataRL(config).loss_and_gradient(loss_inputs, with_gradient=True)
        metrics = {name: values.tolist() for name, values in loss.metrics.items()}
        metrics = [dict(zip(metrics, row, strict=True)) for row in zip(*metrics.values(), strict=True)]
        of_actions = {
            "policy": player.log_softmax(-1).gather(1, landscape.actions).exp(),
            "reality": landscape.reality,
            "critic": landscape.critic.permute(1, 2, 0) if critics else torch.empty(*landscape.actions.shape, 0),
            "consensus": landscape.consensus,
            "reward": landscape.rewards,
            "gradient": loss.gradient.gather(1, landscape.actions),
        }  # (T, A), of critics (T, A, C)
        numbers = {name: values.tolist() for name, values in of_actions.items()}
        voices = ["critic"] if len(critics) == 1 else [f"critic {i + 1}" for i in range(len(critics))]
        proposing = {"player": player} if config.player_proposes else {}
        proposed = {}
        for voice, logits in (proposing | dict(zip(voices, critics, strict=True))).items():
            tokens, is_kept = LiveAnswers(logits).proposals(config.top_k, config.top_p)
            proposed[voice] = tokens.masked_fill(~is_kept, -1).tolist()

        def action(position: int, place: int, token: int) -> Action:
            proposers = [voice for voice, tokens in proposed.items() if token in tokens[position]]
            values = {name: column[position][place] for name, column in numbers.items()}
            values["critic"] = tuple(values["critic"])
            return Action(token, self.shown(token), ("text", *proposers) if place == 0 else tuple(proposers), **values)

        bars, apart = thresholds(landscape, config), disagreements(critics, targets)
        fields = ("cross_entropy", "entropy", "expected_reward", "expected_reward_share", "other_reward_share")
        positions = []
        for n, (tokens, valid) in enumerate(zip(landscape.actions.tolist(), landscape.valid.tolist(), strict=True)):
            actions = tuple(action(n, place, token) for place, token in enumerate(tokens) if valid[place])
            values = {name: metrics[n][name] for name in fields}
            first = actions[0]
            positions.append(
                Position(first.token, first.text, actions, threshold=bars[n], disagreement=apart[n], **values)
            )
        return positions, answers_of(player, critics, targets, config), metrics

    def _logits(self, answers: HiddenAnswers) -> Tensor:
        """Logits (T, V) in float64 of one window (1, T), without the rows that no token belongs to."""
        return (answers.states[0] @ answers.weight[: len(self.tokenizer)].t()).double()


def thresholds(landscape: RewardLandscape, config: AvataRLConfig) -> list[float | None]:
    """The largest consensus that still earns nothing, at each position: 1/n, S/n, or None without a threshold."""
    num_active = landscape.valid.sum(1).double()
    if config.threshold == "none":
        return [None] * len(num_active)
    if config.threshold == "mean":
        return (1 / num_active).tolist()
    # S, the mass of the blend before it is normalised; an expert of weight 0 takes no part.
    voices = [landscape.reality, *([] if landscape.critic is None else landscape.critic)]
    weights = [config.reality_weight, *config.critic_weights(len(voices) - 1)]
    experts = [weight * probs.log() for weight, probs in zip(weights, voices, strict=True) if weight]
    mass = sum(experts).masked_fill(~landscape.valid, -torch.inf).exp().sum(1)
    return (mass / num_active).tolist()


def disagreements(critics: Sequence[Tensor], targets: Tensor) -> list[float | None]:
    """How much more likely critics find their favourite than the target, in nats: the mean over critics (N, V)."""
    if not critics:
        return [None] * len(targets)
    apart = [logits.amax(1) - logits.gather(1, targets[:, None])[:, 0] for logits in critics]
    return torch.stack(apart).mean(0).tolist()


def answers_of(player: Tensor, critics: Sequence[Tensor], targets: Tensor, config: AvataRLConfig) -> list[dict]:
    """What landscape.js computes landscapes of other settings from, given logits (N, V), for each position.

    Returns:
        ``tokens``, U of them: the target, then all that any model proposes. ``playerOrder`` and, a list for each
        critic, ``criticOrders``: places in ``tokens`` of the proposals, the likeliest first. ``logPolicy`` (U) and
        ``logCritics`` (C, U), over the whole vocabulary. ``logRests`` (C): log of what a critic leaves to other tokens.
        ``bestMixture``: the most that the critics together, by their weights, give to any token. ``logTempered`` (U):
        log π at the loss's temperature, None where that is 1. ``entropy`` there, nats. ``agreement`` (C): Σ π p_C.
    """
    kept = min(max(config.top_k, KEPT_PROPOSALS), player.shape[1])
    orders = [LiveAnswers(logits).proposals(kept, None)[0].tolist() for logits in (player, *critics)]
    log_policy, log_tempered = player.log_softmax(-1), (player / config.temperature).log_softmax(-1)
    log_critics = [logits.log_softmax(-1) for logits in critics]
    weights = config.critic_weights(len(critics))
    shares = [weight / sum(weights) if sum(weights) else 1 / len(weights) for weight in weights]
    mixture = sum(share * log_probs.exp() for share, log_probs in zip(shares, log_critics, strict=True))
    answers = []
    for n, target in enumerate(targets.tolist()):
        lists = [order[n] for order in orders]
        tokens = list(dict.fromkeys([target, *(token for tokens in lists for token in tokens)]))
        place = {token: index for index, token in enumerate(tokens)}
        player_order, *critic_orders = [[place[token] for token in tokens] for tokens in lists]
        at, policy = torch.tensor(tokens, device=player.device), log_policy[n].exp()
        answers.append(
            {
                "tokens": tokens,
                "playerOrder": player_order,
                "criticOrders": critic_orders,
                "logPolicy": log_policy[n, at].tolist(),
                "logCritics": [logs[n, at].tolist() for logs in log_critics],
                "logRests": [logs[n].index_fill(0, at, -torch.inf).logsumexp(0).item() for logs in log_critics],
                "bestMixture": mixture[n].max().item() if critics else 0.0,
                "logTempered": None if config.temperature == 1 else log_tempered[n, at].tolist(),
                "entropy": -(log_tempered[n].exp() @ log_tempered[n]).item(),
                "agreement": [(policy @ logs[n].exp()).item() for logs in log_critics],
            }
        )
    return answers


def shown_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text that a person can tell from others: white space visible, bytes that are no character as hex.

    It is what the token adds to a text that it stands in: at the beginning of one, a tokenizer may leave out its space.
    """
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    alone, twice = (tokenizer.decode([token] * count, clean_up_tokenization_spaces=False) for count in (1, 2))
    text = (twice[len(alone) :] if twice.startswith(alone) else "") or alone
    if token in tokenizer.all_special_ids:
        text = piece
    elif BYTE_FALLBACK.fullmatch(piece) and alone != piece:
        is_own = alone in WHITE_SPACE_BYTES and tokenizer.convert_tokens_to_ids(alone) in (None, tokenizer.unk_token_id)
        text = alone if is_own else f"\\x{piece[3:5].lower()}"  # "A" is another token than <0x41>
    elif "\ufffd" in alone and all(character in BYTES for character in piece):
        text = "".join(f"\\x{BYTES[character]:02x}" for character in piece)
    return visible(text.translate(WHITE_SPACE)) or "∅"
