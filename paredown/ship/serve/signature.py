"""What a model takes and gives, as the protocol tells it; arrays checked against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paredown.ship.serve.protocol import Request
from paredown.ship.serve.refused import Refused
from paredown.ship.serve.tensors import DATATYPES

Item = Mapping[str, Any]  # name, dtype and shape, as the signature of a predictor has it


@dataclass(frozen=True)
class Signature:
    """A model's inputs and outputs.

    Attributes:
        inputs: as `paredown.targets.runtimes.Predictor` has them.
        outputs: name, dtype and shape as found by running the file; sizes that vary are -1.
        batched: whether requests may be joined along the first dimension.
        most: the largest batch that the file takes; None where there is no end.
    """

    inputs: tuple[Item, ...]
    outputs: tuple[Item, ...]
    batched: bool = False
    most: int | None = None

    def metadata(self) -> dict[str, Any]:
        """Inputs and outputs in the protocol's form.

        Example:
            >>> item = {"name": "x", "dtype": "float32", "shape": [["batch", 1, None], 3]}
            >>> Signature((item,), ()).metadata()["inputs"]
            [{'name': 'x', 'datatype': 'FP32', 'shape': [-1, 3]}]
        """
        return {"inputs": _told(self.inputs), "outputs": _told(self.outputs)}

    def ordered(self, request: Request) -> list[np.ndarray]:
        """The request's arrays in the model's order.

        Raises:
            Refused: they are not its inputs in number, name, datatype or shape.
        """
        names = [item["name"] for item in self.inputs]
        unknown = [name for name in request.inputs if name not in names]
        missing = [name for name in names if name not in request.inputs]
        if unknown or missing:
            got = ", ".join(map(repr, request.inputs))
            raise Refused(400, f"inputs: expected {', '.join(map(repr, names))}, got {got}.")
        sizes: dict[str, int] = {}
        return [_checked(item, request, sizes) for item in self.inputs]


def _told(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [
        {
            "name": item["name"],
            "datatype": DATATYPES.get(item["dtype"] or "float32", "FP32"),
            "shape": [size if isinstance(size, int) else -1 for size in item["shape"] or [-1]],
        }
        for item in items
    ]


def _checked(item: Item, request: Request, sizes: dict[str, int]) -> np.ndarray:
    """An input's array; ``sizes`` are those of varying names so far."""
    name, shape = item["name"], item["shape"]
    array = request.inputs[name]
    expected = DATATYPES.get(item["dtype"], "")
    if item["dtype"] and request.datatypes[name] != expected:
        got = request.datatypes[name]
        raise Refused(400, f"input {name!r}: expected datatype {expected}, got {got}.")
    if not item["dtype"] and array.dtype == object:
        raise Refused(400, f"input {name!r}: expected numbers, got BYTES.")
    fits = shape is None or len(shape) == array.ndim
    if fits and shape is not None:
        pairs = zip(shape, array.shape, strict=True)
        fits = all(_fits(size, got, sizes) for size, got in pairs)
    if not fits:
        told = _told([item])[0]["shape"]
        raise Refused(400, f"input {name!r}: expected shape {told}, got {list(array.shape)}.")
    return array


def _fits(size: Any, got: int, sizes: dict[str, int]) -> bool:
    if isinstance(size, int):
        return size == got
    symbol, least, most = size
    if not (least <= got and (most is None or got <= most)):
        return False
    return symbol == "?" or sizes.setdefault(symbol, got) == got


def varies_first(inputs: Sequence[Item]) -> tuple[bool, int | None]:
    """Whether the first size of every input varies, all as one, and the largest that is taken.

    Example:
        >>> varies_first([{"shape": [["batch", 1, 8], 3]}, {"shape": [["batch", 1, None]]}])
        (True, 8)
        >>> varies_first([{"shape": [1, 3]}])
        (False, None)
    """
    firsts = [(item["shape"] or [0])[0] for item in inputs]
    if not firsts or any(isinstance(first, int) for first in firsts):
        return False, None
    if len({first[0] for first in firsts}) > 1 or any(first[1] > 1 for first in firsts):
        return False, None
    ends = [first[2] for first in firsts if first[2] is not None]
    return True, min(ends, default=None)
