"""Charts inside table rows: numbers in, inline SVG out.

They use percentages, so that they stretch with the page while text and strokes keep their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from paredown.report.charts import shares, ticks


def strip(height: int, label: str, parts: Iterable[str]) -> str:
    """An SVG as wide as its cell; what it draws is placed in per cent."""
    return (
        f'<svg class="strip" width="100%" height="{height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def pair(before: float, after: float, top: float, label: str) -> str:
    """Two thin bars, before above after; a bar longer than the row ends in a notch."""
    parts = []
    for y, value, style in ((2, before, "fillbefore"), (12, after, "fillafter")):
        width = min(100 * value / top, 100.0) if top else 0.0
        parts.append(
            f'<rect x="0" y="{y}" width="{width:.2f}%" height="8" rx="1.5" class="{style}"/>'
        )
        if top and value > top:
            parts.append(f'<rect x="94%" y="{y - 1}" width="3" height="10" class="notch"/>')
    return strip(22, label, parts)


def dumbbell(before: float, after: float, low: float, high: float, label: str) -> str:
    """Two dots on a line: the original hollow, the compressed filled."""
    a, b = (2 + 96 * (value - low) / ((high - low) or 1.0) for value in (before, after))
    style = "worse" if after < before else "better"
    drawn = (
        '<line x1="0" y1="11" x2="100%" y2="11" class="grid"/>'
        f'<line x1="{a:.2f}%" y1="11" x2="{b:.2f}%" y2="11" class="link {style}"/>'
        f'<circle cx="{a:.2f}%" cy="11" r="5" class="from"/>'
        f'<circle cx="{b:.2f}%" cy="11" r="5" class="to"/>'
    )
    return strip(22, label, [drawn])


def gain(value: float, low: float, high: float, label: str) -> str:
    """A bar from zero: what is won to the right, what is lost to the left."""
    start, end = (100 * (v - low) / ((high - low) or 1.0) for v in sorted((0.0, value)))
    style = "fillafter" if value >= 0 else "fillworse"
    bar = (
        f'<rect x="{start:.2f}%" y="6" width="{max(0.0, end - start):.2f}%" height="10" rx="1.5" '
        f'class="{style}"/>'
    )
    zero = 100 * -low / ((high - low) or 1.0)
    axis = f'<line x1="{zero:.2f}%" y1="2" x2="{zero:.2f}%" y2="20" class="axis"/>'
    return strip(22, label, [bar, axis])


def ruler(low: float, high: float, inset: float, label: Callable[[float], str]) -> str:
    """The axis of a column of strips: ticks with texts, in per cent of the width."""
    parts = []
    for value in ticks(low, high, 4):
        at = inset + (100 - 2 * inset) * (value - low) / ((high - low) or 1.0)
        anchor = "start" if at < 6 else "end" if at > 94 else "middle"
        parts.append(
            f'<line x1="{at:.2f}%" y1="14" x2="{at:.2f}%" y2="19" class="axis"/>'
            f'<text x="{at:.2f}%" y="10" text-anchor="{anchor}" class="tick">'
            f"{escape(label(value))}</text>"
        )
    return strip(20, "Scale", parts)


def stacked(sizes: Sequence[float], label: str) -> str:
    """One bar cut into shares, in the order given."""
    parts, at = [], 0.0
    for index, share in enumerate(shares(sizes)):
        parts.append(
            f'<rect x="{100 * at:.2f}%" y="0" width="{100 * share:.2f}%" height="14" '
            f'class="share{index % 4}"/>'
        )
        at += share
    return strip(14, label, parts)
