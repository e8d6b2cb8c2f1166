"""Pages that are one file each and open from disk: styles, scripts and data inside, nothing from a network.

Whatever text a template is given is inert: it is escaped, and characters that a reader's eye would obey are shown. Only
the scripts that :func:`render_page` was given run, by their hashes in the page's own policy.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from avatarl.sanitise import backticks_around, markdown_code, visible

HERE = Path(__file__).parent
# What Markdown shows as it stands: no mark-up, no item of a list or rule, and no address that it would link to.
PLAIN = re.compile(r"(?!-|\d+\.(?: |$))(?:[A-Za-z0-9 ,%()±−–—'-]|\+(?=\d)|\.(?=[0-9 ]|$))*")


def render_page(template: str, scripts: Sequence[str] = (), **values: Any) -> str:
    """A whole HTML page.

    Args:
        template: A file of this folder that extends ``page.html``.
        scripts: JavaScript, run in this order once the page's elements are there.
        values: What the template names. For data use its filter ``tojson``, which refuses NaN and infinity.
    """
    for script in scripts:
        if "</script" in script.lower() or "<!--" in script:
            raise ValueError("a script that holds the mark that ends it")
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes or repr('none')}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    sources = [Markup(script) for script in scripts]
    return _ENVIRONMENT.get_template(template).render(policy=Markup(policy), scripts=sources, **values)


def render_markdown(template: str, **values: Any) -> str:
    """A Markdown page.

    Args:
        template: A file of this folder. Text from outside passes its filter ``inline``, or ``fence`` for many lines.
        values: What the template names.
    """
    return _MARKDOWN.get_template(template).render(**values)


def markdown_table(table: Any) -> str:
    """One table as Markdown."""
    return _MARKDOWN.get_template("parts.md").module.table_of(table)


def macros_of(template: str) -> Any:
    """The macros of a template of this folder, as functions that give parts of a page."""
    return _ENVIRONMENT.get_template(template).module


def read_source(name: str) -> Markup:
    """A style sheet or script of this folder."""
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _inert(value: Any) -> Any:
    """What a template shows: text from outside with its obeyed characters as escapes."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _inline(text: str) -> str:
    """Text in a paragraph or a table's cell: plain words and numbers as they are, anything else as code."""
    return text if PLAIN.fullmatch(text) else markdown_code(text)


def _fence(text: str) -> str:
    """Text of several lines, as a block of code that it cannot leave."""
    fence = backticks_around(text, fewest=3)
    return f"{fence}text\n{visible(text)}\n{fence}"


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(HERE),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_inert,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
_ENVIRONMENT.globals["read_source"] = read_source
_MARKDOWN = _ENVIRONMENT.overlay(autoescape=False)
_MARKDOWN.filters |= {"inline": _inline, "fence": _fence}
