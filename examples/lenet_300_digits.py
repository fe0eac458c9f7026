"""The same digits with LeNet-300-100, 0.27 M parameters in three linear layers.

`paredown run examples/lenet_300_digits.py --max-drop 1% \\
     --recipe examples/deep_compression_lenet_300.toml --out runs/lenet-300`
"""

from lenet_digits import LeNet300, task, trained  # noqa: F401
from torch import nn


def model() -> nn.Module:
    return trained(LeNet300)
