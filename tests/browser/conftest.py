"""Headless Chromium without a network, for pages as a person sees them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WIDTHS = (400, 1400)  # pixels: a phone, a desk
SCHEMES = ("light", "dark")


def chromium_executable() -> str:
    """Where Chromium lies: CHROMIUM, else on the path."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("Chromium is not installed (Debian's package chromium, or CHROMIUM=/path/to/it)")
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """One browser for all pages."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    executable = chromium_executable()
    with playwright.sync_playwright() as api:
        opened = api.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """``open_page(path, width=…, scheme=…)`` opens a file from disk, offline.

    At the end of the test it has asked for nothing but itself and its console has shown no error.
    """
    contexts, troubles = [], []

    def open_file(path: Path, width: int = 1400, scheme: str = "light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, accept_downloads=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on(
            "request",
            lambda request: request.url.startswith(("file:", "data:", "blob:")) or troubles.append(request.url),
        )
        page.goto(path.resolve().as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert troubles == []


def has_sideways_scrolling(page) -> bool:
    """Whether the page as a whole is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
