"""A finished player as an ordinary model folder: weights, configuration, tokenizer and a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avatarl.inert import markdown_code
from avatarl.models import count_parameters

from ..config import TrainConfig
from .durable import replace_folder

CARD_FILE = "README.md"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
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
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    critics: Sequence[str],
    step: int,
    cross_entropy: float,
) -> None:
    """Write ``folder`` whole and only then put it in place of the one before.

    Args:
        folder: What to write.
        player: The model; its weights may be divided among processes.
        weights: They, whole, as its ``state_dict`` names them.
        tokenizer: Saved with it.
        config: For the card.
        critics: Those that judged.
        step: After how many steps.
        cross_entropy: On validation windows, nats, of the player as it is now.
    """
    count = count_parameters(player)
    card = CARD.format(
        name=markdown_code(Path(config.out).name),
        objective=config.objective,
        tags=", ".join(dict.fromkeys(["avatarl", config.objective])),
        total=count.total,
        non_embedding=count.non_embedding,
        cross_entropy=cross_entropy,
        step=step,
        tokens=step * config.windows_per_step * config.block,
        block=config.block,
        critic=", ".join(map(markdown_code, critics)) or "none",
    )

    def fill(partial: Path) -> None:
        cached = player.config.use_cache
        player.config.use_cache = True  # who opens the folder wants to generate
        try:
            player.save_pretrained(partial, state_dict=dict(weights))
        finally:
            player.config.use_cache = cached
        tokenizer.save_pretrained(partial)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")

    replace_folder(folder, fill)
