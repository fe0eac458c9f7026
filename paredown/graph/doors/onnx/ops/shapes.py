"""Ops that move numbers and compute none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paredown.graph.doors.onnx.call import DTYPES, Call, Known, on_host, symbolic
from paredown.graph.doors.onnx.program import Array

LARGEST = 1 << 31  # numbers of a made tensor: more is a mistake, or an attack


def shape(call: Call) -> Array:
    value = call.value(0)
    sizes = list(value.array.shape if isinstance(value, Known) else value.shape)
    return on_host(sizes[call.attribute("start", 0) : call.attribute("end")])


def size(call: Call) -> Array:
    return on_host([call.tensor(0).numel()]).reshape(())


def reshape(call: Call) -> Tensor:
    x = call.tensor(0)
    wanted = call.attribute("shape") if call.node.version < 5 else call.numbers(1)
    keeps = not call.attribute("allowzero", 0)
    sizes = [
        x.shape[n] if keeps and not symbolic(each) and each == 0 else each
        for n, each in enumerate(wanted)
    ]
    return x.reshape(sizes)


def flatten(call: Call) -> Tensor:
    x, axis = call.tensor(0), call.attribute("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def transpose(call: Call) -> Tensor:
    x = call.tensor(0)
    order = call.attribute("perm") or list(reversed(range(x.dim())))
    moved = [place for place, each in enumerate(order) if place != each]
    if len(moved) == 2:
        return x.transpose(*moved)
    return x.permute(order) if moved else x


def squeeze(call: Call) -> Tensor:
    axes = call.axes(1, 13)
    x = call.tensor(0)
    if axes is None:
        return x.squeeze()
    for axis in axes:
        if not symbolic(x.shape[axis]) and x.shape[axis] != 1:
            raise call.node.refused(f"squeezes axis {axis}, which has {x.shape[axis]} numbers")
    return x.squeeze(axes[0]) if len(axes) == 1 else x.squeeze(axes)


def unsqueeze(call: Call) -> Tensor:
    x, axes = call.tensor(0), call.axes(1, 13) or []
    rank = x.dim() + len(axes)
    for axis in sorted(each % rank for each in axes):
        x = x.unsqueeze(axis)
    return x


def concat(call: Call) -> Tensor:
    parts = [call.tensor(place) for place in range(len(call.values))]
    return torch.cat(parts, call.attribute("axis", 1 if call.node.version < 4 else 0))


def split(call: Call) -> tuple[Tensor, ...]:
    x, axis, count = call.tensor(0), call.attribute("axis", 0), len(call.node.outputs)
    sizes = call.attribute("split") if call.node.version < 13 else None
    if call.has(1):
        sizes = call.numbers(1)
    if sizes is None:
        length = x.shape[axis]
        each = -(-length // count)
        sizes = [each] * (count - 1)
        sizes.append(length - sum(sizes))
    if len({*sizes}) == 1:
        return tuple(x.split(sizes[0], axis))
    return tuple(x.split(list(sizes), axis))


def expand(call: Call) -> Tensor:
    x, sizes = call.tensor(0), call.numbers(1)
    rank = max(x.dim(), len(sizes))
    ours = [1] * (rank - x.dim()) + list(x.shape)
    theirs = [1] * (rank - len(sizes)) + list(sizes)
    made = [_wider(a, b) for a, b in zip(ours, theirs, strict=True)]
    return x.expand(made)


def _wider(here: Any, wanted: Any) -> Any:
    """The size that two broadcast to."""
    if not symbolic(wanted) and wanted == 1:
        return here
    return wanted


def tile(call: Call) -> Tensor:
    x = call.tensor(0)
    if call.node.version < 6:
        times = [1] * x.dim()
        times[call.number(2)] = call.number(1)
        return x.repeat(times)
    return x.repeat(call.numbers(1))


def arange(call: Call) -> Tensor:
    if any(isinstance(call.value(place), Tensor) for place in range(3)):
        raise call.node.refused("counts to a number that is computed from the data", "data")
    bounds = [call.number(place) for place in range(3)]
    return torch.arange(*bounds, dtype=_kind(call.value(0)))


def _kind(value: Any) -> torch.dtype:
    array = value.array if isinstance(value, Known) else value
    first = array.reshape(-1)[0]
    if isinstance(first, (float, torch.SymFloat)) or array.dtype.kind == "f":
        return torch.float32
    return torch.int64 if array.dtype == object else getattr(torch, array.dtype.name)


def filled(call: Call) -> Tensor:
    """ConstantOfShape."""
    sizes, value = call.numbers(0), call.attribute("value")
    if not any(map(symbolic, sizes)) and not 0 <= math.prod(sizes) < LARGEST:
        raise call.node.refused(f"makes a tensor of shape {tuple(sizes)}, which is no size of one")
    if value is None:
        return torch.zeros(sizes)
    kind = value.dtype.name
    return torch.full(sizes, value.reshape(-1)[0].item(), dtype=getattr(torch, kind))


def eye_like(call: Call) -> Tensor:
    value, k = call.value(0), call.attribute("k", 0)
    rows, columns = value.array.shape if isinstance(value, Known) else value.shape
    number = call.attribute("dtype")
    kind = call.tensor(0).dtype if number is None else DTYPES[number]
    full = torch.zeros(rows, columns, dtype=kind)
    places = torch.arange(columns) - torch.arange(rows).unsqueeze(1)
    return torch.where(places == k, torch.ones_like(full), full)


def one_hot(call: Call) -> Tensor:
    places, depth, values = call.tensor(0), call.number(1), call.tensor(2)
    axis = call.attribute("axis", -1)
    rank = places.dim() + 1
    depth = int(depth) if isinstance(depth, float) else depth
    places = places.long()
    places = torch.where(places < 0, places + depth, places)
    around = [1] * rank
    around[axis % rank] = depth
    hot = places.unsqueeze(axis % rank) == torch.arange(depth).reshape(around)
    return torch.where(hot, values[1], values[0])


def trilu(call: Call) -> Tensor:
    x, k = call.tensor(0), call.number(1, 0)
    return x.triu(k) if call.attribute("upper", 1) else x.tril(k)


def pad(call: Call) -> Tensor:
    """Sizes below zero cut; ONNX has all starts and then all ends, PyTorch the last axis first."""
    x = call.tensor(0)
    mode = call.attribute("mode", "constant")
    if call.node.version < 11:
        sizes = call.attribute("pads", call.attribute("paddings"))
        value: Any = call.attribute("value", 0.0)
    else:
        sizes, value = call.numbers(1), call.number(2, 0)
    axes = call.numbers(3) if call.has(3) else list(range(x.dim()))
    starts, ends = [0] * x.dim(), [0] * x.dim()
    for place, axis in enumerate(axes):
        starts[axis % x.dim()], ends[axis % x.dim()] = sizes[place], sizes[place + len(axes)]
    return padded(call, x, starts, ends, mode, value)


def padded(
    call: Call, x: Tensor, starts: list[Any], ends: list[Any], mode: str, value: Any = 0
) -> Tensor:
    """A tensor with so much more before and after, axis by axis."""
    wanted = [axis for axis in range(x.dim()) if _some(starts[axis]) or _some(ends[axis])]
    if not wanted:
        return x
    if mode == "constant":
        flat = [
            size
            for axis in range(x.dim() - 1, wanted[0] - 1, -1)
            for size in (starts[axis], ends[axis])
        ]
        return F.pad(x, flat, value=value)
    name = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode]
    first = x.dim() - len(wanted)
    images = wanted == list(range(first, x.dim())) and x.dim() in (3, 4, 5) and first in (2, 1)
    small = all(each >= 0 for axis in wanted for each in (starts[axis], ends[axis]))
    if (
        images
        and small
        and mode != "wrap"
        and x.dim() - first < x.dim() - 1
        and x.is_floating_point()
    ):
        flat = [size for axis in reversed(wanted) for size in (starts[axis], ends[axis])]
        return F.pad(x, flat, mode=name)
    for axis in wanted:
        x = x.index_select(axis, _around(x.shape[axis], starts[axis], ends[axis], mode))
    return x


def _some(size: Any) -> bool:
    return symbolic(size) or size != 0


def _around(length: Any, start: Any, end: Any, mode: str) -> Tensor:
    """Which places of an axis stand where, with its padding."""
    places = torch.arange(-start, length + end)
    if mode == "edge":
        return places.clamp(0, length - 1)
    if mode == "wrap":
        return places % length
    period = max(2 * (length - 1), 1)
    places = places % period
    return torch.where(places < length, places, period - places)


def depth_to_space(call: Call) -> Tensor:
    x, block = call.tensor(0), call.attribute("blocksize")
    if call.attribute("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    batch, channels, height, width = x.shape
    x = x.reshape(batch, block, block, channels // block**2, height, width)
    x = x.permute(0, 3, 4, 1, 5, 2)
    return x.reshape(batch, channels // block**2, height * block, width * block)


def space_to_depth(call: Call) -> Tensor:
    x, block = call.tensor(0), call.attribute("blocksize")
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // block, block, width // block, block)
    x = x.permute(0, 3, 5, 1, 2, 4)
    return x.reshape(batch, channels * block**2, height // block, width // block)


def reverse_sequence(call: Call) -> Tensor:
    """The first so many of each example backwards."""
    x, lengths = call.tensor(0), call.tensor(1)
    time, batch = call.attribute("time_axis", 0), call.attribute("batch_axis", 1)
    moved = x.movedim((batch, time), (0, 1))
    steps = torch.arange(moved.shape[1]).unsqueeze(0)
    ends = lengths.long().unsqueeze(1)
    places = torch.where(steps < ends, ends - 1 - steps, steps)
    wide = places.reshape(*places.shape, *[1] * (x.dim() - 2)).expand(moved.shape)
    return moved.gather(1, wide).movedim((0, 1), (batch, time))


def refused(why: str, helps: str) -> Callable[[Call], Any]:
    def run(call: Call) -> Any:
        raise call.node.refused(why, helps)

    return run


_SIZES = "gives a result whose size depends on the data"
_CHANCE = "draws random numbers, so that its output is another each time"

TABLE: dict[str, Callable[[Call], Any]] = {
    **{"Shape": shape, "Size": size, "Reshape": reshape, "Flatten": flatten, "Squeeze": squeeze},
    **{"Transpose": transpose, "Unsqueeze": unsqueeze, "Concat": concat, "Split": split},
    **{"Pad": pad, "Expand": expand, "Tile": tile, "Range": arange},
    **{"ConstantOfShape": filled, "EyeLike": eye_like, "OneHot": one_hot, "Trilu": trilu},
    **{"DepthToSpace": depth_to_space, "SpaceToDepth": space_to_depth},
    "ReverseSequence": reverse_sequence,
    **dict.fromkeys(("NonZero", "Unique", "Compress"), refused(_SIZES, "data")),
    **dict.fromkeys(("NonMaxSuppression",), refused(_SIZES, "other")),
    **dict.fromkeys(("RandomNormal", "RandomNormalLike"), refused(_CHANCE, "other")),
    **dict.fromkeys(("RandomUniform", "RandomUniformLike"), refused(_CHANCE, "other")),
    **dict.fromkeys(("Bernoulli", "Multinomial"), refused(_CHANCE, "other")),
}
