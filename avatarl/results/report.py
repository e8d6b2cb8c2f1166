"""Several runs side by side, in one file: what they are, how good, how they got there, what they write.

A reader of run folders, as they stand: a run that goes on, has no player yet or lost its data is shown with what there
is, and what is missing is said.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from avatarl.data import PreparedData
from avatarl.data.dataset import read_manifest
from avatarl.device import pick_device
from avatarl.durable import replace_file
from avatarl.errors import UserError
from avatarl.objective.config import require_whole
from avatarl.places import CONFIG, require_found
from avatarl.sanitise import one_line
from avatarl.untrusted import check_writable, refusing
from avatarl.version import __version__

from .charts import CHARTED, MOST_POINTS, Style, chart_data, reliability_data
from .evaluate import evaluate as evaluate_model
from .generate import generate
from .pages import read_source, render_markdown, render_page
from .prompts import held_out_prompts
from .runs import Run, read_runs, same_data
from .tables import (
    overview_table,
    reliability_tables,
    results_table,
    resumptions,
    settings_table,
    validation_table,
    what_was_trained,
)

SUFFIXES = (".html", ".md")


@dataclass
class Findings:
    """What a report itself found out about a run, beyond what its folder holds."""

    data: Path | None = None  # prepared, that it can be evaluated on
    data_digest: str = ""
    train_tokens: int | None = None  # of its own data
    evaluation: dict[str, Any] | None = None
    samples: list[str] = field(default_factory=list)  # one for each prompt
    trouble: str = ""  # why there is no evaluation


def report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    baseline: str | Path | None = None,
    data: str | Path | None = None,
    max_windows: int = 64,
    prompts: Sequence[str] | None = None,
    sample_tokens: int = 80,
    evaluate: bool = True,
    device: str = "auto",
    quiet: bool = False,
) -> None:
    """Write a report on run folders: tables, curves, reliability diagrams and samples.

    Args:
        runs: Run folders, finished or not.
        out: The page to write (.html, one file that opens from disk; or .md, without curves).
        baseline: The one of ``runs`` that the others are compared with; when None the first whose objective is
            cross_entropy and that is not another's critic, else the first.
        data: Prepared data to evaluate all runs on, instead of each on its own.
        max_windows: How many validation windows that evaluation reads, the same of all runs.
        prompts: What to continue; when None the beginnings of held-out documents.
        sample_tokens: Tokens of a continuation.
        evaluate: Whether to open the players at all; otherwise only what the folders say is shown.
        device: ``cpu``, ``cuda`` or ``auto``.
        quiet: Print no progress.

    Raises:
        UserError: A setting is wrong, one of ``runs`` is no run folder, or its files are not what a run writes.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise UserError(f"out is {out}; expected a name that ends in {' or '.join(SUFFIXES)}")
    check_writable(out)
    require_whole("max_windows", max_windows, minimum=1)
    require_whole("sample_tokens", sample_tokens, minimum=1)
    if not runs:
        raise UserError("runs is empty; expected at least one run folder")
    pick_device(device)
    opened = read_runs(runs, CHARTED)
    chosen = _baseline(opened, baseline)
    if data is not None:
        read_manifest(Path(data))
    findings = [_find_data(run, data) for run in opened]
    if evaluate:
        block_size = _common_block_size(opened)
        prompts = _default_prompts(findings) if prompts is None else list(prompts)
        for run, found in zip(opened, findings, strict=True):
            if not quiet:
                print(f"{run.name}: {found.trouble or 'evaluating and sampling'}", file=sys.stderr, flush=True)
            if not found.trouble:
                _examine(run, found, block_size, max_windows, prompts, sample_tokens, device)
    values = _values(opened, findings, chosen, prompts if evaluate else [], evaluate)
    content = _page(values) if out.suffix == ".html" else render_markdown("report.md", **values)
    with refusing(f"out is {out}, which cannot be written (", ")"):
        replace_file(out.resolve(), content)


def _baseline(runs: Sequence[Run], wanted: str | Path | None) -> int:
    """The number of the run that the others are compared with."""
    folders = [os.path.abspath(run.folder) for run in runs]
    if wanted is None:
        named = [critic for run in runs for critic in _as_list(run.settings.get("critic"))]
        critics = {os.path.abspath(name) for name in named if isinstance(name, str)}
        twins = [number for number, run in enumerate(runs) if run.settings.get("objective") == "cross_entropy"]
        # A critic is trained by it too, and no equal of the players that it judged.
        return next((number for number in twins if folders[number] not in critics), twins[0] if twins else 0)
    if os.path.abspath(wanted) not in folders:
        raise UserError(f"baseline is {wanted}; expected one of the runs: {', '.join(str(run.folder) for run in runs)}")
    return folders.index(os.path.abspath(wanted))


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


# --- evaluating and sampling ------------------------------------------------------------------------------------------


def _find_data(run: Run, given: str | Path | None) -> Findings:
    """The data of a run, or that given for all; whatever is wrong with it becomes the reason not to evaluate."""
    found = Findings()
    own = run.settings.get("data")
    try:
        if not isinstance(own, str):
            raise UserError("its settings name no data")
        require_found(run.folder / CONFIG, {"data": own})
        content, manifest = read_manifest(Path(own))
        found.data, found.data_digest = Path(own), hashlib.sha256(content).hexdigest()
        if found.data_digest != run.record.get("data_digest", found.data_digest):
            raise UserError(f"{own} is not what it was when the run was trained on it")
        found.train_tokens = manifest["tokens"]["train"]
    except UserError as error:
        found.trouble = str(error)
    if given is not None:
        content, _ = read_manifest(Path(given))
        found.data, found.data_digest, found.trouble = Path(given), hashlib.sha256(content).hexdigest(), ""
    if not run.has_player:
        found.trouble = "it has no player yet"
    return found


def _common_block_size(runs: Sequence[Run]) -> int | None:
    """The shortest context of the runs, so that all are evaluated on the same windows; None where none says."""
    blocks = [block_size for run in runs if type(block_size := run.settings.get("block_size")) is int]
    return min(blocks, default=None)


def _default_prompts(findings: Sequence[Findings]) -> list[str]:
    """Beginnings of documents of the first data that there is."""
    for found in findings:
        if not found.trouble:
            try:
                return held_out_prompts(PreparedData.open(found.data))
            except UserError:  # which its evaluation will say
                continue
    return [""]


def _examine(
    run: Run,
    found: Findings,
    block_size: int | None,
    max_windows: int,
    prompts: Sequence[str],
    sample_tokens: int,
    device: str,
) -> None:
    """Evaluate a run's best player, and let it continue the prompts."""
    try:
        found.evaluation = evaluate_model(
            run.folder, found.data, block_size=block_size, max_windows=max_windows, device=device
        )
        for prompt in prompts:
            (text,) = generate(run.folder, prompt, max_new_tokens=sample_tokens, device=device)
            found.samples.append(text)
    except UserError as error:
        found.trouble = str(error)


# --- what the page says -----------------------------------------------------------------------------------------------


def _values(
    runs: Sequence[Run], findings: Sequence[Findings], baseline: int, prompts: Sequence[str], evaluated: bool
) -> dict[str, Any]:
    """All that the templates name."""
    trained = [what_was_trained(run, found.train_tokens) for run, found in zip(runs, findings, strict=True)]
    evaluations = {number: found.evaluation for number, found in enumerate(findings) if found.evaluation}
    texts = [found.data_digest for found in findings]
    is_same_text = [text == texts[baseline] for text in texts]
    samples = []
    for place, prompt in enumerate(prompts):
        texts = [(number, found.samples[place]) for number, found in enumerate(findings) if place < len(found.samples)]
        samples.append((prompt, texts))
    return {
        "version": __version__,
        "written": datetime.now(UTC).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00") + " UTC",
        "command": one_line(shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "avatarl"), *sys.argv[1:]])),
        "runs": [{"name": run.name, **Style.of(number)._asdict()} for number, run in enumerate(runs)],
        "baseline": baseline,
        "warnings": _warnings(runs, findings, evaluations, is_same_text),
        "remarks": _remarks(runs, findings, trained, evaluated),
        "overview": overview_table(runs, trained),
        "commands": [(run.name, one_line(str(run.record.get("command", "unknown")))) for run in runs],
        "resumed": [(run.name, lines) for run in runs if (lines := resumptions(run))],
        "results": results_table(runs, trained, evaluations, baseline, is_same_text),
        "seeds": sorted({one_line(str(run.settings.get("seed"))) for run in runs}),
        "validation": validation_table(runs),
        "curves": chart_data(runs),
        "reliability": reliability_data(evaluations),
        "reliability_tables": reliability_tables(runs, evaluations) if evaluations else [],
        "samples": samples if any(found.samples for found in findings) else [],
        "settings": settings_table(runs),
    }


def _warnings(
    runs: Sequence[Run], findings: Sequence[Findings], evaluations: dict[int, Any], is_same_text: Sequence[bool]
) -> list[str]:
    """What would mislead somebody who did not know it."""
    warnings = []
    identities = [run.record.get("identity") for run in runs]
    tokenizers = {str(identity.get("tokenizer")) for identity in identities if isinstance(identity, dict)}
    is_same_data = all(same_data(run, other) for run in runs for other in runs)
    if not is_same_data:
        warnings.append("The runs were trained on different data, and validated on different text while they trained.")
    if not is_same_data and len(tokenizers) > 1:
        warnings.append(
            "The runs have different tokenizers: nats per token, perplexity, accuracies and entropy of one say nothing "
            "about another. Bits per byte do, where the text is the same."
        )
    elif not all(is_same_text[number] for number in evaluations):
        warnings.append(
            "The runs were evaluated on different data, each on its own, and no differences are taken: only bits per "
            "byte can be compared, and only where the text is the same. --data DIR evaluates all on one."
        )
    return warnings


def _remarks(
    runs: Sequence[Run], findings: Sequence[Findings], trained: Sequence[Any], evaluated: bool
) -> dict[str, list[str]]:
    """What is missing of runs, or shown otherwise than it was logged, and the names of the runs it is true of."""
    remarks: list[tuple[str, str]] = []
    for run, found, done in zip(runs, findings, trained, strict=True):
        if evaluated and found.trouble:
            part = "not sampled further" if found.evaluation else "not evaluated"
            remarks.append((run.name, f"{part}: {found.trouble}"))
        if missing := (found.evaluation or {}).get("bits_per_byte_missing"):
            remarks.append((run.name, f"no bits per byte: {missing}"))
        if not run.record:
            remarks.append((run.name, "environment.json is missing or damaged, so where it ran is unknown"))
        if done.flops is None and done.steps:
            remarks.append((run.name, "no FLOPs in the log, and so no curve over them"))
        lines = len(run.train["step"])
        if lines > MOST_POINTS:
            mean = f"the mean of some {lines / MOST_POINTS:.2g} of its {lines:,} lines"
            remarks.append((run.name, f"each point of a training curve is {mean}"))
    of_runs: dict[str, list[str]] = {}
    for name, remark in remarks:
        of_runs.setdefault(remark, []).append(name)
    return of_runs


def _page(values: dict[str, Any]) -> str:
    from plotly.offline import get_plotlyjs

    drawn = {"runs": values["runs"], **values["curves"], "reliability": values["reliability"]}
    return render_page("report.html", [get_plotlyjs(), read_source("report.js")], drawn=drawn, **values)
