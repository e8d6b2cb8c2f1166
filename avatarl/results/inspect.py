"""The inspector's command: which settings and critics hold, what text is read, where it is shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from avatarl.errors import UserError
from avatarl.objective.config import AvataRLConfig
from avatarl.places import CONFIG, require_found
from avatarl.untrusted import check_writable, read_regular_file, refusing

from .runs import read_settings

LARGEST_TEXT_BYTES = 1 << 20


def inspect(
    player: str | Path,
    *,
    critic: Sequence[str] | None = None,
    text: str | None = None,
    file: str | Path | None = None,
    position: int | None = None,
    out: str | Path | None = None,
    avatarl: AvataRLConfig | None = None,
    device: str = "auto",
) -> None:
    """Show the rewards of each candidate of a text: in the terminal, as a page, as JSON.

    Args:
        player: A run folder (its best player), a model folder or a hub id.
        critic: Critics (default: those that the run was trained with).
        text: The text to look at.
        file: A file with the text; - for standard input.
        position: Show the candidates of this token, counted from 0.
        out: Write a page (.html) or the numbers (.json) instead.
        avatarl: Settings of the rewards (default: those of the player's run, else the article's).
        device: cpu, cuda or auto.

    Raises:
        UserError: There is no text or too much of it, or the models cannot be opened or do not fit each other.
    """
    from avatarl.console import Console

    from .inspector import Inspector
    from .payouts import print_inspection, write_inspection
    from .reporter import check_suffix

    content = read_text(text, file)
    if out is not None:
        check_suffix(out, (".html", ".json"))
        check_writable(out)
        if position is not None:
            raise UserError(f"position is {position}, and out has every position; expected one of them")
    inspection = Inspector.open(player, critic, avatarl, device).inspect(content)
    if out is None:
        print_inspection(Console(), inspection, position)
    else:
        write_inspection(inspection, out)
        print(out)


def settings_and_critics(
    player: str | Path, critics: Sequence[str] | None = None, config: AvataRLConfig | None = None
) -> tuple[AvataRLConfig, list[str]]:
    """The given settings and critics; where None, those that the player was trained with.

    Raises:
        UserError: There is no critic, or one that knows no other text than it was trained beside.
    """
    from avatarl.models.critics import critic_class

    own_config, own_critics = trained_with(player)
    if critics is None and own_critics:
        require_found(Path(player) / CONFIG, {"critic": own_critics})
    config, critics = config or own_config, list(own_critics if critics is None else critics)
    if config.needs_critic and not critics:
        raise UserError(f"critic is not given, and {player} was not trained with one; give a critic")
    for name in critics:
        if not critic_class(name).answers_any_text:
            raise UserError(f"critic {name} has no answers for other text; give a run, a model folder or a hub id")
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
