"""Convolutions and poolings: Keras pads "same" at the end where it cannot pad evenly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from paredown.graph.doors.keras.value import Layer, Value, first, parameter, set_to, whole

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MAXIMA = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
MEANS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def padding(sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> list[int]:
    """How much "same" pads along each dimension, both sides together; the end gets the odd one.

    Example:
        >>> padding((8, 9), (3, 3), (2, 2)), padding((8, 8), (3, 5), (1, 1))
        ([1, 2], [2, 4])
    """
    return [
        max((-(-size // stride) - 1) * stride + reach - size, 0)
        for size, reach, stride in zip(sizes, kernel, strides, strict=True)
    ]


def sides(totals: Sequence[int]) -> list[int]:
    """As ``F.pad`` wants them: the last dimension first, each with its begin and end."""
    return [part for total in reversed(totals) for part in (total // 2, total - total // 2)]


def _spatial(layer: Any) -> tuple[int, ...] | None:
    """The sizes of a layer's input besides batch and channels, where the file fixes them."""
    shape = tuple(layer.input.shape)[1:-1]
    return shape if all(isinstance(size, int) for size in shape) else None


def _totals(layer: Any) -> list[int] | None:
    """What is padded along each dimension; None where that depends on sizes that vary."""
    rank = layer.rank
    if layer.padding == "valid":
        return [0] * rank
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation_rate, layer.kernel_size, strict=True)]
    if all(stride == 1 for stride in layer.strides):
        return [each - 1 for each in reach]
    sizes = _spatial(layer)
    return None if sizes is None else padding(sizes, reach, layer.strides)


def _placed(made: Any, layer: Any) -> list[int] | None:
    """Give a convolution the layer's padding, or what must be padded before it; None where that
    depends on sizes that vary."""
    if layer.padding == "causal":
        return [layer.dilation_rate[0] * (layer.kernel_size[0] - 1), 0]
    totals = _totals(layer)
    if totals is None:
        return None
    if all(total % 2 == 0 for total in totals):
        made.padding = tuple(total // 2 for total in totals)
        return []
    return sides(totals)


def _plain(layer: Any) -> bool:
    last = layer.data_format == "channels_last"
    return last and getattr(layer, "quantization_mode", None) is None and not lora(layer)


def lora(layer: Any) -> bool:
    return bool(getattr(layer, "lora_enabled", False))


def convolution(layer: Any) -> Layer | None:
    if not _plain(layer) or layer.padding not in ("valid", "same", "causal"):
        return None
    kernel = parameter(layer.kernel)  # (*kernel, in / groups, out)
    made = CONVOLUTIONS[layer.rank](
        kernel.shape[-2] * layer.groups,
        kernel.shape[-1],
        layer.kernel_size,
        layer.strides,
        dilation=layer.dilation_rate,
        groups=layer.groups,
        bias=layer.use_bias,
    )
    set_to(made.weight, kernel.movedim((-1, -2), (0, 1)))
    if layer.use_bias:
        set_to(made.bias, parameter(layer.bias))
    pads = _placed(made, layer)
    return None if pads is None else first(made, pads)


def depthwise(layer: Any) -> Layer | None:
    found = _depthwise(layer, layer.kernel, layer.bias if layer.use_bias else None)
    return None if found is None else first(*found)


def _depthwise(layer: Any, weight: Any, bias: Any) -> tuple[nn.Module, list[int]] | None:
    if not _plain(layer) or layer.padding not in ("valid", "same"):
        return None
    kernel = parameter(weight)  # (*kernel, in, multiplier)
    channels, times = kernel.shape[-2:]
    made = CONVOLUTIONS[layer.rank](
        channels,
        channels * times,
        layer.kernel_size,
        layer.strides,
        dilation=layer.dilation_rate,
        groups=channels,
        bias=bias is not None,
    )
    set_to(made.weight, kernel.movedim((-2, -1), (0, 1)).flatten(0, 1).unsqueeze(1))
    if bias is not None:
        set_to(made.bias, parameter(bias))
    pads = _placed(made, layer)
    return None if pads is None else (made, pads)


def separable(layer: Any) -> Layer | None:
    found = _depthwise(layer, layer.depthwise_kernel, None)
    if found is None:
        return None
    kernel = parameter(layer.pointwise_kernel)  # (1, ..., in, out)
    second = CONVOLUTIONS[layer.rank](
        kernel.shape[-2], kernel.shape[-1], kernel_size=1, bias=layer.use_bias
    )
    set_to(second.weight, kernel.movedim((-1, -2), (0, 1)))
    if layer.use_bias:
        set_to(second.bias, parameter(layer.bias))
    return first(nn.Sequential(found[0], second), found[1])


def transposed(layer: Any) -> Layer | None:
    if not _plain(layer):
        return None
    from keras.src.backend.common import backend_utils

    pads, more = backend_utils.compute_conv_transpose_padding_args_for_torch(
        input_shape=layer.input.shape,
        kernel_shape=layer.kernel.shape,
        strides=layer.strides,
        padding=layer.padding,
        output_padding=layer.output_padding,
        dilation_rate=layer.dilation_rate,
    )
    if layer.padding == "same" and any(more):  # which Keras cuts at the other end
        return None
    kernel = parameter(layer.kernel)  # (*kernel, out, in)
    made = TRANSPOSED[layer.rank](
        kernel.shape[-1],
        kernel.shape[-2],
        layer.kernel_size,
        layer.strides,
        padding=tuple(pads),
        output_padding=tuple(more),
        dilation=layer.dilation_rate,
        bias=layer.use_bias,
    )
    set_to(made.weight, kernel.movedim((-1, -2), (0, 1)))
    if layer.use_bias:
        set_to(made.bias, parameter(layer.bias))
    return first(made)


def _pool(layer: Any, kinds: dict[int, Any], **how: Any) -> Layer | None:
    rank = len(layer.pool_size)
    if layer.data_format != "channels_last":
        return None
    totals = [0] * rank
    if layer.padding == "same":
        sizes = _spatial(layer)
        if sizes is None:
            return None
        totals = padding(sizes, layer.pool_size, layer.strides)
    if all(total % 2 == 0 for total in totals):
        pads = tuple(total // 2 for total in totals)
        return first(kinds[rank](layer.pool_size, layer.strides, pads, **how))
    if kinds is MEANS or max(totals) > 1:  # Keras repeats the edge, here, where a mean is uneven
        return None
    return first(kinds[rank](layer.pool_size, layer.strides, ceil_mode=True, **how))


def maximum(layer: Any) -> Layer | None:
    return _pool(layer, MAXIMA)


def mean(layer: Any) -> Layer | None:
    return _pool(layer, MEANS, count_include_pad=False)


class Whole(nn.Module):
    """The mean or the maximum of each channel."""

    def __init__(self, is_mean: bool, keeps: bool) -> None:
        super().__init__()
        self.is_mean, self.keeps = is_mean, keeps

    def forward(self, value: Value) -> Value:
        x = value.first().tensor
        dims = list(range(2, x.dim()))
        made = x.mean(dims, keepdim=self.keeps) if self.is_mean else x.amax(dims, self.keeps)
        return Value(made, self.keeps)


def whole_mean(layer: Any) -> Layer | None:
    return whole(Whole(True, layer.keepdims)) if layer.data_format == "channels_last" else None


def whole_maximum(layer: Any) -> Layer | None:
    return whole(Whole(False, layer.keepdims)) if layer.data_format == "channels_last" else None


def zeros(layer: Any) -> Layer | None:
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    pads = layer.padding if isinstance(layer.padding[0], (tuple, list)) else [layer.padding]
    flat = [int(part) for pair in reversed(pads) for part in pair]

    return first(nn.Identity(), flat)


def upsampling(layer: Any) -> Layer | None:
    size = layer.size if isinstance(layer.size, (tuple, list)) else (layer.size,)
    ways = {"nearest": "nearest", "bilinear": "bilinear"}
    way = ways.get(getattr(layer, "interpolation", "nearest"))
    if way is None or getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    return first(nn.Upsample(scale_factor=tuple(float(each) for each in size), mode=way))


_RANKS = ("1D", "2D", "3D")
TABLE: dict[str, Callable[[Any], Layer | None]] = {
    **{f"Conv{rank}": convolution for rank in _RANKS},
    **{f"Conv{rank}Transpose": transposed for rank in _RANKS},
    **{f"DepthwiseConv{rank}": depthwise for rank in _RANKS[:2]},
    **{f"SeparableConv{rank}": separable for rank in _RANKS[:2]},
    **{f"MaxPooling{rank}": maximum for rank in _RANKS},
    **{f"AveragePooling{rank}": mean for rank in _RANKS},
    **{f"GlobalAveragePooling{rank}": whole_mean for rank in _RANKS},
    **{f"GlobalMaxPooling{rank}": whole_maximum for rank in _RANKS},
    **{f"ZeroPadding{rank}": zeros for rank in _RANKS},
    **{f"UpSampling{rank}": upsampling for rank in _RANKS[:2]},
}
