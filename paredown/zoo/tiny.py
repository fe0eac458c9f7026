"""MLPerf Tiny's reference networks (2106.07597), multilayer perceptrons, a small U-Net."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.core.errors import UserError
from paredown.zoo.blocks import Size, divisible


def _conv(
    channels: int,
    out: int,
    kernel: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    groups: int = 1,
    act: bool = True,
) -> nn.Sequential:
    """A convolution with its bias, norm and ReLU."""
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = (sides[0] // 2, sides[1] // 2)
    conv = nn.Conv2d(channels, out, kernel, stride, padding, groups=groups)
    return nn.Sequential(conv, nn.BatchNorm2d(out), *([nn.ReLU()] if act else []))


def _repeated(count: int, depth: float) -> int:
    return max(1, round(count * depth))


class DSCNN(nn.Sequential):
    """Keywords in spectrograms by depthwise-separable convolutions.

    Shapes: (B, channels, T, F) -> (B, classes); the paper's is (B, 1, 49, 10) -> (B, 12).
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        width: float = 1.0,
        depth: float = 1.0,
    ) -> None:
        wide = divisible(64 * width)
        blocks: list[nn.Module] = []
        for _ in range(_repeated(4, depth)):
            blocks += [_conv(wide, wide, groups=wide), _conv(wide, wide, 1)]
        super().__init__(
            nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), _valid_stem(channels, wide), nn.Dropout(0.2)),
            *blocks,
            nn.Dropout(0.4),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(wide, classes),
        )


def _valid_stem(channels: int, out: int) -> nn.Module:
    """A kernel of ten by four, with a stride of two, that halves an even size exactly."""
    conv = nn.Conv2d(channels, out, (10, 4), 2, (4, 1))
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions and what they are added to."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_conv(channels, out, 3, stride), _conv(out, out, act=False))
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.layers(x))


class ResNet8(nn.Sequential):
    """Small pictures by three residual blocks.

    Shapes: (B, channels, H, W) -> (B, classes); the paper's is (B, 3, 32, 32) -> (B, 10).
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        width: float = 1.0,
        depth: float = 1.0,
    ) -> None:
        sizes = [divisible(16 * width * 2**n) for n in range(3)]
        blocks, before = [], sizes[0]
        for n, size in enumerate(sizes):
            for repeat in range(_repeated(1, depth)):
                blocks.append(Residual(before, size, 2 if n and not repeat else 1))
                before = size
        super().__init__(
            _conv(channels, sizes[0]),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(before, classes),
        )


class MLP(nn.Sequential):
    """Linear layers with norms between, for rows of numbers.

    Shapes: (B, features) -> (B, out).
    """

    def __init__(self, features: int, out: int, hidden: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(features, size), nn.BatchNorm1d(size), nn.ReLU()]
            features = size
        super().__init__(*layers, nn.Linear(features, out))


def mlp(features: int, out: int, width: float = 1.0, depth: float = 1.0) -> MLP:
    """Two layers of 128 at a width and depth of 1."""
    return MLP(features, out, [divisible(128 * width)] * _repeated(2, depth))


def autoencoder(features: int, out: int, width: float = 1.0, depth: float = 1.0) -> MLP:
    """Sounds of machines by how well eight numbers tell them; the paper's is 640 -> 640."""
    sides = [divisible(128 * width)] * _repeated(4, depth)
    return MLP(features, out, [*sides, 8, *sides])


class UNet(nn.Module):
    """Maps of what is where, on three scales (1505.04597).

    Shapes: (B, channels, H, W) -> (B, classes, H, W).
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        size: Size = 224,
        width: float = 1.0,
        depth: float = 1.0,
    ) -> None:
        super().__init__()
        scales = 1 + _repeated(2, depth)
        least = min(size) if isinstance(size, tuple) else size
        if least < 2 ** (scales - 1):
            raise UserError(
                f"zoo: images of {least} pixels cannot be halved {scales - 1} times; give at least "
                f"{2 ** (scales - 1)}, or a smaller depth."
            )
        sizes = [divisible(16 * width * 2**n) for n in range(scales)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        before = channels
        for size in sizes:
            self.down.append(nn.Sequential(_conv(before, size), _conv(size, size)))
            before = size
        for size in sizes[-2::-1]:
            self.up.append(nn.Sequential(_conv(before + size, size), _conv(size, size)))
            before = size
        self.head = nn.Conv2d(before, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        passed: list[Tensor] = []
        for n, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if n else x)
            passed.append(x)
        for block, beside in zip(self.up, passed[-2::-1], strict=True):
            x = F.interpolate(x, size=beside.shape[2:])
            x = block(torch.cat([x, beside], 1))
        return self.head(x)  # type: ignore[no-any-return]
