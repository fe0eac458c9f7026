"""Where the score went: noise by layer, what restoring wins, and faults that were planted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paredown
from paredown import FineTune, PruneChannels, PruneWeights, Quantize
from paredown.explain.explanation import explain_file
from paredown.explain.findings import KINDS, Remedy
from paredown.explain.noise import Outputs
from paredown.explain.runner import Runner
from paredown.types import Target, Task

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


def images(seed, count=64, scale=1.0):
    x = scale * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, torch.arange(count) % 4)


def rows(seed, count=256, size=32):
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, torch.arange(count) % 4)


def task(make=images, **changes):
    splits = {"train": make(0), "calibration": make(1), "validation": make(2), "test": make(3)}
    fields = {"score": paredown.accuracy, "loss": F.cross_entropy, "batch_size": 32}
    return Task(**({"example": (splits["test"][:1][0],)} | fields | splits | changes))


def conv_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)),
    ).eval()


def explained(module, task, steps, tmp_path, runtime="onnxruntime", **more):
    """The explanation, the original and the compressed model."""
    model = paredown.capture(module, task.example)
    made = paredown.apply(model, steps, task)
    suffix = {"onnxruntime": ".onnx", "pytorch": ".safetensors"}[runtime]
    path = tmp_path / f"model{suffix}"
    paredown.export(made, Target(runtime), path)
    settings = {"seconds": 60.0, **more}
    return explain_file(model, made, path, runtime, task, steps, **settings), model, made


def output_db(original, made, task):
    outputs = Outputs()
    x = task.validation[:][0]
    outputs.add(Runner(original.graph).outputs([x]), Runner(made.graph).outputs([x]))
    return outputs.db


# --- planted faults --------------------------------------------------------------------------


def clipped_range():
    return conv_net(), task(), [Quantize(ranges="percentile", percentile=90)]


def saturation():
    return conv_net(), task(calibration=images(1, scale=0.3)), [Quantize()]


def wide_range():
    calibration = images(1, 512)
    calibration.tensors[0][0, 0, 4, 4] = 100.0
    return conv_net(), task(calibration=calibration), [Quantize(ranges="minmax")]


def outlier_channel():
    net = conv_net()
    with torch.no_grad():
        net[0].weight[0] *= 100
        net[0].bias[0] *= 100
        net[2].weight[:, 0] /= 100
    return net, task(), [Quantize()]


def outlier_input():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        net[0].weight[3] *= 60
        net[1].weight[:, 3] /= 60
    return net, task(rows), [Quantize()]


class Joined(nn.Module):
    """Two branches, the second a hundred times as large as what it stands for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(3, 2, 3, 1, 1)
        self.both, self.head = nn.Conv2d(18, 16, 3, 2, 1), nn.Linear(256, 4)
        with torch.no_grad():
            self.large.weight *= 100
            self.both.weight[:, 16:] /= 100

    def forward(self, x):
        y = torch.cat([self.small(x).relu(), self.large(x).relu()], 1)
        return self.head(self.both(y).relu().flatten(1))


def shared_scale():
    return Joined().eval(), task(), [Quantize()]


class Offset(nn.Module):
    """A bias far above what the weights give, taken off again behind them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 4)
        with torch.no_grad():
            self.first.bias.fill_(2e5)

    def forward(self, x):
        return self.last(self.first(x) - 2e5)


def held_scale():
    return Offset().eval(), task(rows), [Quantize()]


def outlying_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        net[0].weight[:, 5] = 12.0

    def small(seed):
        data = rows(seed)
        data.tensors[0][:, 5] *= 0.01
        return data

    return net, task(small), [Quantize()]


def few_levels():
    return conv_net(), task(), [Quantize("int4")]


def dead_channels():
    net = conv_net()
    with torch.no_grad():
        net[2].weight[:8] = 0.0
        net[2].bias[:8] = -1.0
    return net, task(), [Quantize()]


FAULTS = [
    *(clipped_range, saturation, wide_range, outlier_channel, outlier_input, shared_scale),
    *(held_scale, outlying_weights, few_levels, dead_channels),
]


def test_every_kind_has_its_fault():
    assert [fault.__name__ for fault in FAULTS] == sorted(KINDS, key=list(KINDS).index) or {
        fault.__name__ for fault in FAULTS
    } == set(KINDS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_named(fault, tmp_path):
    module, its_task, steps = fault()
    found, _, _ = explained(module, its_task, steps, tmp_path)
    print(
        [
            (c["kind"], c["layers"], c["words"], c["remedy"], c["gain_db"], c["tried_db"])
            for c in found.causes
        ]
    )
    assert [cause["kind"] for cause in found.causes] == [fault.__name__]
