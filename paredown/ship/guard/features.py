"""What of a batch is watched for drift: a few numbers an example, whatever its shape."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST_ELEMENTS = 64  # of one example that are pooled
MOST_EXAMPLES = 256  # of one batch that are looked at
MOST_NUMBERS = 2**21  # of one batch that are looked at, in whole examples, and of one tick
MOST_CHANNELS = 4
MOST_CLASSES = 1000
FINITE = "not finite"  # the feature that is 1 where an example holds NaN or infinity
COMMON = "common"  # the feature whose histogram is of the most frequent values
CLASS = "class"


def features(batch: np.ndarray, output: bool = False) -> dict[str, Floats]:
    """Feature -> its values over a batch of any shape, the examples along the first axis.

    * ``values``: elements of all examples, at most 64 evenly spaced ones of each.
    * ``mean``, ``spread``: of each example that has several elements (of an image the brightness
      and the contrast).
    * ``channel 0``, ...: of images, (N, C, H, W) or (N, H, W, C), each channel's mean.
    * ``common``: of whole numbers, such as token ids, the same values again, to be counted one
      by one.
    * ``class``: of outputs (N, classes), the largest one's index.
    * ``not finite``: 1 where an example holds NaN or infinity; such values are in nothing else.

    A batch of anything but numbers has none.

    Example:
        >>> found = features(np.array([[0.0, 2.0], [1.0, np.nan]]))
        >>> found["mean"].tolist(), found["not finite"].tolist()
        ([1.0, 1.0], [0.0, 1.0])
    """
    array = np.asarray(batch)
    if array.dtype.kind not in "fiub" or array.size == 0:
        return {}
    array = array.reshape(1) if array.ndim == 0 else array
    room = max(1, MOST_NUMBERS * len(array) // array.size)  # examples
    array = array[_spaced(len(array), min(MOST_EXAMPLES, room))]
    whole = array.dtype.kind in "iub"
    values = array.astype(np.float64)
    flat = values.reshape(len(values), -1)  # (examples, elements)
    good = np.isfinite(flat)
    pooled = flat[:, _spaced(flat.shape[1], MOST_ELEMENTS)].ravel()
    whole_rows = np.asarray(good.all(1))
    found: dict[str, Floats] = {
        FINITE: np.where(whole_rows, 0.0, 1.0),
        "values": pooled[np.isfinite(pooled)],
    }
    if flat.shape[1] > 1:
        found |= _moments(flat, good)
    if whole:
        found[COMMON] = found["values"]
    if output and not whole and array.ndim == 2 and 1 < array.shape[1] <= MOST_CLASSES:
        found[CLASS] = flat[whole_rows].argmax(1).astype(np.float64)
    return found | _channels(values)


def of_batches(batches: Mapping[str, np.ndarray], kind: str) -> dict[str, tuple[Floats, int]]:
    """Full name, such as "input x: mean" -> the values, and how many examples they are of."""
    found: dict[str, tuple[Floats, int]] = {}
    for name, batch in batches.items():
        seen = features(batch, kind == "output")
        if seen:
            examples = len(seen[FINITE])
            found |= {f"{kind} {name}: {key}": (values, examples) for key, values in seen.items()}
    return found


def _spaced(n: int, most: int) -> NDArray[np.intp]:
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.intp))


def _moments(flat: Floats, good: NDArray[np.bool_]) -> dict[str, Floats]:
    """Mean and spread of each example's finite values; an example without any has none."""
    counts = good.sum(1)
    some = counts > 0
    kept = np.clip(np.where(good, flat, 0.0), -1e150, 1e150)  # squares of larger ones overflow
    mean = kept.sum(1)[some] / counts[some]
    around = np.where(good[some], kept[some] - mean[:, None], 0.0)
    return {"mean": mean, "spread": np.sqrt((around**2).sum(1) / counts[some])}


def _channels(values: Floats) -> dict[str, Floats]:
    if values.ndim != 4:
        return {}
    axis = 1 if values.shape[1] <= MOST_CHANNELS else 3
    if not 1 < values.shape[axis] <= MOST_CHANNELS:
        return {}
    rows = np.moveaxis(values, axis, 1).reshape(len(values), values.shape[axis], -1)
    means = rows.mean(2)  # (examples, channels)
    means = means[np.isfinite(means).all(1)]
    return {f"channel {each}": means[:, each] for each in range(means.shape[1])}
