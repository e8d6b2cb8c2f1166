"""Behind the page of `avatarl play`: what players write, the rewards of each token; all that is shown is text."""

from __future__ import annotations

import dataclasses
import re
import socket
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from avatarl import AvataRLConfig, UserError
from avatarl.cli import main
from avatarl.data import PreparedData
from avatarl.data.prepare import prepare
from avatarl.device import pick_device
from avatarl.models import build_player
from avatarl.results import play
from avatarl.results.continuation import Continuation, Side, open_all
from avatarl.results.generate import LONGEST_PROMPT, Sampling, continue_ids, prompt_ids
from avatarl.results.inspector import Inspector, shown_token
from avatarl.results.players import open_player
from avatarl.training import OptimConfig, train

from ..conftest import BLOCK, TINY_PLAYER, write_documents

gradio = pytest.importorskip("gradio", reason="gradio is not installed (extra app)")

from starlette.testclient import TestClient  # noqa: E402

from avatarl.results import app as page  # noqa: E402
from avatarl.results.door import LARGEST_BODY_BYTES  # noqa: E402

PROMPT, COUNT, SEED = "quick fox", 6, 3
HOSTILE = "<img src=x onerror=alert(1)>&{{7*7}}${7*7}</script>\u202e"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_config) -> str:
    """A run of eight steps, with checkpoints after the fourth and the last."""
    folder = tmp_path_factory.mktemp("played")
    fast = OptimConfig(learning_rate=0.1, warmup_steps=1)  # so that each checkpoint says something else
    train(tiny_config(folder, optim=fast), quiet=True)
    return str(folder / "run")


@pytest.fixture(scope="module")
def side(run: str) -> Side:
    return Side(run, pick_device("cpu"))


@pytest.fixture(scope="module")
def rewards(side: Side) -> Inspector:
    return open_all([side.run], None, side.device)[1]


def generate(sides: list[Side], rewards: Inspector | None, *choices: str, prompt: str = PROMPT) -> list:
    return page.generate_on_page(sides, rewards, prompt, 1.5, COUNT, SEED, *choices)


def texts_of(model: Path, prompt: str) -> list[str]:
    """The tokens that `avatarl generate` draws, from the ids below it."""
    opened = open_player(model, "cpu")
    read = prompt_ids(opened.tokenizer, prompt)
    sampling = Sampling(max_new_tokens=COUNT, temperature=1.5, seed=SEED)
    (ids,) = continue_ids(opened, read, sampling)
    return [shown_token(opened.tokenizer, token) for token in ids[len(read) :]]


def click(found: Continuation, place: int) -> str:
    return page.candidates_of_click(found, gradio.EventData(None, {"place": place}))


def text_of(html: str) -> str:
    return page.Markup(html).striptags()


def table_of(html: str) -> dict[int, dict[str, float]]:
    """The numbers of a table of candidates, by token and column; those of several critics in a list."""
    rows = re.findall(r'<tr data-token="(\d+)".*?</tr>', html, re.DOTALL)
    cells = [re.findall(r'<td class="(\w+)" data-value="([^"]+)"', row) for row in html.split("<tr data-token=")[1:]]
    return {int(row): {name: float(value) for name, value in of} for row, of in zip(rows, cells, strict=True)}


# --- what players write --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "model"), [("best", "player"), ("final", "final"), ("step 8", "final")])
def test_a_player_says_what_generate_does(side, run, choice: str, model: str):
    _, found, _ = generate([side], None, choice)
    assert found.texts == texts_of(Path(run) / model, PROMPT)
    assert found.player == f"{run}, {choice}"


def test_checkpoints_differ_and_leave_nothing(side, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    texts = {choice: generate([side], None, choice)[1].texts for choice in ("step 4", "step 8")}
    assert texts["step 4"] != texts["step 8"]
    assert generate([side], None, "step 4")[1].texts == texts["step 4"]
    assert list(tmp_path.iterdir()) == []


def test_two_sides_stand_in_their_order(side, player_folder, rewards):
    other = Side(str(player_folder), pick_device("cpu"))
    assert other.choices == ["model"]
    first, second, found_first, found_second, below = generate([side, other], rewards, "best", "model")
    assert found_first.texts != found_second.texts
    for html, found in ((first, found_first), (second, found_second)):
        assert text_of(html) == text_of(f"{PROMPT}{''.join(found.texts)}").replace("␣", " ")
        assert html.count("<button") == len(found.texts) == html.count("aria-pressed")
    assert below == page.HINT


def test_an_empty_prompt_begins_a_document(side, run, rewards):
    _, found, _ = generate([side], rewards, "final", prompt="")
    assert found.texts == texts_of(Path(run) / "final", "")
    assert len(found.positions) == len(found.texts)


# --- rewards --------------------------------------------------------------------------------------------------------


def test_every_token_has_the_inspectors_rewards(side, run, rewards, critic_folder, tokenizer):
    html, found, _ = generate([side], rewards, "best")
    inspector = Inspector.open(run, device="cpu")
    assert inspector.config == rewards.config and inspector.names[1:] == rewards.names[1:] == (str(critic_folder),)
    ids = [*tokenizer.encode(PROMPT), *(position.token for position in found.positions)]
    assert [shown_token(tokenizer, position.token) for position in found.positions] == found.texts
    expected = inspector.inspect_ids(ids).positions[-len(found.texts) :]
    shares = [float(share) for share in re.findall(r"--share: ([\d.e-]+)", html)]
    assert shares == pytest.approx([0.65 * position.expected_reward_share**0.5 for position in expected], abs=1e-6)
    for place, position in enumerate(expected):
        shown = table_of(click(found, place))
        assert list(shown)[0] == found.positions[place].token
        assert shown.keys() == {action.token for action in position.actions}
        for action in position.actions:
            names = ("reality", "consensus", "reward", "policy")
            numbers = {name: getattr(action, name) for name in names} | {"push": -action.gradient}
            numbers["critic"] = action.critic[0]
            assert shown[action.token] == pytest.approx(numbers, rel=1e-4, abs=1e-7)


def test_the_table_says_who_proposed(side, rewards):
    _, found, _ = generate([side], rewards, "best")
    html = click(found, 2)
    assert f"Position 2 of <code>{found.player}</code>" in html
    assert f"{len(found.positions[2].actions)} active actions" in html and "every one of them is paid" in html
    for action, row in zip(sorted_actions(found, 2), html.split("<tr data-token=")[1:], strict=True):
        assert tuple(re.findall(r'<b class="by \w+" title="([^"]+)">', row.split("</tr>")[0])) == action.proposed_by
        assert f'<td title="{page.escape(action.text)}">{page.escape(action.text)}</td>' in row


def sorted_actions(found: Continuation, place: int) -> list:
    first, *others = found.positions[place].actions
    return [first, *sorted(others, key=lambda action: -action.consensus)]


def test_several_critics_have_a_column_each(side, critic_folder, player_folder):
    rewards = open_all([side.run], [str(critic_folder), str(player_folder)], side.device)[1]
    _, found, _ = generate([side], rewards, "best")
    html = click(found, 0)
    assert re.findall(r'<th scope="col">(p critic[^<]*)', html) == ["p critic 1", "p critic 2"]
    row = html.split("<tr data-token=")[1]
    values = [float(value) for value in re.findall(r'<td class="critic" data-value="([^"]+)"', row)]
    assert values == list(found.positions[0].actions[0].critic)


def test_the_threshold_is_written_and_drawn(side, rewards):
    config = AvataRLConfig.article(top_k=4)
    rewards = Inspector(rewards.player, rewards.critics, rewards.tokenizer, config, rewards.names)
    _, found, _ = generate([side], rewards, "best")
    html = click(found, 0)
    assert f"a consensus above {found.positions[0].threshold:.4f} is paid" in html
    assert html.count('<b style="left:') == len(found.positions[0].actions)


@pytest.mark.parametrize("place", [-1, COUNT, 99, "0", None, 1.5])
def test_a_click_on_no_token_shows_nothing(side, rewards, place):
    _, found, _ = generate([side], rewards, "best")
    assert click(found, place) == click(None, 0) == ""


# --- without critics ------------------------------------------------------------------------------------------------


def introduction_of(app: gradio.Blocks) -> str:
    return next(part.value for part in app.blocks.values() if isinstance(part, gradio.HTML))


def test_without_a_critic_a_line_says_why_and_players_speak(player_folder, run, tmp_path: Path):
    shown = introduction_of(play.build_app([str(player_folder), run], device="cpu"))
    assert f"critic is not given, and {player_folder} was not trained with one" in shown and "--critic" in shown
    side = Side(str(player_folder), pick_device("cpu"))
    html, found, below = generate([side], None, "model")
    assert "<button" not in html and below == "" and found.positions == ()
    assert text_of(html) == text_of(f"{PROMPT}{''.join(found.texts)}").replace("␣", " ")


def test_a_critic_that_is_gone_is_a_line_unless_it_was_asked_for(run, tmp_path: Path):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "player").symlink_to(Path(run) / "player")
    settings = yaml.safe_load((Path(run) / "config.yaml").read_text())
    gone = str(tmp_path / "gone" / "critic")
    (copy / "config.yaml").write_text(yaml.safe_dump({**settings, "critic": gone}))
    assert f"No rewards are shown: {gone}: no such folder" in introduction_of(play.build_app([str(copy)], device="cpu"))
    with pytest.raises(UserError, match="no such folder"):
        play.build_app([run], [gone], device="cpu")


def test_players_and_critics_share_their_tokens(run, player_folder, critic_folder, tmp_path: Path):
    source = write_documents(tmp_path / "documents.jsonl", count=20, seed=2)
    prepare([str(source)], tmp_path / "data", tokenizer="bpe:280", quiet=True)
    tokenizer = PreparedData.open(tmp_path / "data").load_tokenizer()
    other = str(tmp_path / "other")
    build_player(TINY_PLAYER, tokenizer, BLOCK, seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    for runs, critic in (([run, other], critic_folder), ([other], critic_folder), ([run], other)):
        with pytest.raises(UserError, match="has another vocabulary"):
            play.build_app(runs, [str(critic)], device="cpu")
    shown = introduction_of(play.build_app([run, other], device="cpu"))
    assert f"No rewards are shown: player {other}, model has another vocabulary" in shown


def test_the_settings_are_the_first_runs(run, player_folder, critic_folder):
    shown = introduction_of(play.build_app([run, str(player_folder)], device="cpu"))
    assert f"Critic:\n<code>{critic_folder}</code>.\nSettings: those of <code>{run}" in shown
    given = open_all([str(player_folder)], [str(critic_folder)], pick_device("cpu"))[1]
    assert given.config == AvataRLConfig.article()


# --- what is from outside is text -----------------------------------------------------------------------------------


def test_hostile_names_prompts_and_tokens_are_text(side, rewards):
    _, found, _ = generate([side], rewards, "best")
    actions = tuple(dataclasses.replace(action, text=HOSTILE) for action in found.positions[0].actions)
    positions = [dataclasses.replace(found.positions[0], text=HOSTILE, actions=actions)]
    hostile = Continuation(HOSTILE, HOSTILE, [HOSTILE], positions)
    rewards = SimpleNamespace(names=["player", HOSTILE])
    for html, places in {
        page.PAGE.generated(hostile): 3,
        page.PAGE.generated(dataclasses.replace(hostile, positions=())): 2,
        click(hostile, 0): 4 + 2 * len(actions),
        page.PAGE.introduction(rewards, HOSTILE, ""): 2,
        page.PAGE.introduction(None, HOSTILE, HOSTILE): 1,
    }.items():
        assert "<img" not in html and "</script" not in html and "\u202e" not in html
        assert html.count(str(page.escape(HOSTILE.replace("\u202e", "\\u202e")))) == places


def test_what_is_refused_is_said_in_an_escaped_line(side, rewards, monkeypatch):
    def refuse(*_arguments):
        raise UserError(f"{HOSTILE}\nis no player")

    monkeypatch.setattr(side, "generate", refuse)
    with pytest.raises(gradio.Error) as shown:
        generate([side], rewards, "best")
    assert "<img" not in shown.value.message and "\n" not in shown.value.message
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown.value.message
    assert not shown.value.print_exception  # no traceback in the terminal


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": "old oak " * BLOCK}, f"prompt has .* expected fewer than the model&#39;s context of {BLOCK}"),
        ({"count": 2.5}, "max_new_tokens is 2.5"),
        ({"count": 0}, "max_new_tokens is 0"),
        ({"seed": None}, "seed is None"),
        ({"seed": 1 << 63}, "seed is .* below 2.63"),
        ({"temperature": -1}, "temperature is -1"),
        ({"choice": "step 5"}, "has no player &#39;step 5&#39;; expected one of best, final, step 4, step 8"),
    ],
    ids=str,
)
def test_a_mistake_in_the_page_is_named(side, rewards, changed: dict, message: str):
    asked = {"prompt": PROMPT, "temperature": 0.8, "count": COUNT, "seed": SEED, "choice": "best", **changed}
    with pytest.raises(gradio.Error, match=message):
        page.generate_on_page([side], rewards, *asked.values())


# --- serving --------------------------------------------------------------------------------------------------------


def test_the_page_is_for_this_machine_alone(run, monkeypatch):
    settings = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda _app, **given: settings.update(given))
    app = play.build_app([run], device="cpu")
    monkeypatch.setenv("no_proxy", "example.org")
    page.launch(app, "127.0.0.1", 7860)
    assert settings["server_name"] == "127.0.0.1" and settings["share"] is False
    assert not app.analytics_enabled
    assert settings["theme"]._stylesheets == []
    assert "http" not in settings["head"] and "@import" not in settings["head"]
    assert not any(settings[name] for name in ("footer_links", "run_history", "enable_monitoring", "pwa", "mcp_server"))
    page.launch(app, "::1", 7860)
    assert settings["server_name"] == "[::1]"
    assert settings["state_session_capacity"] == page.MOST_SESSIONS <= 32  # of a megabyte each


@pytest.fixture(scope="module")
def visit(run):
    """``visit(method, path, …)``: what the page answers, served on ``HOST``."""
    settings, app = {}, play.build_app([run], device="cpu")
    app.launch = lambda **given: settings.update(given)
    page.launch(app, HOST, 7860)
    served = gradio.routes.App.create_app(app, app_kwargs=settings["app_kwargs"])
    with TestClient(served, base_url=f"http://{HOST}:7860") as client:
        yield client.request


HOST = "127.0.0.1"
JOIN = "/gradio_api/queue/join"


@pytest.mark.parametrize("path", ["/config", "/gradio_api/info", "/gradio_api/startup-events"])
@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:9", "[::1]:7860", "192.0.2.7", socket.gethostname()])
def test_the_page_is_served_under_this_machines_names(visit, path: str, host: str):
    assert visit("GET", path, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil", "", "["]
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/config"), ("POST", JOIN), ("HEAD", "/")])
def test_no_other_name_that_points_here_reads_or_runs_it(visit, method: str, path: str, host: str):
    assert visit(method, path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9", "http://localhost:7860", "["])
@pytest.mark.parametrize(("method", "path"), [("POST", JOIN), ("GET", "/gradio_api/queue/data?session_hash=a")])
def test_no_other_page_in_the_browser_asks(visit, method: str, path: str, origin: str):
    assert visit(method, path, headers={"Origin": origin}).status_code == 403


def test_the_pages_own_questions_are_taken(visit):
    answer = visit("POST", JOIN, json={}, headers={"Origin": f"http://{HOST}:7860"})
    assert answer.status_code == 422 and "data" in answer.text  # what gradio says of a question with nothing in it


@pytest.mark.parametrize(
    "name", ["upload", "upload/", "run/say", "api/say", "call/say", "component_server", "stream/a"]
)
def test_what_the_page_never_sends_is_not_taken(visit, name: str):
    for method in ("POST", "PUT", "DELETE"):
        assert visit(method, f"/gradio_api/{name}", files={"files": ("a.txt", b"x")}).status_code == 404


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_question_is_no_longer_than_a_prompt(visit, is_announced: bool):
    content = b'{"data": ["' + b"x" * LARGEST_BODY_BYTES + b'"]}'
    assert visit("POST", JOIN, content=content if is_announced else iter([content])).status_code == 413


def test_a_prompt_is_bounded_before_it_is_read(side, rewards):
    with pytest.raises(gradio.Error, match="prompt has 1,048,577 characters; expected at most 1,048,576"):
        generate([side], rewards, "best", prompt="x" * (LONGEST_PROMPT + 1))


def test_a_port_that_cannot_be_had_is_refused_before_anything_is_opened(capsys):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert main(["play", "no/such/run", "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"avatarl: port {port} of 127.0.0.1 cannot be listened on") and len(err.splitlines()) == 1
    for host, port in (("127.0.0.1", 99999), ("127.0.0.1", 0), ("192.0.2.1", 7860), ("no host", 7860), ("x" * 99, 1)):
        with pytest.raises(UserError, match="port .*(expected|give a free one)"):
            play.check_port(host, port)


def test_without_gradio_the_extra_is_named(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "avatarl.results.app")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"play needs gradio.*pip install 'avatarl\[app\]'"):
        play.build_app([run])


@pytest.mark.parametrize("count", [0, 3])
def test_one_or_two_runs_are_expected(run, count: int):
    with pytest.raises(UserError, match=f"play is given {count} runs; expected one or two"):
        play.build_app([run] * count)
