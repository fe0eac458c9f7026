"""Draw the two pictures of docs/structured-pruning.md from real analyses.

python docs/make_structured_pruning.py groups   # docs/coupled-groups.svg, in seconds
python docs/make_structured_pruning.py time     # docs/analysis-time.svg, about two minutes
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor, fx, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from paredown.graph.capture import capture  # noqa: E402
from paredown.graph.coupling.coupling import Coupling, analyze  # noqa: E402
from paredown.graph.model import Input, Model  # noqa: E402
from paredown.graph.values import refresh_values  # noqa: E402
from paredown.report.charts import Scale, frame, line, text  # noqa: E402

HERE = Path(__file__).parent
CELL, GAP, TOP = 12, 44, 84  # of the picture of groups, in its units
UNIT = 2  # the unit that is filled in, of every group
OPS = (10, 30, 100, 300, 1000, 3000, 10_000)
REPEATS = 5

# a card of its own in both themes, so that the words can be read on any page; the two groups
# differ in lightness, not in hue alone
STYLE = """
svg { --card: #ffffff; --edge: #d0d7de; --ink: #1f2328; --soft: #59636e; --cell: #eef1f4;
  --first: #1b4b91; --second: #f2a33a; }
@media (prefers-color-scheme: dark) { svg { --card: #161b22; --edge: #3d444d; --ink: #f0f6fc;
  --soft: #a5b0bb; --cell: #262d36; --first: #4a7fd6; --second: #ffd58a; } }
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); }
.tick, .small { fill: var(--soft); font-size: 12px; }
.name { fill: var(--ink); font-size: 13px; } .strong { font-weight: 600; }
.card { fill: var(--card); stroke: var(--edge); }
.cell { fill: var(--cell); stroke: var(--card); stroke-width: 1.5; }
.whole { fill: var(--soft); opacity: .45; }
.g0 { fill: var(--first); } .g1 { fill: var(--second); }
.flow { fill: none; stroke: var(--soft); stroke-width: 1.6; }
.head { fill: var(--soft); }
.grid { stroke: var(--edge); stroke-width: 1; opacity: .6; }
.axis { stroke: var(--soft); stroke-width: 1; }
.l0 { fill: none; stroke: var(--first); stroke-width: 2.5; }
.l1 { fill: none; stroke: var(--second); stroke-width: 2.5; }
"""


def picture(width: float, height: float, label: str, parts: list[str]) -> str:
    """A picture that stands by itself, on its own card."""
    inset = f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8" class="card"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img" aria-label="{escape(label)}">'
        f"<style>{STYLE}</style>\n" + "\n".join([inset, *parts]) + "\n</svg>\n"
    )


# --- the groups of a residual block ----------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norms and a shortcut, between a first and a last layer."""

    def __init__(self, width: int = 8, inner: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return self.head(x.mean((2, 3)))


@dataclass
class Box:
    """A layer in the picture: its tensors side by side, or an op without weights."""

    name: str
    tensors: list[tuple[str, tuple[int, ...]]]
    left: float = 0.0

    @property
    def matrix(self) -> bool:
        return len(self.tensors) == 1

    @property
    def columns(self) -> int:
        return self.tensors[0][1][1] if self.matrix else len(self.tensors)

    @property
    def rows(self) -> int:
        return self.tensors[0][1][0] if self.tensors else 0

    @property
    def width(self) -> float:
        return CELL * self.columns if self.tensors else 26.0

    @property
    def right(self) -> float:
        return self.left + self.width


def draw_groups() -> str:
    model = capture(ResidualBlock(), (torch.zeros(1, 3, 8, 8),))
    coupling = analyze(model)
    boxes, edges = layers(model, coupling)
    left = 34.0
    for box in boxes:
        box.left, left = left, left + box.width + GAP
    places = {box.name: number for number, box in enumerate(boxes)}
    middle = TOP + CELL * max(box.rows for box in boxes) / 2
    parts: list[str] = []
    for start, end in edges:
        parts += flow(boxes, places[start], places[end], middle)
    for box in boxes:
        parts += drawn(box, middle, coupling)
    bottom = middle + CELL * max(box.rows for box in boxes) / 2 + 64
    width = left - GAP + 34
    parts += legend(coupling, bottom)
    return picture(width, bottom + 92, "What must be cut together in a residual block", parts)


def layers(model: Model, coupling: Coupling) -> tuple[list[Box], list[tuple[str, str]]]:
    """The layers with weights and the additions, in order, and which reads which."""
    shapes = {t.name: t.shape for t in coupling.tensors if t.shape}
    boxes: dict[str, Box] = {}
    edges: dict[tuple[str, str], None] = {}
    made: dict[fx.Node, str] = {}  # value -> the box that it comes from
    for node in model.graph.graph.nodes:
        if node.op != "call_function":
            continue
        sources = [made[n] for n in node.all_input_nodes if n in made]
        weights = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        if weights:
            name = weights[0].rpartition(".")[0]
            boxes[name] = Box(name, [(w, shapes[w]) for w in weights if w in shapes])
        elif len(sources) > 1:
            name = "+"
            boxes[name] = Box(name, [])
        elif sources:
            made[node] = sources[0]  # an op that passes its channels on
            continue
        else:
            continue
        edges |= {(source, name): None for source in sources}
        made[node] = name
    return list(boxes.values()), list(edges)


def drawn(box: Box, middle: float, coupling: Coupling) -> list[str]:
    """The cells of a layer's tensors; a unit of each group filled in, its dimensions marked."""
    if not box.tensors:
        x = box.left + box.width / 2
        return [
            f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="13" class="card"/>',
            text(x, middle + 5, "+", "middle", "strong"),
        ]
    top = middle - CELL * box.rows / 2
    at = box.left + box.width / 2
    shape = box.tensors[0][1]
    words = (
        " × ".join(map(str, shape)) if box.matrix else f"{len(box.tensors)} vectors of {shape[0]}"
    )
    parts = [
        text(at, top - 38, box.name, "middle", "name strong"),
        text(at, top - 22, words, "middle", "small"),
    ]
    filled: dict[tuple[int, int], list[int]] = {}
    for number, group in enumerate(coupling.groups):
        for member in group.members:
            for column, (name, _) in enumerate(box.tensors):
                if member.name == name:
                    cells = member.indices[UNIT].tolist()
                    for place in _cells(box, member.dim, cells, column):
                        filled.setdefault(place, []).append(number)
    for row in range(box.rows):
        for column in range(box.columns):
            x, y = box.left + CELL * column, top + CELL * row
            parts += _square(x, y, filled.get((row, column), []))
    return parts + marks(box, top, coupling)


def _cells(box: Box, dim: int, indices: list[int], column: int) -> Iterator[tuple[int, int]]:
    """What one unit of a member takes: rows or columns of a matrix, an entry of a vector."""
    for index in indices:
        if not box.matrix:
            yield index, column
        else:
            others = range(box.columns if dim == 0 else box.rows)
            yield from ((index, n) if dim == 0 else (n, index) for n in others)


def _square(x: float, y: float, groups: list[int]) -> list[str]:
    """One cell in the colour of the group whose unit it goes with; of two, in halves."""
    style = f"cell g{groups[0]}" if groups else "cell"
    parts = [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{CELL}" height="{CELL}" rx="2" class="{style}"/>'
    ]
    if len(groups) > 1:
        corners = f"{x + 1:.1f},{y + CELL - 1:.1f} {x + CELL - 1:.1f},{y + 1:.1f}"
        third = f"{x + CELL - 1:.1f},{y + CELL - 1:.1f}"
        parts.append(f'<polygon points="{corners} {third}" class="g{groups[1]}"/>')
    return parts


def marks(box: Box, top: float, coupling: Coupling) -> list[str]:
    """A bar along each dimension in the colour of its group; grey where it stays whole."""
    group_of = {
        (m.name, m.dim): f"g{number}"
        for number, group in enumerate(coupling.groups)
        for m in group.members
    }
    name = box.tensors[0][0]
    height = CELL * box.rows
    parts = [_bar(box.left - 8, top, 5, height, group_of.get((name, 0), "whole"))]
    if box.matrix:
        parts.append(_bar(box.left, top - 8, box.width, 5, group_of.get((name, 1), "whole")))
    return parts


def _bar(x: float, y: float, width: float, height: float, style: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2.5" '
        f'class="{style}"/>'
    )


def flow(boxes: list[Box], start: int, end: int, middle: float) -> list[str]:
    """An arrow from one layer to the next, or around those between."""
    a, b = boxes[start], boxes[end]
    if end == start + 1:
        x1, x2 = a.right + 4, b.left - (12 if b.tensors else 2)
        path = f"M{x1:.1f} {middle:.1f}H{x2 - 6:.1f}"
        return [f'<path d="{path}" class="flow"/>', _arrow(x2, middle, 1, 0)]
    below = middle + CELL * max(box.rows for box in boxes) / 2 + 24
    x1, x2 = a.right + GAP / 2 - 8, b.left + b.width / 2
    path = (
        f"M{x1:.1f} {middle:.1f}V{below - 8:.1f}Q{x1:.1f} {below:.1f} {x1 + 8:.1f} {below:.1f}"
        f"H{x2 - 8:.1f}Q{x2:.1f} {below:.1f} {x2:.1f} {below - 8:.1f}V{middle + 20:.1f}"
    )
    words = text((x1 + x2) / 2, below - 7, "shortcut", "middle", "small")
    return [f'<path d="{path}" class="flow"/>', _arrow(x2, middle + 14, 0, -1), words]


def _arrow(x: float, y: float, dx: int, dy: int) -> str:
    """A head whose point is at (x, y), in direction (dx, dy)."""
    back, side = (x - 7 * dx, y - 7 * dy), (4 * dy, 4 * dx)
    points = [
        (x, y),
        (back[0] + side[0], back[1] + side[1]),
        (back[0] - side[0], back[1] - side[1]),
    ]
    return f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}" class="head"/>'


def legend(coupling: Coupling, top: float) -> list[str]:
    """What each colour is, in the analysis' own figures."""
    parts = []
    for number, group in enumerate(coupling.groups):
        y = top + 22 * number
        layers = len({member.name.rpartition(".")[0] for member in group.members})
        words = (
            f"group “{group.name}”: {group.size} channels, {len(group.members)} dimensions of "
            f"tensors in {layers} layers, {'exact' if group.exact else 'not exact'}"
        )
        parts += [_bar(34, y - 10, 12, 12, f"g{number}"), text(54, y, words)]
    y = top + 22 * len(coupling.groups)
    parts += [_bar(34, y - 10, 12, 12, "whole"), text(54, y, "stays whole: input, outputs")]
    words = (
        f"Filled: channel {UNIT} of each group; all of it goes, or none. A square is a 3 × 3 "
        "kernel of a convolution, else one number."
    )
    parts.append(text(34, y + 26, words, style="small"))
    return parts


# --- the time that an analysis takes ---------------------------------------------------------


def chain(ops: int, residual: bool) -> Model:
    """A model of so many ops: linear layers and ReLUs, behind each other or on a residual stream.

    Written down as a graph, since capturing 10,000 ops takes minutes; `analyze` sees the same.
    """
    aten, width = torch.ops.aten, 8
    small = capture(nn.Linear(width, width), (torch.zeros(1, width),))
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("input")

    def layer(value: fx.Node, number: int) -> fx.Node:
        setattr(root, f"layer{number}", nn.Linear(width, width))
        weight = graph.get_attr(f"layer{number}.weight")
        bias = graph.get_attr(f"layer{number}.bias")
        return graph.call_function(aten.linear.default, (value, weight, bias))

    x = layer(x, 0)
    for number in range(1, 1 + (ops - 2) // (3 if residual else 2)):
        y = graph.call_function(aten.relu.default, (layer(x, number),))
        x = graph.call_function(aten.add.Tensor, (x, y)) if residual else y
    graph.output((layer(x, ops),))
    module = fx.GraphModule(root, graph)
    inputs = (Input("input", torch.zeros(1, width), {0: "batch"}),)
    model = Model(module, inputs, small.arguments, small.outputs)
    refresh_values(model)
    return model


def measured(residual: bool) -> list[tuple[int, float]]:
    """(ops, median processor seconds of `analyze`) for each size, the first run not counted."""
    found = []
    for wanted in OPS:
        model = chain(wanted, residual)
        ops = sum(node.op == "call_function" for node in model.graph.graph.nodes)
        seconds = []
        for _ in range(REPEATS + 1):
            start = time.process_time()
            coupling = analyze(model)
            seconds.append(time.process_time() - start)
        assert coupling.groups and not coupling.unknown
        found.append((ops, statistics.median(seconds[1:])))
        print(f"{'residual' if residual else 'plain'} chain, {ops} ops: {found[-1][1]:.4f} s")
    return found


def draw_time() -> str:
    series = {"plain chain": measured(False), "residual chain": measured(True)}
    values = [seconds for points in series.values() for _, seconds in points]
    x = Scale(OPS[0] * 0.65, OPS[-1] * 1.25, 76, 566, log=True)
    y = Scale(min(values) / 1.6, max(values) * 1.6, 300, 50, log=True)
    parts = frame(x, y, "ops in the graph", "")
    parts.append(
        text(24, 28, "processor time of one analysis, seconds (median of 5)", style="name")
    )
    for number, (name, points) in enumerate(series.items()):
        path = " ".join(f"{x(ops):.1f},{y(seconds):.1f}" for ops, seconds in points)
        parts.append(f'<polyline points="{path}" class="l{number}"/>')
        for ops, seconds in points:
            parts.append(_mark(x(ops), y(seconds), number))
        at = 246 + 20 * number
        parts += [line(426, at, 454, at, f"l{number}"), _mark(440, at, number)]
        parts.append(text(462, at + 4, name, style="name"))
    return picture(600, 356, "Time of an analysis against the number of ops", parts)


def _mark(x: float, y: float, number: int) -> str:
    """A round mark for the first series, a square one for the second."""
    if number == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="g0"/>'
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" class="g1"/>'


def main() -> None:
    drawn = {
        "groups": ("coupled-groups.svg", draw_groups),
        "time": ("analysis-time.svg", draw_time),
    }
    torch.set_num_threads(1)
    for name in sys.argv[1:] or drawn:
        file, draw = drawn[name]
        (HERE / file).write_text(draw())


if __name__ == "__main__":
    main()
