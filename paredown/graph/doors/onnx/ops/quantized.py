"""Files that are quantized already: integers as floats that are whole, so that all is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paredown.graph.doors.onnx.call import DTYPES, Call, Known
from paredown.graph.doors.onnx.ops.convolutions import convolved

LIMITS = {
    **{torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-32768, 32767)},
    **{torch.uint16: (0, 65535)},
}


def _along(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    """One scale, or one for each place of an axis, beside the tensor."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() != 1:
        return scale
    around = [1] * x.dim()
    around[axis % x.dim()] = scale.numel()
    return scale.reshape(around)


def _blocks(scale: Tensor, x: Tensor, axis: int, size: int) -> Tensor:
    """One scale for each block of an axis."""
    return scale.repeat_interleave(size, axis).narrow(axis, 0, x.shape[axis])


def _scale(call: Call, place: int, x: Tensor) -> Tensor:
    scale = call.tensor(place)
    axis, size = call.attribute("axis", 1), call.attribute("block_size", 0)
    return _blocks(scale, x, axis % x.dim(), size) if size else _along(scale, x, axis)


def dequantize(call: Call) -> Tensor:
    x = call.tensor(0)
    scale = _scale(call, 1, x)
    numbers = x.float() if not x.is_floating_point() else x
    if call.has(2):
        numbers = numbers - _scale(call, 2, x).float()
    return numbers * scale.float()


def quantize(call: Call) -> Tensor:
    """To whole numbers, halves to even."""
    x = call.tensor(0)
    scale = _scale(call, 1, x)
    kind = torch.uint8
    if call.has(2):
        kind = call.tensor(2).dtype
        if isinstance(call.value(2), Known) and call.value(2).array.dtype.kind == "f":  # type: ignore[union-attr]
            raise call.node.refused("rounds to floats of 8 bits")
    elif call.attribute("output_dtype", 0):
        kind = DTYPES[call.attribute("output_dtype")]
    if kind not in LIMITS:
        raise call.node.refused(f"rounds to {kind}, which no runtime here computes with")
    zero = _scale(call, 2, x).float() if call.has(2) else 0.0
    low, high = LIMITS[kind]
    return torch.clamp(torch.round(x / scale) + zero, low, high).to(kind)


def dynamic_quantize(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    x = call.tensor(0)
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.clamp(torch.round(-low / scale), 0, 255)
    numbers = torch.clamp(torch.round(x / scale) + zero, 0, 255)
    return numbers.to(torch.uint8), scale, zero.to(torch.uint8)


def _centred(call: Call, place: int, zero: int, axis: int) -> Tensor:
    """Whole numbers less their zero point, as floats of 64 bits: products of them are exact."""
    x = call.tensor(place).double()
    return x - _along(call.tensor(zero), x, axis).double() if call.has(zero) else x


def matmul_integer(call: Call) -> Tensor:
    a, b = _rows(call, 0, 2), _centred(call, 1, 3, -1)
    return torch.matmul(a, b).to(torch.int32)


def _rows(call: Call, place: int, zero: int) -> Tensor:
    """The left operand, whose zero points are those of its rows."""
    return _centred(call, place, zero, -2)


def conv_integer(call: Call) -> Tensor:
    x, weight = _centred(call, 0, 2, 1), _centred(call, 1, 3, 0)
    return convolved(call, x, weight, None).round().to(torch.int32)


def _rounded(call: Call, values: Tensor, scale: int, zero: int) -> Tensor:
    point = call.tensor(zero)
    low, high = LIMITS[point.dtype]
    numbers = torch.round((values / call.tensor(scale).double()).float()) + point
    return torch.clamp(numbers, low, high).to(point.dtype)


def qlinear_matmul(call: Call) -> Tensor:
    a, b = _rows(call, 0, 2), _centred(call, 3, 5, -1)
    left = _along(call.tensor(1), a, -2).double()
    product = torch.matmul(a * left, b * _along(call.tensor(4), b, -1).double())
    return _rounded(call, product, 6, 7)


def qlinear_conv(call: Call) -> Tensor:
    x, weight = _centred(call, 0, 2, 1), _centred(call, 3, 5, 0)
    bias = call.maybe(8)
    made = convolved(call, x, weight, None if bias is None else bias.double())
    scale = call.tensor(1).double() * _along(call.tensor(4), made, 1).double()
    return _rounded(call, made * scale, 6, 7)


def _joined(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Call], Tensor]:
    """ONNX Runtime's sums and products of two quantized tensors."""

    def run(call: Call) -> Tensor:
        a = _centred(call, 0, 2, 1) * call.tensor(1).double()
        b = _centred(call, 3, 5, 1) * call.tensor(4).double()
        return _rounded(call, function(a, b), 6, 7)

    return run


def _through(function: Callable[[Call, Tensor], Tensor]) -> Callable[[Call], Tensor]:
    """ONNX Runtime's functions of one quantized tensor."""

    def run(call: Call) -> Tensor:
        x = _centred(call, 0, 2, 1) * call.tensor(1).double()
        return _rounded(call, function(call, x), 3, 4)

    return run


def _pooled(call: Call, x: Tensor) -> Tensor:
    if call.attribute("channels_last", 0):
        raise call.node.refused("has its channels last")
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def matmul_n_bits(call: Call) -> Tensor:
    """ONNX Runtime's product with a weight of few bits in blocks (outputs, blocks, bytes)."""
    return torch.matmul(call.tensor(0), n_bits(call).t())


def n_bits(call: Call) -> Tensor:
    """The weight of a MatMulNBits as floats (outputs, inputs)."""
    bits, size = call.attribute("bits", 4), call.attribute("block_size")
    inputs, outputs = call.attribute("K"), call.attribute("N")
    if bits not in (4, 8) or (call.has(4) and call.value(4) is not None):
        raise call.node.refused(f"has weights of {bits} bits, or groups in another order")
    blocks = -(-inputs // size)
    packed = call.tensor(1).reshape(outputs, blocks, -1)
    numbers = _unpacked(packed, bits)[..., :size].float()
    zero: Any = float(1 << (bits - 1))
    if call.has(3):
        points = call.tensor(3)
        if not points.is_floating_point():
            points = _unpacked(points.reshape(outputs, -1), bits)[:, :blocks].float()
        zero = points.reshape(outputs, blocks, 1)
    made = (numbers - zero) * call.tensor(2).reshape(outputs, blocks, 1)
    return made.reshape(outputs, -1)[:, :inputs]


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Bytes as numbers of so many bits, the lower first."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


TABLE: dict[str, Callable[[Call], Any]] = {
    **{"DequantizeLinear": dequantize, "QuantizeLinear": quantize},
    **{"com.microsoft.DequantizeLinear": dequantize, "com.microsoft.QuantizeLinear": quantize},
    **{"DynamicQuantizeLinear": dynamic_quantize, "MatMulInteger": matmul_integer},
    **{"ConvInteger": conv_integer, "QLinearMatMul": qlinear_matmul, "QLinearConv": qlinear_conv},
    "com.microsoft.QLinearAdd": _joined(torch.add),
    "com.microsoft.QLinearMul": _joined(torch.mul),
    "com.microsoft.QLinearSigmoid": _through(lambda call, x: torch.sigmoid(x)),
    "com.microsoft.QLinearGlobalAveragePool": _through(_pooled),
    "com.microsoft.MatMulNBits": matmul_n_bits,
}
