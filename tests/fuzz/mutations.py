"""Ways to damage a file, and hostile values; all of it decided by one ``random.Random``."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# What a terminal obeys, what a page or a picture interprets, and what a path or a parser stumbles over.
HOSTILE_TEXTS = (
    "",
    "\x00",
    "a\x00b",
    "\x1b[2J\x1b[31mred",
    "\x1b]8;;https://example.org\x07link\x1b]8;;\x07",
    "\x9b31m\x85",
    "over\rwritten\b\b\b",
    "\u202egnp.exe",
    "two\nlines",
    "half\ud800",
    "|cell|`code`<script>alert(1)</script>",
    "$\\frac{1}{0}$",
    "[red]markup[/red]",
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "~",
    "%s%n{0}{self}",
    "!!python/object/apply:os.system ['touch exploited']",
    "__import__('os').system('touch exploited')",
    "https://example.org/model",
    "organisation/name",
    "漢字 🙂 ä",
    "x" * 100_000,
)
HOSTILE_NUMBERS = (
    0,
    -1,
    1,
    2,
    255,
    65_536,
    2**31,
    2**32,
    2**63,
    2**64,
    10**9,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
)
HOSTILE_VALUES = (None, True, False, [], {}, [[]], {"": None}, [None] * 100, *HOSTILE_TEXTS, *HOSTILE_NUMBERS)
HOSTILE_BYTES = (b"", b"\0", b"\xff\xfe\0", b"\n" * 1000, b"\x80\x04\x95", b"PK\x03\x04", b"{", b"[" * 100_000, b"null")

# A pickle that makes the file `exploited` in the working folder as soon as it is read.
PICKLE = b"cos\nsystem\n(S'touch exploited'\ntR."


def hostile_value(rng: random.Random) -> Any:
    """A value that JSON can write, of any type."""
    return copy.deepcopy(rng.choice(HOSTILE_VALUES))


def nested(depth: int) -> bytes:
    """Brackets within brackets, as JSON and YAML both read them."""
    return b"[" * depth + b"]" * depth


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """``content`` with one to four changes: bits turned, cut off, cut out, doubled, overwritten, replaced."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = rng.choice(BYTE_DAMAGES)(content, rng)
    return content


def _turned_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 8, 64)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut_off(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _cut_out(content: bytes, rng: random.Random) -> bytes:
    start, stop = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:start] + content[stop:]


def _doubled(content: bytes, rng: random.Random) -> bytes:
    start, stop = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:stop] + content[start:]


def _overwritten(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + rng.randbytes(rng.choice((1, 4, 8, 100))) + content[start + 1 :]


def _with_hostile_text(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + rng.choice(HOSTILE_TEXTS).encode("utf-8", "surrogatepass") + content[start:]


def _replaced(content: bytes, rng: random.Random) -> bytes:
    return rng.choice((*HOSTILE_BYTES, PICKLE, nested(100_000)))


BYTE_DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _turned_bits,
    _turned_bits,
    _cut_off,
    _cut_out,
    _doubled,
    _overwritten,
    _with_hostile_text,
    _replaced,
)


def damaged_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of what JSON or YAML holds with one to three entries replaced, removed, renamed, doubled or nested."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return hostile_value(rng)
        container, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1:
                deep: Any = container[key]
                for _ in range(rng.choice((1, 10, 500))):
                    deep = rng.choice(([deep], {"x": deep}))
                container[key] = deep
            case 2 if isinstance(container, dict):
                container[rng.choice(HOSTILE_TEXTS)] = container.pop(key)
            case 3:
                other, other_key = rng.choice(places)
                container[key] = copy.deepcopy(other[other_key])
            case 4 if isinstance(container[key], (int, float)):
                container[key] += rng.choice((-1, 1, 0.5, 1000))
            case _:
                container[key] = hostile_value(rng)
    return tree


def _places(tree: Any):
    """Every (container, key) in a tree."""
    waiting = [tree]
    while waiting:
        container = waiting.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        for key in keys:
            yield container, key
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON file, damaged in its structure or in its bytes; what Python cannot write is damaged in its bytes."""
    if rng.random() < 0.7:
        try:
            return json.dumps(damaged_tree(json.loads(content), rng)).encode("utf-8", "surrogatepass")
        except (RecursionError, ValueError):
            pass
    return damaged_bytes(content, rng)
