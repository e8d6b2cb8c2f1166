"""Run folders written by hand, so that what a report makes of them is known beforehand, and reports read back."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import yaml

from avatarl.results.report import report

TOKENS_PER_STEP = 2048
HOSTILE = "<script>alert(1)</script>|`x`\u202e\n## &amp; <b>"
PLAYER_FLOPS, CRITIC_FLOPS = 6_000_000, 1_000_000  # per token


def write_run(folder: Path, lines: list[dict], record: dict | None = None, **settings) -> Path:
    """A run folder with these lines of metrics, and settings besides those that every run has."""
    folder.mkdir(parents=True)
    common = {
        "data": "no data",
        "objective": "avatarl",
        "block_size": 16,
        "steps": 100,
        "seed": 1,
        "optim": {"name": "adamw"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**common, **settings}, sort_keys=False), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if record is not None:
        (folder / "environment.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def write_data(folder: Path, train_tokens: int = 9) -> Path:
    """A prepared folder that can be found, but not read."""
    folder.mkdir()
    manifest = {"format_version": 1, "files": {}, "tokens": {"train": train_tokens, "valid": 9}, "vocab_size": 9}
    manifest |= {"end_of_text_id": None, "dtype": "uint16"}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def write_hostile_runs(folder: Path) -> list[Path]:
    """Two runs whose every word is an attack."""
    record = dict.fromkeys(("command", "device", "revision", "started", "processes", "precision"), HOSTILE)
    record["resumed"] = [{"step": HOSTILE, "changes": [HOSTILE]}]
    data, runs = write_data(folder / "data"), []
    for name in ("<b><img src=x onerror=window.hacked=1>", "=cmd|`x` **b** \u202e\nnext"):
        settings = {HOSTILE: HOSTILE, "critic": [HOSTILE], "objective": HOSTILE, "seed": HOSTILE, "data": str(data)}
        runs.append(write_run(folder / name, made_up_lines(5), record, **settings))
        (runs[-1] / "player").mkdir()
    return runs


def line(event: str, step: int, **metrics) -> dict:
    """A line of metrics without FLOPs, as runs once wrote them."""
    return {"event": event, "step": step, "tokens": step * TOKENS_PER_STEP, **metrics}


BIN = {"from": 0.0, "to": 0.5, "count": 7, "confidence": 0.25, "accuracy": 0.5}
# What evaluate() returns, of no model.
EVALUATION = {
    **dict.fromkeys(
        ("cross_entropy", "perplexity", "bits_per_byte", "top1_accuracy", "top16_accuracy", "entropy"), 1.0
    ),
    **{"expected_calibration_error": 0.1, "top16_calibration_error": 0.1, "tokens": 7},
    "reliability": [BIN, BIN | {"from": 0.5, "to": 1.0, "confidence": 0.75}],
    "top16_reliability": [BIN, BIN | {"accuracy": 0.0}],
}


def spent(step: int) -> dict[str, int]:
    tokens = step * TOKENS_PER_STEP
    return {"player_flops": tokens * PLAYER_FLOPS, "critic_flops": tokens * CRITIC_FLOPS}


def made_up_lines(steps: int, offset: float = 0.0, evaluations: int = 5, digits: int = 16) -> list[dict]:
    """A line of training for every step and some evaluations, smooth and never the same."""
    lines = []
    for step in range(1, steps + 1):
        falling = round(5 + offset + 3 * math.exp(-4 * step / steps) + 0.1 * math.sin(step), digits)
        metrics = {
            "loss": 1.5 * falling,
            "cross_entropy": falling,
            "entropy": falling - 0.1,
            "expected_reward": 1 / falling,
            "expected_reward_share": 0.8 / falling,
            "other_reward_share": 0.05 / falling,
        }
        speed = {"tokens_per_second": 2000 + 100 * math.sin(step), "skipped_steps": 0, "grad_norm": falling / 3}
        lines.append(line("train", step, **spent(step), **speed, **metrics))
        if step % (steps // evaluations) == 0:
            lines.append(line("eval", step, **spent(step), **metrics))
    return lines


def report_of(runs: list[Path], out: Path, **options) -> Page:
    """A report on what lies in the folders alone."""
    report(runs, out, evaluate=False, quiet=True, **options)
    return Page(out)


class Page(HTMLParser):
    """A page's tags, its tables as rows of cells, its data and its text."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.tables: dict[str, dict[str, list[str]]] = {}  # caption → row's name → cells
        self.text = self._data = ""
        self._rows: list[list[str]] = []
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.drawn = json.loads(self._data)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        if tag not in ("meta", "link", "input", "path", "wbr"):
            self._inside.append("data" if attributes.get("type") == "application/json" else tag)
        if tag == "table":
            self._rows = []
        elif tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        if tag not in ("path",):
            self._inside.pop()
        if tag == "table":
            self.tables[self._caption] = {
                " ".join(row[0].split()): [" ".join(cell.split()) for cell in row[1:]] for row in self._rows if row
            }

    def handle_data(self, data):
        if "data" in self._inside:
            self._data += data
        elif not {"script", "style"} & set(self._inside):
            self.text += data
            if "caption" in self._inside:
                self._caption += data
            elif {"td", "th"} & set(self._inside):
                self._rows[-1][-1] += data
