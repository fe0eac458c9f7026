"""The blocks that efficient convolutional networks are made of, and how a row of a paper's table
describes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

Activation = Callable[[], nn.Module]
Norm = Callable[[int], nn.Module]
Size = int | tuple[int, int]  # rows and columns of an image, or one number for both

relu: Activation = partial(nn.ReLU, inplace=True)
relu6: Activation = partial(nn.ReLU6, inplace=True)
hard_swish: Activation = partial(nn.Hardswish, inplace=True)
swish: Activation = partial(nn.SiLU, inplace=True)


def divisible(channels: float, by: int = 8) -> int:
    """A number of channels that kernels like: the nearest multiple, never a tenth less.

    Example:
        >>> divisible(32 * 0.35), divisible(24 * 0.35), divisible(96 * 0.75)
        (16, 8, 72)
    """
    made = max(by, int(channels + by / 2) // by * by)
    return made if made >= 0.9 * channels else made + by


@dataclass(frozen=True)
class Row:
    """A row of a paper's table: ``repeats`` blocks of one kind, the first with the stride.

    Attributes:
        kind: "plain" (one convolution), "separable" (depthwise, then pointwise), "inverted" (wider
            inside, and depthwise there), "fused" (inverted, its first two convolutions one),
            "universal" (inverted, with a depthwise convolution of ``kernel`` ahead, if any).
        out: channels behind it.
        expand: channels inside, as a multiple of those before it.
        hidden: the same as a number, in place of ``expand``.
        inner: size of the universal block's depthwise kernel inside; 0 is none.
        squeeze: squeeze-excite inside, as in the papers "swish" (EfficientNet's) or "hard"
            (MobileNetV3's); "" is none.
    """

    kind: str
    out: int
    kernel: int = 3
    stride: int = 1
    expand: float = 1.0
    hidden: int = 0
    repeats: int = 1
    inner: int = 0
    squeeze: str = ""
    activation: Activation = relu

    def scaled(self, width: float) -> Row:
        """With every number of channels multiplied."""
        hidden = divisible(self.hidden * width) if self.hidden else 0
        return replace(self, out=divisible(self.out * width), hidden=hidden)

    def inside(self, channels: int) -> int:
        """Channels inside a block that has so many before it."""
        return self.hidden or divisible(channels * self.expand)


class ConvNorm(nn.Sequential):
    """A convolution that keeps the size but for its stride, its norm and its activation."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        norm: Norm = nn.BatchNorm2d,
        activation: Activation | None = None,
    ) -> None:
        conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, norm(out), *([activation()] if activation else []))


class SqueezeExcite(nn.Module):
    """Channels weighed by what their whole maps hold (1709.01507).

    Shapes: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(
        self, channels: int, squeezed: int, activation: nn.Module, scale: nn.Module
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.activation = nn.Conv2d(channels, squeezed, 1), activation
        self.fc2, self.scale_activation = nn.Conv2d(squeezed, channels, 1), scale

    def forward(self, x: Tensor) -> Tensor:
        weights = self.fc2(self.activation(self.fc1(self.avgpool(x))))  # (B, C, 1, 1)
        return x * self.scale_activation(weights)  # type: ignore[no-any-return]


class DropPath(nn.Module):
    """Leave a block out for some examples of a batch, in training alone (1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


class Block(nn.Module):
    """A row's layers, under the name that torchvision gives them; the input is added where shapes
    allow it.

    Shapes: (B, C, H, W) -> (B, out, H / stride, W / stride).
    """

    def __init__(self, name: str, layers: Sequence[nn.Module], added: bool, drop: float) -> None:
        super().__init__()
        self.name, self.added = name, added
        self.add_module(name, nn.Sequential(*layers))
        self.drop = DropPath(drop) if added and drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        made = self.get_submodule(self.name)(x)
        return x + self.drop(made) if self.added else made  # type: ignore[no-any-return]


def squeeze_excite(kind: str, channels: int, hidden: int) -> nn.Module:
    if kind == "swish":
        return SqueezeExcite(hidden, max(1, channels // 4), swish(), nn.Sigmoid())
    return SqueezeExcite(hidden, divisible(hidden // 4), relu(), nn.Hardsigmoid())


def layers_of(row: Row, channels: int, norm: Norm, flat: bool = False) -> list[nn.Module]:
    """The layers of one block of a row, with so many channels before it.

    Args:
        flat: whether the last convolution and its norm stand beside the others, as in
            torchvision's MobileNetV2, or together.
    """
    make, acted = (
        partial(ConvNorm, norm=norm),
        partial(ConvNorm, norm=norm, activation=row.activation),
    )
    if row.kind == "plain":
        return [acted(channels, row.out, row.kernel, row.stride)]
    if row.kind == "separable":
        depthwise = acted(channels, channels, row.kernel, row.stride, channels)
        return [depthwise, acted(channels, row.out)]
    hidden = row.inside(channels)
    if row.kind == "fused":
        if hidden == channels:
            return [acted(channels, row.out, row.kernel, row.stride)]
        return [acted(channels, hidden, row.kernel, row.stride), make(hidden, row.out)]
    made: list[nn.Module] = []
    kernel = row.kernel
    if row.kind == "universal":
        kernel = row.inner
        if row.kernel:
            stride = 1 if row.inner else row.stride
            made.append(make(channels, channels, row.kernel, stride, channels))
    if hidden != channels or row.kind == "universal":
        made.append(acted(channels, hidden))
    if kernel:
        made.append(acted(hidden, hidden, kernel, row.stride, hidden))
    if row.squeeze:
        made.append(squeeze_excite(row.squeeze, channels, hidden))
    last = make(hidden, row.out)
    return [*made, *(last if flat else [last])]
