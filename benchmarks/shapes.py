"""Models with the shapes of well-known ones, and images with the statistics of photographs.

Weights are random, since nothing is downloaded. What decides how well a network survives eight
bits is how far its channels differ and how its values spread, so gains and shifts of the norms
vary from channel to channel as in trained networks, and batch-norm statistics are settled on
images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

CLASSES = 1000


def conv_norm(inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1) -> list:
    """A convolution that keeps the image size at stride 1, without bias, and its batch norm."""
    conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outer)]


class Basic(nn.Module):
    """Two 3x3 convolutions around a skip connection (He et al. 1512.03385)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(inner, outer, 3, stride)
        self.conv2, self.bn2 = conv_norm(outer, outer, 3)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and inner == outer
        self.down = None if same else nn.Sequential(*conv_norm(inner, outer, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.down is None else self.down(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + skip)


class ResNet18(nn.Module):
    """torchvision's ResNet-18: 11.7 million parameters at 1,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        blocks = [[Basic(i, o, s), Basic(o, o, 1)] for i, o, s in widths]
        self.blocks = nn.Sequential(*[block for pair in blocks for block in pair])
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.stem(x)))
        return self.head(torch.flatten(self.average(x), 1))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a skip connection (He et al. 1512.03385)."""

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        outer = 4 * width
        relu = nn.ReLU(inplace=True)
        first = [*conv_norm(inner, width, 1), relu]
        second = [*conv_norm(width, width, 3, stride), relu]
        self.layers = nn.Sequential(*first, *second, *conv_norm(width, outer, 1))
        same = stride == 1 and inner == outer
        self.down = nn.Sequential(*([] if same else conv_norm(inner, outer, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.layers(x) + self.down(x))


class ResNet50(nn.Module):
    """torchvision's ResNet-50: 25.6 million parameters at 1,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inner = 64
        for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for number in range(blocks):
                layers.append(Bottleneck(inner, width, 1 if number else stride))
                inner = 4 * width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, CLASSES)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Inverted(nn.Module):
    """Widen, filter each channel, narrow (Sandler et al. 1801.04381)."""

    def __init__(self, inner: int, outer: int, stride: int, widen: int) -> None:
        super().__init__()
        middle = inner * widen
        first = [*conv_norm(inner, middle, 1), nn.ReLU6(inplace=True)] if widen > 1 else []
        filtered = [*conv_norm(middle, middle, 3, stride, groups=middle), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*first, *filtered, *conv_norm(middle, outer, 1))
        self.skips = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.skips else self.layers(x)


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2: 3.5 million parameters at 1,000 classes."""

    ROWS = (  # widen, channels, blocks, stride
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    )

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*conv_norm(3, 32, 3, 2), nn.ReLU6(inplace=True)]
        inner = 32
        for widen, outer, blocks, stride in self.ROWS:
            for number in range(blocks):
                layers.append(Inverted(inner, outer, 1 if number else stride, widen))
                inner = outer
        layers += [*conv_norm(inner, 1280, 1), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(self.features(x), 1)
        return self.head(torch.flatten(x, 1))


class Excited(nn.Module):
    """Inverted bottleneck with SiLU, its channels weighed by what they hold (1905.11946)."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, widen: int) -> None:
        super().__init__()
        middle, narrow = inner * widen, max(1, inner // 4)
        first = [*conv_norm(inner, middle, 1), nn.SiLU(inplace=True)] if widen > 1 else []
        depthwise = conv_norm(middle, middle, kernel, stride, groups=middle)
        self.filtered = nn.Sequential(*first, *depthwise, nn.SiLU(inplace=True))
        squeeze = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(middle, narrow, 1), nn.SiLU(inplace=True)]
        self.weigh = nn.Sequential(*squeeze, nn.Conv2d(narrow, middle, 1), nn.Sigmoid())
        self.project = nn.Sequential(*conv_norm(middle, outer, 1))
        self.skips = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        y = self.filtered(x)
        y = self.project(y * self.weigh(y))
        return x + y if self.skips else y


class EfficientNetB0(nn.Module):
    """EfficientNet-B0: 5.3 million parameters at 1,000 classes."""

    ROWS = (  # widen, kernel, channels, blocks, stride
        *((1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2)),
        *((6, 5, 112, 3, 1), (6, 5, 192, 4, 2), (6, 3, 320, 1, 1)),
    )

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*conv_norm(3, 32, 3, 2), nn.SiLU(inplace=True)]
        inner = 32
        for widen, kernel, outer, blocks, stride in self.ROWS:
            for number in range(blocks):
                layers.append(Excited(inner, outer, kernel, 1 if number else stride, widen))
                inner = outer
        layers += [*conv_norm(inner, 1280, 1), nn.SiLU(inplace=True), nn.AdaptiveAvgPool2d(1)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1280, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Block(nn.Module):
    """Attention and a two-layer perceptron, norms first (Dosovitskiy et al. 2010.11929)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attend(self.norm1(x)))
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm2(x)))))

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, head_size) each
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class ViT(nn.Module):
    """ViT-S/16: 22 million parameters, 197 tokens at 224 px."""

    def __init__(self, width: int = 384, depth: int = 12, heads: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.5)
        self.places = nn.Parameter(torch.randn(1, 197, width) * 0.2)
        self.blocks = nn.Sequential(*[Block(width, heads, 0.0) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (B, 196, width)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Encoder(nn.Module):
    """A small text encoder: tokens (B, T) -> classes; 5.3 million parameters."""

    def __init__(self, words: int = 8192, width: int = 256, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(128, width)
        self.blocks = nn.Sequential(*[Block(width, heads, 0.1) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)).mean(1))


class PostNorm(nn.Module):
    """A transformer block with its norms behind the sums (Vaswani et al. 1706.03762)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = Block(width, heads, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        part = self.inner
        x = part.norm1(x + part.attend(x))
        return part.norm2(x + part.down(functional.gelu(part.up(x))))


class BertSmall(nn.Module):
    """BERT-small: tokens (B, T) -> classes; 29.3 million parameters, 15.6 of them the embedding."""

    def __init__(
        self, words: int = 30522, width: int = 512, depth: int = 4, heads: int = 8
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[PostNorm(width, heads) for _ in range(depth)])
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(torch.tanh(self.pool(self.blocks(self.norm(x))[:, 0])))


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "mobilenetv2": MobileNetV2,
    "efficientnet-b0": EfficientNetB0,
    "vit-s": ViT,
    "bert-small": BertSmall,
}
TEXT = ("bert-small",)  # take tokens, all others images
TRANSFORMERS = ("vit-s", "bert-small")
IMAGE_SIZE, LENGTH = 224, 128  # px, tokens


def inputs(name: str, count: int, seed: int) -> Tensor:
    """What the named shape takes: images (N, 3, 224, 224), or tokens (N, 128)."""
    if name in TEXT:
        return sentences(count, LENGTH, seed)
    return photographs(count, IMAGE_SIZE, seed)


def sentences(count: int, length: int, seed: int, words: int = 30522) -> Tensor:
    """Tokens (N, length), as frequent as words are: 1 / rank (Zipf 1949)."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, words + 1)
    return torch.from_numpy(rng.choice(words, (count, length), p=shares / shares.sum()))


def build(name: str, images: Tensor | None = None) -> nn.Module:
    """The named shape in evaluation mode; the same weights each time.

    Args:
        images: (N, 3, H, W) to settle the batch norms on, a few batches.
    """
    torch.manual_seed(0)
    module = SHAPES[name]()
    for part in module.modules():
        _draw(part)
    if images is not None:
        settle(module, images)
    return module.eval()


def _draw(part: nn.Module) -> None:
    """Weights that keep the variance, gains and shifts that differ between channels."""
    with torch.no_grad():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            fan_in = part.weight[0].numel()
            part.weight.normal_(0, math.sqrt((2 if isinstance(part, nn.Conv2d) else 1) / fan_in))
            if part.bias is not None:
                part.bias.normal_(0, 0.05)
        elif isinstance(part, (nn.BatchNorm2d, nn.LayerNorm)):
            part.weight.normal_(0, 0.4).exp_()  # a third of the channels beyond 0.67 .. 1.5
            part.bias.normal_(0, 0.3)


def settle(module: nn.Module, images: Tensor, batch: int = 16) -> None:
    """Batch-norm statistics: the plain average over the batches."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    module.train()
    with torch.no_grad():
        for part in images.split(batch):
            module(part)
    for norm in norms:
        norm.momentum = 0.1


def photographs(count: int, size: int, seed: int) -> Tensor:
    """Images (N, 3, size, size), normalised as for ImageNet: clouds with things in front.

    The clouds have amplitudes that fall as 1 / frequency, as those of photographs do (Field 1987,
    JOSA A 4:2379); the things are boxes and discs of one colour, which bring edges and flat areas.
    """
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([_photograph(rng, size) for _ in range(count)]))


def _photograph(rng: np.random.Generator, size: int) -> np.ndarray:
    across, down = np.fft.rfftfreq(size), np.fft.fftfreq(size)[:, None]
    amplitude = 1 / np.maximum(np.hypot(across, down), 1 / size)  # (size, size // 2 + 1)
    noise = rng.standard_normal((4, *amplitude.shape)) + 1j * rng.standard_normal(
        (4, *amplitude.shape)
    )
    clouds = np.fft.irfft2(noise * amplitude, (size, size))
    clouds /= clouds.std((1, 2), keepdims=True)
    image = 0.8 * clouds[:1] + 0.4 * clouds[1:]  # (3, size, size): colours go together
    image = image * rng.uniform(0.4, 1.2) + rng.normal(0, 0.5)
    y, x = np.mgrid[:size, :size] / size
    for _ in range(rng.integers(2, 7)):
        (cx, cy), (w, h) = rng.uniform(0, 1, 2), rng.uniform(0.03, 0.3, 2)
        box = (abs(x - cx) < w) & (abs(y - cy) < h)
        inside = box if rng.random() < 0.5 else ((x - cx) / w) ** 2 + ((y - cy) / h) ** 2 < 1
        image = np.where(inside, rng.normal(0, 1.2, (3, 1, 1)) + 0.15 * image, image)
    return image.clip(-2.1, 2.6).astype(np.float32)


class Stored(Dataset):
    """Images in a raw float32 file, read one at a time, as a folder of images is."""

    def __init__(self, path: Path, count: int, size: int) -> None:
        self.path, self.count, self.shape = path, count, (3, size, size)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        values = math.prod(self.shape)
        image = np.fromfile(self.path, np.float32, values, offset=4 * values * index)
        return torch.from_numpy(image.reshape(self.shape)), 0


def store(path: Path, count: int, size: int, seed: int) -> Stored:
    """Write images for `Stored`, one at a time."""
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        for _ in range(count):
            file.write(_photograph(rng, size).tobytes())
    return Stored(path, count, size)
