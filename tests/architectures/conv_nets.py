"""Convolutional image classifiers without residual stages: plain, dense and branching ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ChannelNorm, ConvNorm, DropPath
from .entry import Architecture, images, series


class Branches(nn.Module):
    """Runs branches side by side and concatenates their channels."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def vgg() -> nn.Module:
    """VGG with batch norm: four stages, then a flattened 2x2 map into three linear layers."""
    layers, channels = [], 3
    for width, depth in ((16, 1), (32, 1), (64, 2), (96, 2)):
        for _ in range(depth):
            conv = nn.Conv2d(channels, width, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    head = [nn.Linear(96 * 4, 128), nn.ReLU(True), nn.Dropout()]
    head += [nn.Linear(128, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *head)


def alexnet() -> nn.Module:
    """AlexNet: large first kernels, local response norm, a grouped convolution, no batch norm."""
    features = [nn.Conv2d(3, 24, 5, 2, 2), nn.ReLU(), nn.LocalResponseNorm(5), nn.MaxPool2d(3, 2)]
    features += [nn.Conv2d(24, 48, 5, padding=2, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    features += [nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 48, 3, padding=1)]
    head = [nn.Dropout(), nn.Linear(48 * 9, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 10)]
    return nn.Sequential(*features, nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), *head)


class DenseLayer(nn.Module):
    """Concatenates all earlier maps, and adds `growth` channels by a 1x1 and a 3x3 convolution."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.drop_rate = 0.1

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(maps, 1))))
        x = self.conv2(F.relu(self.norm2(x)))
        return F.dropout(x, p=self.drop_rate, training=self.training)


class DenseBlock(nn.ModuleList):
    """Dense layers, each reading the block's input and all layers before it."""

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self:
            maps.append(layer(maps))
        return torch.cat(maps, 1)


def densenet(growth: int = 8, layers: int = 4) -> nn.Module:
    """DenseNet: three dense blocks with halving transitions."""
    parts, channels = [nn.Conv2d(3, 16, 3, padding=1, bias=False)], 16
    for stage in range(3):
        parts.append(DenseBlock(DenseLayer(channels + i * growth, growth) for i in range(layers)))
        channels += layers * growth
        parts += [nn.BatchNorm2d(channels), nn.ReLU()]
        if stage < 2:
            parts += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def googlenet_module(inputs: int, widths: tuple) -> nn.Module:
    """1x1, 3x3, double 3x3 and pooled branches, with the widths of all their convolutions."""
    a, b0, b1, c0, c1, d = widths
    return Branches(
        ConvNorm(inputs, a, 1),
        nn.Sequential(ConvNorm(inputs, b0, 1), ConvNorm(b0, b1, 3)),
        nn.Sequential(ConvNorm(inputs, c0, 1), ConvNorm(c0, c1, 3)),
        nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), ConvNorm(inputs, d, 1)),
    )


def googlenet() -> nn.Module:
    """GoogLeNet without its auxiliary heads: three inception modules and ceiling pools."""
    return nn.Sequential(
        ConvNorm(3, 16, 7, 2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        ConvNorm(16, 16, 1),
        ConvNorm(16, 32, 3),
        googlenet_module(32, (16, 16, 24, 4, 8, 8)),
        googlenet_module(56, (24, 16, 32, 8, 16, 12)),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        googlenet_module(84, (32, 24, 40, 8, 16, 16)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(104, 10),
    )


def strip(inputs: int, outputs: int, kernel: tuple) -> nn.Module:
    """A convolution with a long, thin kernel, batch norm and ReLU."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU())


def inception() -> nn.Module:
    """Inception v3: modules with 1x7 and 7x1 kernels, one split in two, one that halves."""
    long = [ConvNorm(48, 16, 1), strip(16, 16, (1, 7)), strip(16, 24, (7, 1))]
    mixed = Branches(
        ConvNorm(48, 24, 1),
        nn.Sequential(*long),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), ConvNorm(48, 16, 1)),
    )
    reduce = Branches(
        nn.Sequential(ConvNorm(64, 24, 1), ConvNorm(24, 32, 3, 2)),
        nn.Sequential(ConvNorm(64, 24, 1), strip(24, 24, (1, 7)), ConvNorm(24, 32, 3, 2)),
        nn.MaxPool2d(3, 2, 1),
    )
    forked = Branches(strip(24, 24, (1, 3)), strip(24, 24, (3, 1)))
    last = Branches(ConvNorm(128, 32, 1), nn.Sequential(ConvNorm(128, 24, 1), forked))
    stem = [ConvNorm(3, 16, 3, 2), ConvNorm(16, 32, 3), nn.MaxPool2d(3, 2, 1), ConvNorm(32, 48, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(80, 10)]
    return nn.Sequential(*stem, mixed, reduce, last, *head)


class Fire(nn.Module):
    """Squeezes to few channels, then concatenates a 1x1 and a 3x3 expansion."""

    def __init__(self, inputs: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def squeezenet() -> nn.Module:
    """SqueezeNet: fire modules, and a convolution as the classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(32, 8, 16),
        Fire(32, 8, 24),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(48, 12, 32),
        nn.Dropout(),
        nn.Conv2d(64, 10, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class ConvNextBlock(nn.Module):
    """A depthwise 7x7, then channels-last linear layers, a layer scale and drop path."""

    def __init__(self, width: int, drop_path: float):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)
        self.layer_scale = nn.Parameter(1e-6 * torch.ones(width))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.depthwise(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        out = self.project(F.gelu(self.expand(self.norm(out))))
        return x + self.drop_path((self.layer_scale * out).permute(0, 3, 1, 2))


def convnext(widths: tuple = (16, 32, 64)) -> nn.Module:
    """ConvNeXt: a patch stem, stages of two blocks, a norm and 2x2 convolution between them."""
    parts = [nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0])]
    for stage, width in enumerate(widths):
        if stage > 0:
            parts += [ChannelNorm(widths[stage - 1]), nn.Conv2d(widths[stage - 1], width, 2, 2)]
        parts += [ConvNextBlock(width, 0.1), ConvNextBlock(width, 0.2)]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1])]
    return nn.Sequential(*parts, *pool, nn.Linear(widths[-1], 10))


def conv_mixer(width: int = 32, depth: int = 3) -> nn.Module:
    """ConvMixer: residual depthwise and pointwise convolutions on patches."""

    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    parts = [nn.Conv2d(3, width, 4, 4), nn.GELU(), nn.BatchNorm2d(width)]
    for _ in range(depth):
        depthwise = nn.Conv2d(width, width, 5, groups=width, padding="same")
        parts += [Residual(depthwise, nn.GELU(), nn.BatchNorm2d(width))]
        parts += [nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Conv3d(nn.Module):
    """C3D with one factorised (2+1)D block: a video classifier, (B, 3, T, H, W) in."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(3, 12, 3, padding=1)
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.spatial = nn.Conv3d(12, 24, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.norm1 = nn.BatchNorm3d(24)
        self.temporal = nn.Conv3d(24, 24, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.norm2 = nn.BatchNorm3d(24)
        self.pool2 = nn.AvgPool3d(2)
        self.fc1 = nn.Linear(24 * 2 * 4 * 4, 48)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(F.relu(self.conv1(x)))  # (B, 12, 4, 8, 8)
        x = F.relu(self.norm1(self.spatial(x)))
        x = self.pool2(F.relu(self.norm2(self.temporal(x))))  # (B, 24, 2, 4, 4)
        return self.fc2(self.dropout(F.relu(self.fc1(torch.flatten(x, 1)))))


def entry(build, size: int = 32) -> Architecture:
    """An image classifier of this file."""
    return Architecture(build=build, example=images(size), family="convolutional")


ENTRIES = {
    "vgg": entry(vgg),
    "alexnet": entry(alexnet, size=64),
    "densenet": entry(densenet),
    "googlenet": entry(googlenet, size=64),
    "inception": entry(inception),
    "squeezenet": entry(squeezenet, size=64),
    "convnext": entry(convnext),
    "conv_mixer": entry(conv_mixer),
    "conv3d": Architecture(build=Conv3d, example=series(3, 4, 16, 16), family="convolutional"),
}
