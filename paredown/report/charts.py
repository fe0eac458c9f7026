"""Charts: numbers in, inline SVG out. Colours are CSS variables, so they follow the page's theme.

They have a fixed ``viewBox``; the strips inside table rows are in strips.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

Box = tuple[float, float, float, float]  # left, top, right, bottom

CHARACTER = 7.0  # the width of a digit at the charts' font size, rounded up
LETTER = 8.4  # and of a letter of a bold name
BEYOND = 0.05  # the share of samples, the slowest, that may lie outside a latency's axis
FAR = 3.0  # spreads of the middle half above it, from where on a sample is an outlier
LINE = 13.0


@dataclass(frozen=True)
class Scale:
    """Maps low..high to start..end, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, count)


@dataclass(frozen=True)
class Point:
    """One step of the trajectory.

    Attributes:
        label: its number in the table.
        state: "shipped" where it is in the artifact, else "kept" or "undone".
        after: the label of the step that it was made from, "" of the first.
    """

    x: float
    y: float
    label: str
    state: str
    title: str
    after: str = ""


@dataclass(frozen=True)
class Axis:
    """A label with its unit, and the goal's bound with its text, if there is one."""

    label: str
    goal: float | None = None
    goal_text: str = ""


def finite(values: Iterable[object]) -> list[float]:
    """The numbers among ``values`` that can be drawn."""
    return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within low..high, at most ``count`` steps apart.

    Example:
        >>> ticks(0, 97, 5), ticks(0.912, 0.931, 4)
        ([0.0, 20.0, 40.0, 60.0, 80.0], [0.915, 0.92, 0.925, 0.93])
    """
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next((m * power for m in (1, 2, 5) if (high - low) / (m * power) <= count), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{n * step:.9g}") + 0.0 for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within low..high; powers of ten alone when those suffice.

    Example:
        >>> log_ticks(30, 1200)
        [50.0, 100.0, 200.0, 500.0, 1000.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [float(f"{m * 10.0**p:.6g}") for p in powers for m in (1, 2, 5)]
    inside = [value for value in every if low <= value <= high]
    tens = [value for value in inside if f"{value:e}".startswith("1.0")]
    return tens if len(inside) > 7 and len(tens) > 1 else inside


def number(value: float) -> str:
    """A tick's text: no exponent in the usual range, a true minus sign.

    Example:
        >>> number(1200.0), number(-0.05), number(1e-7)
        ('1,200', '−0.05', '1e−07')
    """
    text = f"{value:,.10g}" if abs(value) < 1e7 and abs(value) >= 1e-4 else f"{value:.3g}"
    return text.replace("-", "−")


def svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, words: str, anchor: str = "start", style: str = "tick") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">'
        f"{escape(words)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """The range of ``values`` with some air; never empty."""
    low, high = min(values), max(values)
    air = (high - low) * share or abs(high) * 0.02 or 1.0
    return low - air, high + air


def thinned(scale: Scale, labels: Callable[[float], str] = number) -> list[tuple[float, str]]:
    """Positions and texts of a horizontal axis' ticks, leaving out those that would touch."""
    shown: list[tuple[float, str]] = []
    edge = -math.inf
    for value in scale.ticks():
        half = len(labels(value)) * CHARACTER / 2
        if scale(value) - half > edge + 6:
            shown.append((scale(value), labels(value)))
            edge = scale(value) + half
    return shown


def frame(x: Scale, y: Scale, x_label: str, y_label: str) -> list[str]:
    """Gridlines, tick texts and axis labels; the label of y stands above it, never rotated."""
    parts = levels(y, y_label, x)
    for position, words in thinned(x):
        parts.append(line(position, y.start, position, y.start + 4, "axis"))
        parts.append(text(position, y.start + 18, words, "middle"))
    parts.append(text(x.end, y.start + 36, x_label, "end", "name"))
    return parts


def levels(y: Scale, label: str, x: Scale) -> list[str]:
    """Gridlines with their tick texts, the line at the bottom, and the axis' label above."""
    parts = []
    for value in y.ticks(5):
        parts.append(line(x.start, y(value), x.end, y(value), "grid"))
        parts.append(text(x.start - 8, y(value) + 4, number(value), "end"))
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(text(0, 12, label, "start", "name"))
    return parts


def trajectory(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    """Score against a cost: each kept step joined to the one it was made from, what leads to the
    artifact by a bold line; undone ones hollow, goals dashed."""
    xs = [p.x for p in points] + finite([x_axis.goal])
    ys = [p.y for p in points] + finite([y_axis.goal])
    log = min(xs) > 0 and max(xs) / min(xs) > 8
    low, high = (min(xs) / 1.3, max(xs) * 1.3) if log else (min(0.0, min(xs)), max(xs) * 1.06)
    x = Scale(low, high if high > low else low + 1, 56, 446, log)
    y = Scale(*padded(ys, 0.12), 268, 40)
    at = {p.label: (x(p.x), y(p.y)) for p in points}
    joined = [p for p in points if p.state != "undone" and p.after in at]
    joined.sort(key=lambda p: p.state == "shipped")
    taken = [around(x(p.x), y(p.y), 6) for p in points]
    parts = [*frame(x, y, x_axis.label, y_axis.label), *_goals(x, y, x_axis, y_axis, taken)]
    for p in joined:
        style = "path" if p.state == "shipped" else "path left"
        parts.append(line(*at[p.after], *at[p.label], style))
    labels = [place(x(p.x), y(p.y), p.label, taken, (x.start, 34, x.end, 266)) for p in points]
    parts += [_dot(x(p.x), y(p.y), p) for p in points]
    return svg(460, 312, f"{y_axis.label} against {x_axis.label}", parts + labels)


def _goals(x: Scale, y: Scale, x_axis: Axis, y_axis: Axis, taken: list[Box]) -> list[str]:
    """The bounds as dashed lines with their texts, and the corner that meets both, tinted."""
    parts = []
    across = x.end if x_axis.goal is None else x(x_axis.goal)
    floor = y.start if y_axis.goal is None else y(y_axis.goal)
    if x_axis.goal is not None or y_axis.goal is not None:
        parts.append(
            f'<rect x="{x.start:.1f}" y="{y.end:.1f}" width="{across - x.start:.1f}" '
            f'height="{floor - y.end:.1f}" class="zone"/>'
        )
    if x_axis.goal is not None:
        width = len(x_axis.goal_text) * CHARACTER
        middle = min(max(across, x.start + width / 2), x.end - width / 2)
        parts.append(line(across, y.start, across, y.end, "goal"))
        parts.append(text(middle, y.end - 7, x_axis.goal_text, "middle", "goaltext"))
    if y_axis.goal is not None:
        parts.append(line(x.start, floor, x.end, floor, "goal"))
        width = len(y_axis.goal_text) * CHARACTER
        above = (x.end - width, floor - 5 - LINE, x.end, floor - 3)
        free = not any(_touch(above, box) for box in taken)
        box = above if free else (above[0], floor + 3, x.end, floor + 5 + LINE)
        parts.append(text(x.end, box[3] - 2, y_axis.goal_text, "end", "goaltext"))
        taken.append(box)
    return parts


def _dot(x: float, y: float, point: Point) -> str:
    title = f"<title>{escape(point.title)}</title>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{point.state}">{title}</circle>'


def around(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def place(x: float, y: float, words: str, taken: list[Box], within: Box) -> str:
    """The label at the nearest spot that touches nothing drawn so far; far ones get a leader."""
    width = len(words) * (CHARACTER if words.isdigit() else LETTER) + 2
    for distance in range(14, 150, 8):
        for turn in range(16):
            angle = -math.pi / 2 + (turn + 1) // 2 * (-1) ** turn * math.pi / 8
            cx, cy = x + distance * math.cos(angle), y + distance * math.sin(angle)
            box = (cx - width / 2, cy - LINE / 2, cx + width / 2, cy + LINE / 2)
            inside = within[0] <= box[0] and box[2] <= within[2]
            inside = inside and within[1] <= box[1] and box[3] <= within[3]
            if inside and not any(_touch(box, other) for other in taken):
                taken.append(box)
                near = 1 - 9 / distance
                lead = line(x, y, x + (cx - x) * near, y + (cy - y) * near, "lead")
                return (lead if distance > 14 else "") + text(cx, cy + 4, words, "middle", "mark")
    return ""  # more points than room: the table below still has them all


def outline(edges: Sequence[float], heights: Sequence[float], x: Scale, y: Scale) -> str:
    """The closed outline of a histogram as path data."""
    steps = "".join(
        f"V{min(max(y(h), y.end), y.start):.1f}H{x(right):.1f}"
        for h, right in zip(heights, edges[1:], strict=True)
    )
    return f"M{x(edges[0]):.1f} {y.start:.1f}{steps}V{y.start:.1f}Z"


def shares(counts: Sequence[float]) -> list[float]:
    """Counts as shares of their sum."""
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def histogram(name: str, edges: Sequence[float], before: list[float], after: list[float]) -> str:
    """Weights before and after; bars far above the original's peak are cut and say their share."""
    first, second = shares(before), shares(after)
    top = min(max(first + second), 1.8 * max(first)) or max(second) or 1.0
    x = Scale(edges[0], edges[-1], 12, 188)
    y = Scale(0, top, 92, 16)
    parts = [
        f'<path d="{outline(edges, first, x, y)}" class="before"/>',
        f'<path d="{outline(edges, second, x, y)}" class="after"/>',
        line(12, 92, 188, 92, "axis"),
    ]
    if max(second) > top:
        peak = second.index(max(second))
        middle = min(max(x((edges[peak] + edges[peak + 1]) / 2), 28), 172)
        parts.append(text(middle, 11, f"{max(second):.0%} ↑", "middle", "cut"))
    for at, words in _few(x):
        half = len(words) * CHARACTER / 2
        parts.append(line(at, 92, at, 95, "axis"))
        parts.append(text(min(max(at, half), 200 - half), 107, words, "middle"))
    return svg(200, 112, f"Weights of {name}", parts)


def _few(x: Scale) -> list[tuple[float, str]]:
    """As many tick texts as fit side by side within a small chart."""
    for count in (5, 4, 3, 2, 1):
        found = [(x(value), number(value)) for value in ticks(x.low, x.high, count)]
        widest = max((len(words) for _, words in found), default=0) * CHARACTER
        apart = min((b[0] - a[0] for a, b in itertools.pairwise(found)), default=200.0)
        ends = 200 - widest if len(found) == 2 else 200.0  # the outer ones are moved inwards
        if widest + 8 < min(apart, ends):
            return found
    return found[:1]


def slowest(samples: Sequence[float]) -> float:
    """Where the axis of some latencies may end: behind the last that is no outlier, and never
    before the slowest twentieth.

    Example:
        >>> slowest([1.0, 1.1, 1.2, 1.3]), slowest([*(1 + n / 100 for n in range(39)), 90.0])
        (1.3, 1.38)
    """
    ordered = sorted(samples)
    first, third = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.75))
    usual = [value for value in ordered if value <= third + FAR * (third - first)]
    return max(usual[-1], ordered[math.ceil((1 - BEYOND) * len(ordered)) - 1])


def latency(original: list[float], compressed: list[float], unit: str, width: int = 900) -> str:
    """Both distributions over one axis, each with its median; outliers lie outside."""
    samples = {"original": sorted(original), "compressed": sorted(compressed)}
    samples = {name: values for name, values in samples.items() if values}
    low = min(values[0] for values in samples.values())
    high = max(slowest(values) for values in samples.values())
    low, high = padded([low, high], 0.04)
    bins = 60
    edges = [low + (high - low) * n / bins for n in range(bins + 1)]
    heights = {name: binned(values, low, high, bins) for name, values in samples.items()}
    x = Scale(low, high, 44, width - 14)
    y = Scale(0, 108 * max(max(h) for h in heights.values()), 250, 52)
    parts = frame(x, y, f"time of one inference, {unit}", "share of inferences, %")
    for row, (name, values) in enumerate(samples.items()):
        style = "before" if name == "original" else "after"
        outlined = outline(edges, [100 * h for h in heights[name]], x, y)
        middle = x(median(values))
        right = middle > x.end - 190
        words = f"{name}: median {median(values):.3g} {unit}"
        parts.append(f'<path d="{outlined}" class="{style}"/>')
        parts.append(line(middle, y.start, middle, 24 + 18 * row, f"median {style}line"))
        at = middle - 7 if right else middle + 7
        parts.append(text(at, 32 + 18 * row, words, "end" if right else "start", f"{style}text"))
    return svg(width, 292, "Distributions of the latency", parts)


def binned(values: Sequence[float], low: float, high: float, bins: int) -> list[float]:
    """The share of ``values`` in each of ``bins`` equal bins; what lies above is left out.

    Example:
        >>> binned([0.1, 0.2, 0.9, 5.0], 0.0, 1.0, 2)
        [0.5, 0.25]
    """
    counts = [0] * bins
    for value in values:
        index = int((value - low) / (high - low) * bins)
        if 0 <= index < bins:
            counts[index] += 1
    return [count / len(values) for count in counts]
