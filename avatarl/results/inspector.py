"""What every candidate of every position of a text is paid, and why: the reward landscape with names on it.

A text is read as training reads it: cut into windows of the context's length, the first of which begins with the
end-of-text token. Everything is computed in float64 from logits in float32.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from avatarl.data.tokenizer import encode_texts, encode_with_bytes, end_of_text_id
from avatarl.device import pick_device
from avatarl.errors import UserError
from avatarl.models import Critic, load_model, load_tokenizer, open_critic
from avatarl.models.critics import CriticInputs, kind_of_critic
from avatarl.models.loading import check_rows, head_weight, last_hidden, resolve_model
from avatarl.objective import AvataRL, AvataRLConfig, HiddenAnswers, LiveAnswers, RewardLandscape, reward_landscape
from avatarl.objective.objectives import LossInputs
from avatarl.places import CONFIG, require_found
from avatarl.sanitise import visible
from avatarl.untrusted import read_regular_file, refusing

from .evaluate import context_length
from .runs import read_settings

MOST_TOKENS = 2048  # of a text: a page of so many positions has three megabytes
LARGEST_TEXT_BYTES = 1 << 20
KEPT_PROPOSALS = 32  # of each model, for who changes settings where there is no model any more
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
    """One token of the text, and what was said and paid where it stands."""

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


class Answers(NamedTuple):
    """What a position's landscape is computed from: what each model says of its own proposals and of the others'."""

    tokens: list[int]  # U of them: the text's, then all that any model proposes
    player_order: list[int]  # places in ``tokens`` of the player's proposals, the likeliest first
    critic_orders: list[list[int]]
    log_policy: list[float]  # log π (U)
    log_critics: list[list[float]]  # log p_C over the whole vocabulary, (C, U)
    log_rests: list[float]  # log of what p_C leaves to tokens that are not in ``tokens`` (C)
    best_mixture: float  # the most that the critics together, in proportion to their weights, give to any token
    log_tempered: list[float] | None  # log π at the loss's temperature (U); None where that is 1
    entropy: float  # of the policy at the loss's temperature, nats
    agreement: list[float]  # Σ π p_C over the whole vocabulary (C)


@dataclass(frozen=True)
class Inspection:
    """A text, judged."""

    player: str
    critics: tuple[str, ...]
    config: AvataRLConfig
    positions: tuple[Position, ...]
    summary: dict[str, float]  # means over the positions, in the words of docs/metrics.md
    answers: tuple[Answers, ...]  # of each position
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
            player: The model whose policy is looked at, in eval mode.
            critics: The critics.
            tokenizer: Of all of them.
            config: The settings. Of a sampled tail its expectation is shown, ``dense``.
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
        self.block_size = min([context_length(player), *(critic.longest for critic in critics if critic.longest)])

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
        resolve_model(player)  # a name that is none is not to be blamed on the critic
        chosen, (config, critics) = pick_device(device), settings_and_critics(player, critics, config)
        tokenizer = load_tokenizer(player)
        opened = load_model(player, torch.float32, chosen)
        check_rows(opened, tokenizer, str(player))
        opened_critics = [open_critic(name, tokenizer, device=chosen) for name in critics]
        return cls(opened, opened_critics, tokenizer, config, [str(player), *map(str, critics)])

    def inspect(self, text: str) -> Inspection:
        """Judge a text; its first token too where the tokenizer has an end-of-text token to read before it.

        Raises:
            UserError: It has no token to judge, or too many.
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
        """Judge every token of ``ids`` but the first, which is only read.

        Raises:
            UserError: There are fewer than two.
        """
        if len(ids) < 2:
            raise UserError("text has no token to judge; give some text")
        windows = [self._judge(window) for window in self._windows(ids)]
        positions, answers, metrics = (sum(parts, []) for parts in zip(*windows, strict=True))
        summary = {name: math.fsum(line[name] for line in metrics) / len(metrics) for name in metrics[0]}
        tokens = dict.fromkeys(token for of_position in answers for token in of_position.tokens)
        texts = {token: self.shown(token) for token in tokens}
        return Inspection(self.names[0], self.names[1:], self.config, tuple(positions), summary, tuple(answers), texts)

    def _windows(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Windows of at most ``block_size`` + 1 tokens, each beginning with the last one of the window before."""
        for start in range(0, len(ids) - 1, self.block_size):
            yield torch.tensor(ids[start : start + self.block_size + 1], device=self.player.device)

    @torch.no_grad()
    def _judge(self, window: Tensor) -> tuple[list[Position], list[Answers], list[dict[str, float]]]:
        """Every position of a window (T + 1,), what its landscape is computed from, and its metrics."""
        inputs, targets, config = window[None, :-1], window[1:], self.config
        hidden = HiddenAnswers(last_hidden(self.player, inputs), head_weight(self.player))
        of_critics = [critic.answers(CriticInputs(inputs)) for critic in self.critics]
        player, *critics = answers = [self._logits(each) for each in (hidden, *of_critics)]
        for name, logits in zip(self.names, answers, strict=True):
            if not logits.amax().isfinite():
                raise UserError(f"{name}: its logits are NaN or infinite, of which there is no softmax")
        landscape = reward_landscape(player, critics, targets, config)
        live = [LiveAnswers(logits) for logits in critics]
        loss_inputs = LossInputs(player.clone(), live, targets, weights=torch.ones_like(player[:, 0]))
        loss = AvataRL(config).loss_and_gradient(loss_inputs, with_gradient=True)
        metrics = _rows(**loss.metrics)
        numbers = _rows(
            actions=landscape.actions,
            valid=landscape.valid,
            policy=player.log_softmax(-1).gather(1, landscape.actions).exp(),
            reality=landscape.reality,
            critic=landscape.critic.permute(1, 2, 0) if critics else torch.empty(*landscape.actions.shape, 0),
            consensus=landscape.consensus,
            rewards=landscape.rewards,
            gradient=loss.gradient.gather(1, landscape.actions),
        )
        voices = ["critic"] if len(critics) == 1 else [f"critic {i + 1}" for i in range(len(critics))]
        proposing = dict(zip(voices, critics, strict=True))
        if config.player_proposes:
            proposing = {"player": player, **proposing}
        lists = {
            voice: LiveAnswers(logits).proposals(config.top_k, config.top_p) for voice, logits in proposing.items()
        }
        tokens_of = {voice: tokens.masked_fill(~kept, -1) for voice, (tokens, kept) in lists.items()}
        proposers = _rows(**tokens_of) if tokens_of else [{}] * len(targets)
        positions = [
            self._position(*of_position)
            for of_position in zip(
                numbers, proposers, metrics, thresholds(landscape, config), disagreements(critics, targets), strict=True
            )
        ]
        return positions, answers_of(player, critics, targets, config), metrics

    def _logits(self, answers: HiddenAnswers) -> Tensor:
        """Logits (T, V) in float64 of one window (1, T), without the rows that no token belongs to."""
        return (answers.states[0] @ answers.weight[: len(self.tokenizer)].t()).double()

    def _position(
        self,
        numbers: dict[str, list],
        proposed: dict[str, list[int]],
        metrics: dict[str, float],
        threshold: float | None,
        disagreement: float | None,
    ) -> Position:
        """One row of the landscape with names on it."""
        actions = [
            Action(
                token=token,
                text=self.shown(token),
                proposed_by=(
                    *(["text"] if place == 0 else []),
                    *(who for who, listed in proposed.items() if token in listed),
                ),
                policy=numbers["policy"][place],
                reality=numbers["reality"][place],
                critic=tuple(numbers["critic"][place]),
                consensus=numbers["consensus"][place],
                reward=numbers["rewards"][place],
                gradient=numbers["gradient"][place],
            )
            for place, (token, is_valid) in enumerate(zip(numbers["actions"], numbers["valid"], strict=True))
            if is_valid
        ]
        of_position = ("cross_entropy", "entropy", "expected_reward", "expected_reward_share", "other_reward_share")
        return Position(
            token=actions[0].token,
            text=actions[0].text,
            actions=tuple(actions),
            threshold=threshold,
            disagreement=disagreement,
            **{name: metrics[name] for name in of_position},
        )


def settings_and_critics(
    player: str | Path, critics: Sequence[str] | None = None, config: AvataRLConfig | None = None
) -> tuple[AvataRLConfig, list[str]]:
    """Those that are given; where None, those that the player was trained with.

    Raises:
        UserError: There is no critic, or one that cannot be asked about other text than it was trained beside.
    """
    own_config, own_critics = trained_with(player)
    if critics is None and own_critics:
        require_found(Path(player) / CONFIG, {"critic": own_critics})
    config, critics = config or own_config, list(own_critics if critics is None else critics)
    if config.needs_critic and not critics:
        raise UserError(f"critic is not given, and {player} is no run that was trained with one; give a critic")
    for name in critics:
        if kind_of_critic(name) in ("average", "cache"):
            raise UserError(f"critic {name} cannot be asked about any text; give a run, a model folder or a hub id")
    return config, critics


def trained_with(player: str | Path) -> tuple[AvataRLConfig, list[str]]:
    """Settings and critics that a run was trained with; the article's and none for a model that is no run.

    Raises:
        UserError: Its config.yaml is not what a run writes.
    """
    if not os.path.isfile(Path(player) / CONFIG):
        return AvataRLConfig.article(), []
    settings = read_settings(player)
    with refusing(f"{player}: config.yaml is not what a run writes (", ")"):
        critic = settings["critic"] or []
        return AvataRLConfig(**settings["avatarl"]), [critic] if isinstance(critic, str) else list(map(str, critic))


def read_text(text: str | None, file: str | Path | None) -> str:
    """The text to look at: given itself, or in a UTF-8 file, ``-`` being standard input.

    Raises:
        UserError: Both or neither are given, or the file cannot be read.
    """
    if (text is None) == (file is None):
        raise UserError("expected the text to look at: either text or file (- is standard input)")
    if text is not None:
        return text
    try:
        if str(file) == "-":
            return sys.stdin.buffer.read(LARGEST_TEXT_BYTES).decode("utf-8")
        return read_regular_file(Path(file), LARGEST_TEXT_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"file {file} cannot be read as UTF-8 text ({error})") from error


def thresholds(landscape: RewardLandscape, config: AvataRLConfig) -> list[float | None]:
    """The consensus that earns nothing yet, at each position: 1/n, S/n, or None without a threshold."""
    num_active = landscape.valid.sum(1).double()
    if config.threshold == "none":
        return [None] * len(num_active)
    if config.threshold == "mean":
        return (1 / num_active).tolist()
    # S, the mass of the blend before it is normalised; an expert of weight 0 says nothing.
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


def answers_of(player: Tensor, critics: Sequence[Tensor], targets: Tensor, config: AvataRLConfig) -> list[Answers]:
    """What is to be kept of logits (N, V), so that landscapes of other settings can be computed from it."""
    kept = min(max(config.top_k, KEPT_PROPOSALS), player.shape[1])
    orders = [LiveAnswers(logits).proposals(kept, None)[0].tolist() for logits in (player, *critics)]
    log_policy, log_tempered = player.log_softmax(-1), (player / config.temperature).log_softmax(-1)
    log_critics = [logits.log_softmax(-1) for logits in critics]
    entropy = -torch.linalg.vecdot(log_tempered.exp(), log_tempered)
    agreement = [torch.linalg.vecdot(log_policy.exp(), log_probs.exp()) for log_probs in log_critics]
    weights = config.critic_weights(len(critics))
    shares = [weight / sum(weights) if sum(weights) else 1 / len(weights) for weight in weights]
    mixture = sum(share * log_probs.exp() for share, log_probs in zip(shares, log_critics, strict=True))
    best = mixture.amax(1).tolist() if critics else [0.0] * len(targets)
    answers = []
    for number, target in enumerate(targets.tolist()):
        lists = [order[number] for order in orders]
        tokens = list(dict.fromkeys([target, *(token for tokens in lists for token in tokens)]))
        place = {token: index for index, token in enumerate(tokens)}
        player_order, *critic_orders = [[place[token] for token in tokens] for tokens in lists]
        at = torch.tensor(tokens, device=player.device)
        answers.append(
            Answers(
                tokens,
                player_order,
                critic_orders,
                log_policy[number, at].tolist(),
                [log_probs[number, at].tolist() for log_probs in log_critics],
                [log_probs[number].index_fill(0, at, -torch.inf).logsumexp(0).item() for log_probs in log_critics],
                best[number],
                None if config.temperature == 1 else log_tempered[number, at].tolist(),
                entropy[number].item(),
                [overlap[number].item() for overlap in agreement],
            )
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


def _rows(**columns: Tensor) -> list[dict[str, Any]]:
    """Tensors (N, …) as N dictionaries of numbers and lists."""
    rows = zip(*(tensor.tolist() for tensor in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]
