"""What inputs and outputs looked like when the artifact was made: histograms, kept as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paredown.core.errors import UserError
from paredown.core.files import write_atomically
from paredown.ship.guard.features import CLASS, COMMON, FINITE, Floats, of_batches

BINS = 10  # between the least and the largest value, of equal shares; the usual count for PSI
MOST_COMMON = 31
HELD = 20_000  # values of a feature that are held while a profile is made
FORMAT = 1
Batch = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Histogram:
    """Counts of one feature.

    Args:
        edges: of the bins, rising, each bin without its lower and with its upper end; two more
            bins are open. With ``exact``, the values that have a bin each; one more is of all
            others.
        exact: whether values are counted one by one.
        counts: (bins,).
        examples: how many the counts are of.

    Example:
        >>> Histogram((0.0, 1.0), False, (0, 2, 0), 2).counted([-1.0, 0.5, 9.0]).tolist()
        [1, 1, 1]
        >>> Histogram((7.0, 9.0), True, (3, 1, 0), 4).counted([7, 8, 9, 9]).tolist()
        [1, 2, 1]
    """

    edges: tuple[float, ...]
    exact: bool
    counts: tuple[int, ...]
    examples: int

    def counted(self, values: ArrayLike) -> NDArray[np.int64]:
        """How many of ``values`` (N,) fall into each bin."""
        array = np.asarray(values, np.float64)
        edges = np.asarray(self.edges)
        at = np.searchsorted(edges, array, side="left")
        if self.exact:
            there = edges[np.minimum(at, len(edges) - 1)] == array
            at = np.where(there, at, len(edges))
        return np.bincount(at, minlength=len(edges) + 1).astype(np.int64)


@dataclass(frozen=True)
class Profile:
    """Histograms of inputs and outputs, by the features that `paredown.ship.guard.features` names.

    Example:
        >>> batches = [{"x": np.linspace(0, 1, 100).reshape(50, 2)}]
        >>> profile = Profile.of(batches)
        >>> sorted(profile.histograms)[:2]
        ['input x: mean', 'input x: not finite']
    """

    histograms: Mapping[str, Histogram] = field(default_factory=dict)

    @staticmethod
    def of(inputs: Iterable[Batch], outputs: Iterable[Batch] = ()) -> Profile:
        """The profile of batches, each name -> (examples, ...), such as those of a calibration.

        Of each feature at most 20,000 values are held while it is made.

        Raises:
            UserError: there is no example in them.
        """
        found: dict[str, _Sample] = {}
        for kind, batches in (("input", inputs), ("output", outputs)):
            for batch in batches:
                for name, (values, examples) in of_batches(batch, kind).items():
                    found.setdefault(name, _Sample()).add(values, examples)
        made = {name: each.histogram(name) for name, each in found.items() if each.size}
        if not made:
            raise UserError("profile: expected batches of numbers, got no example.")
        return Profile(made)

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON; the file is whole or not there.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        told = {
            name: {
                "edges": list(each.edges),
                "exact": each.exact,
                "counts": list(each.counts),
                "examples": each.examples,
            }
            for name, each in self.histograms.items()
        }
        text = json.dumps({"format": FORMAT, "histograms": told}, allow_nan=False)
        write_atomically(Path(path), text.encode())

    @staticmethod
    def load(path: str | Path) -> Profile:
        """The profile that `save` wrote.

        Raises:
            UserError: no such file, or it holds something else.
        """
        path = Path(path)
        try:
            told = json.loads(path.read_bytes())
            if not isinstance(told, dict) or not {"format", "histograms"} <= told.keys():
                raise ValueError('it lacks "format" and "histograms"')
            if told["format"] != FORMAT:
                raise ValueError(f"its format is {told['format']!r}, expected {FORMAT}")
            made = {str(name): _read(each) for name, each in told["histograms"].items()}
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{path}: is no profile, as paredown.Profile.save writes it: {what}."
            ) from error
        return Profile(made)


class _Sample:
    """Values of one feature, evenly spaced over all that came, at most twice `HELD`."""

    def __init__(self) -> None:
        self.kept: list[Floats] = []
        self.size = self.examples = 0
        self._stride = 1

    def add(self, values: Floats, examples: int) -> None:
        self.examples += examples
        self.kept.append(values[:: self._stride])
        self.size += len(self.kept[-1])
        while self.size > 2 * HELD:
            self.kept = [np.concatenate(self.kept)[::2]]
            self.size = len(self.kept[0])
            self._stride *= 2

    def histogram(self, name: str) -> Histogram:
        values = np.concatenate(self.kept)
        exact = name.endswith((COMMON, CLASS, FINITE))
        edges = _frequent(values) if exact else _quantiles(values)
        blank = Histogram(tuple(map(float, edges)), exact, (), self.examples)
        return Histogram(blank.edges, exact, tuple(map(int, blank.counted(values))), self.examples)


def _frequent(values: Floats) -> Floats:
    each, counts = np.unique(values, return_counts=True)
    return np.sort(each[np.argsort(-counts, kind="stable")[:MOST_COMMON]])


def _quantiles(values: Floats) -> Floats:
    """Edges of bins with equal shares; just below the least value begins the lowest."""
    inner = np.quantile(values, np.linspace(0, 1, BINS + 1)[1:])
    low = np.nextafter(values.min(), -math.inf)
    return np.unique(np.concatenate([[low], inner]))


def _read(told: dict[str, Any]) -> Histogram:
    edges = tuple(float(each) for each in told["edges"])
    counts = tuple(int(each) for each in told["counts"])
    examples = int(told["examples"])
    finite = all(map(math.isfinite, edges)) and all(a < b for a, b in pairwise(edges))
    if not (edges and finite and len(counts) == len(edges) + 1):
        raise ValueError("the edges of a histogram do not rise, or have other counts")
    if not (min(counts) >= 0 and sum(counts) > 0 and examples > 0):
        raise ValueError("the counts of a histogram are no counts")
    return Histogram(edges, bool(told["exact"]), counts, examples)
