"""Equalised channels and corrected biases: as before in float, closer to it in integers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.graph.capture import capture
from paredown.graph.coupling.scaling import exchange, move
from paredown.graph.fold import fold_batch_norm
from paredown.graph.model import Model
from paredown.graph.quantized.regions import prepare
from paredown.graph.values import refresh_values
from paredown.steps.quantization.correct import sure_shift
from paredown.steps.quantization.equalize import equalize, smoothing_factors
from paredown.steps.quantization.quantize import Quantize
from paredown.targets.runtimes import onnxruntime
from tests.architectures import ARCHITECTURES
from tests.architectures.captured import captured
from tests.test_architectures import QUICK, run, tensors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


def calibrated(inputs: Tensor) -> Task:
    data = TensorDataset(inputs, torch.zeros(len(inputs)))
    return Task(example=(inputs[:1],), score=None, calibration=data, batch_size=16)


def prepared(module: nn.Module, example, dynamic=None) -> Model:
    return ready(capture(module.eval(), example, dynamic))


def ready(model: Model) -> Model:
    model = model.copy().eval()
    prepare(model)
    fold_batch_norm(model.graph)
    refresh_values(model)
    return model


def snr_db(before: Tensor, after: Tensor) -> float:
    noise = float((before - after).double().square().sum())
    return 10 * math.log10(float(before.double().square().sum()) / noise) if noise else math.inf


# --- factors ---------------------------------------------------------------------------------


def test_the_ends_even_out_values_or_weights_and_the_middle_both():
    rng = np.random.default_rng(0)
    values, weights = np.exp(rng.normal(0, 1, (2, 50)))
    f = smoothing_factors(values, weights, 1.0)
    assert np.ptp(np.log(values * f)) < 1e-9
    f = smoothing_factors(values, weights, 0.0)
    assert np.ptp(np.log(weights / f)) < 1e-9
    f = smoothing_factors(values, weights, 0.5)
    assert np.ptp(np.log(values * f / (weights / f))) < 1e-9
    assert abs(np.log(f).mean()) < 1e-9


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_dead_channels_stay_and_none_goes_far(share):
    f = smoothing_factors(np.array([0.0, 1.0, 1e30, 1e-30]), np.array([1.0, 0.0, 1.0, 1.0]), share)
    assert f[0] == f[1] == 1 and (f >= 1e-3 - 1e-12).all() and (f <= 1e3 + 1e-9).all()
    assert (smoothing_factors(np.zeros(3), np.zeros(3), share) == 1).all()


# --- what can be moved -----------------------------------------------------------------------


def case(name: str):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("name", [case(name) for name in ARCHITECTURES])
def test_moving_factors_changes_no_output(name):
    model, example = captured(name)
    model = ready(model)
    found, before = exchange(model.graph), run(model)
    factors = np.exp(np.random.default_rng(0).normal(0, 0.7, found.count))
    move(model.graph, found, factors)
    for ours, theirs in zip(run(model), before, strict=True):
        if not theirs.is_floating_point():
            assert torch.equal(ours, theirs)
            continue
        seen = theirs.isfinite()
        error = float((ours - theirs)[seen].double().norm())
        assert error <= 1e-5 * float(theirs[seen].double().norm())
    assert len(tensors(example)) == len(model.inputs)


class Chain(nn.Module):
    """A convolution, a depthwise one and a last one, with an activation between."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.last, self.act = nn.Conv2d(8, 4, 1), activation

    def forward(self, x):
        return self.last(self.act(self.deep(self.act(self.first(x)))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x).relu())


class Attended(nn.Module):
    """Norm, attention and a gated MLP: four kinds of readers."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def readers(module: nn.Module, x: Tensor) -> set[str]:
    return {r.site.weight for r in exchange(prepared(module, (x,)).graph).readers}


def test_which_layers_can_take_a_factor_up():
    image = torch.randn(2, 3, 6, 6)
    assert readers(Chain(nn.ReLU()), image) == {"deep.weight", "last.weight"}
    assert readers(Chain(nn.LeakyReLU()), image) == {"deep.weight", "last.weight"}
    for bent in (nn.GELU(), nn.Sigmoid(), nn.ReLU6(), nn.Softplus()):  # f(c x) is not c f(x)
        assert readers(Chain(bent), image) == set()
    assert readers(Tied(), torch.randn(2, 6)) == set()
    every = {f"{name}.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert readers(Attended(), torch.randn(2, 5, 8)) == every


def test_a_sum_ties_its_operands_and_an_output_pins_them():
    class Sum(nn.Module):
        def __init__(self, shown: bool):
            super().__init__()
            self.one, self.two, self.last = (nn.Linear(4, 4) for _ in range(3))
            self.shown = shown

        def forward(self, x):
            y = self.one(x) + self.two(x)
            return (self.last(y), y) if self.shown else self.last(y)

    x = torch.randn(2, 4)
    model = prepared(Sum(False), (x,))
    found = exchange(model.graph)
    assert found.count == 5
    assert {part.name for part in found.makers} == {
        *("one.weight", "one.bias", "two.weight", "two.bias")
    }
    assert readers(Sum(True), x) == set()


# --- what they are worth ---------------------------------------------------------------------


def test_outlying_channels_no_longer_cost_the_others_their_levels(tmp_path):
    torch.manual_seed(0)
    module = Attended()
    with torch.no_grad():
        for norm in (module.norm, module.norm2):
            norm.weight[2] *= 60.0
            for reader in (module.q, module.k, module.v, module.gate, module.up):
                reader.weight[:, 2] /= 60.0
    x = torch.randn(64, 5, 8)
    model, task = capture(module.eval(), (x[:1],)), calibrated(x)
    found = {}
    for smooth in (0.0, 0.5):
        made = Quantize(smooth=smooth, correct_bias=False).apply(model, task)
        with torch.no_grad():
            found[smooth] = snr_db(model(x), made(x))
        onnxruntime.lower(made, tmp_path / "model.onnx")
    assert found[0.5] > found[0.0] + 6


def test_equalising_alone_leaves_the_float_model_as_it_was():
    torch.manual_seed(0)
    module, x = Chain(nn.ReLU()), torch.randn(16, 3, 6, 6)
    with torch.no_grad():
        module.first.weight.mul_(torch.logspace(-2, 2, 8).reshape(-1, 1, 1, 1))
    model = prepared(module, (x[:1],))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    equalize(model, calibrated(x), ["deep.weight", "last.weight"], 0.5)
    with torch.no_grad():
        got, wanted = model.graph(x)[0], module(x)
    assert float((got - wanted).norm()) <= 1e-5 * float(wanted.norm())
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert {"first.weight", "first.bias", "deep.weight", "deep.bias", "last.weight"} == changed
    untouched = prepared(module, (x[:1],))
    equalize(untouched, calibrated(x), [], 0.5)
    assert all(torch.equal(t, before[n]) for n, t in untouched.state_dict().items())


# --- bias correction -------------------------------------------------------------------------


def test_a_shift_counts_as_far_as_it_is_sure():
    torch.manual_seed(0)
    assert torch.equal(sure_shift(torch.ones(4, 3)), torch.ones(3))
    assert torch.equal(sure_shift(torch.ones(1, 3)), torch.zeros(3))  # one batch says nothing
    noise = sure_shift(torch.randn(30, 1000))
    assert float(noise.abs().mean()) < 0.7 * float(torch.randn(30, 1000).mean(0).abs().mean())
    sure = sure_shift(0.01 * torch.randn(30, 100) + 1)
    assert (sure - 1).abs().max() < 0.01


class Clipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.two(self.one(x).relu())


@pytest.fixture(scope="module")
def clipped() -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(256, 16) + 1  # all enter the correction
    return capture(Clipped().eval(), (x[:1],)), x


def quantized(model: Model, x: Tensor, correct: bool) -> Model:
    step = Quantize(ranges="percentile", percentile=97.0, smooth=0.0, correct_bias=correct)
    return step.apply(model, calibrated(x))


def test_the_mean_output_is_that_of_the_float_model(clipped):
    model, x = clipped
    shift = {}
    for correct in (False, True):
        made = quantized(model, x, correct)
        with torch.no_grad():
            shift[correct] = float((made(x) - model(x)).mean(0).norm())
    assert shift[True] < 0.35 * shift[False]


def test_one_example_corrects_nothing(clipped):
    model, x = clipped
    one, off = (quantized(model, x[:1], correct) for correct in (True, False))
    assert torch.equal(one.state_dict()["two.bias"], off.state_dict()["two.bias"])


@pytest.mark.parametrize("smooth", [-0.1, 1.1, math.nan])
def test_a_share_out_of_its_range(smooth):
    with pytest.raises(UserError, match=r"smooth must be in \[0, 1\]"):
        Quantize(smooth=smooth)
