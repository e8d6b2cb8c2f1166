"""Several runs side by side, in one file: what they are, how good, how they got there, what they write.

It reads run folders as they stand. A run that is still training, has no player yet or lost its data is shown with what
there is, and the page says what is missing.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avatarl.errors import UserError
from avatarl.objective.config import require_whole
from avatarl.places import CONFIG, require_found
from avatarl.sanitise import one_line
from avatarl.untrusted import check_writable

from .charts import CHARTED, MOST_POINTS, charts_of
from .evaluate import evaluate as evaluate_model
from .generate import generate
from .prompts import held_out_prompts
from .reporter import SUFFIXES, check_suffix, write_page
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
    """Write one page on several runs: settings, results, curves, calibration and samples.

    Args:
        runs: Run folders, finished or not.
        out: The page to write: .html, one file that opens from disk, or .md without curves.
        baseline: The run to compare with (default: the first trained by cross_entropy that is not another's critic,
            else the first).
        data: Prepared data to evaluate all runs on (default: each on its own).
        max_windows: Validation windows to evaluate on, the same of all runs.
        prompts: Texts to continue (default: beginnings of held-out documents).
        sample_tokens: Tokens of a continuation.
        evaluate: Whether to open the players; false shows only what the run folders hold.
        device: cpu, cuda or auto.
        quiet: Print no progress.

    Raises:
        UserError: A setting is wrong, one of ``runs`` is not a run folder, or its files are not what a run writes.
    """
    out = Path(out)
    check_suffix(out, SUFFIXES)
    check_writable(out)
    require_whole("max_windows", max_windows, minimum=1)
    require_whole("sample_tokens", sample_tokens, minimum=1)
    if not runs:
        raise UserError("runs is empty; expected at least one run folder")
    opened = read_runs(runs, CHARTED)
    chosen = _baseline(opened, baseline)
    given = None if data is None else (Path(data), *_digest_and_tokens(Path(data)))
    findings = [_find_data(run, given) for run in opened]
    if evaluate:
        from avatarl.device import pick_device

        pick_device(device)  # before anything takes long
        # The shortest context of the runs, so that all are evaluated on the same windows; None where none says.
        block_sizes = [size for run in opened if type(size := run.settings.get("block_size")) is int]
        options = {"block_size": min(block_sizes, default=None), "max_windows": max_windows, "device": device}
        prompts = _default_prompts(findings) if prompts is None else list(prompts)
        for run, found in zip(opened, findings, strict=True):
            if not quiet:
                print(f"{run.name}: {found.trouble or 'evaluating and sampling'}", file=sys.stderr, flush=True)
            if not found.trouble:
                _examine(run, found, options, prompts, sample_tokens)
    _write(out, opened, findings, chosen, prompts if evaluate else [], evaluate)


def _baseline(runs: Sequence[Run], wanted: str | Path | None) -> int:
    """The number of the run that the others are compared with."""
    folders = [os.path.abspath(run.folder) for run in runs]
    if wanted is None:
        critics = {os.path.abspath(name) for run in runs for name in run.critics if isinstance(name, str)}
        twins = [number for number, run in enumerate(runs) if run.settings.get("objective") == "cross_entropy"]
        # A critic is trained by cross-entropy too, but is no baseline of the players that it rewarded.
        return next((number for number in twins if folders[number] not in critics), twins[0] if twins else 0)
    if os.path.abspath(wanted) not in folders:
        raise UserError(f"baseline is {wanted}; expected one of the runs: {', '.join(str(run.folder) for run in runs)}")
    return folders.index(os.path.abspath(wanted))


# --- evaluating and sampling ------------------------------------------------------------------------------------------


def _find_data(run: Run, given: tuple[Path, str, int] | None) -> Findings:
    """The data of a run, or that given for all; whatever is wrong with it becomes the reason not to evaluate."""
    found = Findings()
    own = run.settings.get("data")
    try:
        if not isinstance(own, str):
            raise UserError("its settings name no data")
        require_found(run.folder / CONFIG, {"data": own})
        found.data = Path(own)
        found.data_digest, train_tokens = _digest_and_tokens(found.data)
        if found.data_digest != run.record.get("data_digest", found.data_digest):
            raise UserError(f"{own} has changed since the run was trained on it")
        found.train_tokens = train_tokens
    except UserError as error:
        found.trouble = str(error)
    if given is not None:
        found.data, found.data_digest, _ = given
        found.trouble = ""
    if not run.has_player:
        found.trouble = "it has no player yet"
    return found


def _digest_and_tokens(data: Path) -> tuple[str, int]:
    """What tells prepared data from others, and how many training tokens they have."""
    from avatarl.data.dataset import read_manifest

    content, manifest = read_manifest(data)
    return hashlib.sha256(content).hexdigest(), manifest["tokens"]["train"]


def _default_prompts(findings: Sequence[Findings]) -> list[str]:
    """Beginnings of documents of the first data that can be read."""
    from avatarl.data import PreparedData

    for found in findings:
        if not found.trouble:
            try:
                return held_out_prompts(PreparedData.open(found.data))
            except UserError:  # reported by the evaluation
                continue
    return [""]


def _examine(run: Run, found: Findings, options: dict[str, Any], prompts: Sequence[str], sample_tokens: int) -> None:
    """Evaluate a run's best player, and let it continue the prompts."""
    try:
        found.evaluation = evaluate_model(run.folder, found.data, **options)
        for prompt in prompts:
            found.samples += generate(run.folder, prompt, max_new_tokens=sample_tokens, device=options["device"])
    except UserError as error:
        found.trouble = str(error)


# --- what the page says -----------------------------------------------------------------------------------------------


def _write(
    out: Path,
    runs: Sequence[Run],
    findings: Sequence[Findings],
    baseline: int,
    prompts: Sequence[str],
    is_evaluated: bool,
) -> None:
    trained = [what_was_trained(run, found.train_tokens) for run, found in zip(runs, findings, strict=True)]
    evaluations = {number: found.evaluation for number, found in enumerate(findings) if found.evaluation}
    is_same_text = [found.data_digest == findings[baseline].data_digest for found in findings]
    samples = [
        (prompt, [(number, found.samples[n]) for number, found in enumerate(findings) if n < len(found.samples)])
        for n, prompt in enumerate(prompts)
    ]
    write_page(
        out,
        "report",
        [run.name for run in runs],
        charts_of(runs, evaluations),
        baseline=baseline,
        warnings=_warnings(runs, evaluations, is_same_text),
        remarks=_remarks(runs, findings, trained, is_evaluated),
        overview=overview_table(runs, trained),
        commands=[(run.name, one_line(str(run.record.get("command", "unknown")))) for run in runs],
        resumed=[(run.name, lines) for run in runs if (lines := resumptions(run))],
        results=results_table(runs, trained, evaluations, baseline, is_same_text),
        seeds=sorted({one_line(str(run.settings.get("seed"))) for run in runs}),
        validation=validation_table(runs),
        reliability_tables=reliability_tables(runs, evaluations) if evaluations else [],
        samples=samples if any(found.samples for found in findings) else [],
        settings=settings_table(runs),
    )


def _warnings(runs: Sequence[Run], evaluations: dict[int, Any], is_same_text: Sequence[bool]) -> list[str]:
    """What would mislead a reader who did not know it."""
    warnings = []
    identities = [run.record.get("identity") for run in runs]
    tokenizers = {str(identity.get("tokenizer")) for identity in identities if isinstance(identity, dict)}
    is_same_data = all(same_data(run, other) for run in runs for other in runs)
    if not is_same_data:
        warnings.append("The runs were trained on different data, and validated on different text while they trained.")
    if not is_same_data and len(tokenizers) > 1:
        warnings.append(
            "The runs have different tokenizers, so nats per token, perplexity, accuracies and entropy do not compare. "
            "Bits per byte do, where the text is the same."
        )
    elif not all(is_same_text[number] for number in evaluations):
        warnings.append(
            "Each run was evaluated on its own data, and these differ, so no differences are shown. Only bits per byte "
            "compare, and only where the text is the same. Pass --data DIR to evaluate all runs on one."
        )
    return warnings


def _remarks(
    runs: Sequence[Run], findings: Sequence[Findings], trained: Sequence[Any], is_evaluated: bool
) -> dict[str, list[str]]:
    """What is missing of runs, or shown otherwise than it was logged, and the names of the runs it is true of."""
    of_runs: dict[str, list[str]] = {}
    for run, found, done in zip(runs, findings, trained, strict=True):
        lines, remarks = len(run.train), []
        if is_evaluated and found.trouble:
            remarks.append(f"not {'sampled further' if found.evaluation else 'evaluated'}: {found.trouble}")
        if missing := (found.evaluation or {}).get("bits_per_byte_missing"):
            remarks.append(f"no bits per byte: {missing}")
        if not run.record:
            remarks.append("environment.json is missing or damaged, so where it ran is unknown")
        if done.total_flops is None and done.steps:
            remarks.append("no FLOPs in the log, and so no curve over them")
        if lines > MOST_POINTS:
            remarks.append(
                f"each point of a training curve is the mean of some {lines / MOST_POINTS:.2g} of its {lines:,} lines"
            )
        for remark in remarks:
            of_runs.setdefault(remark, []).append(run.name)
    return of_runs
