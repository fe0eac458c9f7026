"""Which bytes of an artifact are coded together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from paredown.ship.pack import find
from paredown.ship.pack.blocks import Layout
from paredown.ship.pack.index import CHUNK, Stream

SMALL = 4096  # bytes of a tensor below which it is coded with others of its kind


def streams(paths: Sequence[Path], views: Sequence[np.ndarray]) -> list[Stream]:
    """What is coded together: the files' structure, small tensors of a kind, quantized tensors,
    each large tensor."""
    found: dict[tuple[Layout, bytes], list[tuple[int, int]]] = {}
    rest: list[tuple[int, int]] = []
    base = 0
    for path, view in zip(paths, views, strict=True):
        at = 0
        for tensor in find.tensors(path, view):
            if tensor.start > at:
                rest.append((base + at, base + tensor.start))
            at = tensor.end
            digest = hashlib.sha256(view[tensor.start : tensor.end].data).digest()
            place = (base + tensor.start, base + tensor.end)
            found.setdefault((tensor.layout, digest), []).append(place)
        if at < len(view):
            rest.append((base + at, base + len(view)))
        base += len(view)
    structure = [Stream(Layout(), tuple(rest), False, ())] if rest else []
    return structure + _grouped(found)


def _grouped(found: dict[tuple[Layout, bytes], list[tuple[int, int]]]) -> list[Stream]:
    """Streams of tensors, which come with the places where each is found."""
    small: dict[Layout, list[tuple[int, int]]] = {}
    alone: list[Stream] = []
    quantized = _Group()
    for (layout, _), places in found.items():
        size = places[0][1] - places[0][0]
        if layout.shapes and size <= CHUNK and len(places) == 1:
            quantized.add(layout.shapes[0], places[0])
        elif size < SMALL:
            small.setdefault(Layout(layout.width, 0, layout.floats), []).extend(places)
        else:
            alone.append(Stream(layout, tuple(places), len(places) > 1, ()))
    together = [_small(kind, sorted(places)) for kind, places in small.items()]
    return [*together, *quantized.streams, *alone]


def _small(kind: Layout, places: list[tuple[int, int]]) -> Stream:
    vectors = kind.floats and kind.width == 4
    shapes = tuple(((end - start) // 4,) for start, end in places) if vectors else ()
    return Stream(replace(kind, shapes=shapes), tuple(places), False, ())


class _Group:
    """Quantized tensors in streams of one chunk each."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def add(self, shape: tuple[int, ...], place: tuple[int, int]) -> None:
        last = self.streams[-1] if self.streams else None
        if last is None or last.size + place[1] - place[0] > CHUNK:
            self.streams.append(Stream(Layout(shapes=(shape,)), (place,), False, ()))
        else:
            layout = replace(last.layout, shapes=(*last.layout.shapes, shape))
            self.streams[-1] = replace(last, layout=layout, ranges=(*last.ranges, place))


def chunk_layout(layout: Layout, size: int) -> Layout:
    """How a chunk of a stream reads: of a tensor in several chunks each has some of its rows."""
    if sum(map(prod, layout.shapes)) * layout.width == size:
        return layout
    whole = layout.columns and size % layout.columns == 0 and len(layout.shapes) == 1
    shapes = ((size // layout.columns, *layout.shapes[0][1:]),) if whole else ()
    return replace(layout, shapes=shapes)


def gather(views: Sequence[np.ndarray], stream: Stream, at: int, size: int) -> np.ndarray:
    """Bytes ``at`` to ``at + size`` of a stream, from wherever they lie in the files."""
    found = []
    for start, end in stream.ranges[: 1 if stream.copies else None]:
        length = end - start
        if at < length and size:
            taken = min(size, length - at)
            found += _slices(views, start + at, start + at + taken)
            at, size = 0, size - taken
        else:
            at -= min(at, length)
    return np.concatenate(found)


def _slices(views: Sequence[np.ndarray], start: int, end: int) -> list[np.ndarray]:
    found, base = [], 0
    for view in views:
        a, b = max(start - base, 0), min(end - base, len(view))
        if a < b:
            found.append(view[a:b])
        base += len(view)
    return found
