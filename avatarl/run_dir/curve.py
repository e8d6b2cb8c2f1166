"""The validation curve of a run as a small picture.

Written by hand, since it is drawn anew whenever a player is the best so far. It depends on the numbers alone, so that a
run that was killed leaves the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT = 640, 300  # pixels
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 40  # margins
COLOUR = "#0072B2"

PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">
<rect width="{width}" height="{height}" fill="white"/>
<text x="{left}" y="20">validation cross-entropy, nats per token</text>
<text x="{right}" y="{below}" text-anchor="end">{tokens:,} training tokens</text>
<text x="{left}" y="{below}">0</text>
<path d="M{left} {top}H{right}M{left} {bottom}H{right}" stroke="lightgrey"/>
<text x="{beside}" y="{top}" dy="4" text-anchor="end">{highest:.3f}</text>
<text x="{beside}" y="{bottom}" dy="4" text-anchor="end">{lowest:.3f}</text>
<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>
<circle cx="{last_x}" cy="{last_y}" r="3" fill="{colour}"/>
</svg>
"""


def draw_curve(tokens: Sequence[int], cross_entropies: Sequence[float]) -> str:
    """Draw cross-entropy (nats) over training tokens as SVG text; the last of at least one point is marked."""
    highest, lowest = max(cross_entropies), min(cross_entropies)
    most, right, bottom = max(tokens), WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(count: int, nats: float) -> tuple[float, float]:
        x = LEFT + (right - LEFT) * count / most
        y = bottom - (bottom - TOP) * (nats - lowest) / (highest - lowest or 1.0)
        return round(x, 1), round(y, 1)

    places = [place(count, nats) for count, nats in zip(tokens, cross_entropies, strict=True)]
    return PICTURE.format(
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=right,
        top=TOP,
        bottom=bottom,
        below=bottom + 20,
        beside=LEFT - 6,
        tokens=most,
        highest=highest,
        lowest=lowest,
        points=" ".join(f"{x},{y}" for x, y in places),
        colour=COLOUR,
        last_x=places[-1][0],
        last_y=places[-1][1],
    )
