"""Resize and Upsample: PyTorch's own where the conventions are the same, else axis by axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paredown.graph.doors.onnx.call import Call, symbolic
from paredown.graph.doors.onnx.program import Array

MEANT = (  # read where they matter
    *("antialias", "axes", "coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside"),
    *("extrapolation_value", "keep_aspect_ratio_policy", "mode", "nearest_mode", "scales"),
)


@dataclass(frozen=True)
class _Axis:
    """How one axis is resized: from one length to another, at a scale."""

    axis: int
    length: Any
    size: Any
    scale: Any
    roi: tuple[float, float]


def resize(call: Call) -> Tensor:
    x = call.tensor(0)
    axes = _axes(call, x)
    if call.attribute("coordinate_transformation_mode") == "align_corners":
        _check_corners(call, axes)
    changed = [each for each in axes if _changes(each) or _shifts(call)]
    if not changed:
        return x
    made = _by_torch(call, x, axes, changed)
    if made is not None:
        return made
    for each in changed:
        if symbolic(each.size) or symbolic(each.length):
            raise call.node.refused(
                "resizes an axis whose size varies in a way that PyTorch's own does not", "data"
            )
        x = _along(call, x, each)
    return x


def _check_corners(call: Call, axes: list[_Axis]) -> None:
    """Where the corners lie, ONNX's words and its runtimes say differently of broken sizes."""
    for each in axes:
        if not symbolic(each.scale) and not symbolic(each.size):
            if abs(each.scale * each.length - each.size) > 1e-3:
                raise call.node.refused("aligns corners at a scale that gives no whole size")


def _changes(axis: _Axis) -> bool:
    """Whether the axis gets another size; those of images always may, where they vary."""
    if axis.axis > 1 and (symbolic(axis.size) or symbolic(axis.length)):
        return True
    return bool(axis.size != axis.length)


def _shifts(call: Call) -> bool:
    return bool(call.attribute("coordinate_transformation_mode") == "tf_crop_and_resize")


def _axes(call: Call, x: Tensor) -> list[_Axis]:
    upsample = call.node.op == "Upsample"
    for name in MEANT:
        call.attribute(name)
    _ = call.has(1), call.has(2), call.has(3)
    places = (1, None) if upsample or call.node.version < 11 else (2, 3)
    wanted = call.attribute("axes") or list(range(x.dim()))
    wanted = [each % x.dim() for each in wanted]
    roi = [0.0] * len(wanted) + [1.0] * len(wanted)
    if not upsample and call.node.version >= 11 and call.has(1) and _shifts(call):
        roi = [float(each) for each in call.numbers(1)]
    scales = call.attribute("scales") if upsample and not call.has(1) else None
    if scales is None and call.has(places[0]) and call.host(places[0]).size:
        scales = call.numbers(places[0])
    found = []
    if scales is not None:
        for n, axis in enumerate(wanted):
            length, scale = x.shape[axis], scales[n]
            size = _scaled(length, scale, roi[n], roi[n + len(wanted)])
            found.append(_Axis(axis, length, size, scale, (roi[n], roi[n + len(wanted)])))
        return found
    sizes = call.numbers(3)
    ratios = [size / x.shape[axis] for size, axis in zip(sizes, wanted, strict=True)]
    policy = call.attribute("keep_aspect_ratio_policy", "stretch")
    for n, axis in enumerate(wanted):
        length, size, scale = x.shape[axis], sizes[n], ratios[n]
        if policy != "stretch":
            scale = min(ratios) if policy == "not_larger" else max(ratios)
            size = math.floor(scale * length + 0.5)
        found.append(_Axis(axis, length, size, scale, (roi[n], roi[n + len(wanted)])))
    return found


def _scaled(length: Any, scale: Any, start: float, end: float) -> Any:
    if (start, end) != (0.0, 1.0):
        return math.floor(length * (end - start) * scale)
    if not symbolic(scale) and float(scale).is_integer():
        return length * int(scale)
    return torch.sym_int(length * scale) if symbolic(length) else math.floor(length * scale)


def _by_torch(call: Call, x: Tensor, axes: list[_Axis], changed: list[_Axis]) -> Tensor | None:
    """By PyTorch's own op; None where it computes something else."""
    spatial = range(2, x.dim())
    if not {each.axis for each in changed} <= set(spatial) or x.dim() not in (3, 4, 5):
        return None
    if not x.is_floating_point():
        return None
    mode, options = _mode_of(call, x.dim() - 2, changed)
    if mode is None:
        return None
    by_axis = {each.axis: each for each in axes}
    sizes = [by_axis[a].size if a in by_axis else x.shape[a] for a in spatial]
    whole = [
        not symbolic(each.scale) and float(each.scale).is_integer() for each in by_axis.values()
    ]
    if all(whole) and mode in ("nearest", "bilinear"):
        factors = [float(by_axis[a].scale) if a in by_axis else 1.0 for a in spatial]
        if any(symbolic(each) for each in sizes):
            return F.interpolate(x, scale_factor=factors, mode=mode, **options)
    if any(not _same_scale(each) for each in changed):
        return None
    return F.interpolate(x, size=sizes, mode=mode, **options)


def _same_scale(axis: _Axis) -> bool:
    """Whether the scale follows from the sizes, as PyTorch has it."""
    if symbolic(axis.scale) or symbolic(axis.size):
        return True
    return abs(axis.size / axis.length - axis.scale) < 1e-6


def _mode_of(call: Call, rank: int, axes: list[_Axis]) -> tuple[Any, dict[str, Any]]:
    mode = call.attribute("mode", "nearest")
    usual = "asymmetric" if call.node.op == "Upsample" or call.node.version < 11 else "half_pixel"
    where = call.attribute("coordinate_transformation_mode", usual)
    if call.attribute("antialias", 0) or call.attribute("exclude_outside", 0):
        return None, {}
    more = all(not symbolic(each.size) and each.size > 1 for each in axes)
    if mode == "nearest":
        how = call.attribute("nearest_mode", "round_prefer_floor")
        if where == "asymmetric" and (how == "floor" or usual == "asymmetric"):
            return "nearest", {}
        if where in ("half_pixel", "pytorch_half_pixel") and how == "round_prefer_ceil":
            return "nearest-exact", {}
        whole = all(not symbolic(e.scale) and float(e.scale).is_integer() for e in axes)
        if where == "half_pixel" and how == "round_prefer_floor" and whole:
            return "nearest", {}
        return None, {}
    names = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}, "cubic": {2: "bicubic"}}
    name = names[mode].get(rank)
    if mode == "cubic" and call.attribute("cubic_coeff_a", -0.75) != -0.75:
        return None, {}
    if where == "align_corners":
        return name, {"align_corners": True}
    if where == "half_pixel" or (where == "pytorch_half_pixel" and more):
        return name, {"align_corners": False}
    return None, {}


def _along(call: Call, x: Tensor, axis: _Axis) -> Tensor:
    """One axis, by a matrix of weights (size, length)."""
    weights, beyond = matrix(call, axis)
    moved = x.movedim(axis.axis, -1)
    if call.attribute("mode", "nearest") == "nearest":
        made = moved.index_select(-1, torch.from_numpy(weights.argmax(1)))
    else:
        made = torch.matmul(moved, torch.from_numpy(weights.T.astype(np.float32)).to(x.dtype))
    if beyond.any():
        value = call.attribute("extrapolation_value", 0.0)
        made = torch.where(torch.from_numpy(beyond), torch.full_like(made, value), made)
    return made.movedim(-1, axis.axis)


def matrix(call: Call, axis: _Axis) -> tuple[Array, Array]:
    """How much of each number there goes into each here, and which of these lie beyond it."""
    mode, a = call.attribute("mode", "nearest"), call.attribute("cubic_coeff_a", -0.75)
    usual = "asymmetric" if call.node.op == "Upsample" or call.node.version < 11 else "half_pixel"
    where = call.attribute("coordinate_transformation_mode", usual)
    at = _coordinates(where, axis)
    made = np.zeros((axis.size, axis.length))
    shrink = min(1.0, axis.scale) if call.attribute("antialias", 0) else 1.0
    reach = {"nearest": 1, "linear": 1, "cubic": 2}[mode] / shrink
    for row, x in enumerate(at):
        if mode == "nearest":
            nearest = _nearest(x, call.attribute("nearest_mode", "round_prefer_floor"), usual)
            made[row, int(np.clip(nearest, 0, axis.length - 1))] = 1.0
            continue
        places = np.arange(math.floor(x - reach) + 1, math.ceil(x + reach) + (x == math.ceil(x)))
        weights = _kernel(mode, np.abs(places - x) * shrink, a)
        if call.attribute("exclude_outside", 0):
            weights = weights * ((places >= 0) & (places < axis.length))
        if shrink < 1.0 or call.attribute("exclude_outside", 0) or mode == "linear":
            weights = weights / weights.sum()
        np.add.at(made[row], np.clip(places, 0, axis.length - 1), weights)
    beyond = np.zeros(axis.size, bool)
    if where == "tf_crop_and_resize":
        beyond = (at < 0) | (at > axis.length - 1)
    return made, beyond


def _coordinates(where: str, axis: _Axis) -> Array:
    """Where each new number lies among the old ones."""
    x = np.arange(axis.size, dtype=np.float64)
    if where == "asymmetric":
        return x / axis.scale
    if where == "align_corners":
        return x * (axis.length - 1) / (axis.size - 1) if axis.size > 1 else x * 0
    if where == "tf_half_pixel_for_nn":
        return (x + 0.5) / axis.scale
    if where == "tf_crop_and_resize":
        start, end = axis.roi
        if axis.size == 1:
            return np.array([0.5 * (start + end) * (axis.length - 1)])
        step = (end - start) * (axis.length - 1) / (axis.size - 1)
        return start * (axis.length - 1) + x * step
    if where == "half_pixel_symmetric":
        exact = axis.scale * axis.length
        offset = axis.length / 2 * (1 - axis.size / exact)
        return offset + (x + 0.5) / axis.scale - 0.5
    if where == "pytorch_half_pixel" and axis.size == 1:
        return x * 0 - 0.5
    return (x + 0.5) / axis.scale - 0.5


def _nearest(x: float, how: str, usual: str) -> float:
    if usual == "asymmetric" or how == "floor":
        return math.floor(x)
    if how == "ceil":
        return math.ceil(x)
    return math.ceil(x - 0.5) if how == "round_prefer_floor" else math.floor(x + 0.5)


def _kernel(mode: str, far: Array, a: float) -> Array:
    if mode == "linear":
        return np.clip(1 - far, 0, 1)
    near = ((a + 2) * far - (a + 3)) * far**2 + 1
    wide = ((far - 5) * far + 8) * far * a - 4 * a
    return np.where(far <= 1, near, np.where(far < 2, wide, 0.0))


TABLE: dict[str, Callable[[Call], Any]] = {"Resize": resize, "Upsample": resize}
