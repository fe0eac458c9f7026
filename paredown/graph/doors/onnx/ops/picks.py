"""Ops that pick some of a tensor's numbers, or put others in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paredown.graph.doors.onnx.call import Call, Known, symbolic


def slices(call: Call) -> Tensor:
    x = call.tensor(0)
    if call.node.version < 10:
        starts, ends = call.attribute("starts"), call.attribute("ends")
        axes, steps = call.attribute("axes"), None
    else:
        starts, ends = call.numbers(1), call.numbers(2)
        axes = call.numbers(3) if call.has(3) else None
        steps = call.numbers(4) if call.has(4) else None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        x = _sliced(x, axis % x.dim(), start, end, step)
    return x


def _sliced(x: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    """Numbers out of the range end where it does; a step below zero goes backwards."""
    if step > 0:
        most = 2**63 - 1
        end = end if symbolic(end) else min(end, most)
        if not symbolic(start) and start == 0 and not symbolic(end) and end >= 2**31 - 1:
            return x if step == 1 else torch.ops.aten.slice.Tensor(x, axis, 0, most, step)
        made: Tensor = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
        return made
    length = x.shape[axis]
    first = min(start + length if start < 0 else start, length - 1)
    last = max(end + length if end < 0 else end, -1)
    if end < -length:
        last = -1
    if first == length - 1 and last == -1 and step == -1:
        return x.flip(axis)
    places = torch.arange(first, last, step, device=x.device) if first > last else None
    if places is None:
        return x.narrow(axis, 0, 0)
    return x.index_select(axis, places)


def gather(call: Call) -> Tensor:
    """One place is a selection, whole numbers into a table of two axes are an embedding."""
    axis = call.attribute("axis", 0)
    where = call.value(1)
    data = call.tensor(0)
    if not isinstance(where, Tensor):
        numbers = call.numbers(1)
        rank = call.host(1).ndim
        if rank == 0:
            made: Tensor = torch.ops.aten.select.int(data, axis, numbers[0])
            return made
        if rank == 1 and not any(map(symbolic, numbers)):
            start = numbers[0] if numbers else 0
            if numbers and start >= 0 and numbers == list(range(start, start + len(numbers))):
                return _sliced(data, axis % data.dim(), start, start + len(numbers), 1)
    found = call.tensor(1)
    length = data.shape[axis]
    if isinstance(call.value(0), Known) and axis == 0 and data.dim() == 2 and found.dim() > 0:
        if data.is_floating_point():
            # places below zero fail in PyTorch, which is louder than counting from the end
            return F.embedding(_not_negative_known(call, found, length), data)
    flat = _not_negative(call, found, length).reshape(-1)
    made = data.index_select(axis, flat)
    axis %= data.dim()
    if found.dim() == 1:
        return made
    return made.reshape(*data.shape[:axis], *found.shape, *data.shape[axis + 1 :])


def _not_negative_known(call: Call, places: Tensor, length: Any) -> Tensor:
    if isinstance(call.value(1), Known):
        return _not_negative(call, places, length)
    return places if places.dtype in (torch.int64, torch.int32) else places.long()


def _not_negative(call: Call, places: Tensor, length: Any) -> Tensor:
    """Places from the end on, which PyTorch's selections do not know, where the file has any."""
    value = call.value(1)
    places = places if places.dtype in (torch.int64, torch.int32) else places.long()
    if isinstance(value, Known) and value.array.size and value.array.min() >= 0:
        return places
    return torch.where(places < 0, places + length, places)


def gather_elements(call: Call) -> Tensor:
    x, places, axis = call.tensor(0), call.tensor(1).long(), call.attribute("axis", 0)
    return x.gather(axis, torch.where(places < 0, places + x.shape[axis], places))


def gather_nd(call: Call) -> Tensor:
    x, places, batch = call.tensor(0), call.tensor(1).long(), call.attribute("batch_dims", 0)
    depth = places.shape[-1]
    index: list[Tensor] = []
    for axis in range(batch):
        around = [1] * (places.dim() - 1)
        around[axis] = x.shape[axis]
        index.append(torch.arange(x.shape[axis]).reshape(around))
    for place in range(depth):
        each = places[..., place]
        index.append(torch.where(each < 0, each + x.shape[batch + place], each))
    return x[tuple(index)]


def scatter_elements(call: Call) -> Tensor:
    x, places, values = call.tensor(0), call.tensor(1).long(), call.tensor(2)
    axis, how = call.attribute("axis", 0), call.attribute("reduction", "none")
    places = torch.where(places < 0, places + x.shape[axis], places)
    if how == "none":
        return x.scatter(axis, places, values)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, places, values, names[how])


def scatter_nd(call: Call) -> Tensor:
    x, places, values = call.tensor(0), call.tensor(1).long(), call.tensor(2)
    how = call.attribute("reduction", "none")
    depth = places.shape[-1]
    flat = x.reshape(-1, *x.shape[depth:]) if depth else x.reshape(1, *x.shape)
    at = torch.zeros(places.shape[:-1], dtype=torch.int64)
    for place in range(depth):
        each = places[..., place]
        each = torch.where(each < 0, each + x.shape[place], each)
        at = at * x.shape[place] + each
    rows = values.reshape(-1, *x.shape[depth:])
    at = at.reshape(-1)
    if how == "none":
        return flat.index_copy(0, at, rows).reshape(x.shape)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    wide = at.reshape(-1, *[1] * (rows.dim() - 1)).expand(rows.shape)
    return flat.scatter_reduce(0, wide, rows, names[how]).reshape(x.shape)


TABLE: dict[str, Callable[[Call], Any]] = {
    **{"Slice": slices, "Gather": gather, "GatherElements": gather_elements},
    **{"GatherND": gather_nd, "ScatterElements": scatter_elements, "Scatter": scatter_elements},
    "ScatterND": scatter_nd,
}
