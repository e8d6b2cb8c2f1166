"""The payout table of a text against the objective's own functions on the models' own logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from avatarl import AvataRLConfig, UserError, avatarl_loss, reward_landscape
from avatarl.cli import main
from avatarl.data.tokenizer import end_of_text_id, open_tokenizer
from avatarl.models import load_model
from avatarl.models.critics import LiveCritic
from avatarl.results.inspector import Inspector, shown_token, thresholds
from avatarl.results.payouts import SUMMARY

from ..conftest import BLOCK, save_model
from ..tokenizers_of_kinds import KINDS, save_tokenizer

TEXT = "quick fox old oak\nblue sea, wise owl"
CONFIG = AvataRLConfig.article(top_k=5, threshold="none", entropy_coef=0.3)


def logits_of(folder: Path, inputs: Tensor) -> Tensor:
    """The logits as any user of transformers has them."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(inputs).logits[0].double()


def ids_of(tokenizer, text: str) -> list[int]:
    return [end_of_text_id(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.fixture(scope="module")
def inspector(player_folder: Path, critic_folder: Path) -> Inspector:
    return Inspector.open(player_folder, [str(critic_folder)], CONFIG, device="cpu")


# --- against the objective ------------------------------------------------------------------------------------------


def test_every_number_is_the_objectives(inspector, player_folder, critic_folder, tokenizer):
    ids = ids_of(tokenizer, TEXT)
    assert len(ids) <= BLOCK
    inputs, targets = torch.tensor([ids[:-1]]), torch.tensor(ids[1:])
    player, critic = (logits_of(folder, inputs) for folder in (player_folder, critic_folder))
    landscape = reward_landscape(player, critic, targets, CONFIG)
    player.requires_grad_()
    log_pi = player.log_softmax(-1)
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    loss = -(landscape.rewards * log_pi.gather(1, landscape.actions)).sum() - CONFIG.entropy_coef * entropy.sum()
    (gradient,) = torch.autograd.grad(loss, player)

    inspection = inspector.inspect(TEXT)
    assert [position.token for position in inspection.positions] == ids[1:]
    assert "".join(position.text for position in inspection.positions) == TEXT.replace(" ", "␣").replace("\n", "⏎")
    for number, position in enumerate(inspection.positions):
        valid = landscape.valid[number]
        tokens = landscape.actions[number, valid]
        assert [action.token for action in position.actions] == tokens.tolist()
        expected = {
            "reality": landscape.reality[number, valid],
            "consensus": landscape.consensus[number, valid],
            "reward": landscape.rewards[number, valid],
            "policy": log_pi[number, tokens].exp(),
            "gradient": gradient[number, tokens],
        }
        for field, values in expected.items():
            found = [getattr(action, field) for action in position.actions]
            assert found == pytest.approx(values.tolist(), rel=1e-5, abs=1e-7), field
        critic_probs = [action.critic for action in position.actions]
        assert critic_probs == [(pytest.approx(p, rel=1e-4),) for p in landscape.critic[number, valid].tolist()]
        rewards, policy = landscape.rewards[number], log_pi[number].exp()
        earned = (rewards * policy[landscape.actions[number]]).sum().item()
        assert position.expected_reward == pytest.approx(earned, rel=1e-5)
        assert position.expected_reward_share == pytest.approx(earned / rewards.max().item(), rel=1e-5)
        assert position.other_reward_share == pytest.approx(1 - (rewards[0] / rewards.sum()).item(), rel=1e-5)
        assert position.cross_entropy == pytest.approx(-log_pi[number, targets[number]].item(), rel=1e-5)
        assert position.entropy == pytest.approx(entropy[number].item(), rel=1e-5)
        log_critic = critic[number].log_softmax(-1)
        assert position.disagreement == pytest.approx((log_critic.max() - log_critic[targets[number]]).item(), abs=1e-5)


def test_the_summary_is_what_the_loss_reports(inspector, player_folder, critic_folder, tokenizer):
    ids = ids_of(tokenizer, TEXT)
    inputs, targets = torch.tensor([ids[:-1]]), torch.tensor(ids[1:])
    player, critic = (logits_of(folder, inputs) for folder in (player_folder, critic_folder))
    _, metrics = avatarl_loss(player, critic, targets, CONFIG)
    summary = inspector.inspect(TEXT).summary
    assert summary == pytest.approx({name: value.item() for name, value in metrics.items()}, rel=1e-5, abs=1e-7)
    assert SUMMARY.keys() <= summary.keys()


def test_a_long_text_is_read_in_windows(inspector, player_folder, tokenizer):
    text = " ".join([TEXT] * 4)
    ids = ids_of(tokenizer, text)
    found = [position.cross_entropy for position in inspector.inspect(text).positions]
    assert len(ids) > 2 * BLOCK and len(found) == len(ids) - 1
    for start in range(0, len(ids) - 1, BLOCK):
        window = torch.tensor(ids[start : start + BLOCK + 1])
        log_pi = logits_of(player_folder, window[None, :-1]).log_softmax(-1)
        expected = -log_pi.gather(1, window[1:, None])[:, 0]
        assert found[start : start + BLOCK] == pytest.approx(expected.tolist(), rel=1e-5)


def test_windows_that_end_with_the_text(inspector, tokenizer):
    ids = ids_of(tokenizer, " ".join([TEXT] * 4))[: 2 * BLOCK + 1]
    assert len(inspector.inspect_ids(ids).positions) == 2 * BLOCK


def test_so_much_is_kept_that_settings_can_be_changed(player_folder, critic_folder):
    for top_k, kept in ((4, 32), (40, 40)):
        config = AvataRLConfig.article(top_k=top_k)
        inspection = Inspector.open(player_folder, [str(critic_folder)], config, device="cpu").inspect(TEXT)
        for position, answers in zip(inspection.positions, inspection.answers, strict=True):
            assert len(answers["playerOrder"]) == len(answers["criticOrders"][0]) == kept
            assert len(set(answers["tokens"])) == len(answers["tokens"]) and answers["tokens"][0] == position.token
            assert {action.token for action in position.actions} <= set(answers["tokens"]) <= inspection.texts.keys()


def test_tokens_given_by_id_are_judged_as_the_texts_are(inspector, tokenizer):
    assert inspector.inspect_ids(ids_of(tokenizer, TEXT)).as_dict() == inspector.inspect(TEXT).as_dict()
    alone = inspector.inspect_ids(ids_of(tokenizer, TEXT)[3:5])
    assert [position.token for position in alone.positions] == ids_of(tokenizer, TEXT)[4:5]


def test_several_critics_speak_with_their_numbers(player_folder, critic_folder, second_critic, tokenizer):
    config = AvataRLConfig.article(top_k=5, critic_weight=(0.2, 0.1))
    names = [str(critic_folder), str(second_critic)]
    inspection = Inspector.open(player_folder, names, config, device="cpu").inspect(TEXT)
    assert inspection.critics == tuple(names)
    ids = ids_of(tokenizer, TEXT)
    lists = {
        voice: logits_of(folder, torch.tensor([ids[:-1]])).topk(5).indices.tolist()
        for voice, folder in {"player": player_folder, "critic 1": critic_folder, "critic 2": second_critic}.items()
    }
    for number, position in enumerate(inspection.positions):
        for action in position.actions:
            expected = [voice for voice, tokens in lists.items() if action.token in tokens[number]]
            if action.token == ids[number + 1]:
                expected = ["text", *expected]
            assert list(action.proposed_by) == expected
            assert len(action.critic) == 2


def test_top_p_cuts_what_is_said_to_be_proposed(player_folder, critic_folder):
    config = AvataRLConfig.article(top_k=8, top_p=0.01)  # the shortest prefix is one token
    inspection = Inspector.open(player_folder, [str(critic_folder)], config, device="cpu").inspect(TEXT)
    for position in inspection.positions:
        assert 1 <= len(position.actions) <= 3
        voices = [voice for action in position.actions for voice in action.proposed_by]
        assert sorted(voices) == ["critic", "player", "text"]


def test_what_top_p_cuts_off_does_not_propose_the_texts_token(inspector, player_folder, critic_folder, tokenizer):
    first = ids_of(tokenizer, TEXT)[0]
    (answers,) = inspector.inspect_ids([first, 0]).answers
    second = answers["tokens"][answers["playerOrder"][1]]
    config = AvataRLConfig.article(top_k=8, top_p=0.01)  # the shortest prefix is one token
    (position,) = (
        Inspector.open(player_folder, [str(critic_folder)], config, "cpu").inspect_ids([first, second]).positions
    )
    assert "player" not in position.actions[0].proposed_by


def test_a_player_that_proposes_nothing_is_not_said_to(player_folder, critic_folder):
    config = AvataRLConfig.article(top_k=8, player_proposes=False)
    inspection = Inspector.open(player_folder, [str(critic_folder)], config, device="cpu").inspect(TEXT)
    for position in inspection.positions:
        assert len(position.actions) <= 1 + 8
        voices = [voice for action in position.actions for voice in action.proposed_by]
        assert sorted(voices) == ["critic"] * 8 + ["text"]
    alone = AvataRLConfig(reality_weight=1.0, critic_weight=0.0, player_proposes=False)
    for position in Inspector.open(player_folder, [], alone, device="cpu").inspect(TEXT).positions:
        assert [action.proposed_by for action in position.actions] == [("text",)]


@pytest.mark.parametrize("threshold", ["mean", "mass"])
def test_the_threshold_divides_the_paid_from_the_others(player_folder, critic_folder, threshold: str):
    config = AvataRLConfig.article(top_k=4, threshold=threshold, smoothing=0.5)
    inspection = Inspector.open(player_folder, [str(critic_folder)], config, device="cpu").inspect(TEXT)
    kinds = set()
    for position in inspection.positions:
        if threshold == "mean":
            assert position.threshold == 1 / len(position.actions)
        for action in position.actions:
            kinds.add(action.reward > 0)
            assert (action.consensus > position.threshold) == (action.reward > 0)
    assert kinds == {True, False}


def test_the_mass_of_the_blend_is_that_of_the_words(player_folder, critic_folder):
    """threshold = S/n, S = Σ p_R^w_R · p_C^w_C on the active actions."""
    config = AvataRLConfig.released(top_k=4)
    inspection = Inspector.open(player_folder, [str(critic_folder)], config, device="cpu").inspect(TEXT)
    for position in inspection.positions:
        mass = sum(action.reality**0.7 * action.critic[0] ** 0.3 for action in position.actions)
        assert position.threshold == pytest.approx(mass / len(position.actions))


def test_without_an_expert_the_mass_is_that_of_the_others():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = AvataRLConfig.released(top_k=2, smoothing=0.0, reality_weight=0.0, critic_weight=1.0)
    landscape = reward_landscape(logits, [logits], torch.tensor([1, 2, 3]), config)
    mass = torch.where(landscape.valid, landscape.critic[0], 0.0).sum(1)
    assert thresholds(landscape, config) == pytest.approx((mass / landscape.valid.sum(1)).tolist())


def test_a_sampled_tail_is_shown_by_its_expectation(player_folder, critic_folder):
    tail = dict(top_k=4, pool="arithmetic", threshold="none")
    sampled, dense = (
        Inspector.open(player_folder, [str(critic_folder)], AvataRLConfig(tail=rule, **tail), device="cpu")
        for rule in ("sample", "dense")
    )
    assert sampled.inspect(TEXT).as_dict() == dense.inspect(TEXT).as_dict()


def test_no_critic_where_the_text_alone_pays(player_folder):
    config = AvataRLConfig.article(top_k=4, reality_weight=1.0, critic_weight=0.0)
    inspection = Inspector.open(player_folder, [], config, device="cpu").inspect(TEXT)
    assert inspection.critics == () and inspection.disagreements(5) == []
    assert all(action.critic == () for position in inspection.positions for action in position.actions)
    assert all(position.disagreement is None for position in inspection.positions)


def test_disagreements_are_the_worst_first(inspector):
    inspection = inspector.inspect(TEXT)
    places = inspection.disagreements(4)
    found = [inspection.positions[place].disagreement for place in places]
    assert found == sorted((p.disagreement for p in inspection.positions), reverse=True)[:4]


@pytest.mark.parametrize("pass_with_nan", [0, 1])
def test_nan_is_refused(pass_with_nan, inspector, monkeypatch):
    real, passes = inspector._logits, iter(range(2))
    monkeypatch.setattr(
        inspector, "_logits", lambda *given: real(*given) + (torch.nan if next(passes) == pass_with_nan else 0)
    )
    with pytest.raises(UserError, match=f"{inspector.names[pass_with_nan]}: its logits are NaN or infinite"):
        inspector.inspect(TEXT)


# --- what a run was trained with ------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, player_folder: Path, tiny_config) -> Path:
    """A run folder with a player and settings of its own."""
    config = tiny_config(tmp_path, avatarl=AvataRLConfig(top_k=3, critic_weight=0.4, reality_weight=0.6))
    shutil.copytree(player_folder, tmp_path / "run" / "player")
    (tmp_path / "run" / "config.yaml").write_text(config.as_yaml())
    return tmp_path / "run"


def test_a_run_brings_its_critic_and_settings(run: Path, critic_folder):
    inspection = Inspector.open(run, device="cpu").inspect(TEXT)
    assert inspection.critics == (str(critic_folder),)
    assert (inspection.config.top_k, inspection.config.critic_weight) == (3, 0.4)


def test_what_is_given_takes_the_place_of_what_the_run_had(run: Path, second_critic):
    inspection = Inspector.open(run, [str(second_critic)], AvataRLConfig(top_k=2), device="cpu").inspect(TEXT)
    assert inspection.critics == (str(second_critic),) and inspection.config.top_k == 2


def test_the_command_changes_single_settings_of_the_run(run: Path, tmp_path: Path, capsys):
    command = ["inspect", "--player", str(run), "--text", TEXT, "--avatarl.smoothing", "0.2"]
    assert main([*command, "--out", str(tmp_path / "out.json")]) == 0
    config = json.loads((tmp_path / "out.json").read_text())["config"]
    assert (config["smoothing"], config["top_k"], config["critic_weight"]) == (0.2, 3, 0.4)
    assert capsys.readouterr().out.strip() == str(tmp_path / "out.json")


def test_settings_of_a_recipe_reach_the_page(run: Path, tmp_path: Path):
    assert main(["inspect", "--player", str(run), "--text", TEXT, "--out", str(tmp_path / "out.html")]) == 0
    page = (tmp_path / "out.html").read_text()
    assert '"top_k":3' in page and '"tail":"renormalise"' in page


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("critics", "message"),
    [
        (["ema:0.9:5"], "critic ema:0.9:5 has no answers for other text; give a run, a model folder or a hub id"),
        ([], "critic is not given, and .* was not trained with one; give a critic"),
    ],
)
def test_a_critic_that_is_none(player_folder, critics, message):
    with pytest.raises(UserError, match=message):
        Inspector.open(player_folder, critics, device="cpu")


def test_a_cache_is_no_critic_of_any_text(player_folder, critic_cache):
    with pytest.raises(UserError, match="has no answers for other text"):
        Inspector.open(player_folder, [str(critic_cache)], device="cpu")


@pytest.mark.parametrize(
    "content", ["objective: avatarl\n", "[1]\n", "critic: 5\navatarl: {topk: 3}\n", "critic: x\navatarl: {top_k: -1}\n"]
)
def test_a_config_that_no_run_writes(run: Path, content: str):
    (run / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="config.yaml|top_k is -1"):
        Inspector.open(run, device="cpu")


def test_text_without_a_token_and_text_without_end(inspector, monkeypatch):
    with pytest.raises(UserError, match="text has no token to look at"):
        inspector.inspect("")
    monkeypatch.setattr("avatarl.results.inspector.MOST_TOKENS", 5)
    with pytest.raises(
        UserError, match=r"text has \d+ tokens; expected at most 5, which its first \d+ characters have"
    ):
        inspector.inspect(TEXT)


def test_a_player_that_is_none_is_not_blamed_on_the_critic(run: Path):
    with pytest.raises(UserError, match="no such folder"):
        Inspector.open(run / "player" / "nowhere", device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"either text or file (- is standard input)"),
        (["--text", "a", "--file", "b"], "either text or file"),
        (["--file", "nowhere.txt"], "file nowhere.txt cannot be read"),
        (["--text", "a", "--out", "x.txt"], "expected a name that ends in .html or .json"),
        (["--text", "a", "--out", "x.json", "--position", "0"], "position is 0, and out has every position"),
        (["--text", "a", "--position", "77"], "position is 77; expected 0 to 0"),
    ],
)
def test_mistakes_of_the_command_are_one_line(run: Path, arguments, message, capsys):
    assert main(["inspect", "--player", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_last_of_two_players_brings_its_settings(run: Path, player_folder, critic_folder, capsys):
    critic = ["--critic", str(critic_folder), "--text", TEXT, "--position", "1"]
    assert main(["inspect", "--player", str(run), "--player", str(player_folder), *critic]) == 0
    twice = capsys.readouterr().out
    assert main(["inspect", "--player", str(player_folder), *critic]) == 0
    assert capsys.readouterr().out == twice


def test_tokens_of_a_long_context_are_judged_all_the_same(inspector, tokenizer, monkeypatch):
    monkeypatch.setattr("avatarl.results.inspector.MOST_TOKENS", 5)
    ids = ids_of(tokenizer, TEXT)
    assert len(inspector.inspect_ids(ids).positions) == len(ids) - 1 > 5


def test_text_from_a_file(run: Path, tmp_path: Path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    for source in (["--text", TEXT], ["--file", str(tmp_path / "text.txt")]):
        assert main(["inspect", "--player", str(run), *source]) == 0
    first, second = capsys.readouterr().out.split("player ")[1:]
    assert first == second


# --- tokens as text -------------------------------------------------------------------------------------------------


def test_white_space_and_bytes_are_visible(tokenizer):
    shown = {
        text: shown_token(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"][0]) for text in " \n\té"
    }
    assert shown == {" ": "␣", "\n": "⏎", "\t": "⇥", "é": "\\xc3"}
    assert shown_token(tokenizer, end_of_text_id(tokenizer)) == "<|endoftext|>"


def test_tokens_are_shown_as_they_stand_in_a_text(tmp_path: Path):
    """SentencePiece's have their space, and its bytes are bytes, but for white space that has no other token."""
    tokenizer = open_tokenizer(save_tokenizer("SentencePiece", tmp_path))
    pieces = {
        "▁": "␣", "▁The": "␣The", "he": "he", "o": "o", "<0x6F>": "\\x6f", "<0xE9>": "\\xe9",
        "<0x20>": "\\x20", "<0x0D>": "␍", "<0x00>": "\\x00", "</s>": "</s>", "<unk>": "<unk>",
    }  # fmt: skip
    assert {piece: shown_token(tokenizer, tokenizer.convert_tokens_to_ids(piece)) for piece in pieces} == pieces
    words = open_tokenizer(save_tokenizer("WordPiece", tmp_path / "words"))
    shown = [shown_token(words, token) for token in words("rain, windwind", add_special_tokens=False)["input_ids"]]
    assert "".join(shown) == "␣rain,␣windwind"


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_can_be_told_from_the_others(kind: str, tmp_path: Path):
    tokenizer = open_tokenizer(save_tokenizer(kind, tmp_path))
    assert len({shown_token(tokenizer, token) for token in range(len(tokenizer))}) == len(tokenizer)


def test_texts_of_another_tokenizer_have_their_spaces(tmp_path: Path):
    """In the positions and their candidates, as terminal, page and JSON have them."""
    tokenizer = open_tokenizer(save_tokenizer("SentencePiece", tmp_path))
    player = load_model(save_model(tmp_path / "player", tokenizer, seed=5, factor=15), torch.float32, "cpu")
    inspection = Inspector(player, [LiveCritic("critic", player)], tokenizer, CONFIG, ["player", "critic"]).inspect(
        "to the door 龍"
    )
    texts = [position["text"] for position in inspection.as_dict()["positions"]]
    assert "".join(texts) == "␣to␣the␣door␣\\xe9\\xbe\\x8d"
    assert texts == [inspection.texts[position.token] for position in inspection.positions]


def test_characters_that_a_terminal_obeys_are_shown(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "decode", lambda *_, **__: "a\x1b[2J\u202eb")
    assert shown_token(tokenizer, 5) == "a\\x1b[2J\\u202eb"
