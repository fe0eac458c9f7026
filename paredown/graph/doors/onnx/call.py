"""What an op of an ONNX graph is called with: tensors, and values that are known at capture.

Three kinds of values go through a graph: tensors; arrays on the host, of sizes that may be
symbolic, which is how shape arithmetic stays out of the tensors and dimensions stay dynamic; and
known arrays of the file, which become parameters or buffers only where an op asks for a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from torch import Tensor

from paredown.graph.doors.onnx.program import Array, Node

FEW = 8  # floats that may be arithmetic of shapes, such as scales
MANY = 1024  # whole numbers that may be


@dataclass(frozen=True)
class Known:
    """An array that the file holds."""

    name: str
    array: Array


Value: TypeAlias = "Tensor | Array | Known"
Made: TypeAlias = "Value | tuple[Value | None, ...]"

FLOATS = ("float16", "bfloat16", "float32", "float64")
DTYPES: dict[int, torch.dtype] = {  # ONNX's number of a type -> what computes here
    **dict.fromkeys((1, 10, 11, 16), torch.float32),  # 16 and 64 bits compute in 32 here
    **{2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32},
    **{7: torch.int64, 9: torch.bool, 12: torch.uint32, 13: torch.uint64},
}


# Attributes that change no number, or repeat what the tensors tell.
HARMLESS = frozenset(
    {
        *("auto_pad", "axes", "consumed_inputs", "kernel_shape", "mask_filter_value", "name"),
        *("num_outputs", "precision", "qk_matmul_output_mode", "round_mode", "saturate", "seed"),
        *("stash_type", "training_mode"),
    }
)


@functools.cache
def _schema(op: str, version: int) -> Any:
    try:
        return onnx.defs.get_schema(op, version)
    except onnx.defs.SchemaError:
        return None


def usual(node: Node, name: str) -> Any:
    """An attribute's value where a node does not have it; None where there is none.

    Example:
        >>> usual(Node("Gemm", (), (), {}, "", 13), "alpha")
        1.0
    """
    schema = _schema(node.op, node.version)
    if schema is None or name not in schema.attributes:
        return None
    default = schema.attributes[name].default_value
    found = onnx.helper.get_attribute_value(default) if default.type else None
    return found.decode() if isinstance(found, bytes) else found


@dataclass(frozen=True)
class Call:
    """A node with its inputs' values, on one way through the graph."""

    node: Node
    values: tuple[Value | None, ...]
    tensor_of: Callable[[Known], Tensor]
    training: bool = False
    asked: set[str | int] = field(default_factory=set)  # attributes and inputs that were looked at

    def attribute(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return self.node.attributes.get(name, default)

    def has(self, place: int) -> bool:
        self.asked.add(place)
        return place < len(self.values) and self.values[place] is not None

    def value(self, place: int) -> Value:
        self.asked.add(place)
        found = self.values[place] if place < len(self.values) else None
        if found is None:
            raise self.node.refused(f"lacks its input {place}")
        return found

    def tensor(self, place: int) -> Tensor:
        found = self.value(place)
        if isinstance(found, Known):
            return filled(found) if is_number(found) else self.tensor_of(found)
        return found if isinstance(found, Tensor) else as_tensor(found)

    def maybe(self, place: int) -> Tensor | None:
        return self.tensor(place) if self.has(place) else None

    def host(self, place: int) -> Array:
        """A value that must be known at capture.

        Raises:
            UserError: it is computed from data.
        """
        found = self.value(place)
        if isinstance(found, Tensor):
            which = f"its input {place} ({self.node.inputs[place]!r})"
            raise self.node.refused(f"{which} is computed from the data", "data")
        return found.array if isinstance(found, Known) else found

    def numbers(self, place: int) -> list[Any]:
        """The same as a list of Python's numbers, or of symbols."""
        return [plain(each) for each in self.host(place).reshape(-1).tolist()]

    def number(self, place: int, default: Any = None) -> Any:
        """The same of a value that is one number."""
        if not self.has(place):
            return default
        found = self.numbers(place)
        if len(found) != 1:
            raise self.node.refused(f"its input {place} has {len(found)} numbers instead of one")
        return found[0]

    def check_all_asked(self) -> None:
        """Refuse a node that says more than its op here looked at: else that would be left out.

        Raises:
            UserError: it has an attribute that is not the usual one, or an input, that none reads.
        """
        own = self.node.op.startswith("paredown.")
        for name, value in () if own else self.node.attributes.items():
            if name not in self.asked | HARMLESS and value != usual(self.node, name):
                raise self.node.refused(f"has {name}={value!r}, which cannot be taken")
        for place, given in enumerate(self.values):
            if given is not None and place not in self.asked:
                raise self.node.refused(f"has an input {place}, which cannot be taken")

    def axes(self, place: int, since: int) -> list[int] | None:
        """Axes that were an attribute before they became an input; None where there are none."""
        if self.node.version >= since and not self.node.op.startswith("com."):
            return [int(each) for each in self.numbers(place)] if self.has(place) else None
        found = self.attribute("axes")
        return None if found is None else list(found)

    def operand(self, place: int, beside: Tensor | None = None) -> Any:
        """A tensor, or a number where that says the same: one value that widens no shape."""
        found = self.value(place)
        rank = 0 if beside is None else beside.dim()
        if isinstance(found, Known) and is_number(found) and found.array.ndim <= rank:
            return plain(found.array.reshape(-1)[0].item())
        if isinstance(found, np.ndarray) and found.size == 1 and found.ndim <= rank:
            return plain(found.reshape(-1)[0])
        return self.tensor(place)


def filled(known: Known) -> Tensor:
    """A number of a formula as a tensor, which the graph makes and no state holds."""
    kind: torch.dtype = getattr(torch, known.array.dtype.name)
    return torch.full(known.array.shape, known.array.reshape(-1)[0].item(), dtype=kind)


def is_number(known: Known) -> bool:
    """Whether a constant is a number of a formula, and no weight that could be trained."""
    if known.array.size != 1:
        return False
    if known.array.dtype.kind != "f" or known.array.ndim == 0:
        return "." not in known.name or known.array.dtype.kind != "f"
    return not known.name or known.name.startswith(("val_", "const", "/", "onnx::"))


def is_host(value: Value | None) -> bool:
    """Whether shape arithmetic can go on with it, without a tensor."""
    if isinstance(value, Known):
        floating = value.array.dtype.kind == "f"
        return value.array.size <= (FEW if floating else MANY)
    return not isinstance(value, Tensor)


def plain(number: Any) -> Any:
    """A number of NumPy's as Python's; symbols as they are."""
    return number.item() if isinstance(number, np.generic) else number


def symbolic(value: Any) -> bool:
    """Whether a number is a size that varies."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def as_tensor(array: Array) -> Tensor:
    """An array on the host as a tensor; sizes that vary stay so.

    Example:
        >>> as_tensor(np.array([2, 3], object))
        tensor([2, 3])
    """
    if array.dtype != object:
        return torch.from_numpy(np.array(array))
    flat = [plain(each) for each in array.reshape(-1).tolist()]
    kind = torch.int64
    if any(isinstance(each, (float, torch.SymFloat)) for each in flat):
        kind = torch.float32
    elif flat and all(isinstance(each, bool) for each in flat):
        kind = torch.bool
    if not any(map(symbolic, flat)):
        return torch.tensor(flat, dtype=kind).reshape(array.shape)
    made = [torch.scalar_tensor(each, dtype=kind) for each in flat]
    return torch.stack(made).reshape(array.shape)


def on_host(numbers: Any) -> Array:
    """Numbers as an array on the host, of one axis, that may hold symbols."""
    made = np.empty(len(numbers), object)
    for place, each in enumerate(numbers):
        made[place] = plain(each)
    return made
