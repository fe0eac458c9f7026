"""Residual networks: image classifiers whose blocks add to their input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ConvNorm, SqueezeExcite
from .entry import Architecture, images


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide, and a shortcut."""

    def __init__(self, inputs, width, stride, groups=1, attend=nn.Identity):
        super().__init__()
        self.conv1 = ConvNorm(inputs, width, 1)
        self.conv2 = ConvNorm(width, width, 3, stride, groups)
        self.conv3 = ConvNorm(width, 4 * width, 1, act=None)
        self.attend = attend()
        self.downsample = shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.attend(self.conv3(self.conv2(self.conv1(x)))) + self.downsample(x))


class SqueezeExciteBlock(BasicBlock):
    """A basic block whose branch is scaled by squeeze-and-excitation."""

    def __init__(self, inputs, width, stride):
        super().__init__(inputs, width, stride)
        self.se = SqueezeExcite(width, max(width // 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.se(out) + self.downsample(x))


class PreActivation(nn.Module):
    """Batch norm and ReLU before each convolution; nothing after the addition."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(0.1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = stride == 1 and inputs == width
        self.downsample = None if same else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        skip = x if self.downsample is None else self.downsample(active)
        out = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        return out + skip


class EfficientChannelAttention(nn.Module):
    """Gates channels by a 1-D convolution that runs over the channels themselves."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(1, 2)  # (B, 1, C)
        gate = torch.sigmoid(self.conv(pooled)).transpose(1, 2).unsqueeze(-1)  # (B, C, 1, 1)
        return x * gate.expand_as(x)


class BlockAttention(nn.Module):
    """CBAM: a channel gate from mean and maximum, then a spatial gate from both."""

    def __init__(self, channels):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels // 4), nn.ReLU(), nn.Linear(channels // 4, channels)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))  # (B, C)
        x = x * gate[:, :, None, None]
        summary = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)  # (B, 2, H, W)
        return x * torch.sigmoid(self.spatial(summary))


class SelectiveKernel(nn.Module):
    """Two branches of different dilation, mixed by a softmax over the branches."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.branches = nn.ModuleList(
            ConvNorm(inputs, width, 3, stride, dilation=dilation) for dilation in (1, 2)
        )
        self.reduce = nn.Sequential(nn.Linear(width, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())
        self.select = nn.Linear(8, 2 * width)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([branch(x) for branch in self.branches], 1)  # (B, 2, C, H, W)
        pooled = branches.sum(1).mean((-2, -1))  # (B, C)
        choice = self.select(self.reduce(pooled)).unflatten(1, (2, -1)).softmax(1)  # (B, 2, C)
        mixed = (branches * choice[..., None, None]).sum(1)  # (B, C, H, W)
        return F.relu(mixed + self.downsample(x))


class Res2Block(nn.Module):
    """Slices of the channels pass through one another's convolutions in turn."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.slice_width = width // 4
        self.reduce = ConvNorm(inputs, width, 1, stride)
        self.convs = nn.ModuleList(ConvNorm(width // 4, width // 4) for _ in range(3))
        self.expand = ConvNorm(width, width, 1, act=None)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = torch.split(self.reduce(x), self.slice_width, 1)
        slices = [first]
        for conv, part in zip(self.convs, others, strict=True):
            slices.append(conv(part if len(slices) == 1 else part + slices[-1]))
        return F.relu(self.expand(torch.cat(slices, 1)) + self.downsample(x))


class StandardisedConv(nn.Conv2d):
    """A convolution whose filters are normalised to mean 0 and deviation 1 at every call."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        weight = weight.reshape_as(self.weight) / flat.shape[-1] ** 0.5
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class GroupNormBlock(nn.Module):
    """Pre-activation with group norms and standardised convolutions (Big Transfer)."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.norm1 = nn.GroupNorm(4, inputs)
        self.conv1 = StandardisedConv(inputs, width, 3, stride, 1, bias=False)
        self.norm2 = nn.GroupNorm(4, width)
        self.conv2 = StandardisedConv(width, width, 3, 1, 1, bias=False)
        self.downsample = StandardisedConv(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        return self.conv2(F.relu(self.norm2(self.conv1(active)))) + self.downsample(active)


class ReparameterisedBlock(nn.Module):
    """RepVGG while training: 3x3, 1x1 and identity branches, each with a batch norm."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.dense = ConvNorm(inputs, width, 3, stride, act=None)
        self.pointwise = ConvNorm(inputs, width, 1, stride, act=None)
        same = stride == 1 and inputs == width
        self.identity = nn.BatchNorm2d(inputs) if same else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.dense(x) + self.pointwise(x)
        return F.relu(out if self.identity is None else out + self.identity(x))


class GatedBottleneck(nn.Module):
    """RegNetY: a bottleneck of one width with a grouped convolution and a squeeze-excite gate."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.a = ConvNorm(inputs, width, 1)
        self.b = ConvNorm(width, width, 3, stride, groups=width // 8)
        self.se = SqueezeExcite(width, max(inputs // 4, 4))
        self.c = ConvNorm(width, width, 1, act=None)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.downsample(x) + self.c(self.se(self.b(self.a(x)))))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Identity where the shapes agree, else a 1x1 convolution with batch norm."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return ConvNorm(inputs, outputs, 1, stride, act=None)


class ResidualNet(nn.Module):
    """A stem, stages of two blocks that halve the resolution, and a linear classifier."""

    def __init__(self, block, widths=(16, 32, 64), stem=None, expansion=1, classes=10):
        super().__init__()
        self.stem = stem or ConvNorm(3, widths[0])
        layers, channels = [], widths[0]
        for stage, width in enumerate(widths):
            for index in range(2):
                layers.append(block(channels, width, 2 if index == 0 and stage > 0 else 1))
                channels = expansion * width
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.stem(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))  # (B, classes)


class ResNet8(nn.Module):
    """The image classifier of MLPerf Tiny: three stacks of one block each."""

    def __init__(self):
        super().__init__()
        self.stem = ConvNorm(3, 16)
        self.stack1 = BasicBlock(16, 16, 1)
        self.stack2 = BasicBlock(16, 32, 2)
        self.stack3 = BasicBlock(32, 64, 2)
        self.pool = nn.AvgPool2d(8)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stack3(self.stack2(self.stack1(self.stem(x))))  # (B, 64, 8, 8)
        return self.fc(self.pool(x).flatten(1))


def imagenet_stem(width: int) -> nn.Module:
    """A 7x7 convolution of stride 2 and a max pool of stride 2."""
    return nn.Sequential(ConvNorm(3, width, 7, 2), nn.MaxPool2d(3, 2, 1))


def bottleneck_net(widths, groups=1, attend=None) -> nn.Module:
    """A residual net of bottlenecks, `attend` making each block's gate for its channel count."""

    def block(inputs, width, stride):
        gate = nn.Identity if attend is None else lambda: attend(4 * width)
        return Bottleneck(inputs, width, stride, groups, gate)

    return ResidualNet(block, widths, imagenet_stem(widths[0]), expansion=4)


def entry(build, size: int = 32) -> Architecture:
    """An image classifier of this file."""
    return Architecture(build=build, example=images(size), family="residual")


ENTRIES = {
    "resnet_basic": entry(
        lambda: ResidualNet(BasicBlock, (16, 32, 64, 96), imagenet_stem(16)), size=64
    ),
    "resnet_bottleneck": entry(lambda: bottleneck_net((8, 16, 32, 48)), size=64),
    "resnet8": entry(ResNet8),
    "resnet_preactivation": entry(lambda: ResidualNet(PreActivation)),
    "resnext": entry(lambda: bottleneck_net((16, 24, 32), groups=8), size=64),
    "regnet": entry(lambda: ResidualNet(GatedBottleneck, (16, 32, 64, 96))),
    "se_resnet": entry(lambda: ResidualNet(SqueezeExciteBlock)),
    "eca_resnet": entry(
        lambda: bottleneck_net((8, 16, 24), attend=lambda _: EfficientChannelAttention()), size=64
    ),
    "cbam_resnet": entry(lambda: bottleneck_net((8, 16, 24), attend=BlockAttention), size=64),
    "sknet": entry(lambda: ResidualNet(SelectiveKernel)),
    "res2net": entry(lambda: ResidualNet(Res2Block)),
    "big_transfer": entry(lambda: ResidualNet(GroupNormBlock)),
    "repvgg": entry(lambda: ResidualNet(ReparameterisedBlock)),
}
