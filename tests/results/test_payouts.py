"""An inspected text as people see it in the terminal, and as it is written to files."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from avatarl import AvataRLConfig, UserError
from avatarl.results.inspector import Inspector
from avatarl.results.payouts import print_inspection, write_inspection

TEXT = "quick fox old oak\nblue sea, wise owl"
CONFIG = AvataRLConfig.article(top_k=5, threshold="none", entropy_coef=0.3)


@pytest.fixture(scope="module")
def inspector(player_folder: Path, critic_folder: Path) -> Inspector:
    return Inspector.open(player_folder, [str(critic_folder)], CONFIG, device="cpu")


# --- the terminal ---------------------------------------------------------------------------------------------------


def printed(inspection, position: int | None = None, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_inspection(console, inspection, position)
    return console.file.getvalue()


def test_the_terminal_shows_text_means_and_disagreements(inspector):
    inspection = inspector.inspect(TEXT)
    lines = printed(inspection).splitlines()
    assert max(map(cell_len, lines)) <= 80 and len(lines) <= 24
    assert " 0 quick fox old oak⏎" in lines
    assert any(
        line.startswith("cross-entropy") and f"{inspection.summary['cross_entropy']:.4g}" in line for line in lines
    )
    for place in inspection.disagreements(5):
        assert any(line.startswith(f"{place} ") and inspection.positions[place].text in line for line in lines)


def test_the_terminal_colours_what_was_earned(inspector):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    print_inspection(console, inspector.inspect(TEXT))
    assert "48;2;11;92;146" in console.file.getvalue() or "48;2;29;61;92" in console.file.getvalue()


def test_without_colours_nothing_is_said_of_them(inspector):
    text = printed(inspector.inspect(TEXT))
    assert "without colours: --position N" in text and "< 15%" not in text
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    print_inspection(console, inspector.inspect(TEXT))
    assert "< 15%" in console.file.getvalue() and "without colours" not in console.file.getvalue()


def test_the_terminal_shows_one_positions_candidates(inspector):
    inspection = inspector.inspect(TEXT)
    position = inspection.positions[3]
    lines = printed(inspection, 3).splitlines()
    assert max(map(cell_len, lines)) <= 80
    (head,) = [number for number, line in enumerate(lines) if line.startswith("token ")]
    rows = lines[head + 1 :]
    first, *others = position.actions
    others = sorted(others, key=lambda action: -action.consensus)
    assert rows[0].split()[0] == first.text and rows[1].split()[0] == others[0].text
    assert f"{first.reality:.4f}" in rows[0] and f"{first.consensus:.4f}" in rows[0]
    assert ("↑" if first.gradient < 0 else "↓") in rows[0] and "█" * 12 in "".join(rows)


def test_unpaid_candidates_beyond_the_first_are_added_up(player_folder, critic_folder):
    config = AvataRLConfig.article(top_k=16)
    inspection = Inspector.open(player_folder, [str(critic_folder)], config, device="cpu").inspect(TEXT)
    position = inspection.positions[2]
    others = sorted(position.actions[1:], key=lambda action: -action.consensus)
    rest = [action for action in others if action.reward == 0][8:]
    (line,) = [line for line in printed(inspection, 2).splitlines() if f"{len(rest)} more" in line]
    assert f"{math.fsum(action.consensus for action in rest):.4f}" in line
    assert len(printed(inspection, 2).splitlines()) <= 24


def test_names_from_outside_are_inert_in_the_terminal(inspector, monkeypatch):
    monkeypatch.setattr(inspector, "names", ("[red]p\x1b[31m\nlayer", "c[/]ritic"))
    text = printed(inspector.inspect(TEXT))
    assert "player [red]p\\x1b[31m layer, critic c[/]ritic" in text.splitlines()[0]


# --- files ----------------------------------------------------------------------------------------------------------


def test_json_holds_every_number(inspector, tmp_path: Path):
    inspection = inspector.inspect(TEXT)
    write_inspection(inspection, tmp_path / "out.json")

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    written = json.loads((tmp_path / "out.json").read_text(), parse_constant=refuse)
    assert written.keys() == {"player", "critics", "config", "positions", "summary"}
    assert written["positions"][2]["actions"][1]["consensus"] == inspection.positions[2].actions[1].consensus
    assert written["positions"][2]["actions"][0]["proposed_by"][0] == "text"
    assert written["config"]["entropy_coef"] == CONFIG.entropy_coef


def test_a_page_that_cannot_be_written(inspector, tmp_path: Path):
    with pytest.raises(UserError, match="which cannot be written"):
        write_inspection(inspector.inspect(TEXT), tmp_path / "nowhere" / "out.html")
