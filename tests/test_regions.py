"""Code in ``torch.no_grad()`` or ``torch.autocast``: steps see it, and it trains as it did."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from paredown.core.task import Task
from paredown.graph.capture import capture
from paredown.graph.doors.module import AUTOCAST
from paredown.graph.model import Model
from paredown.graph.sites import sites
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.recipe import apply
from paredown.targets.runtimes import runtime

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


class Frozen(nn.Module):
    """A head on a backbone that runs in a region of its own."""

    def __init__(self, region, width=16):
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2))
        self.body = nn.Sequential(*layers, nn.Linear(width, width))
        self.head, self.region = nn.Linear(width, 4), region

    def forward(self, x):
        with self.region():
            h = self.body[:3](x)
            both = h, h + 1
            with torch.autocast("cpu", enabled=False):
                h = self.body[3:]((both[0] + both[1]).float())
        return self.head(h.float())


REGIONS = {
    "no gradients": torch.no_grad,
    "autocast that is off": lambda: torch.autocast("cpu", enabled=False),
    "autocast of another device": lambda: torch.autocast("cuda", dtype=torch.bfloat16),
    "gradients again": lambda: torch.set_grad_enabled(True),
    "nothing": contextlib.nullcontext,
}


@pytest.mark.parametrize("kind", REGIONS)
def test_a_region_is_part_of_the_graph_and_trains_as_it_did(kind, tmp_path):
    module = Frozen(REGIONS[kind]).eval()
    model = capture(module, (torch.randn(3, 8),))
    model.save(tmp_path / "m.safetensors")
    x = torch.randn(6, 8)
    for made in (model, Model.load(tmp_path / "m.safetensors")):
        assert made.notes == () and len(sites(made.graph)) == 3
        torch.testing.assert_close(made(x), module(x), atol=0, rtol=0)
        assert int(made.state_dict()["body.1.num_batches_tracked"]) == 0
        theirs = Frozen(REGIONS[kind]).train()
        made.train()
        for run in (made, theirs):
            torch.manual_seed(1)
            run(x).sum().backward()
        for name, parameter in theirs.named_parameters():
            ours = dict(made.named_parameters())[name].grad
            assert (ours is None) == (parameter.grad is None), name
            if ours is not None:
                torch.testing.assert_close(ours, parameter.grad)
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(made.state_dict()[name], tensor, msg=name)


def test_autocast_computes_in_full_precision_and_says_so():
    module = Frozen(lambda: torch.autocast("cpu", dtype=torch.bfloat16)).eval()
    model = capture(module, (torch.randn(3, 8),))
    x = torch.randn(6, 8)
    assert model.notes == (AUTOCAST,) and len(sites(model.graph)) == 3
    torch.testing.assert_close(model(x), Frozen(contextlib.nullcontext).eval()(x))
    torch.testing.assert_close(model(x), module(x), atol=0.02, rtol=0.02)


def test_a_frozen_backbone_becomes_as_small_as_another(tmp_path):
    data = TensorDataset(torch.randn(16, 8), torch.zeros(16, dtype=torch.long))
    task = Task(example=(torch.randn(1, 8),), score=lambda o, y: o[:, 0], calibration=data)
    onnx, sizes = runtime("onnxruntime"), []
    for number, region in enumerate((contextlib.nullcontext, torch.no_grad)):
        model = capture(Frozen(region, 128).eval(), task.example)
        made = apply(model, [Quantize("int8")], task)
        sizes.append(onnx.lower(made, tmp_path / f"{number}.onnx").stat().st_size)
    assert sizes[1] < 1.02 * sizes[0]
