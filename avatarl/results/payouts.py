"""An inspected text for people: in the terminal, as a page that computes again what its reader changes, as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from avatarl.console import Console
from avatarl.durable import replace_file
from avatarl.errors import UserError
from avatarl.objective import AvataRLConfig
from avatarl.sanitise import one_line
from avatarl.untrusted import refusing

from .inspector import Action, Answers, Inspection
from .pages import read_source, render_page

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
        UserError: Another suffix, or the file cannot be written.
    """
    write = {".html": inspection_page, ".json": lambda numbers: json.dumps(numbers.as_dict(), indent=1) + "\n"}
    content = write[kind_of(out)](inspection)
    with refusing(f"out is {str(out)!r}, which cannot be written (", ")"):
        replace_file(Path(out).resolve(), content)


def kind_of(out: str | Path) -> str:
    """The suffix of a file that an inspection can be written to.

    Raises:
        UserError: It has another one.
    """
    suffix = Path(out).suffix
    if suffix not in (".html", ".json"):
        raise UserError(f"out is {str(out)!r}; expected a name that ends in .html or .json")
    return suffix


# --- the page -------------------------------------------------------------------------------------------------------


def inspection_page(inspection: Inspection) -> str:
    """The inspection as one HTML file, whose settings can be changed."""
    scripts = [read_source("landscape.js"), read_source("inspect.js")]
    return render_page(
        "inspect.html",
        scripts,
        player=one_line(inspection.player),
        critics=[one_line(name) for name in inspection.critics],
        count=len(inspection.positions),
        data=page_data(inspection),
    )


def page_data(inspection: Inspection) -> dict[str, Any]:
    """What the page computes from: settings, and each position's answers with nine significant digits."""
    return {
        "player": inspection.player,
        "critics": list(inspection.critics),
        "settings": settings_of(inspection.config),
        "summary": {name: list(words) for name, words in SUMMARY.items()},
        "texts": inspection.texts,
        "positions": [
            {
                "answers": answers_data(answers),
                "entropy": _digits(position.entropy),
                "disagreement": position.disagreement,
            }
            for position, answers in zip(inspection.positions, inspection.answers, strict=True)
        ],
    }


def settings_of(config: AvataRLConfig) -> dict[str, Any]:
    """The settings as the page's script has them."""
    return dataclasses.asdict(config) | {"tail": config.tail_rule}


def answers_data(answers: Answers) -> dict[str, Any]:
    """Answers as the page's script has them."""
    names = {
        name: name.split("_")[0] + "".join(part.title() for part in name.split("_")[1:]) for name in Answers._fields
    }
    return {names[name]: _digits(value) for name, value in answers._asdict().items()}


def _digits(value: Any) -> Any:
    """Numbers with nine significant digits, in lists of any depth."""
    if isinstance(value, list):
        return [_digits(item) for item in value]
    return float(f"{max(value, LOWEST_LOG_PROB):.9g}") if isinstance(value, float) else value


# --- the terminal ---------------------------------------------------------------------------------------------------


def print_inspection(console: Console, inspection: Inspection, position: int | None = None) -> None:
    """The text coloured by what it earned, its means and where critic and text disagree; or one position's payouts.

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
    means = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, value in inspection.summary.items():
        if name in SUMMARY:
            words, unit = SUMMARY[name]
            means.add_row(words, _number(value), unit)
    console.print(means)
    places = inspection.disagreements(DISAGREEMENTS)
    if places:
        console.print("\nWhere critic and text disagree most (--position N shows one):", highlight=False)
        apart = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for place in places:
            at = inspection.positions[place]
            favourites = dict.fromkeys(
                max(at.actions, key=lambda a, c=c: a.critic[c]).text for c in range(len(inspection.critics))
            )
            apart.add_row(
                str(place), _plain(at.text), _plain(f"{at.disagreement:.2f} nats for {', '.join(favourites)}")
            )
        console.print(apart)


def print_text(console: Console, inspection: Inspection) -> None:
    """The text's tokens, each on the ground of what it earned; the number of a line is that of its first token."""
    width = len(str(len(inspection.positions)))
    line, used = Text(), 0
    for number, position in enumerate(inspection.positions):
        shown = position.text.replace("␣", " ")
        if not used:
            line.append(f"{number:>{width}} ", style="dim")
            used = width + 1
        style = next(style for bound, style in EARNED.items() if position.expected_reward_share < bound)
        line.append(shown, style=style)
        used += cell_len(shown)
        if shown.endswith("⏎") or used > console.width - 12:
            line.append("\n")
            used = 0
    line.append("\n" if used else "")
    if console.color_system is None or console.no_color:
        line.append("(without colours: --position N shows what was earned at a token)", style="dim")
    else:
        line.append("expected reward, share of the best: ", style="dim")
        for bound, style in EARNED.items():
            line.append(f" < {bound:.0%} " if bound < 1 else " more ", style=style)
    console.print(line, soft_wrap=True)


def print_position(console: Console, inspection: Inspection, place: int) -> None:
    """The active actions of one position: who proposed them, what was said of them, what they were paid."""
    at = inspection.positions[place]
    before = "".join(position.text for position in inspection.positions[max(0, place - 12) : place])
    context = Text(before.replace("␣", " ")[-console.width + 30 :], style="dim")
    console.print(Text(f"position {place}: ").append(context).append(at.text, style="reverse"), soft_wrap=True)
    console.print(
        _plain(
            f"cross-entropy {at.cross_entropy:.3f} nats, entropy {at.entropy:.3f} nats, expects "
            f"{at.expected_reward_share:.1%} of the best reward"
        )
    )
    bar = "every action is paid" if at.threshold is None else f"paid is a consensus above {_number(at.threshold)}"
    console.print(_plain(f"{len(at.actions)} active actions (of Text, Player, Critic), {bar}"))

    first, *others = at.actions
    others.sort(key=lambda action: -action.consensus)
    paid = [action for action in others if action.reward > 0]
    unpaid = others[len(paid) :]
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("token", no_wrap=True, max_width=14)
    table.add_column("by", no_wrap=True)
    critics = (
        ["critic"] if len(inspection.critics) == 1 else [f"critic {i + 1}" for i in range(len(inspection.critics))]
    )
    for name in ("reality", *critics, "consensus", "player π", "push", "reward"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    best = max(action.reward for action in at.actions) or 1.0
    for action in [first, *paid, *unpaid[:MOST_UNPAID]]:
        table.add_row(*_row(action, best), style="dim" if action.reward == 0 else "")
    if rest := unpaid[MOST_UNPAID:]:
        table.add_row(*_rest(rest, len(critics)), style="dim")
    console.print(table)


def _row(action: Action, best: float) -> list[Text | str]:
    arrow = "↑" if action.gradient < 0 else "↓" if action.gradient > 0 else " "
    return [
        _plain(action.text),
        "".join(voice[0].upper() + voice[len("critic ") :] for voice in action.proposed_by),
        _number(action.reality),
        *map(_number, action.critic),
        _number(action.consensus),
        _number(action.policy),
        f"{arrow}{_number(abs(action.gradient))}",
        _number(action.reward),
        "█" * round(BAR * action.reward / best) or ("▏" if action.reward else ""),
    ]


def _rest(actions: list[Action], critics: int) -> list[str]:
    """What the actions that are not listed have together; none of them is paid."""
    return [
        f"{len(actions)} more",
        "",
        _number(sum(action.reality for action in actions)),
        *(_number(sum(action.critic[critic] for action in actions)) for critic in range(critics)),
        _number(sum(action.consensus for action in actions)),
        _number(sum(action.policy for action in actions)),
        "",
        "0",
        "",
    ]


def _number(value: float) -> str:
    """Four digits, as far as they say something."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.0e}" if abs(value) < 1e-4 else f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"


def _plain(text: str) -> Text:
    """Text from outside: no markup, no highlighting, one line."""
    return Text(one_line(text), overflow="fold")
