"""Convolutional classifiers made for phones and microcontrollers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ConvNorm, DropPath, SqueezeExcite
from .entry import Architecture, images, series


def classifier(channels: int, classes: int = 10, dropout: float = 0.2) -> list[nn.Module]:
    """Global mean, dropout and a linear layer."""
    head = nn.Linear(channels, classes)
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), head]


def separable(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """A depthwise 3x3 and a pointwise convolution, each with batch norm and ReLU."""
    depthwise = ConvNorm(inputs, inputs, 3, stride, groups=inputs)
    return nn.Sequential(depthwise, ConvNorm(inputs, outputs, 1))


def mobilenet_v1() -> nn.Module:
    """MobileNetV1, as in MLPerf Tiny's person detection."""
    plan = [(8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)]
    return nn.Sequential(ConvNorm(3, 8, 3, 2), *[separable(*p) for p in plan], *classifier(128, 2))


class InvertedResidual(nn.Module):
    """Expand, depthwise, optional squeeze-excite, project; a shortcut where shapes allow it."""

    def __init__(self, inputs, outputs, expand, kernel, stride, act, se=None, drop_path=0.0):
        super().__init__()
        hidden = inputs * expand
        layers = [ConvNorm(inputs, hidden, 1, act=act)] if expand > 1 else []
        layers.append(ConvNorm(hidden, hidden, kernel, stride, groups=hidden, act=act))
        if se is not None:
            layers.append(se(inputs, hidden))
        layers.append(ConvNorm(hidden, outputs, 1, act=None))
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inputs == outputs
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return x + self.drop_path(out) if self.shortcut else out


def inverted_net(plan, stem, last, act, se=None, drop_path=0.0) -> nn.Module:
    """A stem, inverted residuals of (outputs, expand, kernel, stride), and a wide last layer."""
    parts, channels = [ConvNorm(3, stem, 3, 2, act=act)], stem
    for outputs, expand, kernel, stride in plan:
        block = (channels, outputs, expand, kernel, stride, act, se, drop_path)
        parts.append(InvertedResidual(*block))
        channels = outputs
    return nn.Sequential(*parts, ConvNorm(channels, last, 1, act=act), *classifier(last))


def mobilenet_v2() -> nn.Module:
    """MobileNetV2: inverted residuals with ReLU6."""
    plan = [(8, 1, 3, 1), (16, 6, 3, 2), (16, 6, 3, 1), (32, 6, 3, 2), (32, 6, 3, 1)]
    return inverted_net(plan, 16, 96, nn.ReLU6)


def mobilenet_v3() -> nn.Module:
    """MobileNetV3: hard swish, squeeze-excite with a hard sigmoid, two linear layers at the end."""

    def se(_, hidden):
        return SqueezeExcite(hidden, max(hidden // 4, 8), gate=nn.Hardsigmoid)

    plan = [(16, 1, 3, 1), (24, 4, 3, 2), (24, 3, 3, 1), (32, 4, 5, 2), (32, 4, 5, 1)]
    body = inverted_net(plan, 16, 96, nn.Hardswish, se)[:-4]
    head = [nn.Linear(96, 128), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(128, 10)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


def efficientnet() -> nn.Module:
    """EfficientNet: SiLU, squeeze-excite sized by the block's input, and drop path."""

    def se(inputs, hidden):
        return SqueezeExcite(hidden, max(inputs // 4, 4), act=nn.SiLU)

    plan = [(8, 1, 3, 1), (16, 6, 3, 2), (16, 6, 3, 1), (24, 6, 5, 2), (24, 6, 5, 1)]
    return inverted_net(plan, 16, 96, nn.SiLU, se, drop_path=0.1)


class FusedBlock(nn.Module):
    """A full 3x3 convolution that expands, and a pointwise one that projects."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.expand = ConvNorm(inputs, 4 * inputs, 3, stride, act=nn.SiLU)
        self.project = ConvNorm(4 * inputs, outputs, 1, act=None)
        self.shortcut = stride == 1 and inputs == outputs
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.expand(x))
        return x + self.drop_path(out) if self.shortcut else out


def efficientnet_v2() -> nn.Module:
    """EfficientNetV2: fused blocks first, inverted residuals with squeeze-excite after them."""

    def se(inputs, hidden):
        return SqueezeExcite(hidden, max(inputs // 4, 4), act=nn.SiLU)

    fused = [FusedBlock(16, 16, 1), FusedBlock(16, 24, 2), FusedBlock(24, 24, 1)]
    plain = [(24, 32, 4, 3, 2, nn.SiLU, se, 0.1), (32, 32, 4, 3, 1, nn.SiLU, se, 0.1)]
    late = [InvertedResidual(*p) for p in plain]
    last = ConvNorm(32, 96, 1, act=nn.SiLU)
    return nn.Sequential(ConvNorm(3, 16, 3, 2, act=nn.SiLU), *fused, *late, last, *classifier(96))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleaves the channels of the groups, (B, C, H, W) kept."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).contiguous().view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: half the channels pass by at stride 1, both branches shrink at 2."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        half = outputs // 2
        first = half if stride == 1 else inputs
        self.passing = None if stride == 1 else self._branch_tail(inputs, half)
        self.branch = nn.Sequential(
            ConvNorm(first, half, 1),
            ConvNorm(half, half, 3, stride, groups=half, act=None),
            ConvNorm(half, half, 1),
        )

    @staticmethod
    def _branch_tail(inputs: int, half: int) -> nn.Module:
        depthwise = ConvNorm(inputs, inputs, 3, 2, groups=inputs, act=None)
        return nn.Sequential(depthwise, ConvNorm(inputs, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            kept, active = x.chunk(2, dim=1)
        else:
            kept, active = self.passing(x), x
        return channel_shuffle(torch.cat((kept, self.branch(active)), dim=1), 2)


def shufflenet_v2() -> nn.Module:
    """ShuffleNetV2: two stages of a halving unit and two keeping ones."""
    plan = [(16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)]
    units = [ShuffleUnit(*p) for p in plan]
    return nn.Sequential(ConvNorm(3, 16), *units, ConvNorm(64, 96, 1), *classifier(96))


class GroupedShuffleUnit(nn.Module):
    """ShuffleNetV1's unit: grouped pointwise convolutions with a shuffle between them."""

    def __init__(self, channels: int, groups: int = 4):
        super().__init__()
        self.groups = groups
        self.squeeze = ConvNorm(channels, channels // 2, 1, groups=groups)
        self.depthwise = ConvNorm(channels // 2, channels // 2, groups=channels // 2, act=None)
        self.expand = ConvNorm(channels // 2, channels, 1, groups=groups, act=None)

    def forward(self, x: Tensor) -> Tensor:
        shuffled = channel_shuffle(self.squeeze(x), self.groups)
        return F.relu(x + self.expand(self.depthwise(shuffled)))


def shufflenet_v1() -> nn.Module:
    """ShuffleNetV1: grouped units, the resolution halved by pooling between the stages."""
    early = [ConvNorm(3, 32, 3, 2), GroupedShuffleUnit(32), GroupedShuffleUnit(32)]
    late = [ConvNorm(32, 64, 3, 2), GroupedShuffleUnit(64), GroupedShuffleUnit(64)]
    return nn.Sequential(*early, *late, *classifier(64))


class Ghost(nn.Module):
    """Half the channels by a pointwise convolution, the rest by a cheap depthwise one of them."""

    def __init__(self, inputs: int, outputs: int, act=nn.ReLU):
        super().__init__()
        self.outputs = outputs
        half = math.ceil(outputs / 2)
        self.primary = ConvNorm(inputs, half, 1, act=act)
        self.cheap = ConvNorm(half, half, 3, groups=half, act=act)

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], dim=1)[:, : self.outputs]


class GhostBottleneck(nn.Module):
    """Two ghost modules, a depthwise convolution where it halves, squeeze-excite, a shortcut."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int):
        super().__init__()
        self.expand = Ghost(inputs, hidden)
        halve = ConvNorm(hidden, hidden, 3, stride, groups=hidden, act=None)
        self.depthwise = halve if stride > 1 else nn.Identity()
        self.se = SqueezeExcite(hidden, hidden // 4, gate=nn.Hardsigmoid)
        self.project = Ghost(hidden, outputs, act=None)
        around = ConvNorm(inputs, inputs, 3, stride, groups=inputs, act=None)
        pointwise = ConvNorm(inputs, outputs, 1, act=None)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(around, pointwise)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.se(self.depthwise(self.expand(x)))) + self.shortcut(x)


def ghostnet() -> nn.Module:
    """GhostNet; 25 output channels in one block, so that its ghosts are cut to size."""
    plan = [(16, 32, 16, 1), (16, 48, 25, 2), (25, 72, 25, 1), (25, 96, 40, 2)]
    blocks = [GhostBottleneck(*p) for p in plan]
    return nn.Sequential(ConvNorm(3, 16, 3, 2), *blocks, ConvNorm(40, 96, 1), *classifier(96))


class MixedDepthwise(nn.Module):
    """MixNet's depthwise convolution: each part of the channels has its own kernel size."""

    def __init__(self, channels: int, kernels: tuple = (3, 5, 7)):
        super().__init__()
        first = channels - (len(kernels) - 1) * (channels // len(kernels))
        self.widths = [first] + [channels // len(kernels)] * (len(kernels) - 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(w, w, k, padding=k // 2, groups=w, bias=False)
            for w, k in zip(self.widths, kernels, strict=True)
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.widths, dim=1)
        mixed = [conv(part) for conv, part in zip(self.convs, parts, strict=True)]
        return F.silu(self.norm(torch.cat(mixed, dim=1)))


class StarBlock(nn.Module):
    """StarNet's block: two branches of the same input multiplied with each other."""

    def __init__(self, width: int):
        super().__init__()
        self.before = ConvNorm(width, width, 7, groups=width, act=None)
        self.left = nn.Conv2d(width, 3 * width, 1)
        self.right = nn.Conv2d(width, 3 * width, 1)
        self.after = ConvNorm(3 * width, width, 1, act=None)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.before(x)
        return x + self.after(F.relu6(self.left(mixed)) * self.right(mixed))


def mixnet() -> nn.Module:
    """MixNet: expansion, mixed kernel sizes, projection."""
    blocks = []
    for inputs, outputs in ((16, 24), (24, 32)):
        expand = ConvNorm(inputs, 3 * inputs, 1, act=nn.SiLU)
        project = ConvNorm(3 * inputs, outputs, 1, act=None)
        blocks += [expand, MixedDepthwise(3 * inputs), project, nn.AvgPool2d(2)]
    return nn.Sequential(ConvNorm(3, 16, 3, 2, act=nn.SiLU), *blocks, *classifier(32))


def starnet() -> nn.Module:
    """StarNet: two stages of two blocks."""
    early = [ConvNorm(3, 16, 3, 2, act=nn.ReLU6), StarBlock(16), StarBlock(16)]
    late = [ConvNorm(16, 32, 3, 2, act=None), StarBlock(32), StarBlock(32), nn.BatchNorm2d(32)]
    return nn.Sequential(*early, *late, *classifier(32))


def ds_cnn() -> nn.Module:
    """DS-CNN, the keyword spotter of MLPerf Tiny: 49 frames of 10 cepstral coefficients in."""
    first = nn.Conv2d(1, 64, (10, 4), (2, 2), (5, 1), bias=False)
    stem = [first, nn.BatchNorm2d(64), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*stem, *[separable(64, 64) for _ in range(4)], *classifier(64, 12, 0.4))


def entry(build) -> Architecture:
    """An image classifier of this file."""
    return Architecture(build=build, example=images(), family="light")


ENTRIES = {
    "mobilenet_v1": entry(mobilenet_v1),
    "mobilenet_v2": entry(mobilenet_v2),
    "mobilenet_v3": entry(mobilenet_v3),
    "efficientnet": entry(efficientnet),
    "efficientnet_v2": entry(efficientnet_v2),
    "shufflenet_v1": entry(shufflenet_v1),
    "shufflenet_v2": entry(shufflenet_v2),
    "ghostnet": entry(ghostnet),
    "mixnet": entry(mixnet),
    "starnet": entry(starnet),
    "ds_cnn": Architecture(build=ds_cnn, example=series(1, 49, 10), family="light"),
}
