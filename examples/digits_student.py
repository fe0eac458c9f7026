"""A ResNet-8 of a tenth of the digits' parameters, untrained: a student for `Distill`.

`paredown run examples/digits.py --recipe examples/digits_student.toml --out runs/student`
"""

import torch
from digits import ResNet8
from torch import nn


def model() -> nn.Module:
    torch.manual_seed(0)
    return ResNet8(width=10)
