"""Small texts, and the means to read a prepared folder back."""

from __future__ import annotations

import json

import pytest

from avatarl.data import PreparedData
from avatarl.data.prepare import prepare

WORDS = "the quick brown fox jumps over a lazy dog while seven quiet owls watch from an old oak tree".split()


def story(number: int, words: int = 60) -> str:
    """A text that differs from number to number and has repetition enough to train merges on."""
    chosen = [WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(words)]
    return f"Story {number}. " + " ".join(chosen) + ".\n"


@pytest.fixture
def stories_file(tmp_path):
    """Forty documents as JSON lines."""
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story(n)}) + "\n" for n in range(40)))
    return path


@pytest.fixture
def prepared(stories_file, tmp_path) -> PreparedData:
    """The forty documents, prepared in shards of 500 tokens."""
    prepare([str(stories_file)], tmp_path / "prepared", tokenizer="bpe:300", shard_tokens=500, quiet=True)
    return PreparedData.open(tmp_path / "prepared")
