"""Handwritten digits with LeNet-5, 0.4 M parameters, as Deep Compression (1510.00149) has it.

`paredown run examples/lenet_digits.py --max-drop 1% \\
     --recipe examples/deep_compression_lenet_5.toml --out runs/lenet-5`
"""

from pathlib import Path

import digits
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import paredown

FOLDER = Path(__file__).parent  # weights are trained once, then kept here
EPOCHS = 30


class LeNet5(nn.Module):
    """Images (B, 1, 28, 28) -> logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.ip1, self.ip2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(image), 2)  # (B, 20, 12, 12)
        x = F.max_pool2d(self.conv2(x), 2)  # (B, 50, 4, 4)
        return self.ip2(F.relu(self.ip1(x.flatten(1))))


class LeNet300(nn.Module):
    """LeNet-300-100: images (B, 1, 28, 28) -> logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.ip1, self.ip2, self.ip3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.ip1(image.flatten(1)))
        return self.ip3(F.relu(self.ip2(x)))


def task() -> paredown.Task:
    return digits.task(28)


def trained(kind: type[nn.Module]) -> nn.Module:
    """The model of that kind, from its file where it has been trained before."""
    torch.manual_seed(0)
    net, file = kind(), FOLDER / f"{kind.__name__.lower()}.safetensors"
    if file.is_file():
        net.load_state_dict(load_file(file))
        return net
    found = paredown.FineTune(epochs=EPOCHS, lr=1e-3).apply(
        paredown.capture(net, task().example), task()
    )
    save_file(found.state_dict(), file)
    net.load_state_dict(found.state_dict())
    return net


def model() -> nn.Module:
    return trained(LeNet5)
