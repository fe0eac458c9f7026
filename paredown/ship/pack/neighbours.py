"""What the neighbours of a quantized weight say of it: where it will lie, and how widely.

A tensor is gone through in steps along one of its axes (output channels, input channels or the
taps of a kernel), all lanes of a step at once. A weight is predicted from those before it in its
lane, by weights that were fitted to the tensor; its spread from how far the prediction was off in
its lane, or in its row and its column of lanes, and from the step's own scale. All is in whole
numbers or in elementwise float64, which every machine rounds alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from paredown.ship.pack.adaptive import classes

FEW = 32  # steps up to which each has prediction weights of its own
LAGS = 8  # steps back that those look
ONE = 64  # a prediction weight of 1
MOST_WEIGHT = 127
LEAST_SCALE, MOST_SCALE = -20, 20  # of a step, in octaves of squared spread


@dataclass(frozen=True)
class How:
    """How a tensor of ``before * steps * after`` elements is gone through.

    Lanes are (rows, lanes / rows). ``weights`` are in 1/64; none: nothing is predicted. ``spread``
    is the class of the whole tensor's. ``scales`` are one per step, in octaves of squared spread.
    """

    before: int
    steps: int
    after: int
    rows: int
    weights: tuple[int, ...] = ()
    far: int = 0
    learns: bool = False  # the spread of lanes
    spread: int = 0
    scales: tuple[int, ...] = ()

    @property
    def lanes(self) -> int:
        return self.before * self.after

    @property
    def size(self) -> int:
        return self.steps * self.lanes

    def view(self, values: np.ndarray) -> np.ndarray:
        """(N,) elements as (steps, lanes)."""
        shaped = values.reshape(self.before, self.steps, self.after)
        return shaped.transpose(1, 0, 2).reshape(self.steps, self.lanes)

    def unview(self, values: np.ndarray) -> np.ndarray:
        """(steps, lanes) as (N,) elements."""
        shaped = values.reshape(self.steps, self.before, self.after)
        return shaped.transpose(1, 0, 2).reshape(-1)


def weights_needed(steps: int, far: int = 0) -> int:
    """How many prediction weights so many steps take: of many steps those of a few lags and of the
    lanes beside."""
    if steps > FEW:
        return len(_lags(far)) + 2
    return sum(min(step, LAGS) for step in range(steps))


class Walk:
    """The state of going through a tensor step by step, for who decodes it."""

    def __init__(self, how: How) -> None:
        self._how = how
        self._ahead = max(LAGS, how.far + 1)  # rows of zeros, before the first step
        self._values = np.zeros((self._ahead + how.steps, how.lanes), np.int32)
        self._weights = np.array(how.weights, np.int32)
        self._spreads = Spreads(how)

    def expected(self, step: int) -> tuple[np.ndarray | int, np.ndarray]:
        """Where the values of a step will lie, (lanes,) int, and their classes of spread."""
        kinds = self._spreads.kinds(step)
        return (self._predicted(step) if self._how.weights else 0), kinds

    def _predicted(self, step: int) -> np.ndarray:
        at = self._ahead + step
        if self._how.steps > FEW:
            last = self._values[at - 1]
            seen = self._values[[at - lag for lag in _lags(self._how.far)]]
            found = self._weights[: len(seen)] @ seen
            found += self._weights[-2] * np.concatenate([last[-1:], last[:-1]])
            found += self._weights[-1] * np.concatenate([last[1:], last[:1]])
            return rounded(found)
        first, count = weights_needed(step), min(step, LAGS)
        found = self._weights[first : first + count] @ self._values[at - count : at][::-1]
        return rounded(found)

    def saw(self, step: int, values: np.ndarray, off: np.ndarray) -> None:
        """Take in a step's values (lanes,) and how far they lay from what was expected."""
        self._values[self._ahead + step] = values
        self._spreads.saw(step, off)


class Spreads:
    """What is known of the spread of each lane before a step."""

    def __init__(self, how: How) -> None:
        self._how = how
        self._columns = how.lanes // how.rows
        self._crossed = how.rows > 1 and self._columns > 1
        self._whole = 2.0 ** (how.spread - 4)
        self._sums = np.zeros(how.rows if self._crossed else how.lanes)
        self._cross = np.zeros(self._columns)
        self._all = 0.0
        self._steps = 0

    def kinds(self, step: int) -> np.ndarray:
        """The class (lanes,) of each lane."""
        if not self._how.learns:
            return np.full(self._how.lanes, self._how.spread, np.uint8)
        energy = self._energy()
        return classes(energy * 2.0 ** self._how.scales[step] if self._how.scales else energy)

    def _energy(self) -> np.ndarray:
        """The squared spread of each lane, (lanes,), by what was seen of it or, where lanes are in
        rows and columns, of its row and its column."""
        if not self._crossed:
            return (self._sums + 4 * self._whole) / (self._steps + 4)
        known, rows, columns = 2 * self._whole, self._how.rows, self._columns
        along = (self._sums + known) / (self._steps * columns + 2)
        across = (self._cross + known) / (self._steps * rows + 2)
        whole = (self._all + known) / (self._steps * rows * columns + 2)
        return (along[:, None] * across / whole).reshape(-1)

    def saw(self, step: int, off: np.ndarray) -> None:
        """Take in how far a step's values (lanes,) lay from what was expected."""
        if not self._how.learns:
            return
        energy = off.astype(np.int64) ** 2
        scale = 2.0 ** -self._how.scales[step] if self._how.scales else 1.0
        self._steps += 1
        if not self._crossed:
            self._sums += energy * scale
            return
        shaped = energy.reshape(self._how.rows, self._columns)
        self._sums += shaped.sum(1) * scale
        self._cross += shaped.sum(0) * scale
        self._all += float(energy.sum()) * scale


def rounded(sums: np.ndarray) -> np.ndarray:
    """Sums of weighted values as values."""
    return np.minimum(np.maximum((sums + ONE // 2) >> ONE.bit_length() - 1, -128), 127)


def _lags(far: int) -> tuple[int, ...]:
    return (1, 2, 3, far - 1, far, far + 1) if far else (1, 2, 3)


def offs(values: np.ndarray, how: How) -> tuple[np.ndarray, np.ndarray]:
    """How far (steps, lanes) int8 values lie from where they are expected, int8, and their
    classes, as a `Walk` says them step by step."""
    off = values
    if how.weights:
        off = (values.astype(np.int16) - _all_predicted(values, how)).astype(np.int8)
    if not how.learns:
        return off, np.full(values.shape, how.spread, np.uint8)
    spreads = Spreads(how)
    kinds = np.empty(values.shape, np.uint8)
    for step in range(how.steps):
        kinds[step] = spreads.kinds(step)
        spreads.saw(step, off[step])
    return off, kinds


def _all_predicted(values: np.ndarray, how: How) -> np.ndarray:
    found = np.zeros(values.shape, np.int32)
    if how.steps > FEW:
        lags = _lags(how.far)
        for lag, weight in zip(lags, how.weights, strict=False):
            found[lag:] += weight * values[:-lag].astype(np.int32)
        for by, weight in ((1, how.weights[-2]), (-1, how.weights[-1])):
            found[1:] += weight * np.roll(values[:-1], by, 1).astype(np.int32)
        return rounded(found)
    for step in range(1, how.steps):
        first, count = weights_needed(step), min(step, LAGS)
        weights = np.array(how.weights[first : first + count], np.int32)
        found[step] = weights @ values[step - count : step][::-1].astype(np.int32)
    return rounded(found)


# --- fitting ---------------------------------------------------------------------------------


def fitted(values: np.ndarray, how: How, far: bool) -> How:
    """With the prediction weights of least squares for (steps, lanes) int8 values."""
    if how.steps > FEW:
        distance = _far(values) if far else 0
        lags = _lags(distance)
        first = max(lags)
        seen = [values[first - lag : how.steps - lag] for lag in lags]
        seen += [np.roll(seen[0], by, 1) for by in (1, -1)]
        found = _least_squares(np.stack(seen).reshape(len(seen), -1), values[first:].reshape(-1))
        return replace(how, weights=tuple(found), far=distance)
    weights: list[int] = []
    for step in range(1, how.steps):
        weights += _least_squares(values[step - min(step, LAGS) : step][::-1], values[step])
    return replace(how, weights=tuple(weights))


def _least_squares(seen: np.ndarray, target: np.ndarray) -> list[int]:
    """Weights (n,) in 1/64 that predict (N,) from (n, N)."""
    seen, target = seen.astype(np.float32), target.astype(np.float32)
    products = (seen @ seen.T).astype(np.float64)
    products += np.eye(len(seen)) * (0.01 * np.trace(products) / len(seen) + 1)
    found = np.linalg.solve(products, (seen @ target).astype(np.float64))
    return np.clip(np.rint(found * ONE), -MOST_WEIGHT, MOST_WEIGHT).astype(int).tolist()


def _far(values: np.ndarray) -> int:
    """The distance in steps, beyond the nearest, at which values are most alike; 0: none."""
    steps = len(values)
    if steps <= FEW:
        return 0
    spectrum = np.fft.rfft(values.astype(np.float32), 2 * steps, axis=0)
    alike = np.fft.irfft((np.abs(spectrum) ** 2).sum(1))[5 : steps // 2]
    return int(alike.argmax()) + 5 if len(alike) else 0


def with_spread(values: np.ndarray, how: How, learns: bool, scaled: bool) -> How:
    """With the spread of what (steps, lanes) int8 values are off, and with ``scaled`` that of each
    step."""
    off, _ = offs(values, replace(how, learns=False, scales=()))
    energy = (off.astype(np.float32) ** 2).mean(1)
    spread = int(classes(np.array([energy.mean()]))[0])
    scales: tuple[int, ...] = ()
    if scaled:
        octaves = np.rint(np.log2((energy + 0.01) / (energy.mean() + 0.01)))
        scales = tuple(np.clip(octaves, LEAST_SCALE, MOST_SCALE).astype(int).tolist())
    return replace(how, spread=spread, learns=learns, scales=scales)
