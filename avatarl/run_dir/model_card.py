"""A finished player as an ordinary model folder: weights, configuration, tokenizer, a card and its picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avatarl.data.corpus import hub_name
from avatarl.durable import replace_folder
from avatarl.sanitise import backticks_around, markdown_code, one_line
from avatarl.untrusted import read_json

from .identity import ENVIRONMENT

CARD_FILE, CURVE_FILE = "README.md", "curve.svg"
SPENT = ("tokens", "player_flops", "critic_flops")
MOST_SOURCES = 5  # that a card lists
CARD = """\
---
{metadata}
---

# {name}

A causal language model of {total:,} parameters ({non_embedding:,} outside the embedding), trained from random weights
with avatarl by the objective `{objective}`.

| | |
|---|---|
| validation cross-entropy | {cross_entropy:.4f} nats per token at step {step} |
| training tokens at that step | {tokens:,} |
| FLOPs until then | {player_flops:.3g} of the player, {critic_flops:.3g} of critics |
| context | {block_size} tokens |
| precision | {precision} |
| critic | {critic} |
| data | {sources} |
| tokens of the data | {train_tokens} for training, {valid_tokens:,} for validation |
| SHA-256 of its manifest | `{data_digest}` |
| tokenizer | {tokenizer}, {vocab_size:,} entries |
{record}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## Evaluation

![Validation cross-entropy over training tokens]({curve})

Means over the run's own validation windows at step {step}; avatarl's docs/metrics.md defines each metric. They depend
on that text and on the tokenizer, and say nothing about other text.

| metric | value |
|---|---|
{metrics}

## Recipe

All settings of the run; `avatarl train --config RECIPE.yaml --out FOLDER` trains it again.

{recipe}
"""


def write_model_folder(
    folder: Path,
    player: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    pages: Mapping[str, str],
) -> None:
    """Write a model folder, and replace the previous one only when it is complete.

    Args:
        folder: Where to write.
        player: The model; its weights may be divided among processes.
        weights: Its whole weights, by their names in its ``state_dict``.
        tokenizer: Saved with it.
        pages: Texts for people to read, by file name.
    """

    def fill(partial: Path) -> None:
        cached = player.config.use_cache
        player.config.use_cache = player.generation_config.use_cache = True  # users of the folder generate text
        try:
            player.save_pretrained(partial, state_dict=dict(weights))
        finally:
            player.config.use_cache = cached
        tokenizer.save_pretrained(partial)
        _name_class_for_older_readers(partial / "tokenizer_config.json")
        for name, text in pages.items():
            (partial / name).write_text(text, encoding="utf-8")

    replace_folder(folder, fill)


def _name_class_for_older_readers(path: Path) -> None:
    """Call the tokenizer's class what transformers 4 calls it (llama.cpp's converter pins 4); 5 knows both names."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def model_card(
    run: Path,
    settings: Mapping[str, Any],
    evaluation: Mapping[str, float],
    manifest: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> str:
    """The README.md of an evaluated player: front matter for the Hub, what it is, and its whole recipe.

    Untrusted input (names, paths, the data's manifest) is shown as code or quoted, and cannot break out of its place.

    Args:
        run: The run folder.
        settings: The run's, as config.yaml has them.
        evaluation: ``step``, ``tokens``, ``player_flops``, ``critic_flops``, and the means of its metrics.
        manifest: The data's.
        facts: ``total`` and ``non_embedding`` parameters, ``precision``, names of ``critics``, ``unique_tokens`` of an
            epoch, ``data_digest`` and ``vocab_size``.
    """
    step, spent = int(evaluation["step"]), {name: evaluation[name] for name in SPENT}
    name = Path(os.path.abspath(run)).name  # also of "."
    sources, of_split = sources_of(manifest), manifest["tokens"]["train"]
    recipe = yaml.safe_dump({name: value for name, value in settings.items() if name != "out"}, sort_keys=False)
    fence = backticks_around(recipe, fewest=3)
    more = f" and {len(sources) - MOST_SOURCES} more" if len(sources) > MOST_SOURCES else ""
    return CARD.format(
        metadata=metadata(name, settings["objective"], sources, evaluation["cross_entropy"]),
        name=markdown_code(name),
        objective=settings["objective"],
        total=facts["total"],
        non_embedding=facts["non_embedding"],
        cross_entropy=evaluation["cross_entropy"],
        step=step,
        **spent,
        block_size=settings["block_size"],
        precision=facts["precision"],
        critic=", ".join(map(markdown_code, facts["critics"])) or "none",
        sources=(", ".join(map(markdown_code, sources[:MOST_SOURCES])) or "unknown") + more,
        train_tokens=f"{facts['unique_tokens']:,} of {of_split:,}" if settings["train_windows"] else f"{of_split:,}",
        valid_tokens=manifest["tokens"]["valid"],
        data_digest=facts["data_digest"],
        tokenizer=markdown_code(str(manifest.get("tokenizer"))),
        vocab_size=facts["vocab_size"],
        record="\n".join(f"| {name} | {value} |" for name, value in record_of(run)),
        curve=CURVE_FILE,
        metrics="\n".join(
            f"| {markdown_code(name)} | {value:.6g} |"
            for name, value in evaluation.items()
            if name not in ("step", *spent)
        ),
        recipe=f"{fence}yaml\n{recipe}{fence}",
    )


def metadata(name: str, objective: str, sources: Sequence[str], cross_entropy: float) -> str:
    """The front matter for the Hub, as YAML; the result is labelled as one of the data's validation split."""
    datasets = [dataset for source in sources if (dataset := hub_dataset(source))]
    result = EvalResult(
        task_type="text-generation",
        dataset_type=datasets[0] if len(datasets) == len(sources) == 1 else "text",
        dataset_name=one_line(", ".join(sources[:MOST_SOURCES])) or "unknown",
        dataset_split="validation",
        metric_type="cross_entropy",
        metric_name="cross-entropy, nats per token",
        metric_value=round(cross_entropy, 4),
    )
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["avatarl", objective])),
        datasets=datasets or None,
        model_name=one_line(name),
        eval_results=[result],
    ).to_yaml()


def sources_of(manifest: Mapping[str, Any]) -> list[str]:
    """The sources of prepared data, if its manifest lists them."""
    sources = manifest.get("sources")
    return list(map(str, sources)) if isinstance(sources, list) else []


def hub_dataset(source: str) -> str | None:
    """The Hub's id of a source ``hub:ID`` or ``hub:ID@CONFIG``; None for any other, such as ``hub:FOLDER``."""
    dataset, _ = hub_name(source)
    try:
        validate_repo_id(dataset)
    except HFValidationError:
        return None
    return dataset if source.startswith("hub:") and not Path(dataset).exists() else None


def record_of(run: Path) -> list[tuple[str, str]]:
    """From environment.json: revision and versions of the last start, and the changes at each resume."""
    try:
        record = read_json(run / ENVIRONMENT)
        last = [record, *record["resumed"]][-1]
        versions = {name: last["versions"][name] for name in ("avatarl", "torch", "transformers")}
        versions["avatarl"] = " ".join(filter(None, [versions["avatarl"], last["revision"]]))
        changed = [start for start in record["resumed"] if start["changes"]]
        changes = [f"from step {start['step']}: {'; '.join(start['changes'])}" for start in changed]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [("made with", "unknown")]
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [("made with", markdown_code(made_with)), *[("changed", markdown_code(change)) for change in changes]]
