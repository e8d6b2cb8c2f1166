"""A report on whatever a run folder may hold: unfinished, damaged, gone or hostile; all words in it are text."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from avatarl import UserError
from avatarl.results.report import report
from avatarl.sanitise import OBEYED, one_line

from .reports import EVALUATION, HOSTILE, Page, made_up_lines, report_of, write_hostile_runs, write_run

# --- runs as they come ------------------------------------------------------------------------------------------------


def only_settings(run: Path) -> None:
    (run / "metrics.jsonl").unlink()


def being_written(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 9')


def not_finite(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 9, "tokens": 18432, "loss": NaN, "grad_norm": Infinity}\n')


def record_of(content: bytes):
    return lambda run: (run / "environment.json").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (only_settings, "at step 0 of 100"),
        (being_written, "at step 3 of 100"),
        (not_finite, "at step 9 of 100"),
        (lambda run: None, "environment.json is missing or damaged"),
        (record_of(b"[" * 100_000), "environment.json is missing or damaged"),
        (record_of(b"\xff"), "environment.json is missing or damaged"),
        (record_of(b'{"device": null, "sizes": {"parameters": 1' + b"0" * 400 + b"}}"), "not recorded"),
        (record_of(b'{"resumed": [7, {"changes": 3, "step": []}], "identity": 5, "sizes": []}'), "from step unknown"),
        (record_of(b'{"device": "' + b"x" * 1_000_000 + b'"}'), "x" * 100),
    ],
)
def test_a_run_is_shown_as_it_stands(tmp_path: Path, damage, said: str):
    run = write_run(tmp_path / "run", made_up_lines(3, evaluations=3))
    damage(run)
    page = report_of([run], tmp_path / "report.html")
    assert said in page.text
    assert (tmp_path / "report.html").stat().st_size < 6_000_000
    report([run], tmp_path / "report.md", quiet=True)
    assert "not evaluated: it has no player yet" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", b"a: [", "config.yaml cannot be read (while parsing"),
        ("config.yaml", b"- a", "config.yaml holds ['a']; expected settings by name"),
        ("config.yaml", b"a: &a {b: *a}", "config.yaml has too many aliases"),
        ("config.yaml", b"a: " + b"[" * 30 + b"]" * 30, "config.yaml is nested more than 20 deep"),
        ("config.yaml", b"a: 0x" + b"f" * 5000, "config.yaml cannot be read"),
        ("config.yaml", None, "has no config.yaml; expected a run folder"),
        ("metrics.jsonl", b"hello\n", "metrics.jsonl, line 1, is not a line of metrics"),
        ("metrics.jsonl", b'{"event": "train"\n{"event": "eval"}\n', "metrics.jsonl, line 1, is not a line of metrics"),
        ("metrics.jsonl", b'{"event": "train", "step": 1}\n', "a line has no step or no tokens"),
        ("metrics.jsonl", b'{"event": "train", "step": 1, "tokens": []}\n', "tokens in metrics.jsonl is"),
        ("metrics.jsonl", b'{"event": "eval", "step": 1, "tokens": 1, "loss": 1e300}\n', "loss in metrics.jsonl is"),
    ],
)
def test_what_no_run_writes_is_named(tmp_path: Path, name: str, content: bytes | None, message: str):
    run = write_run(tmp_path / "run", [])
    (run / name).unlink() if content is None else (run / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        report([run], tmp_path / "report.html", evaluate=False)
    assert str(run) in str(refusal.value)
    assert not (tmp_path / "report.html").exists()


def test_data_that_is_gone_or_changed_is_said(trained: list[Path], data_folder: Path, tmp_path: Path):
    shutil.copytree(trained[1], tmp_path / "run")
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    moved = tmp_path / "data"
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**settings, "data": str(moved)}))
    page = tmp_path / "report.md"
    options = dict(max_windows=2, prompts=["old oak"], sample_tokens=2, device="cpu", quiet=True)
    report([tmp_path / "run"], page, **options)
    assert "not evaluated: " in page.read_text() and "manifest.json: no such file" in page.read_text()
    shutil.copytree(data_folder, moved)
    with (moved / "manifest.json").open("a") as manifest:
        manifest.write(" ")
    report([tmp_path / "run"], page, **options)
    assert "has changed since the run was trained on it" in page.read_text()
    report([tmp_path / "run"], page, data=data_folder, **options)
    assert "not evaluated" not in page.read_text() and "| tokens evaluated | 32 |" in page.read_text()


def test_a_player_that_cannot_be_opened_is_said(trained: list[Path], tmp_path: Path):
    shutil.copytree(trained[1], tmp_path / "run")
    (tmp_path / "run" / "player" / "model.safetensors").write_bytes(b"nothing")
    report(
        [tmp_path / "run", trained[0]],
        tmp_path / "report.html",
        max_windows=2,
        prompts=[""],
        sample_tokens=2,
        quiet=True,
    )
    page = Page(tmp_path / "report.html")
    assert "run: not evaluated: " in page.text
    assert page.tables["Results"]["cross-entropy nats per token"][0] == "—"


def test_prompts_come_from_held_out_text(trained: list[Path], tmp_path: Path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "avatarl.results.report.generate", lambda _, prompt, **__: asked.append(prompt) or [prompt + "!"]
    )
    report(trained[:1], tmp_path / "report.html", max_windows=1, device="cpu", quiet=True)
    assert asked[0] == "" and len(asked) > 2 and all(len(prompt.split()) > 3 for prompt in asked[1:])


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile_runs(tmp_path: Path, monkeypatch) -> list[Path]:
    """Runs whose every word is an attack, and whose players answer with more."""
    monkeypatch.setattr("avatarl.results.report.evaluate_model", lambda *_, **__: EVALUATION)
    monkeypatch.setattr("avatarl.results.report.generate", lambda _, prompt, **__: [f"{prompt}</pre>\n```\n{HOSTILE}"])
    return write_hostile_runs(tmp_path)


ELEMENTS = set(
    "html head meta title link style body main section div a p h1 h2 h3 ul li b code pre span wbr noscript script "
    "table caption thead tbody tr th td details summary fieldset legend label input button figure figcaption svg "
    "path".split()
)


def test_hostile_words_are_text_on_the_page(hostile_runs: list[Path], tmp_path: Path):
    out = tmp_path / "report.html"
    report(hostile_runs, out, prompts=[HOSTILE], quiet=True)
    page = Page(out)
    assert page.tags <= ELEMENTS
    assert out.read_text(encoding="utf-8").count("<script>") == 2  # plotly's and ours
    assert not OBEYED.search(page.text)
    names = [one_line(run.name) for run in hostile_runs]
    assert [run["name"] for run in page.drawn["runs"]] == names
    for name in names:
        assert page.text.count(name) >= 6
    assert page.tables["What was trained on what"]["device"] == [" ".join(one_line(HOSTILE).split())] * 2
    assert page.text.count("</pre>\n```") == 2
    assert page.tables["Settings"]["data"]


def test_hostile_words_are_code_in_markdown(hostile_runs: list[Path], tmp_path: Path):
    out = tmp_path / "report.md"
    report(hostile_runs, out, prompts=[HOSTILE], quiet=True)
    text = out.read_text(encoding="utf-8")
    assert not OBEYED.search(text)
    fenced = re.compile(r"^(`{3,})text\n.*?^\1$", re.DOTALL | re.MULTILINE)
    assert len(fenced.findall(text)) == 2
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "CODE", fenced.sub("FENCE", text))
    assert "<script" not in outside and "<img" not in outside and "**b**" not in outside and "&amp;" not in outside
    widths = [len(re.findall(r"(?<!\\)\|", row)) for row in outside.splitlines() if row.startswith("| ")]
    assert set(widths) <= {4, 5}  # two runs, or the three columns of a reliability table
