"""Shapes that the data decides: masks that pick, nonzero, unique."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from paredown.core.task import Task
from paredown.graph.capture import capture
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.recipe import apply

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


def add_where_negative(h):
    h = h.clone()
    h[h < 0] += 1.5
    return h


WAYS = {
    "masked addition": add_where_negative,
    "masked rows": lambda h: h + h[h.sum(1) > 0].sum() * 0.01,
    "nonzero": lambda h: h + h.nonzero().float().sum() * 0.0001,
    "unique": lambda h: h + (h > 0).long().unique().float().sum(),
    "masked select": lambda h: h + h.masked_select(h > 0).sum() * 0.01,
}


class Layers(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.way = nn.Linear(8, 16), nn.Linear(16, 4), way

    def forward(self, x):
        return self.two(self.way(self.one(x)))


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("ranges", ["int8", "int8-dynamic"])
def test_they_are_quantized_as_others_are(kind, ranges):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, torch.zeros(32))
    task = Task(example=(x[:1],), score=lambda out, y: out[:, 0], calibration=data)
    model = capture(Layers(WAYS[kind]).eval(), task.example)
    made = apply(model, [Quantize(ranges)], task)
    before, after = model(x), made(x)
    assert not torch.equal(before, after)
    # a value whose sign the rounding turns goes another way, and moves by more than its rounding
    assert float((before - after).norm() / before.norm()) < (
        0.3 if kind.startswith("masked") else 0.1
    )
