"""Shape arithmetic: ops on arrays of sizes, which stay symbolic where dimensions are dynamic.

Each gives ``NotImplemented`` where what it was asked for can only be a tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from paredown.graph.doors.onnx.call import Call, on_host, plain, symbolic
from paredown.graph.doors.onnx.program import Array

FEW = 64  # numbers that a made array may have; more are a tensor


def _objects(call: Call, place: int) -> Array:
    return call.host(place).astype(object)


def _ints(call: Call, place: int) -> list[int] | None:
    """Plain whole numbers; None where one of them varies."""
    found = call.numbers(place)
    return None if any(map(symbolic, found)) else [int(each) for each in found]


def binary(function: Callable[[Any, Any], Any]) -> Callable[[Call], Any]:
    """An op on two operands, number by number."""
    each = np.frompyfunc(lambda a, b: function(plain(a), plain(b)), 2, 1)

    def run(call: Call) -> Any:
        made = _objects(call, 0)
        for place in range(1, len(call.values)):
            made = each(made, _objects(call, place))
        return np.asarray(made, object)

    return run


def unary(function: Callable[[Any], Any]) -> Callable[[Call], Any]:
    each = np.frompyfunc(lambda a: function(plain(a)), 1, 1)
    return lambda call: np.asarray(each(_objects(call, 0)), object)


def _divide(a: Any, b: Any) -> Any:
    """Whole numbers are cut toward zero; sizes are not negative."""
    if isinstance(a, (float, torch.SymFloat)) or isinstance(b, (float, torch.SymFloat)):
        return a / b if b or symbolic(b) else math.copysign(math.inf, a)
    if symbolic(a) or symbolic(b):
        return a // b
    return int(a / b) if abs(a) < 2**50 else a // b


def _modulo(call: Call) -> Any:
    if call.attribute("fmod", 0):
        return NotImplemented
    return binary(operator.mod)(call)


def _power(a: Any, b: Any) -> Any:
    return a ** (int(b) if isinstance(b, float) and b.is_integer() else b)


def cast(call: Call) -> Any:
    number = call.attribute("to")
    if number in (1, 10, 11, 16):
        return unary(_float)(call)
    if number in (2, 3, 4, 5, 6, 7, 12, 13):
        return unary(_int)(call)
    return unary(bool)(call) if number == 9 else NotImplemented


def _float(a: Any) -> Any:
    return torch.sym_float(a) if symbolic(a) else float(a)


def _int(a: Any) -> Any:
    if isinstance(a, torch.SymFloat):
        return math.trunc(a)
    return a if symbolic(a) else int(a)


def _floor(a: Any) -> Any:
    return _float(math.floor(a)) if isinstance(a, (float, torch.SymFloat)) else a


def _ceil(a: Any) -> Any:
    return _float(math.ceil(a)) if isinstance(a, (float, torch.SymFloat)) else a


def _sqrt(a: Any) -> Any:
    return torch.sym_sqrt(a) if symbolic(a) else math.sqrt(a)


def gather(call: Call) -> Any:
    where = call.host(1)
    if any(map(symbolic, where.reshape(-1).tolist())):
        return NotImplemented
    axis = call.attribute("axis", 0)
    return np.asarray(np.take(call.host(0), where.astype(np.int64), axis=axis))


def slices(call: Call) -> Any:
    """Bounds that vary can only be those of a tensor."""
    data = call.host(0)
    if call.node.version < 10:
        starts, ends = call.attribute("starts"), call.attribute("ends")
        axes, steps = call.attribute("axes"), None
    else:
        starts, ends = _ints(call, 1), _ints(call, 2)
        axes = _ints(call, 3) if call.has(3) else None
        steps = _ints(call, 4) if call.has(4) else None
    if starts is None or ends is None:
        return NotImplemented
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    places: list[Any] = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        last = None if step < 0 and end < -data.shape[axis] else end
        places[axis] = slice(start, last, step)
    return data[tuple(places)]


def concat(call: Call) -> Any:
    parts = [_objects(call, place) for place in range(len(call.values))]
    return np.concatenate(parts, call.attribute("axis", 0))


def unsqueeze(call: Call) -> Any:
    data, axes = call.host(0), call.axes(1, 13)
    rank = data.ndim + len(axes or [])
    for axis in sorted(each % rank for each in axes or []):
        data = np.expand_dims(data, axis)
    return data


def squeeze(call: Call) -> Any:
    axes = call.axes(1, 13)
    return np.squeeze(call.host(0), None if axes is None else tuple(axes))


def reshape(call: Call) -> Any:
    shape = call.attribute("shape") if call.node.version < 5 else _ints(call, 1)
    if shape is None:
        return NotImplemented
    data = call.host(0)
    zero = call.attribute("allowzero", 0)
    return data.reshape([data.shape[n] if not s and not zero else s for n, s in enumerate(shape)])


def size(call: Call) -> Any:
    return np.array(call.host(0).size, object)


def shape(call: Call) -> Any:
    sizes = list(call.host(0).shape)
    return on_host(sizes[call.attribute("start", 0) : call.attribute("end")])


def arange(call: Call) -> Any:
    bounds = [call.number(place) for place in range(3)]
    if any(map(symbolic, bounds)) or any(isinstance(each, float) for each in bounds):
        return NotImplemented
    made = list(range(*bounds))
    return on_host(made) if len(made) <= FEW else NotImplemented


def filled(call: Call) -> Any:
    """ConstantOfShape."""
    sizes = _ints(call, 0)
    if sizes is None or math.prod(sizes) > FEW:
        return NotImplemented
    value = call.attribute("value")
    number = 0.0 if value is None else plain(value.reshape(-1)[0])
    if not isinstance(number, (int, bool)):
        return NotImplemented
    return np.full(sizes, number, object)


def expand(call: Call) -> Any:
    sizes = _ints(call, 1)
    if sizes is None or math.prod(sizes) > FEW:
        return NotImplemented
    data = call.host(0)
    return np.array(np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(sizes))))


def where(call: Call) -> Any:
    chosen = np.frompyfunc(lambda c, a, b: plain(a) if c else plain(b), 3, 1)
    return np.asarray(chosen(*[_objects(call, place) for place in range(3)]), object)


def reduce(function: Callable[[Any, Any], Any], start: Any, since: int) -> Callable[[Call], Any]:
    """Over all of an array of one axis."""

    def run(call: Call) -> Any:
        axes, alone = call.axes(1, since), call.attribute("noop_with_empty_axes", 0)
        data = call.host(0)
        if data.ndim != 1 or (axes is not None and [a % data.ndim for a in axes] != [0]):
            return NotImplemented
        if axes is None and alone:
            return NotImplemented
        found = start
        for place, each in enumerate(data.tolist()):
            found = each if start is None and not place else function(found, each)
        made = np.array(found, object)
        return made.reshape(1) if call.attribute("keepdims", 1) else made

    return run


def transpose(call: Call) -> Any:
    return np.transpose(call.host(0), call.attribute("perm"))


def split(call: Call) -> Any:
    data, axis = call.host(0), call.attribute("axis", 0)
    parts = call.attribute("split") if call.node.version < 13 else None
    if call.has(1):
        parts = _ints(call, 1)
    if parts is None:
        each = -(-data.shape[axis] // len(call.node.outputs))
        parts = [each] * (len(call.node.outputs) - 1)
        parts.append(data.shape[axis] - sum(parts))
    return tuple(np.split(data, np.cumsum(parts)[:-1], axis))


def tile(call: Call) -> Any:
    times = _ints(call, 1)
    if times is None or math.prod(times) * call.host(0).size > FEW:
        return NotImplemented
    return np.tile(call.host(0), times)


def flatten(call: Call) -> Any:
    data, axis = call.host(0), call.attribute("axis", 1)
    return data.reshape(math.prod(data.shape[:axis]), -1)


def _greater(a: Any, b: Any) -> Any:
    return torch.sym_max(a, b) if symbolic(a) or symbolic(b) else max(a, b)


def _less(a: Any, b: Any) -> Any:
    return torch.sym_min(a, b) if symbolic(a) or symbolic(b) else min(a, b)


TABLE: dict[str, Callable[[Call], Any]] = {
    **{"Add": binary(operator.add), "Sub": binary(operator.sub), "Mul": binary(operator.mul)},
    **{"Div": binary(_divide), "Mod": _modulo, "Pow": binary(_power), "Sum": binary(operator.add)},
    **{"Max": binary(_greater), "Min": binary(_less), "Neg": unary(operator.neg)},
    **{"Equal": binary(lambda a, b: bool(a == b)), "Less": binary(lambda a, b: bool(a < b))},
    **{"Greater": binary(lambda a, b: bool(a > b)), "Not": unary(operator.not_)},
    **{"GreaterOrEqual": binary(lambda a, b: bool(a >= b))},
    **{"LessOrEqual": binary(lambda a, b: bool(a <= b))},
    **{"And": binary(lambda a, b: bool(a) and bool(b)), "Or": binary(lambda a, b: bool(a or b))},
    **{"Abs": unary(abs), "Floor": unary(_floor), "Ceil": unary(_ceil), "Sqrt": unary(_sqrt)},
    **{"Cast": cast, "Gather": gather, "Slice": slices, "Concat": concat, "Squeeze": squeeze},
    **{"Unsqueeze": unsqueeze, "Reshape": reshape, "Size": size, "Shape": shape},
    **{"Range": arange, "ConstantOfShape": filled, "Expand": expand, "Where": where},
    **{"ReduceProd": reduce(operator.mul, 1, 18), "ReduceSum": reduce(operator.add, 0, 13)},
    **{"ReduceMax": reduce(_greater, None, 18), "ReduceMin": reduce(_less, None, 18)},
    **{"Transpose": transpose, "Split": split, "Tile": tile, "Flatten": flatten},
    "Identity": lambda call: call.value(0),
}
