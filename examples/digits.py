"""Handwritten digits with MLPerf Tiny's ResNet-8 at twice its width, 0.3 M parameters.

`paredown run examples/digits.py --max-drop 2% --size 0.1x --latency 0.5x --out runs/digits`
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paredown

WEIGHTS = Path(__file__).with_name("digits.safetensors")  # trained once, then kept
EPOCHS = 12


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; (B, C, H, W) -> (B, width, H / stride, W / stride)."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(channels, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet8(nn.Module):
    """Images (B, 1, 32, 32) -> logits (B, 10)."""

    def __init__(self, width: int = 32, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.layer1 = Block(width, width, 1)
        self.layer2 = Block(width, 2 * width, 2)
        self.layer3 = Block(2 * width, 4 * width, 2)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.head(x.mean((2, 3)))


def splits(size: int = 32) -> dict[str, TensorDataset]:
    """1,797 images as (1, size, size) in [-1, 1], in a fixed random order."""
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (N, 1, 8, 8)
    images = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    bounds = {"train": (0, 997), "validation": (997, 1397), "test": (1397, 1797)}
    return {
        name: TensorDataset(images[order[a:b]], labels[order[a:b]])
        for name, (a, b) in bounds.items()
    }


def task(size: int = 32) -> paredown.Task:
    data = splits(size)
    return paredown.Task(
        example=(data["train"].tensors[0][:1],),
        score=paredown.accuracy,
        loss=F.cross_entropy,
        classes=tuple("0123456789"),
        **data,
    )


def model() -> nn.Module:
    torch.manual_seed(0)
    net = ResNet8()
    if WEIGHTS.is_file():
        net.load_state_dict(load_file(WEIGHTS))
        return net
    trained = paredown.FineTune(epochs=EPOCHS, lr=3e-3).apply(
        paredown.capture(net, task().example), task()
    )
    save_file(trained.state_dict(), WEIGHTS)
    net.load_state_dict(trained.state_dict())
    return net
