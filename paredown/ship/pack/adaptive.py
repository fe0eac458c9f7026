"""Symbols of classes that learn their own frequencies as they go: no table is stored.

Each class starts from a bell of its own width and adds what it has seen, as a Dirichlet prior does.
Coder and decoder count alike, in whole numbers, so that every machine has the same frequencies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from paredown.ship.pack.entropy import Damaged

CLASSES = 24  # half an octave of spread apart, from 1/4 up
SYMBOLS = 256
_FIRST, _MOST = 256, 1 << 16  # symbols between two looks at the counts
_SEEN = 26_000  # weight of a symbol that was seen; a bell weighs about 2 ** 20
_STALE = 16  # a table is made anew once its class has grown by a sixteenth


def _bells() -> np.ndarray:
    """Whole numbers (classes, symbols): half normal and half Laplace, around 0 on a circle."""
    at = np.minimum(np.arange(SYMBOLS), SYMBOLS - np.arange(SYMBOLS))
    spread = 2.0 ** (np.arange(CLASSES)[:, None] / 2 - 2)
    normal = 0.4 * np.exp(-0.5 * (at / spread) ** 2)
    laplace = 0.7 * np.exp(-np.sqrt(2) * at / spread)
    bells = 0.6 * normal + 0.4 * laplace
    return np.rint(bells / bells.sum(1, keepdims=True) * 2**20).astype(np.int64) + 8


# Squared spreads between two classes, on a grid that hides how a machine rounds powers
_BETWEEN = np.rint(2.0 ** (np.arange(CLASSES - 1) - 3.5) * 4096) / 4096
_BELLS = _bells()


def classes(energy: np.ndarray) -> np.ndarray:
    """The class of each squared spread that is expected.

    Example:
        >>> classes(np.array([0.0, 1.0, 4.0, 1e9])).tolist()
        [0, 4, 6, 23]
    """
    return np.searchsorted(_BETWEEN, energy).astype(np.uint8)


class Counts:
    """What each class has seen, and its table."""

    def __init__(self) -> None:
        self._seen = np.zeros((CLASSES, SYMBOLS), np.int64)
        self._total = [0] * CLASSES
        self._made: list[tuple[int, Any] | None] = [None] * CLASSES

    def steps(self, count: int) -> list[tuple[int, int]]:
        """The pieces (start, end) between which tables stay as they are."""
        found, at, seen = [], 0, sum(self._total)
        while at < count:
            step = min(max(_FIRST, seen // 4), _MOST, count - at)
            found.append((at, at + step))
            at, seen = at + step, seen + step
        return found

    def table(self, number: int) -> Any:
        """The frequencies of a class, as constriction takes them."""
        import constriction

        made = self._made[number]
        total = self._total[number]
        if made is None or (total - made[0]) * _STALE > made[0]:
            weights = self._seen[number] * _SEEN + _BELLS[number]
            shares = (weights / weights.sum()).astype(np.float32)
            model = constriction.stream.model.Categorical(shares, perfect=False)
            made = self._made[number] = (total, model)
        return made[1]

    def add(self, number: int, symbols: np.ndarray) -> None:
        self._seen[number] += np.bincount(symbols, minlength=SYMBOLS)
        self._total[number] += len(symbols)


class Encoder:
    """Takes symbols in the order in which they will come out."""

    def __init__(self) -> None:
        self._counts = Counts()
        self._jobs: list[tuple[np.ndarray, Any]] = []

    def put(self, symbols: np.ndarray, kinds: np.ndarray) -> None:
        """Symbols (N,) uint8 of classes (N,)."""
        for start, end in self._counts.steps(len(symbols)):
            part = symbols[start:end]
            for number, chosen in grouped(kinds[start:end]):
                taken = part[chosen].astype(np.int32)
                self._jobs.append((taken, self._counts.table(number)))
                self._counts.add(number, taken)

    def finish(self) -> bytes:
        import constriction

        coder = constriction.stream.stack.AnsCoder()  # a stack: last in, first out
        for symbols, table in reversed(self._jobs):
            coder.encode_reverse(symbols, table)
        return coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Gives back what an `Encoder` took.

    Example:
        >>> symbols, kinds = np.arange(9, dtype=np.uint8), np.full(9, 7, np.uint8)
        >>> coder = Encoder()
        >>> coder.put(symbols, kinds)
        >>> Decoder(coder.finish()).get(kinds).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8]
    """

    def __init__(self, data: bytes) -> None:
        import constriction

        if len(data) % 4:
            raise Damaged("half a word")
        words = np.frombuffer(data, "<u4").astype(np.uint32)
        if len(words) and words[-1] == 0:
            raise Damaged("an empty last word")
        self._coder = constriction.stream.stack.AnsCoder(words)
        self._counts = Counts()

    def get(self, kinds: np.ndarray) -> np.ndarray:
        """Symbols (N,) uint8 of classes (N,)."""
        made = np.empty(len(kinds), np.uint8)
        for start, end in self._counts.steps(len(kinds)):
            part = made[start:end]
            for number, chosen in grouped(kinds[start:end]):
                count = end - start if isinstance(chosen, slice) else len(chosen)
                taken = self._coder.decode(self._counts.table(number), count)
                part[chosen] = taken
                self._counts.add(number, taken)
        return made

    def finish(self) -> None:
        """That nothing is left.

        Raises:
            Damaged: something is.
        """
        if not self._coder.is_empty():
            raise Damaged("symbols are left over")


def grouped(kinds: np.ndarray) -> list[tuple[int, Any]]:
    """(class, which elements are of it) for each class that occurs, in order."""
    counts = np.bincount(kinds)
    present = np.flatnonzero(counts)
    if len(present) == 1:
        return [(int(present[0]), slice(None))]
    order = np.argsort(kinds, kind="stable")
    ends = np.cumsum(counts)
    return [(int(k), order[ends[k] - counts[k] : ends[k]]) for k in present]
