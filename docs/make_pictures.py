"""Make the README's pictures from a finished demo: ``python docs/make_pictures.py runs/demo``.

They are the pages of `avatarl report` and `avatarl inspect` as Chromium shows them (Debian's package, or CHROMIUM).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from avatarl.cli import main as avatarl

HERE = Path(__file__).resolve().parent
SENTENCE = "Return the first item of the list, or None if the list is empty."


def main(demo: Path) -> None:
    """Write docs/curves.png and docs/inspected.png."""
    # In the demo's folder, so that the pictures show names and nobody's paths.
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as api, contextlib.chdir(demo):
        report, inspection = Path(folder) / "report.html", Path(folder) / "inspection.html"
        runs = ["avatarl", "cross_entropy", "critic"]
        run("report", *runs, "--evaluate", "false", "--out", str(report))
        run("inspect", "--player", "avatarl", "--critic", "critic", "--text", SENTENCE, "--out", str(inspection))
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
        browser = api.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        take(
            browser.new_page(viewport={"width": 1400, "height": 1000}),
            report,
            "section[aria-labelledby=curves-heading]",
            HERE / "curves.png",
        )
        take(browser.new_page(viewport={"width": 1240, "height": 880}), inspection, None, HERE / "inspected.png")
        browser.close()


def run(*command: str) -> None:
    """One command of avatarl; whatever it says stands on the terminal."""
    if status := avatarl(command):
        sys.exit(status)


def take(page: Page, path: Path, element: str | None, out: Path) -> None:
    """A picture of an element of a page, or of what its window shows."""
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle")
    page.add_style_tag(
        content=".controls { position: static !important; }"
    )  # what follows a reader would cover a heading
    (page.locator(element) if element else page).screenshot(path=out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
