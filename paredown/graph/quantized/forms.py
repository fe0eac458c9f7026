"""Every form that weights can have besides float32: one record each, and all that asks, asks it.

A new form is a record in `WEIGHT_FORMS`, the step that makes it, and the runtimes that can write
it, each of which names it in its ``FORMS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.quantized import grouped, low_bits, per_channel
from paredown.graph.quantized.codes import from_bytes, to_bytes
from paredown.graph.quantized.grouped import PER_GROUP
from paredown.graph.quantized.low_bits import BINARY, TERNARY
from paredown.graph.quantized.per_channel import PER_CHANNEL
from paredown.graph.rows import from_rows, rows

# Integers (R, F) in int8, scales and zero points (R, G), the axis of the rows, weights to a scale.
Parts = tuple[Tensor, Tensor, Tensor | None, int, int]


@dataclass(frozen=True)
class Form:
    """What weights can be besides float32.

    Attributes:
        name: as runtimes name it in their ``FORMS``, and a step in its ``form``.
        made_by: the step that makes it, as a person types it.
        word: what a report calls such a weight.
        op: the fake quantizer that stands in the graph, which takes the weight first and what it
            needs to round it after that; None where the weight itself has another ``dtype``.
        grid: the whole numbers that weights become.
        parts: what the op makes of the weight and its other arguments.
        follows: whether scales are a function of the float weight, which may change by a factor;
            else they are the op's second argument.
        alone: whether weights alone are rounded, for kernels that take activations in float.
    """

    name: str
    made_by: str
    word: str
    op: Any = None
    grid: range = range(0)
    parts: Callable[..., Parts] | None = None
    follows: bool = False
    alone: bool = False
    dtype: torch.dtype | None = None

    @property
    def bits(self) -> int:
        """That one weight takes in a file."""
        return (len(self.grid) - 1).bit_length() if self.dtype is None else self.dtype.itemsize * 8

    @property
    def low(self) -> int:
        """The grid's lower end."""
        return self.grid[0]

    @property
    def high(self) -> int:
        """The grid's upper end."""
        return self.grid[-1]

    def stored_bytes(self, count: int) -> int:
        """What so many weights take in a file.

        Example:
            >>> WEIGHT_FORMS["ternary"].stored_bytes(5)
            2
        """
        return -(-count * self.bits // 8)

    def saved_bytes(self, count: int) -> int:
        """By how much less that is than in float32."""
        return count * (32 - self.bits) // 8

    def pack(self, integers: Tensor) -> Tensor:
        """Whole numbers (...) of the grid -> bytes (ceil(N * bits / 8),), uint8; the number of a
        weight's place in the grid is what is stored, and the first weight lies lowest.

        Example:
            >>> WEIGHT_FORMS["binary"].pack(torch.tensor([1, -1, 1, 1]))
            tensor([13], dtype=torch.uint8)
            >>> WEIGHT_FORMS["ternary"].pack(torch.tensor([1, -1, 0]))
            tensor([18], dtype=torch.uint8)
        """
        places = (integers.flatten().to(torch.int16) - self.low) // self.grid.step
        return to_bytes(places, self.bits)

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        """What `pack` has packed, in its shape, int8.

        Example:
            >>> ternary = WEIGHT_FORMS["ternary"]
            >>> ternary.unpack(ternary.pack(torch.tensor([[1, -1], [0, 0]])), (2, 2))
            tensor([[ 1, -1],
                    [ 0,  0]], dtype=torch.int8)
        """
        places = from_bytes(packed, self.bits, torch.Size(shape).numel()).to(torch.int16)
        integers = places * self.grid.step + self.low
        return integers.to(torch.int8).reshape(tuple(shape))

    def read(self, name: str, weight: Tensor, *arguments: Any) -> Rounded:
        """The weight of that name as the op of this form rounds it.

        Args:
            arguments: the op's, behind the weight.

        Example:
            >>> made = WEIGHT_FORMS["binary"].read("weight", torch.tensor([[1.0, -3.0]]), 0)
            >>> made.integers, made.scales
            (tensor([[ 1, -1]], dtype=torch.int8), tensor([[2.]]))
        """
        assert self.parts is not None, f"{self.name} is no form of integers"
        return Rounded(name, self, weight, arguments, *self.parts(weight, *arguments))


@dataclass(frozen=True)
class Rounded:
    """A weight behind its quantizer, as rows (R, F) of integers, one for each output channel.

    ``integers`` are int8, ``scales`` and ``zero_points`` (R, G); ``axis`` is that of the rows in
    the float ``weight``, and each ``group`` of a row has a scale, 0 being the whole row.
    """

    name: str
    form: Form
    weight: Tensor
    arguments: tuple[Any, ...]
    integers: Tensor
    scales: Tensor
    zero_points: Tensor | None
    axis: int
    group: int

    def shaped(self) -> Tensor:
        """The integers in the shape of the weight."""
        return from_rows(self.integers, self.weight, self.axis).contiguous()

    def values(self) -> Tensor:
        """The weight as its quantizer gives it, the sign of each zero included."""
        return self.form.op(self.weight, *self.arguments)  # type: ignore[no-any-return]


def _of_channels(weight: Tensor, scale: Tensor, axis: int, low: int, high: int) -> Parts:
    made = per_channel.integers(weight, scale, axis, low, high)
    return made, scale[:, None], None, axis, 0


def _of_groups(
    weight: Tensor, scale: Tensor, zero: Tensor | None, axis: int, group: int, low: int, high: int
) -> Parts:
    made = grouped.integers(weight, scale, zero, axis, group, low, high)
    return made, scale, zero, axis, group


def _of_signs(weight: Tensor, axis: int) -> Parts:
    made = rows(low_bits.signs(weight), axis).to(torch.int8)
    return made, low_bits.binary_scales(weight, axis)[:, None], None, axis, 0


def _of_ternary_signs(weight: Tensor, axis: int) -> Parts:
    made = rows(low_bits.ternary_signs(weight, axis), axis).to(torch.int8)
    return made, low_bits.ternary_scales(weight, axis)[:, None], None, axis, 0


def _by_name(*forms: Form) -> dict[str, Form]:
    return {form.name: form for form in forms}


_INT8 = Form(
    "int8",
    made_by='Quantize("int8")',
    word="int8",
    op=PER_CHANNEL,
    grid=range(-127, 128),
    parts=_of_channels,
)
_INT8_ALONE = Form(
    "int8-weights",
    made_by="QuantizeWeights(8)",
    word="int8",
    op=PER_GROUP,
    grid=range(-128, 128),
    parts=_of_groups,
    alone=True,
)
_INT4: dict[str, Any] = {"word": "int4", "grid": range(-8, 8)}
WEIGHT_FORMS = _by_name(
    _INT8,
    replace(_INT8, name="int4", made_by='Quantize("int4")', **_INT4),
    # the same weights; the range of what comes to a layer is found at each inference
    replace(_INT8, name="int8-dynamic", made_by='Quantize("int8-dynamic")'),
    _INT8_ALONE,
    replace(_INT8_ALONE, name="int4-weights", made_by="QuantizeWeights(4)", **_INT4),
    Form(
        "binary",
        made_by='Binarize("binary")',
        word="binary",
        op=BINARY,
        grid=range(-1, 2, 2),
        parts=_of_signs,
        follows=True,
    ),
    Form(
        "ternary",
        made_by='Binarize("ternary")',
        word="ternary",
        op=TERNARY,
        grid=range(-1, 2),
        parts=_of_ternary_signs,
        follows=True,
    ),
    Form("fp16", made_by='Cast("fp16")', word="float16", dtype=torch.float16),
    Form("bf16", made_by='Cast("bf16")', word="bfloat16", dtype=torch.bfloat16),
)


def of_op(op: Any, bits: int) -> Form:
    """The form that a fake quantizer makes with so many bits.

    Raises:
        LookupError: there is none.

    Example:
        >>> of_op(PER_CHANNEL, 4).name, of_op(PER_GROUP, 4).name
        ('int4', 'int4-weights')
    """
    for form in WEIGHT_FORMS.values():
        if form.op is op and form.bits == bits:
            return form
    raise LookupError(f"no form of weights has {op} and {bits} bits")


def of_grid(op: Any, low: int, high: int) -> Form:
    """The form of the fewest bits that a fake quantizer makes of the whole numbers low..high.

    Raises:
        LookupError: there is none.

    Example:
        >>> of_grid(PER_CHANNEL, -7, 7).name, of_grid(PER_CHANNEL, -63, 63).name
        ('int4', 'int8')
    """
    bits = {form.bits for form in WEIGHT_FORMS.values() if form.op is op}
    needed = (high - low).bit_length()
    return of_op(op, min((each for each in bits if each >= needed), default=needed))


def form_of(node: fx.Node) -> Form | None:
    """The form of the weight that a node rounds; None where it is no quantizer of weights.

    Where an op makes several, the grid's ends, its last two arguments, tell which.

    Example:
        >>> graph = fx.Graph()
        >>> weight, scale = graph.placeholder("weight"), graph.placeholder("scale")
        >>> form_of(graph.call_function(PER_CHANNEL, (weight, scale, 0, -7, 7))).name
        'int4'
        >>> form_of(graph.call_function(BINARY, (weight, 0))).name, form_of(weight)
        ('binary', None)
    """
    bits = {form.bits for form in WEIGHT_FORMS.values() if form.op is node.target}
    if len(bits) > 1:
        low, high = node.args[-2:]
        assert isinstance(low, int) and isinstance(high, int)
        return of_grid(node.target, low, high)
    return of_op(node.target, bits.pop()) if bits else None
