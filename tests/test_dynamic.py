"""Dynamic quantization: ranges found as the model runs, on linear layers alone."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from paredown.core.errors import UserError
from paredown.core.task import Target, Task
from paredown.graph.capture import capture
from paredown.graph.quantized.quantizers import (
    DYNAMIC,
    fake_quantize_dynamic,
    quantized_weights,
    quantizers,
)
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.recipe import apply, problems
from paredown.steps.training.fine_tune import FineTune
from paredown.targets.runtimes import RUNTIMES, onnxruntime

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
BLIND = Quantize("int8-dynamic", smooth=0, correct_bias=False)  # needs no data


class Net(nn.Module):
    """A convolution, three layers that read one value, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(4, 32, 3, padding=1)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x).transpose(1, 2)  # (B, L, 32)
        x = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return capture(Net().eval(), (torch.randn(1, 4, 10),))


def snr_db(before, after):
    return 10 * math.log10(float(before.square().sum() / (before - after).square().sum()))


def test_the_range_is_that_of_the_tensor():
    values = torch.tensor([-1.0, 0.0, 0.3, 2.0])
    made = fake_quantize_dynamic(values, 0, 255)
    assert made[1] == 0 and (made - values).abs().max() <= 3 / 255 / 2 * 1.001
    # a range always holds 0, and one tensor says nothing of another
    assert float(fake_quantize_dynamic(torch.tensor([5.0, 5.1]), 0, 255)[1]) == pytest.approx(5.1)
    assert torch.allclose(fake_quantize_dynamic(values * 1e4, 0, 255), made * 1e4)
    assert fake_quantize_dynamic(torch.zeros(3), 0, 255).tolist() == [0, 0, 0]
    assert fake_quantize_dynamic(torch.zeros(0, 3), 0, 255).shape == (0, 3)


def test_gradients_pass_straight_through():
    x = torch.randn(6, requires_grad=True)
    fake_quantize_dynamic(x, 0, 255).sum().backward()
    assert x.grad.tolist() == [1.0] * 6


def test_it_needs_no_data_and_rounds_linear_layers_alone(model, tmp_path):
    assert not BLIND.needs and not Quantize("int8-dynamic").needs
    made = BLIND.apply(model, None)
    assert sorted(quantized_weights(made.graph)) == [f"{n}.weight" for n in ("head", "k", "q", "v")]
    dynamic = [node for node in quantizers(made.graph) if node.target is DYNAMIC]
    assert len(dynamic) == 2  # one for all three that read the same value
    path = onnxruntime.lower(made, tmp_path / "model.onnx")
    census = onnxruntime.census(path)
    assert census.integer_ops == {"MatMulIntegerToFloat": 3, "DynamicQuantizeMatMul": 1}
    assert census.unfused == ()
    x = torch.randn(3, 4, 10)
    for scale in (1.0, 1e3):  # static ranges would clip
        before, after = model(x * scale).detach(), made(x * scale).detach()
        assert snr_db(before, after) > 25
        [got] = onnxruntime.open(path)((x * scale).numpy())
        assert snr_db(after, torch.from_numpy(got)) > 35


def test_products_with_weights_of_either_layout(tmp_path):
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 24), nn.Parameter(torch.randn(24, 8))
            self.c = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return torch.addmm(self.c[0], self.a(x) @ self.b, self.c)

    torch.manual_seed(0)
    net = capture(Products(), (torch.randn(2, 16),))
    made = BLIND.apply(net, None)
    assert len(quantized_weights(made.graph)) == 3
    path = onnxruntime.lower(made, tmp_path / "model.onnx")
    assert sum(onnxruntime.census(path).integer_ops.values()) == 3
    x = torch.randn(7, 16)
    [got] = onnxruntime.open(path)(x.numpy())
    assert np.allclose(got, made(x).detach(), atol=0.05 * float(made(x).detach().abs().max()))


def test_it_trains_and_saves(model, tmp_path):
    data = TensorDataset(torch.randn(32, 4, 10), torch.randint(5, (32,)))
    task = Task(
        example=(torch.randn(1, 4, 10),), score=None, loss=nn.functional.cross_entropy, train=data
    )
    made = apply(model, [Quantize("int8-dynamic"), FineTune(epochs=1, lr=1e-3)], task)
    made.save(tmp_path / "model.safetensors")
    again = type(made).load(tmp_path / "model.safetensors")
    x = torch.randn(2, 4, 10)
    assert torch.equal(again(x), made(x))


def test_what_it_refuses(model):
    with pytest.raises(UserError, match="no linear or recurrent layer is left to run on integers"):
        BLIND.apply(capture(nn.Conv1d(4, 4, 3), (torch.zeros(1, 4, 8),)), None)
    with pytest.raises(UserError, match="quantized already"):
        Quantize("int8-dynamic").apply(BLIND.apply(model, None), None)
    task = Task(example=(torch.zeros(1, 4, 10),), score=None)
    assert problems([BLIND], task) == []
    assert problems([Quantize("int8-dynamic")], task) == []
    assert "needs calibration" in problems([Quantize("int8-dynamic", smooth=0.5)], task)[0]
    for runtime in RUNTIMES:  # each has kernels of its own for it
        assert problems([BLIND], task, Target(runtime)) == []
