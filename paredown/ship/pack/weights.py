"""Quantized weights, tensor after tensor, each by what its neighbours say of it.

A block holds a head, deflated, of whole numbers (LEB128, signed ones folded), and behind it the
coded deviations of all tensors, whose classes learn from one tensor to the next.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from paredown.ship.pack.adaptive import CLASSES, Decoder, Encoder
from paredown.ship.pack.entropy import Damaged, deflate, entropy_bits, inflate
from paredown.ship.pack.neighbours import (
    FEW,
    LEAST_SCALE,
    MOST_SCALE,
    MOST_WEIGHT,
    How,
    Walk,
    fitted,
    offs,
    weights_needed,
    with_spread,
)
from paredown.ship.pack.whole_numbers import Reader, number, signed

MAX_STEPS = 1 << 15  # of all tensors in a block: a step costs time, however few its lanes
MOST_STEPS = 4096  # of a tensor
MIN_LANES = 8
LEARNING = ((False, False), (True, False), (True, True))  # spreads of lanes, and of steps
SMALLER = 0.97  # of the squares is left where a prediction is worth its weights
SAMPLE = 1 << 16  # elements by which one way through a tensor is chosen
_HEAD = struct.Struct("<II")  # bytes of the head, deflated and inflated
_KERNEL = 16  # an axis up to this long may be one of a kernel's


def encode(values: np.ndarray, hows: Sequence[How]) -> bytes:
    """Code (N,) uint8, which are int8 tensors behind each other, each by its way.

    Example:
        >>> values = np.arange(60, dtype=np.uint8)
        >>> hows = [chosen(values[:20], (4, 5))[0], chosen(values[20:], (2, 2, 10))[0]]
        >>> np.array_equal(decode(encode(values, hows), 60), values)
        True
    """
    coder, head = Encoder(), bytearray(number(len(hows)))
    head += b"".join(map(_written, hows))
    for how, start in _largest_first(hows):
        tensor = values[start : start + how.size].view(np.int8)
        for off, kinds in zip(*offs(how.view(tensor), how), strict=True):
            coder.put(off.view(np.uint8), kinds)
    packed = deflate(bytes(head))
    return _HEAD.pack(len(packed), len(head)) + packed + coder.finish()


def decode(data: bytes, size: int) -> np.ndarray:
    """The (size,) uint8 that `encode` was given.

    Raises:
        Damaged: the data was not written for that size.
    """
    if len(data) < _HEAD.size:
        raise Damaged("cut off")
    length, whole = _HEAD.unpack_from(data)
    if whole > 1100 * length + 64:
        raise Damaged("a head larger than it can be")
    head = Reader(inflate(data[_HEAD.size : _HEAD.size + length], whole))
    coder = Decoder(data[_HEAD.size + length :])
    made = np.empty(size, np.uint8)
    hows = [_read(head) for _ in range(head.count())]
    head.finish()
    if sum(how.size for how in hows) != size:
        raise Damaged("tensors that do not fill the block")
    if sum(how.steps for how in hows) > MAX_STEPS:
        raise Damaged("more steps than a block can have")
    for how, start in _largest_first(hows):
        made[start : start + how.size] = how.unview(_tensor(coder, how)).view(np.uint8)
    coder.finish()
    return made


def _largest_first(hows: Sequence[How]) -> list[tuple[How, int]]:
    """Each tensor with where it starts: small ones have much to learn from large ones."""
    starts = np.cumsum([0, *(how.size for how in hows)]).tolist()
    return sorted(zip(hows, starts[:-1], strict=True), key=lambda each: (-each[0].size, each[1]))


def _tensor(coder: Decoder, how: How) -> np.ndarray:
    """(steps, lanes) int8 of the next tensor."""
    walk = Walk(how)
    made = np.empty((how.steps, how.lanes), np.int8)
    for step in range(how.steps):
        middle, kinds = walk.expected(step)
        off = coder.get(kinds).view(np.int8)
        made[step] = (off.astype(np.int16) + middle).astype(np.int8)
        walk.saw(step, made[step], off)
    return made


# --- the head --------------------------------------------------------------------------------


def _written(how: How) -> bytes:
    flags = bool(how.weights) | how.learns << 1 | bool(how.scales) << 2
    made = b"".join(map(number, (how.before, how.steps, how.after, how.rows, flags, how.spread)))
    if how.weights:
        made += number(how.far) + b"".join(map(signed, how.weights))
    return made + b"".join(map(signed, how.scales))


def _read(head: Reader) -> How:
    before, steps, after, rows, flags, spread = (head.number() for _ in range(6))
    if not 0 < steps <= MAX_STEPS or not before or not after or not rows:
        raise Damaged("a tensor of no size, or of too many steps")
    if before * after % rows or flags > 7 or spread >= CLASSES:
        raise Damaged("a tensor that cannot be")
    weights, far = [], 0
    if flags & 1:
        far = head.number()
        weights = [head.signed() for _ in range(weights_needed(steps, far))]
    scales = [head.signed() for _ in range(steps)] if flags & 4 else []
    if far >= steps or any(abs(each) > MOST_WEIGHT for each in weights):
        raise Damaged("a prediction that cannot be")
    if any(not LEAST_SCALE <= each <= MOST_SCALE for each in scales):
        raise Damaged("a scale that cannot be")
    learns = bool(flags & 2)
    return How(before, steps, after, rows, tuple(weights), far, learns, spread, tuple(scales))


# --- choosing --------------------------------------------------------------------------------


def chosen(tensor: np.ndarray, shape: tuple[int, ...]) -> tuple[How, float]:
    """The way through (N,) bytes that takes the fewest bits, by a sample, and about how many."""
    tensor = tensor.view(np.int8)
    best, least = None, np.inf
    for way in ways(shape):
        few = _sample(way.view(tensor), way)
        small = replace(way, before=few.shape[1], steps=len(few), after=few.shape[2])
        values = few.reshape(len(few), -1)
        predicted = _predicting(values, replace(small, rows=few.shape[1]))
        for learns, scaled in LEARNING if way.steps > 1 else LEARNING[:1]:
            how = with_spread(values, predicted, learns, scaled)
            bits = _cost(values, how) * (len(tensor) / values.size)
            if bits < least:
                best, least = (way, how), bits
    assert best is not None  # there is always the way of one step
    return _whole(tensor, *best), least


def ways(shape: tuple[int, ...]) -> Iterator[How]:
    """In one step, and along each axis, or the two of a kernel."""
    sizes = [size for size in shape if size > 1]
    size = prod(sizes)
    yield How(size, 1, 1, 1)
    pairs = [n for n in range(len(sizes) - 1) if max(sizes[n : n + 2]) <= _KERNEL]
    single = [n for n in range(len(sizes)) if n not in pairs and n - 1 not in pairs]
    for first, last in [*((n, n + 1) for n in single), *((n, n + 2) for n in pairs)]:
        steps, ahead, behind = prod(sizes[first:last]), sizes[:first], sizes[last:]
        if MIN_LANES * steps <= size and steps <= MOST_STEPS:
            rows = ahead[0] if ahead else prod(behind[:-1])
            yield How(prod(ahead), steps, prod(behind), rows)


def _sample(values: np.ndarray, way: How) -> np.ndarray:
    """(steps, rows, columns) out of (steps, lanes): all steps, and lanes for about SAMPLE
    elements."""
    shaped = values.reshape(way.steps, way.rows, -1)
    if values.size <= 3 * SAMPLE:
        return shaped
    _, rows, columns = shaped.shape
    keep = max(MIN_LANES, SAMPLE // way.steps)
    down = min(rows, keep if columns == 1 else max(2, keep // min(columns, keep)))
    across = min(columns, -(-keep // down))
    return np.ascontiguousarray(shaped[:, :down, :across])


def _predicting(values: np.ndarray, way: How) -> How:
    """With prediction, where it makes (steps, lanes) int8 values smaller."""
    if way.steps == 1:
        return way
    tried = [fitted(values, way, far) for far in (False, True)[: 1 + (way.steps > FEW)]]
    before, *after = (_energy(values, how) for how in (way, *tried))
    least = min(after)
    return tried[after.index(least)] if least < SMALLER * before else way


def _energy(values: np.ndarray, how: How) -> float:
    return float((offs(values, replace(how, learns=False))[0].astype(np.float32) ** 2).sum())


def _whole(tensor: np.ndarray, way: How, few: How) -> How:
    """What was chosen for a sample of a tensor, for the whole of it."""
    values = way.view(tensor)
    how = replace(few, before=way.before, steps=way.steps, after=way.after, rows=way.rows)
    if how.weights and way.steps <= FEW:
        how = fitted(values, how, False)
    return with_spread(values, how, how.learns, bool(few.scales))


def _cost(values: np.ndarray, how: How) -> float:
    """About how many bits (steps, lanes) int8 values take."""
    off, kinds = offs(values, how)
    joint = kinds.astype(np.int32) * 256 + off.view(np.uint8)
    counts = np.bincount(joint.reshape(-1), minlength=CLASSES * 256).reshape(CLASSES, 256)
    present = int(np.count_nonzero(counts))
    scales = np.unique(how.scales, return_counts=True)[1]
    told = 5.0 * len(how.weights) + (entropy_bits(scales) + 16 if how.scales else 0.0)
    return entropy_bits(counts) + told + 2.0 * present
