"""Convolutions and what pools over windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paredown.graph.doors.onnx.call import Call, symbolic

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MEANS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
MAXIMA = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def rank_of(call: Call, x: Tensor) -> int:
    """How many axes the windows have."""
    rank = x.dim() - 2
    if rank not in (1, 2, 3):
        raise call.node.refused(f"has {rank} axes besides batch and channels; 1 to 3 can be taken")
    return rank


def windows(call: Call, x: Tensor, kernel: list[int]) -> tuple[list[Any], list[Any]]:
    """The padding before and after each axis."""
    rank = len(kernel)
    auto = call.attribute("auto_pad", "NOTSET")
    if auto == "VALID":
        return [0] * rank, [0] * rank
    if auto == "NOTSET" or not auto:
        pads = call.attribute("pads") or [0] * 2 * rank
        return list(pads[:rank]), list(pads[rank:])
    strides = call.attribute("strides") or [1] * rank
    dilations = call.attribute("dilations") or [1] * rank
    starts, ends = [], []
    for axis in range(rank):
        length, stride = x.shape[axis + 2], strides[axis]
        window = (kernel[axis] - 1) * dilations[axis] + 1
        if stride == 1:
            total: Any = window - 1
        else:
            total = (-(-length // stride) - 1) * stride + window - length
            total = torch.sym_max(total, 0) if symbolic(total) else max(total, 0)
        less = total // 2
        starts.append(less if auto == "SAME_UPPER" else total - less)
        ends.append(total - less if auto == "SAME_UPPER" else less)
    return starts, ends


def outside(x: Tensor, starts: list[Any], ends: list[Any], value: float = 0.0) -> Tensor:
    """The padding that PyTorch's op does not do by itself."""
    flat = [size for pair in zip(reversed(starts), reversed(ends), strict=True) for size in pair]
    return F.pad(x, flat, value=value)


def even(starts: list[Any], ends: list[Any]) -> bool:
    """Whether PyTorch's op can pad by itself: as much before as after, in plain numbers."""
    return (
        not any(map(symbolic, [*starts, *ends])) and starts == ends and min(starts, default=0) >= 0
    )


def conv(call: Call) -> Tensor:
    return convolved(call, call.tensor(0), call.tensor(1), call.maybe(2))


def convolved(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rank = rank_of(call, x)
    starts, ends = windows(call, x, list(weight.shape[2:]))
    strides = call.attribute("strides") or [1] * rank
    dilations = call.attribute("dilations") or [1] * rank
    if not even(starts, ends):
        x, starts = outside(x, starts, ends), [0] * rank
    group = call.attribute("group", 1)
    return CONV[rank](x, weight, bias, strides, starts, dilations, group)


def conv_transpose(call: Call) -> Tensor:
    """Output of a given shape, and padding of two sizes, are cut from the whole."""
    x, weight, bias = call.tensor(0), call.tensor(1), call.maybe(2)
    rank = rank_of(call, x)
    strides = call.attribute("strides") or [1] * rank
    dilations = call.attribute("dilations") or [1] * rank
    more = call.attribute("output_padding") or [0] * rank
    kernel = [(weight.shape[n + 2] - 1) * dilations[n] + 1 for n in range(rank)]
    starts, ends = _cut(call, x, kernel, strides, more)
    group = call.attribute("group", 1)
    small = all(each < max(s, d) for each, s, d in zip(more, strides, dilations, strict=True))
    if even(starts, ends) and small:
        return TRANSPOSED[rank](x, weight, bias, strides, starts, more, group, dilations)
    whole = TRANSPOSED[rank](x, weight, None, strides, 0, 0, group, dilations)
    after = [m - end for m, end in zip(more, ends, strict=True)]
    made = outside(whole, [-each for each in starts], after)
    return made if bias is None else made + bias.reshape(-1, *[1] * rank)


def _cut(
    call: Call, x: Tensor, kernel: list[int], strides: list[int], more: list[int]
) -> tuple[list[Any], list[Any]]:
    rank = len(kernel)
    auto = call.attribute("auto_pad", "NOTSET")
    wanted = call.attribute("output_shape")
    if not wanted and auto in ("NOTSET", "", "VALID"):
        pads = call.attribute("pads") if auto != "VALID" else None
        pads = pads or [0] * 2 * rank
        return list(pads[:rank]), list(pads[rank:])
    sizes = wanted[-rank:] if wanted else [x.shape[n + 2] * strides[n] for n in range(rank)]
    starts, ends = [], []
    for n in range(rank):
        total = strides[n] * (x.shape[n + 2] - 1) + more[n] + kernel[n] - sizes[n]
        less = total // 2
        upper = auto != "SAME_UPPER"
        starts.append(total - less if upper else less)
        ends.append(less if upper else total - less)
    if any(not symbolic(each) and each < 0 for each in (*starts, *ends)):
        starts, ends = [0] * rank, [a + b for a, b in zip(starts, ends, strict=True)]
    return starts, ends


def max_pool(call: Call) -> Any:
    x = call.tensor(0)
    rank, kernel = rank_of(call, x), call.attribute("kernel_shape")
    strides = call.attribute("strides") or [1] * rank
    dilations = call.attribute("dilations") or [1] * rank
    starts, ends = windows(call, x, kernel)
    ceil = bool(call.attribute("ceil_mode", 0))
    places = len(call.node.outputs) > 1 and bool(call.node.outputs[1])
    kind, floating = x.dtype, x.is_floating_point()
    x = x if floating else x.float()
    fits = even(starts, ends) and all(2 * s <= k for s, k in zip(starts, kernel, strict=True))
    if fits:
        if places:
            return _with_places(call, x, kernel, strides, starts, dilations, ceil)
        made = MAX_POOL[rank](x, kernel, strides, starts, dilations, ceil)
        return made if floating else made.to(kind)
    if places:
        raise call.node.refused("gives places under padding of two sizes")
    if ceil:
        ends = _up(x, kernel, strides, dilations, starts, ends)
    x = outside(x, starts, ends, -math.inf)
    made = MAX_POOL[rank](x, kernel, strides, 0, dilations, False)
    return made if floating else made.to(kind)


def _up(
    x: Tensor,
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    starts: list[Any],
    ends: list[Any],
) -> list[Any]:
    """More padding after, so that the last windows are whole; none begins in it."""
    made = []
    for n, size in enumerate(kernel):
        window = (size - 1) * dilations[n] + 1
        length = x.shape[n + 2] + starts[n] + ends[n]
        count = -(-(length - window) // strides[n]) + 1
        if (count - 1) * strides[n] >= x.shape[n + 2] + starts[n]:
            count -= 1
        made.append(max((count - 1) * strides[n] + window - length, 0) + ends[n])
    return made


def _with_places(
    call: Call, x: Tensor, kernel: Any, strides: Any, starts: Any, dilations: Any, ceil: bool
) -> tuple[Tensor, Tensor]:
    """The maxima, and where in the whole tensor they stood."""
    if call.attribute("storage_order", 0):
        raise call.node.refused("gives places in the order of columns")
    rank = x.dim() - 2
    found, at = MAX_POOL[rank](x, kernel, strides, starts, dilations, ceil, True)
    size = math.prod(x.shape[2:])
    planes = torch.arange(x.shape[0] * x.shape[1]) * size
    return found, at + planes.reshape(x.shape[0], x.shape[1], *[1] * rank)


def average_pool(call: Call) -> Tensor:
    x = call.tensor(0)
    rank, kernel = rank_of(call, x), call.attribute("kernel_shape")
    strides = call.attribute("strides") or [1] * rank
    dilations = call.attribute("dilations") or [1] * rank
    starts, ends = windows(call, x, kernel)
    ceil, counts = (
        bool(call.attribute("ceil_mode", 0)),
        bool(call.attribute("count_include_pad", 0)),
    )
    fits = even(starts, ends) and all(2 * s <= k for s, k in zip(starts, kernel, strict=True))
    if fits and set(dilations) == {1}:
        return AVERAGE[rank](x, kernel, strides, starts, ceil, counts)  # type: ignore[no-any-return]
    return _averaged(x, kernel, strides, dilations, starts, ends, ceil, counts)


def _averaged(
    x: Tensor,
    kernel: Any,
    strides: Any,
    dilations: Any,
    starts: Any,
    ends: Any,
    ceil: bool,
    counts: bool,
) -> Tensor:
    """Sums by a convolution with ones, over how many numbers each window has."""
    rank = len(kernel)
    more = _up(x, kernel, strides, dilations, starts, ends) if ceil else ends
    ones = torch.ones_like(x[:1, :1])
    inside = outside(ones, starts, ends, 1.0) if counts else outside(ones, starts, ends)
    extra = [after - end for after, end in zip(more, ends, strict=True)]
    inside = outside(inside, [0] * rank, extra)
    window = torch.ones(1, 1, *kernel, dtype=x.dtype)
    flat = outside(x, starts, more).flatten(0, 1).unsqueeze(1)
    sums = CONV[rank](flat, window, None, strides, 0, dilations)
    made = sums.squeeze(1).unflatten(0, (x.shape[0], x.shape[1]))
    return made / CONV[rank](inside, window, None, strides, 0, dilations)


def lp_pool(call: Call) -> Tensor:
    x, p = call.tensor(0), float(call.attribute("p", 2))
    rank, kernel = rank_of(call, x), call.attribute("kernel_shape")
    strides = call.attribute("strides") or [1] * rank
    dilations = call.attribute("dilations") or [1] * rank
    starts, ends = windows(call, x, kernel)
    ends = (
        _up(x, kernel, strides, dilations, starts, ends) if call.attribute("ceil_mode", 0) else ends
    )
    window = torch.ones(1, 1, *kernel, dtype=x.dtype)
    flat = outside(x.abs().pow(p), starts, ends).flatten(0, 1).unsqueeze(1)
    sums = CONV[rank](flat, window, None, strides, 0, dilations)
    return sums.squeeze(1).unflatten(0, (x.shape[0], x.shape[1])).pow(1 / p)


def global_pool(table: dict[int, Any], whole: Callable[..., Tensor]) -> Callable[[Call], Tensor]:
    """Over all axes besides batch and channels."""

    def run(call: Call) -> Tensor:
        x = call.tensor(0)
        rank = x.dim() - 2
        if rank in table:
            return table[rank](x, 1)  # type: ignore[no-any-return]
        return whole(x, tuple(range(2, x.dim())), keepdim=True)

    return run


def global_lp(call: Call) -> Tensor:
    x, p = call.tensor(0), float(call.attribute("p", 2))
    axes = tuple(range(2, x.dim()))
    return x.abs().pow(p).sum(axes, keepdim=True).pow(1 / p)


def col2im(call: Call) -> Tensor:
    x, image, block = call.tensor(0), call.numbers(1), call.numbers(2)
    rank = len(image)
    pads = call.attribute("pads") or [0] * 2 * rank
    if rank != 2 or pads[:2] != pads[2:]:
        raise call.node.refused("is no image with the same padding on both sides")
    strides, dilations = call.attribute("strides") or [1, 1], call.attribute("dilations") or [1, 1]
    made: Tensor = torch.ops.aten.col2im(x, image, block, dilations, pads[:2], strides)
    return made


def grid_sample(call: Call) -> Tensor:
    x, grid = call.tensor(0), call.tensor(1)
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(
        call.attribute("mode", "bilinear"), call.attribute("mode", "bilinear")
    )
    padding = call.attribute("padding_mode", "zeros")
    if mode == "bicubic" and x.dim() != 4:
        raise call.node.refused("is a cubic sampling of a volume")
    corners = bool(call.attribute("align_corners", 0))
    return F.grid_sample(x, grid, mode, padding, corners)


TABLE: dict[str, Callable[[Call], Any]] = {
    **{"Conv": conv, "ConvTranspose": conv_transpose, "MaxPool": max_pool},
    **{"AveragePool": average_pool, "LpPool": lp_pool, "GlobalLpPool": global_lp},
    "GlobalAveragePool": global_pool(MEANS, torch.mean),
    "GlobalMaxPool": global_pool(MAXIMA, torch.amax),
    **{"Col2Im": col2im, "GridSample": grid_sample},
}
