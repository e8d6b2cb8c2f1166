"""Pages: one file each, and nothing in them that was not put there as a script runs."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from avatarl.results.pages import PLAIN, read_source, render_page

HOSTILE = "</code></script><script>alert(1)</script>\x1b[2J\u202e&amp;'\""


class Elements(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.texts.append(data)


def page_of(**values) -> str:
    return render_page(
        "inspect.html", [read_source("landscape.js")], **{"critics": [], "count": 1, "data": {}, **values}
    )


def test_text_is_text_and_what_an_eye_would_obey_is_shown():
    elements = Elements(page_of(player=HOSTILE))
    assert elements.names.count("script") == 2  # data, and the one script
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert shown in elements.texts


def test_data_cannot_leave_its_place():
    elements = Elements(page_of(player="p", data={"name": HOSTILE}))
    assert elements.names.count("script") == 2
    (text,) = [text for text in elements.texts if text.startswith('{"name"')]
    assert "<" not in text
    with pytest.raises(ValueError, match="not JSON compliant"):
        page_of(player="p", data={"number": float("nan")})


def test_nothing_is_loaded_and_only_given_scripts_run():
    page = page_of(player="p")
    elements = Elements(page)
    sources = [value for name, value in elements.attributes if name in ("src", "href", "action", "srcset")]
    assert sources == ["data:,", "#main"]
    assert "url(" not in page and "@import" not in page
    (policy,) = [value for name, value in elements.attributes if name == "content" and "default-src" in value]
    digest = base64.b64encode(hashlib.sha256(read_source("landscape.js").encode()).digest()).decode()
    assert policy.split("; ")[:2] == ["default-src 'none'", f"script-src 'sha256-{digest}'"]
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert script == read_source("landscape.js")


@pytest.mark.parametrize("script", ["'</script>'", "'</SCRIPT'", "'<!--'"])
def test_a_script_that_would_end_itself_is_refused(script: str):
    with pytest.raises(ValueError, match="the mark that ends it"):
        render_page("inspect.html", [script], player="p", critics=[], count=1, data={})


@pytest.mark.parametrize(
    "text", ["---", "- x", "1. y", "12.", "a*b", "<b>", "`", "https://x.y", "x\ny", "# a", "> a", "+ x"]
)
def test_what_markdown_would_take_for_more_than_text_is_no_plain_text(text: str):
    assert not PLAIN.fullmatch(text)


@pytest.mark.parametrize("text", ["", "run 1", "0.5 better −0.1", "±0", "— (none)", "a-b, c", "1.5", "−0.1 to +0.2"])
def test_what_it_shows_as_it_stands_is(text: str):
    assert PLAIN.fullmatch(text)
