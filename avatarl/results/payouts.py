"""Show an inspected text: in the terminal, as a page whose settings its reader can change, as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from avatarl.console import Console
from avatarl.errors import UserError
from avatarl.objective.config import AvataRLConfig
from avatarl.sanitise import one_line

from .pages import read_source, render_page
from .reporter import write_file

if TYPE_CHECKING:
    from .inspector import Action, Inspection

LOWEST_LOG_PROB = -1e30  # JSON knows no infinity; its exp is 0 all the same
SUMMARY = {  # of docs/metrics.md
    "cross_entropy": ("cross-entropy", "nats per token"),
    "entropy": ("entropy of the policy", "nats"),
    "expected_reward": ("reward the policy expects", ""),
    "expected_reward_share": ("… as a share of the best", ""),
    "other_reward_share": ("reward on other tokens", "share"),
    "active_actions": ("active actions", "per token"),
    "critic_wins": ("critic's favourite earns more", "share of tokens"),
}
DISAGREEMENTS = 5  # shown
# Grounds and inks by the share of the best reward that the policy expects; the bounds are where one ends.
EARNED = {
    0.05: "default",
    0.15: "white on #1d3d5c",
    0.35: "white on #0b5c92",
    0.65: "black on #56b4e9",
    1.01: "black on #f0e442",
}
MOST_UNPAID = 8  # actions without a reward that a table lists
BAR = 12  # characters


def write_inspection(inspection: Inspection, out: str | Path) -> None:
    """Write a page (``.html``) or the numbers (``.json``).

    Raises:
        UserError: The file cannot be written.
    """
    if Path(out).suffix == ".html":
        write_file(out, inspection_page(inspection))
    else:
        write_file(out, json.dumps(inspection.as_dict(), indent=1) + "\n")


# --- the page -------------------------------------------------------------------------------------------------------


def inspection_page(inspection: Inspection) -> str:
    """The inspection as one HTML file, whose settings can be changed; numbers have nine significant digits."""
    data = {
        "player": inspection.player,
        "critics": list(inspection.critics),
        "settings": settings_of(inspection.config),
        "summary": SUMMARY,
        "texts": inspection.texts,
        "positions": [
            {"answers": answers, "entropy": position.entropy, "disagreement": position.disagreement}
            for position, answers in zip(inspection.positions, inspection.answers, strict=True)
        ],
    }
    return render_page(
        "inspect.html",
        [read_source("landscape.js"), read_source("inspect.js")],
        player=one_line(inspection.player),
        critics=[one_line(name) for name in inspection.critics],
        count=len(inspection.positions),
        data=rounded(data),
    )


def settings_of(config: AvataRLConfig) -> dict[str, Any]:
    """The settings as the page's script has them."""
    return dataclasses.asdict(config) | {"tail": config.tail_rule}


def rounded(value: Any) -> Any:
    """Numbers with nine significant digits, none of them infinite, in lists and dictionaries of any depth."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{max(value, LOWEST_LOG_PROB):.9g}") if isinstance(value, float) else value


# --- the terminal ---------------------------------------------------------------------------------------------------


def print_inspection(console: Console, inspection: Inspection, position: int | None = None) -> None:
    """Print the text coloured by its expected reward, its means and disagreements; or the candidates of one position.

    Args:
        console: Where to.
        inspection: What to show.
        position: Show the candidates of this one, counted from 0.

    Raises:
        UserError: There is no such position.
    """
    if position is not None:
        if not 0 <= position < len(inspection.positions):
            raise UserError(f"position is {position}; expected 0 to {len(inspection.positions) - 1}")
        print_position(console, inspection, position)
        return
    console.print(_plain(f"player {inspection.player}, critic {', '.join(inspection.critics) or 'none'}"))
    console.print("a line's number is that of its first token", style="dim", highlight=False)
    print_text(console, inspection)
    summary = ((*SUMMARY[name], value) for name, value in inspection.summary.items() if name in SUMMARY)
    console.print(_table([words, _number(value), unit] for words, unit, value in summary))
    if places := inspection.disagreements(DISAGREEMENTS):
        console.print("\nWhere critic and text disagree most (--position N shows one):", highlight=False)
        rows = []
        for place in places:
            at = inspection.positions[place]
            critics = range(len(inspection.critics))
            best = (max(at.actions, key=lambda action, c=c: action.critic[c]).text for c in critics)
            favourites = ", ".join(dict.fromkeys(best))
            rows.append([str(place), _plain(at.text), _plain(f"{at.disagreement:.2f} nats for {favourites}")])
        console.print(_table(rows))


def print_text(console: Console, inspection: Inspection) -> None:
    """Print the text's tokens, coloured by expected reward; the number of a line is that of its first token."""
    width = len(str(len(inspection.positions)))
    line, used = Text(), 0
    for number, position in enumerate(inspection.positions):
        shown = position.text.replace("␣", " ")
        if not used:
            line.append(f"{number:>{width}} ", style="dim")
            used = width + 1
        line.append(shown, style=next(style for end, style in EARNED.items() if position.expected_reward_share < end))
        used += cell_len(shown)
        if shown.endswith("⏎") or used > console.width - 12:
            line.append("\n")
            used = 0
    line.append("\n" if used else "")
    if console.color_system is None or console.no_color:
        line.append("(without colours: --position N shows what was earned at a token)", style="dim")
    else:
        line.append("expected reward, share of the best: ", style="dim")
        for end, style in EARNED.items():
            line.append(f" < {end:.0%} " if end < 1 else " more ", style=style)
    console.print(line, soft_wrap=True)


def print_position(console: Console, inspection: Inspection, place: int) -> None:
    """Print the active actions of one position: who proposed them, their probabilities, what each was paid."""
    at, critics = inspection.positions[place], range(len(inspection.critics))
    before = "".join(position.text for position in inspection.positions[max(0, place - 12) : place])
    context = Text(before.replace("␣", " ")[-console.width + 30 :], style="dim")
    console.print(Text(f"position {place}: ").append(context).append(at.text, style="reverse"), soft_wrap=True)
    console.print(
        f"cross-entropy {at.cross_entropy:.3f} nats, entropy {at.entropy:.3f} nats, expects "
        f"{at.expected_reward_share:.1%} of the best reward",
        highlight=False,
    )
    paid_from = "every action is paid" if at.threshold is None else f"paid is a consensus above {_number(at.threshold)}"
    console.print(f"{len(at.actions)} active actions (of Text, Player, Critic), {paid_from}", highlight=False)

    first, *others = at.actions
    others.sort(key=lambda action: -action.consensus)
    paid = [action for action in others if action.reward > 0]
    unpaid = others[len(paid) :]
    best = max(action.reward for action in at.actions) or 1.0

    def numbers(actions: Sequence[Action]) -> list[str]:
        """Reality, critics, consensus and policy of one action, or of several together."""
        columns = zip(*((a.reality, *a.critic, a.consensus, a.policy) for a in actions), strict=True)
        return [_number(sum(column)) for column in columns]

    table = _table([], padding=1, show_header=True)
    table.add_column("token", no_wrap=True, max_width=14)
    table.add_column("by", no_wrap=True)
    voices = ["critic"] if len(critics) == 1 else [f"critic {c + 1}" for c in critics]
    for name in ("reality", *voices, "consensus", "player π", "push", "reward"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for action in [first, *paid, *unpaid[:MOST_UNPAID]]:
        arrow = "↑" if action.gradient < 0 else "↓" if action.gradient > 0 else " "
        by = "".join(voice[0].upper() + voice[len("critic ") :] for voice in action.proposed_by)
        bar = "█" * round(BAR * action.reward / best) or ("▏" if action.reward else "")
        push, style = f"{arrow}{_number(abs(action.gradient))}", "" if action.reward else "dim"
        table.add_row(_plain(action.text), by, *numbers([action]), push, _number(action.reward), bar, style=style)
    if rest := unpaid[MOST_UNPAID:]:
        table.add_row(f"{len(rest)} more", "", *numbers(rest), "", "0", "", style="dim")
    console.print(table)


def _table(rows: Iterable[Sequence[Text | str]], padding: int = 2, show_header: bool = False) -> Table:
    table = Table(box=None, padding=(0, padding, 0, 0), show_header=show_header)
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float) -> str:
    """Four digits, as far as they say something."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.0e}" if abs(value) < 1e-4 else f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"


def _plain(text: str) -> Text:
    """Untrusted text: no markup, no highlighting, one line."""
    return Text(one_line(text), overflow="fold")
