"""Fourier transforms, and the windows before them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paredown.graph.doors.onnx.call import DTYPES, Call


def dft(call: Call) -> Tensor:
    """The last axis has the real and the imaginary part, or the real one alone."""
    x, inverse = call.tensor(0), bool(call.attribute("inverse", 0))
    axis = call.number(2, -2) if call.node.version >= 20 else call.attribute("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    length = call.number(1) if call.has(1) else None
    one_sided = bool(call.attribute("onesided", 0))
    values = x[..., 0] if x.shape[-1] == 1 else torch.view_as_complex(x.contiguous())
    if one_sided and inverse:
        return torch.fft.irfft(values, length, axis).unsqueeze(-1)
    if one_sided:
        return torch.view_as_real(torch.fft.rfft(x[..., 0], length, axis))
    function = torch.fft.ifft if inverse else torch.fft.fft
    return torch.view_as_real(function(values, length, axis))


def window(weights: tuple[float, ...]) -> Callable[[Call], Tensor]:
    """A sum of cosines of these weights."""

    def run(call: Call) -> Tensor:
        size = call.number(0)
        steps = torch.arange(size, dtype=torch.float64)
        length = size if call.attribute("periodic", 1) else size - 1
        made = torch.zeros(size, dtype=torch.float64)
        for n, weight in enumerate(weights):
            made = made + (-1) ** n * weight * torch.cos(2 * math.pi * n * steps / length)
        return made.to(DTYPES.get(call.attribute("output_datatype", 1), torch.float32))

    return run


TABLE: dict[str, Callable[[Call], Any]] = {
    "DFT": dft,
    "HannWindow": window((0.5, 0.5)),
    "HammingWindow": window((25 / 46, 21 / 46)),
    "BlackmanWindow": window((0.42, 0.5, 0.08)),
}
