"""Ops that compute each number on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paredown.graph.doors.onnx.call import DTYPES, Call, Known


def unary(function: Callable[[Tensor], Tensor]) -> Callable[[Call], Tensor]:
    """The op that applies a function of PyTorch's to its one input."""
    return lambda call: function(call.tensor(0))


def pair(call: Call) -> tuple[Any, Any]:
    """Two operands, at least one of them a tensor; the other may be a number."""
    first, second = call.value(0), call.value(1)
    if isinstance(first, Tensor) and not isinstance(second, Tensor):
        return first, call.operand(1, first)
    if isinstance(second, Tensor) and not isinstance(first, Tensor):
        return call.operand(0, second), second
    x = call.tensor(0)
    return x, call.operand(1, x)


def binary(function: Callable[[Any, Any], Any]) -> Callable[[Call], Tensor]:
    """The op that applies a function to two operands; before opset 7 the second may name an axis
    from which on it stands beside the first."""

    def run(call: Call) -> Tensor:
        a, b = pair(call)
        axis = call.attribute("axis")
        if axis is not None and call.node.version < 7 and isinstance(b, Tensor):
            b = b.reshape(*b.shape, *[1] * (a.dim() - b.dim() - axis))
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            a = call.tensor(0)
        made: Tensor = function(a, b)
        return made

    return run


def variadic(function: Callable[[Any, Any], Any]) -> Callable[[Call], Tensor]:
    """The op that joins any number of operands, two by two."""

    def run(call: Call) -> Tensor:
        found = call.tensor(0)
        for place in range(1, len(call.values)):
            found = function(found, call.tensor(place))
        return found

    return run


def _subtract(a: Any, b: Any) -> Any:
    return a - b


def _divide(a: Any, b: Any) -> Any:
    """Whole numbers are cut toward zero."""
    if isinstance(a, Tensor) and not a.is_floating_point():
        return torch.div(a, b, rounding_mode="trunc")
    if isinstance(b, Tensor) and not b.is_floating_point():
        return torch.div(torch.full_like(b, a), b, rounding_mode="trunc")
    return a / b


def _and(a: Any, b: Any) -> Any:
    """A truth value that is known leaves the other as it is, or decides."""
    if isinstance(a, bool) or isinstance(b, bool):
        known, x = (a, b) if isinstance(a, bool) else (b, a)
        return x if known else torch.zeros_like(x)
    return torch.logical_and(a, b)


def _or(a: Any, b: Any) -> Any:
    if isinstance(a, bool) or isinstance(b, bool):
        known, x = (a, b) if isinstance(a, bool) else (b, a)
        return torch.ones_like(x) if known else x
    return torch.logical_or(a, b)


def power(call: Call) -> Tensor:
    x = call.tensor(0)
    few = not isinstance(call.value(1), Tensor) and call.host(1).size == 1
    exponent = call.number(1) if few and call.host(1).ndim <= x.dim() else call.operand(1, x)
    if isinstance(exponent, Tensor):
        if x.is_floating_point() or not exponent.is_floating_point():
            return _converted(torch.pow(x, exponent), x.dtype)
        return torch.pow(x.double(), exponent.double()).to(x.dtype)
    if isinstance(exponent, float) and exponent.is_integer() and abs(exponent) < 2**31:
        exponent = int(exponent)
    if exponent == 0.5:
        return torch.sqrt(x)
    if not x.is_floating_point() and (isinstance(exponent, float) or exponent < 0):
        return torch.pow(x.double(), exponent).to(x.dtype)
    return torch.pow(x, exponent)


def modulo(call: Call) -> Tensor:
    a, b = pair(call)
    return torch.fmod(a, b) if call.attribute("fmod", 0) else torch.remainder(a, b)


def cast(call: Call) -> Tensor:
    x = call.tensor(0)
    number = call.attribute("to")
    wanted = DTYPES.get(number)
    if wanted is None:
        raise call.node.refused(f"makes values of type {number}, which no net computes with")
    return _converted(x, wanted)


def cast_like(call: Call) -> Tensor:
    return _converted(call.tensor(0), call.tensor(1).dtype)


def _converted(x: Tensor, wanted: torch.dtype) -> Tensor:
    return x if x.dtype is wanted else x.to(wanted)


def clip(call: Call) -> Tensor:
    x = call.tensor(0)
    if call.node.version < 11:
        low, high = call.attribute("min", -math.inf), call.attribute("max", math.inf)
        if low == 0 and high == 6:
            return F.relu6(x)
        return torch.clamp(x, low, high)
    low, high = (_bound(call, place) for place in (1, 2))
    if low is None and high is None:
        return x
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and (low, high) == (0, 6):
        return F.relu6(x)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        x = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
        return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype))
    return torch.clamp(x, low, high)


def _bound(call: Call, place: int) -> Any:
    if not call.has(place):
        return None
    return call.tensor(place) if isinstance(call.value(place), Tensor) else call.number(place)


def where(call: Call) -> Tensor:
    condition = call.tensor(0)
    first, second = call.value(1), call.value(2)
    if isinstance(first, Tensor) and not isinstance(second, Tensor):
        return torch.where(condition, first, _beside(call, 2, first))
    if isinstance(second, Tensor) and not isinstance(first, Tensor):
        return torch.where(condition, _beside(call, 1, second), second)
    if _is_float(first) and _is_float(second):
        a, b = call.operand(1, condition), call.operand(2, condition)
        if isinstance(a, float) and isinstance(b, float) and math.isfinite(a) and math.isfinite(b):
            return torch.where(condition, a, b)
    return torch.where(condition, call.tensor(1), call.tensor(2))


def _is_float(value: Any) -> bool:
    return isinstance(value, Known) and value.array.dtype.kind == "f"


def _beside(call: Call, place: int, other: Tensor) -> Any:
    """A number where it has the other's type as one."""
    found = call.operand(place, other)
    if isinstance(found, (int, float)) and not math.isfinite(found):
        return torch.scalar_tensor(found, dtype=other.dtype)
    return found


def leaky_relu(call: Call) -> Tensor:
    return F.leaky_relu(call.tensor(0), call.attribute("alpha", 0.01))


def elu(call: Call) -> Tensor:
    return F.elu(call.tensor(0), call.attribute("alpha", 1.0))


def celu(call: Call) -> Tensor:
    return F.celu(call.tensor(0), call.attribute("alpha", 1.0))


def selu(call: Call) -> Tensor:
    """PyTorch's where the constants are its own."""
    x = call.tensor(0)
    alpha, gamma = call.attribute("alpha", 1.67326319), call.attribute("gamma", 1.05070102)
    if abs(alpha - 1.67326324) < 1e-6 and abs(gamma - 1.05070098) < 1e-6:
        return F.selu(x)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


def prelu(call: Call) -> Tensor:
    """One slope a channel, or one for all, is PyTorch's; any other is written out."""
    x, slope = call.tensor(0), call.tensor(1)
    if slope.numel() == 1:
        return F.prelu(x, slope.reshape(1))
    if x.dim() > 1 and slope.shape[0] == x.shape[1] and slope.numel() == slope.shape[0]:
        if slope.dim() == x.dim() - 1:
            return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


def hard_sigmoid(call: Call) -> Tensor:
    x = call.tensor(0)
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


def thresholded_relu(call: Call) -> Tensor:
    return F.threshold(call.tensor(0), call.attribute("alpha", 1.0), 0.0)


def gelu(call: Call) -> Tensor:
    return F.gelu(call.tensor(0), approximate=call.attribute("approximate", "none"))


def biased_gelu(approximate: str) -> Callable[[Call], Tensor]:
    """ONNX Runtime's BiasGelu and FastGelu: with a bias before it."""

    def run(call: Call) -> Tensor:
        x = call.tensor(0)
        x = x + call.tensor(1) if call.has(1) else x
        return F.gelu(x, approximate=approximate)

    return run


def quick_gelu(call: Call) -> Tensor:
    x = call.tensor(0)
    return x * torch.sigmoid(call.attribute("alpha", 1.702) * x)


def swish(call: Call) -> Tensor:
    x, alpha = call.tensor(0), call.attribute("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def shrink(call: Call) -> Tensor:
    x, bias, lambd = call.tensor(0), call.attribute("bias", 0.0), call.attribute("lambd", 0.5)
    zeros = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zeros))


def is_inf(call: Call) -> Tensor:
    x = call.tensor(0)
    above, below = call.attribute("detect_positive", 1), call.attribute("detect_negative", 1)
    if above and below:
        return torch.isinf(x)
    return (
        (x == math.inf)
        if above
        else (x == -math.inf)
        if below
        else torch.zeros_like(x, dtype=torch.bool)
    )


def bit_shift(call: Call) -> Tensor:
    x, by = call.tensor(0), call.tensor(1)
    wide, amount = x.to(torch.int64), by.to(torch.int64)
    left = call.attribute("direction") == "LEFT"
    made = wide << amount if left else wide >> amount
    return made.to(x.dtype)


def dropout(call: Call) -> tuple[Tensor, ...]:
    """Random in training, as PyTorch's; the file's own training mode is not looked at."""
    x = call.tensor(0)
    ratio = call.number(1, 0.5) if call.node.version >= 12 else call.attribute("ratio", 0.5)
    if call.has(2) and bool(call.number(2)):
        raise call.node.refused("is fixed in training mode, where its output is random", "other")
    made = F.dropout(x, float(ratio), call.training)
    if len(call.node.outputs) > 1:
        return made, torch.ones_like(x, dtype=torch.bool)
    return (made,)


def softmax(function: Callable[[Tensor, int], Tensor]) -> Callable[[Call], Tensor]:
    """Before opset 13 over all axes from one on together."""

    def run(call: Call) -> Tensor:
        x = call.tensor(0)
        if call.node.version >= 13:
            return function(x, call.attribute("axis", -1))
        axis = call.attribute("axis", 1) % max(x.dim(), 1)
        if axis == x.dim() - 1 or all(size == 1 for size in x.shape[axis + 1 :]):
            return function(x, axis)
        return function(x.flatten(axis), -1).reshape(x.shape)

    return run


def hardmax(x: Tensor, axis: int) -> Tensor:
    top = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, top, 1.0)


def _mean(call: Call) -> Tensor:
    found = variadic(torch.add)(call)
    return found if len(call.values) == 1 else found / len(call.values)


def _round(x: Tensor) -> Tensor:
    return torch.round(x)  # halves to even, as ONNX has it


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{"Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin},
    **{"Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil},
    **{"Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp},
    **{"Floor": torch.floor, "IsNaN": torch.isnan, "Log": torch.log, "Neg": torch.neg},
    **{"Not": torch.logical_not, "Reciprocal": torch.reciprocal, "Round": _round},
    **{"Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh},
    **{"Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh, "Relu": F.relu},
    **{"Softplus": F.softplus, "Softsign": F.softsign, "HardSwish": F.hardswish},
    **{"Mish": F.mish, "BitwiseNot": torch.bitwise_not, "Det": torch.linalg.det},
    **{"paredown.Silu": F.silu, "paredown.Identity": lambda x: x},
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **{"Add": lambda a, b: a + b, "Sub": _subtract, "Mul": lambda a, b: a * b, "Div": _divide},
    **{"And": _and, "Or": _or, "Xor": lambda a, b: a != b},
    **{"Equal": lambda a, b: a == b, "Greater": lambda a, b: a > b, "Less": lambda a, b: a < b},
    **{"GreaterOrEqual": lambda a, b: a >= b, "LessOrEqual": lambda a, b: a <= b},
    **{"BitwiseAnd": lambda a, b: a & b, "BitwiseOr": lambda a, b: a | b},
    "BitwiseXor": lambda a, b: a ^ b,
}
TABLE: dict[str, Callable[[Call], Any]] = {
    **{name: unary(function) for name, function in UNARY.items()},
    **{name: binary(function) for name, function in BINARY.items()},
    **{"Max": variadic(torch.maximum), "Min": variadic(torch.minimum)},
    **{"Sum": variadic(torch.add), "Mean": _mean, "Pow": power, "Mod": modulo},
    **{"Cast": cast, "CastLike": cast_like, "Clip": clip, "Where": where},
    **{"LeakyRelu": leaky_relu, "Elu": elu, "Celu": celu, "Selu": selu, "PRelu": prelu},
    **{"HardSigmoid": hard_sigmoid, "ThresholdedRelu": thresholded_relu, "Gelu": gelu},
    **{"com.microsoft.Gelu": gelu, "Swish": swish, "Shrink": shrink, "IsInf": is_inf},
    **{"BitShift": bit_shift, "Dropout": dropout, "Hardmax": softmax(hardmax)},
    **{"Softmax": softmax(torch.softmax), "LogSoftmax": softmax(torch.log_softmax)},
    "com.microsoft.QuickGelu": quick_gelu,
    "com.microsoft.BiasGelu": biased_gelu("none"),
    "com.microsoft.FastGelu": biased_gelu("tanh"),
    "Identity": lambda call: call.value(0),
}
