"""What counts as agreement between a file and the model that it was made of."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import paredown
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.targets import parity

pytestmark = pytest.mark.filterwarnings("ignore")


class Chaotic(nn.Module):
    """Forty layers that each double what rounding has moved, to where outputs differ by a tenth."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(40)])
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x) * 1.6 - 0.1) + 0.1 * x
        return x


class File:
    """Stands for an open file: gives these outputs."""

    output_names = ("output",)

    def __init__(self, *outputs):
        self.outputs = outputs

    def __call__(self, *arrays):
        return self.outputs


@pytest.fixture(scope="module")
def chaotic():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 32), torch.zeros(64))
    task = Task(example=(torch.randn(16, 32),), score=None, calibration=data)
    return paredown.apply(Chaotic(), [paredown.Quantize("int8")], task).eval()


def otherwise(model, seed):
    """The model's output where ties fall otherwise."""
    return parity.other_ties(model.graph, [model.inputs[0].example], seed)[0].numpy()


def never(model, path):
    raise AssertionError("looked for the worst tensor")


def test_ties_that_fall_otherwise_are_agreement_enough(chaotic, tmp_path, monkeypatch):
    got = otherwise(chaotic, 7)
    found = parity.agreement_db(chaotic(chaotic.inputs[0].example).detach().numpy(), got)
    monkeypatch.setattr(parity, "QUANTIZED_DB", found + 3)  # what a deeper network falls below
    parity.confirm(chaotic, tmp_path / "file", File(got), never)


@pytest.mark.parametrize("share", [0.3, 1.0, 3.0])
def test_other_differences_are_not(chaotic, tmp_path, share):
    exact = chaotic(chaotic.inputs[0].example).detach().numpy()
    noise = np.random.default_rng(0).normal(size=exact.shape).astype(np.float32)
    wrong = exact + share * exact.std() * noise
    with pytest.raises(UserError, match=r"output 'output' differs .*'layer' at 3 dB"):
        parity.confirm(chaotic, tmp_path / "file", File(wrong), lambda *_: (3.0, "layer"))


def test_where_ties_alone_decide_outputs_do_not_count(chaotic, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "TELLING_DB", 1000.0)
    monkeypatch.setattr(parity, "QUANTIZED_DB", 1000.0)
    with pytest.raises(AssertionError, match="worst tensor"):
        parity.confirm(chaotic, tmp_path / "file", File(otherwise(chaotic, 7)), never)
