"""A finished player as an ordinary model folder: weights, configuration, tokenizer and a card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avatarl.models import count_parameters

from .config import TrainConfig

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [avatarl, {objective}]
---

# {name}

A causal language model of {total:,} parameters ({non_embedding:,} outside the embedding), trained from random weights
with avatarl by the objective `{objective}`.

| | |
|---|---|
| validation cross-entropy | {cross_entropy:.4f} nats per token at step {step} |
| training tokens at that step | {tokens:,} |
| context | {block} tokens |
| critic | {critic} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

The cross-entropy is that of its own validation windows and tokenizer; it says nothing about other text.
"""


def write_model_folder(
    folder: Path,
    player: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    critics: Sequence[str],
    step: int,
    cross_entropy: float,
) -> None:
    """Write ``folder`` whole and only then put it in place of the one before.

    ``critics`` are those that judged; ``cross_entropy`` (nats) is that of the player as it is now, after ``step``.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    cached = player.config.use_cache
    player.config.use_cache = True  # who opens the folder wants to generate
    player.save_pretrained(partial)
    player.config.use_cache = cached
    tokenizer.save_pretrained(partial)
    count = count_parameters(player)
    card = CARD.format(
        name=Path(config.out).name,
        objective=config.objective,
        total=count.total,
        non_embedding=count.non_embedding,
        cross_entropy=cross_entropy,
        step=step,
        tokens=step * config.windows_per_step * config.block,
        block=config.block,
        critic=", ".join(f"`{name}`" for name in critics) or "none",
    )
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
