"""The digits with a ResNet-8 of a tenth of the parameters, untrained: a student for `Distill`.

`paredown run examples/digits_student.py --recipe examples/digits_student.toml --out runs/student`
"""

import torch
from digits import ResNet8, task
from torch import nn

__all__ = ["model", "task"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return ResNet8(width=10)
