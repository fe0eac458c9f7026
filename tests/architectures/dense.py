"""Networks with an output per pixel or at several scales: segmentation, detection, keypoints."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ConvNorm
from .entry import IMAGE_SIZE, Architecture, images


def double_conv(inputs: int, outputs: int) -> nn.Module:
    """Two 3x3 convolutions with batch norm and ReLU."""
    return nn.Sequential(ConvNorm(inputs, outputs), ConvNorm(outputs, outputs))


class UNet(nn.Module):
    """U-Net of three levels, its decoder concatenating the encoder's maps."""

    def __init__(self, bilinear: bool, width: int = 12):
        super().__init__()
        self.bilinear = bilinear
        self.down = nn.ModuleList(
            [
                double_conv(3, width),
                double_conv(width, 2 * width),
                double_conv(2 * width, 4 * width),
            ]
        )
        self.up = nn.ModuleList(self._rise(4 * width >> i, 2 * width >> i) for i in range(2))
        self.merge = nn.ModuleList(double_conv(4 * width >> i, 2 * width >> i) for i in range(2))
        self.head = nn.Conv2d(width, 4, 1)

    def _rise(self, inputs: int, outputs: int) -> nn.Module:
        if self.bilinear:
            scale = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            return nn.Sequential(scale, nn.Conv2d(inputs, outputs, 1))
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, down in enumerate(self.down):
            x = down(x if level == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], dim=1))
        return self.head(x)  # (B, classes, H, W)


class FCN(nn.Module):
    """A fully convolutional net that adds scores of three depths and upsamples the sum."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.stage1 = nn.Sequential(ConvNorm(3, 16, 3, 2), ConvNorm(16, 32, 3, 2))
        self.stage2 = ConvNorm(32, 48, 3, 2)
        self.stage3 = nn.Sequential(ConvNorm(48, 64, 3, 2), nn.Dropout2d(0.1))
        self.scores = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in (32, 48, 64))

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stage1(x)]
        maps.append(self.stage2(maps[-1]))
        maps.append(self.stage3(maps[-1]))
        total = self.scores[2](maps[2])
        for score, features in ((self.scores[1], maps[1]), (self.scores[0], maps[0])):
            larger = F.interpolate(total, size=features.shape[-2:], mode="nearest")
            total = score(features) + larger
        return F.interpolate(total, size=x.shape[-2:], mode="bilinear", align_corners=False)


class DeepLab(nn.Module):
    """DeepLabV3+: dilated branches with a pooled one, decoded together with early features."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.early = nn.Sequential(ConvNorm(3, 16, 3, 2), ConvNorm(16, 24))
        self.late = nn.Sequential(ConvNorm(24, 48, 3, 2), ConvNorm(48, 64, dilation=2))
        self.pyramid = nn.ModuleList(
            [ConvNorm(64, 24, 1), ConvNorm(64, 24, dilation=2), ConvNorm(64, 24, dilation=4)]
        )
        self.pooled = nn.Conv2d(64, 24, 1)
        self.project = nn.Sequential(ConvNorm(96, 32, 1), nn.Dropout(0.1))
        self.lateral = ConvNorm(24, 12, 1)
        self.decode = nn.Sequential(ConvNorm(44, 32), nn.Conv2d(32, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        early = self.early(x)  # (B, 24, H / 2, W / 2)
        late = self.late(early)  # (B, 64, H / 4, W / 4)
        pooled = F.relu(self.pooled(late.mean((2, 3), keepdim=True)))
        branches = [branch(late) for branch in self.pyramid]
        branches.append(pooled.expand(-1, -1, late.shape[2], late.shape[3]))
        features = self.project(torch.cat(branches, 1))
        features = F.interpolate(features, size=early.shape[-2:], mode="bilinear")
        out = self.decode(torch.cat([features, self.lateral(early)], 1))
        return F.interpolate(out, size=x.shape[-2:], mode="bilinear")


class SuperResolution(nn.Module):
    """SRResNet: residual blocks with PReLU, a long skip, and two pixel shuffles."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 9, padding=4), nn.PReLU())
        self.blocks = nn.ModuleList(self._block(width) for _ in range(3))
        self.after = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.grow = nn.Sequential(self._double(width), self._double(width))
        self.head = nn.Conv2d(width, 3, 9, padding=4)

    @staticmethod
    def _block(width: int) -> nn.Module:
        first = [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.PReLU(width)]
        return nn.Sequential(*first, nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))

    @staticmethod
    def _double(width: int) -> nn.Module:
        conv = nn.Conv2d(width, 4 * width, 3, padding=1)
        return nn.Sequential(conv, nn.PixelShuffle(2), nn.PReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.grow(self.after(x) + first))  # (B, 3, 4 H, 4 W)


class Hourglass(nn.Module):
    """One hourglass: down by pooling, up by nearest neighbours, a residual at every scale."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.skip = ConvNorm(width, width)
        self.before = ConvNorm(width, width)
        self.inner = Hourglass(width, depth - 1) if depth > 1 else ConvNorm(width, width)
        self.after = ConvNorm(width, width)

    def forward(self, x: Tensor) -> Tensor:
        low = self.after(self.inner(self.before(F.max_pool2d(x, 2))))
        return self.skip(x) + F.interpolate(low, scale_factor=2.0)


class StackedHourglass(nn.Module):
    """Two hourglasses for keypoints; the first one's heatmaps are fed back into the second."""

    def __init__(self, width: int = 24, keypoints: int = 6):
        super().__init__()
        self.stem = ConvNorm(3, width, 3, 2)
        self.hourglasses = nn.ModuleList(Hourglass(width, 2) for _ in range(2))
        self.heads = nn.ModuleList(nn.Conv2d(width, keypoints, 1) for _ in range(2))
        self.back_features = nn.Conv2d(width, width, 1)
        self.back_heatmaps = nn.Conv2d(keypoints, width, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        features = self.hourglasses[0](x)
        heatmaps = [self.heads[0](features)]  # (B, keypoints, H / 2, W / 2)
        x = x + self.back_features(features) + self.back_heatmaps(heatmaps[0])
        heatmaps.append(self.heads[1](self.hourglasses[1](x)))
        return heatmaps


class HighResolutionNet(nn.Module):
    """HRNet: two resolutions side by side that exchange their maps by addition, twice."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.high_stem = ConvNorm(3, 16)
        self.low_stem = ConvNorm(16, 32, 3, 2)
        self.high = nn.ModuleList(double_conv(16, 16) for _ in range(2))
        self.low = nn.ModuleList(double_conv(32, 32) for _ in range(2))
        self.rise = nn.ModuleList(ConvNorm(32, 16, 1, act=None) for _ in range(2))
        self.fall = nn.ModuleList(ConvNorm(16, 32, 3, 2, act=None) for _ in range(2))
        self.head = nn.Sequential(ConvNorm(48, 48, 1), nn.Conv2d(48, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        high = self.high_stem(x)
        low = self.low_stem(high)
        for stage in range(2):
            high, low = self.high[stage](high), self.low[stage](low)
            risen = F.interpolate(self.rise[stage](low), scale_factor=2, mode="nearest")
            high, low = F.relu(high + risen), F.relu(low + self.fall[stage](high))
        low = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(torch.cat([high, low], 1))


class PyramidDetector(nn.Module):
    """RetinaNet: a feature pyramid, and two heads shared by all its levels."""

    def __init__(self, width: int = 24, anchors: int = 3, classes: int = 4):
        super().__init__()
        self.classes = classes
        widths = (16, 32, 48)
        self.stages = nn.ModuleList(
            ConvNorm(i, o, 3, 2) for i, o in zip((3, *widths), widths, strict=False)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)
        self.class_head = self._head(width, anchors * classes)
        self.box_head = self._head(width, anchors * 4)

    @staticmethod
    def _head(width: int, outputs: int) -> nn.Module:
        inner = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*inner, nn.Conv2d(width, outputs, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        levels = [self.lateral[2](maps[2])]
        for lateral, features in ((self.lateral[1], maps[1]), (self.lateral[0], maps[0])):
            levels.append(lateral(features) + F.interpolate(levels[-1], scale_factor=2))
        levels = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]
        logits = [self._rows(self.class_head(level), self.classes) for level in levels]
        boxes = [self._rows(self.box_head(level), 4) for level in levels]
        return torch.cat(logits, 1), torch.cat(boxes, 1)

    @staticmethod
    def _rows(x: Tensor, values: int) -> Tensor:
        """One row for each anchor of each position: (B, A * values, H, W) to (B, H W A, values)."""
        x = x.unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2)  # (B, H, W, A, values)
        return x.flatten(1, 3)


class CrossStage(nn.Module):
    """YOLO's cross-stage block: half the channels pass by, the others go through bottlenecks."""

    def __init__(self, width: int, depth: int = 2):
        super().__init__()
        self.enter = ConvNorm(width, width, 1, act=nn.SiLU)
        half = width // 2
        self.blocks = nn.ModuleList(ConvNorm(half, half, 3, act=nn.SiLU) for _ in range(depth))
        self.leave = ConvNorm(half * (2 + depth), width, 1, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Yolo(nn.Module):
    """A one-stage detector: cross-stage blocks, pyramid pooling, decoded distribution boxes."""

    def __init__(self, classes: int = 4, bins: int = 8):
        super().__init__()
        self.bins = bins
        self.early = nn.Sequential(ConvNorm(3, 16, 3, 2, act=nn.SiLU), CrossStage(16))
        self.late = nn.Sequential(ConvNorm(16, 32, 3, 2, act=nn.SiLU), CrossStage(32))
        self.pool_in = ConvNorm(32, 16, 1, act=nn.SiLU)
        self.pool_out = ConvNorm(64, 32, 1, act=nn.SiLU)
        self.merge = ConvNorm(48, 24, act=nn.SiLU)
        self.class_heads = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in (24, 32))
        self.box_heads = nn.ModuleList(nn.Conv2d(width, 4 * bins, 1) for width in (24, 32))
        self.register_buffer("positions", torch.arange(bins, dtype=torch.float32))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        early = self.early(x)  # (B, 16, H / 2, W / 2)
        pools = [self.pool_in(self.late(early))]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        late = self.pool_out(torch.cat(pools, 1))  # (B, 32, H / 4, W / 4)
        merged = self.merge(torch.cat([early, F.interpolate(late, scale_factor=2)], 1))
        scales = (merged, late)
        scores = [h(f).flatten(2) for h, f in zip(self.class_heads, scales, strict=True)]
        boxes = [h(f).flatten(2) for h, f in zip(self.box_heads, scales, strict=True)]
        spread = torch.cat(boxes, 2).unflatten(1, (4, self.bins)).softmax(2)  # (B, 4, bins, N)
        distances = torch.einsum("bkpn,p->bkn", spread, self.positions)
        return {"scores": torch.cat(scores, 2).sigmoid(), "distances": distances}


def entry(build, dynamic=IMAGE_SIZE) -> Architecture:
    """A network of this file, of any image size unless said otherwise."""
    return Architecture(build=build, example=images(), family="dense", dynamic=dynamic)


ENTRIES = {
    "unet": entry(lambda: UNet(bilinear=False)),
    "unet_bilinear": entry(lambda: UNet(bilinear=True)),
    "fcn": entry(FCN),
    "deeplab": entry(DeepLab),
    "super_resolution": entry(SuperResolution),
    "hourglass": entry(StackedHourglass, dynamic=None),
    "hrnet": entry(HighResolutionNet),
    "pyramid_detector": entry(PyramidDetector),
    "yolo": entry(Yolo),
}
