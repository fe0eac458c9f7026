"""OpenVINO: what its kernels end with is not rounded on the way."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import paredown
from paredown.core.task import Task
from paredown.graph.quantized.quantizers import quantizers
from paredown.targets.formats.openvino import write
from paredown.targets.parity import QUANTIZED_DB, agreement_db
from paredown.targets.runtimes import openvino, ready

pytestmark = pytest.mark.filterwarnings("ignore")
ready("openvino")


class Swishes(nn.Module):
    """One activation that the kernel before it can end with, and one whose input is read again."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = nn.functional.silu(self.first(x))
        y = self.second(x)
        return self.last(y * torch.sigmoid(y) + y)


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    images = torch.randn(32, 3, 12, 12)
    task = Task(
        example=(images[:1],), score=None, calibration=TensorDataset(images, torch.ones(32))
    )
    module = Swishes().eval()
    return module, paredown.apply(module, [paredown.Quantize("int8")], task), images


def test_a_swish_is_rounded_at_its_end_alone(quantized, tmp_path):
    module, model, images = quantized
    path = openvino.lower(model, tmp_path / "model.xml")
    count = len(quantizers(model.graph))
    assert len(quantizers(write.without_inner_roundings(model).graph)) == count - 2
    assert len(quantizers(model.graph)) == count  # the model given stays as it was
    assert openvino.census(path).integer_ops["Convolution"] == 3
    whole = module(images).detach().numpy()
    [got] = openvino.open(path)(images.numpy())
    simulated = model(images).detach().numpy()
    assert agreement_db(simulated, got) > QUANTIZED_DB
    assert agreement_db(whole, got) > agreement_db(whole, simulated) - 1
