"""Beginnings for models to continue, from text that none of them was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from avatarl.data import PreparedData

DOCUMENTS, PROMPT_TOKENS = 3, 12
SEARCHED_TOKENS = 100_000


def held_out_prompts(data: PreparedData) -> list[str]:
    """Nothing, which stands for the beginning of a document, and the beginnings of some held-out documents."""
    tokenizer = data.load_tokenizer()
    held_out = data.valid.slice(0, min(len(data.valid), SEARCHED_TOKENS))
    starts = np.flatnonzero(held_out == data.end_of_text_id)[:-1] + 1
    starts = starts[starts + PROMPT_TOKENS < len(held_out)]
    chosen = starts[np.linspace(0, len(starts) - 1, DOCUMENTS).astype(int)] if len(starts) else np.array([0])
    openings = [held_out[start : start + PROMPT_TOKENS].tolist() for start in chosen]
    openings = [ids[: ids.index(data.end_of_text_id)] if data.end_of_text_id in ids else ids for ids in openings]
    return list(dict.fromkeys(["", *map(tokenizer.decode, openings)]))
