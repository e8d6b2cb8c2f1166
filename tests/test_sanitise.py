"""Text from outside in terminals, pages and pictures: shown, never obeyed."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import warnings
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table

import avatarl.demo
import avatarl.results
from avatarl import UserError
from avatarl.cli import COMMANDS, main
from avatarl.console import Console
from avatarl.data import PreparedData
from avatarl.errors import RunFailed
from avatarl.results import draw_curves, generate
from avatarl.run_dir.checkpoint import manifest_text, newest_good_checkpoint
from avatarl.sanitise import LONGEST_LINE, OBEYED, SanitisedStream, markdown_code, one_line, sanitised_output, visible

from .fuzz.mutations import HOSTILE_TEXTS

SCREEN = "\x1b[2J\x1b[31m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b2J", "\\x9b2J"),
        ("a\rb\bc\x7f\0", "a\\x0db\\x08c\\x7f\\x00"),
        ("\u202egnp\u2066", "\\u202egnp\\u2066"),
        ("a\u2028b", "a\\u2028b"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("lines\nand\ttabs", "lines\nand\ttabs"),
        ("Ä 漢 🙂 👩\u200d🔬 می\u200cخواهم", "Ä 漢 🙂 👩\u200d🔬 می\u200cخواهم"),
    ],
    ids=ascii,
)
def test_what_a_terminal_obeys_is_shown_instead(text: str, shown: str):
    assert visible(text) == shown


def test_every_control_character_is_covered():
    import unicodedata

    controls = {chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp")}
    turning = {c for c in map(chr, range(0x110000)) if unicodedata.bidirectional(c) in set("LRE RLE PDF".split())}
    turning |= {
        c for c in map(chr, range(0x110000)) if unicodedata.bidirectional(c) in set("LRO RLO LRI RLI FSI PDI".split())
    }
    assert not OBEYED.search(visible("".join(sorted(controls | turning))))
    assert set(visible("".join(sorted(controls)))) & controls == {"\n", "\t"}


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=lambda text: ascii(text)[:30])
def test_hostile_text_fits_on_one_line_and_stays_in_its_code_span(text: str):
    line = one_line(text)
    assert len(line.splitlines()) <= 1 and not OBEYED.search(line) and len(line) <= LONGEST_LINE + 10
    line.encode("utf-8")
    span = markdown_code(text)
    assert "|" not in span and "\n" not in span
    fence = re.match("`+", span)[0]
    assert span.endswith(fence) and fence not in span[len(fence) : -len(fence)]
    assert fence + "`" not in span  # the text's own backticks do not touch the fence


def test_an_error_is_one_inert_line_whatever_it_names():
    assert str(UserError(f"{SCREEN}a\nb")) == "\\x1b[2J\\x1b[31ma b"
    assert len(str(UserError("x" * 1_000_000))) <= LONGEST_LINE + 10
    assert str(UserError("ends with what is " + "x" * 5000 + "expected")).endswith("expected")


EVERY_KIND = f"{SCREEN}\x9b2J\x1b]0;title\x07\r\b\u202egnp\u2066\x7f"


@pytest.mark.parametrize(
    "speak",
    [
        print,
        lambda text: print(text, file=sys.stderr),
        lambda text: sys.stdout.write(text),
        lambda text: sys.stderr.writelines([text, text]),
        lambda text: sys.stderr.write(warnings.formatwarning(text, UserWarning, text, 1)),
        lambda text: logging.StreamHandler().handle(logging.makeLogRecord({"msg": text})),
        lambda text: Console().print(text, markup=False),
        lambda text: Console(stderr=True).rule(text),
        lambda text: Console().print(table_with(text)),
        lambda text: PreparedData.open(text),
        lambda text: (_ for _ in ()).throw(RunFailed(text)),
        lambda text: (_ for _ in ()).throw(KeyError(text)),
    ],
)
def test_all_that_a_command_says_passes_one_door(monkeypatch, capsys, speak):
    monkeypatch.setitem(COMMANDS, "push", SimpleNamespace(run=lambda *_: speak(EVERY_KIND)))
    main(["push", "--debug"])
    said = "".join(capsys.readouterr())
    assert "x1b[2J" in said and not OBEYED.search(said)
    assert not isinstance(sys.stdout, SanitisedStream)


def table_with(text: str) -> Table:
    table = Table(f"head {text}", title=f"title {text}")
    table.add_row(text)
    return table


def test_a_terminal_still_has_its_colours_and_a_progress_its_names(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", SanitisedStream(terminal))
    console = Console(stderr=True, color_system="standard", width=200)
    console.print("red", style="red")
    with Progress(TextColumn("{task.description}", markup=False), console=console, auto_refresh=False) as progress:
        progress.add_task(EVERY_KIND)
        print(EVERY_KIND, file=sys.stderr)
    shown = terminal.getvalue()
    assert "\x1b[31mred\x1b[0m\n" in shown and "\x1b[?25l" in shown  # the cursor is hidden meanwhile
    assert "\\x1b[2J" in shown and "\x1b[2J" not in shown and "\x9b" not in shown and "\u202e" not in shown


def test_nothing_prints_beside_the_door():
    for path in Path(avatarl.__file__).parent.rglob("*.py"):
        if path.name != "console.py":
            assert not re.search(r"rich\.console|__std(out|err)__", path.read_text(encoding="utf-8")), path


def test_what_damages_a_checkpoint_is_named_inertly(tmp_path: Path, capsys):
    """A checkpoint's manifest names its files, and signs itself."""
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(manifest_text(1, {EVERY_KIND: {}}, {}))
    with pytest.raises(UserError), sanitised_output():
        newest_good_checkpoint(tmp_path, Console(stderr=True, soft_wrap=True, markup=False).print)
    said = capsys.readouterr().err
    assert "\\x1b[2J" in said and not OBEYED.search(said)


def test_generated_text_is_inert_on_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(avatarl.results, "generate", wraps(generate)(lambda **_: [f"a\n{SCREEN}", "b"]))
    assert main(["generate", "model"]) == 0
    assert capsys.readouterr().out == "a\n\\x1b[2J\\x1b[31m\n\n---\n\nb\n"


def test_samples_cannot_leave_their_page(data_folder: Path, tmp_path: Path, monkeypatch):
    text = f"{SCREEN}\n````\n# Heading"
    monkeypatch.setattr(avatarl.results, "generate", lambda *_, **__: [text])
    avatarl.demo.write_samples(tmp_path / "samples.md", PreparedData.open(data_folder), {"run": "run"})
    page = (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert not OBEYED.search(page)
    assert "\n`````text\n\\x1b[2J\\x1b[31m\n````\n# Heading\n`````\n" in page


def test_a_results_table_keeps_its_source_in_place():
    numbers = dict.fromkeys(
        ("cross_entropy", "bits_per_byte", "top1_accuracy", "top16_accuracy", "expected_calibration_error", "entropy"),
        1.0,
    )
    run = {"evaluation": numbers | {"tokens": 3}, "training": {"tokens": 3, "seconds": 1.0}}
    source = "a|b`\n# Heading <b>\x1b"
    page = avatarl.demo.results_table({"runs": {"avatarl": run}, "source": source, "unigram_entropy": 1.0})
    assert "``a\\x7cb` # Heading <b>\\x1b``" in page
    assert not OBEYED.search(page)


def test_names_in_a_picture_are_neither_mathematics_nor_left_out(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    line = {"event": "eval", "step": 1, "tokens": 1, "cross_entropy": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    names = ["$\\frac{1}{0}$", "_underscore", "a\x1bb", "$x$"]
    draw_curves({name: run for name in names}, tmp_path / "curves.svg", {"$base$": 1.0})
    picture = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    for name in ("$\\frac{1}{0}$", "_underscore", "a\\x1bb", "$x$", "$base$"):
        assert f"<!-- {name} -->" in picture
