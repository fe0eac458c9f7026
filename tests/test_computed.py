"""Weights that are computed from parameters alone are folded; all others are left as they are."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

import paredown
from paredown import (
    Binarize,
    HashWeights,
    LowRank,
    PruneWeights,
    Quantize,
    QuantizeWeights,
    ShareWeights,
    Task,
)
from paredown.graph.computed import fold_computed_weights
from paredown.graph.quantized.quantizers import quantizers
from paredown.graph.sites import sites
from tests.architectures import ARCHITECTURES, make
from tests.architectures.captured import captured as architecture

warnings.filterwarnings("ignore")


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean 0 and variance 1 in each channel (1903.10520)."""

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        return functional.conv2d(x, (self.weight - mean) * torch.rsqrt(var + 1e-5), self.bias)


class Crossed(nn.Module):
    """Two layers whose weights are halves of one parameter, as in attention; one reads it twice."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.randn(16, 8))

    def forward(self, x):
        first, second = (0.1 * self.both).split(8)
        return functional.linear(functional.linear(x, first), second)


class Windowed(nn.Module):
    """A fixed transform, made of buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("basis", torch.randn(8, 8))
        self.register_buffer("window", torch.rand(8))

    def forward(self, x):
        return functional.linear(x, self.basis * self.window)


class Tied(nn.Module):
    """A table that is looked up, and read again through a factor."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 8)

    def forward(self, x):
        return functional.linear(self.table(x).relu(), 0.5 * self.table.weight)


def old_style(layer):
    return nn.utils.weight_norm(layer)


FOLDED = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), ["weight"]),
    "weight norm, older": (lambda: old_style(nn.Linear(8, 8)), ["weight"]),
    "transposed": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (8, 1)), parametrizations.weight_norm(nn.ConvTranspose1d(8, 4, 3))
        ),
        ["1.weight"],
    ),
    "standardised": (
        lambda: nn.Sequential(nn.Unflatten(1, (2, 2, 2)), Standardised(2, 4, 2)),
        ["1.weight"],
    ),
    "plain": (lambda: nn.Linear(8, 8), []),
    "halves of one": (Crossed, []),
    "a fixed transform": (Windowed, []),
}


def captured(module, example):
    torch.manual_seed(0)
    return paredown.capture(module, (example,))


@pytest.mark.parametrize("name", FOLDED)
def test_what_is_folded_computes_the_same_and_leaves_nothing_behind(name):
    module, expected = FOLDED[name]
    model = captured(module(), torch.randn(2, 8))
    folded = model.copy()
    assert fold_computed_weights(folded) == expected
    assert torch.equal(folded(*[i.example for i in folded.inputs]), model(model.inputs[0].example))
    if expected:
        assert [site.weight for site in sites(folded.graph)] == expected
        prefix = expected[0].removesuffix("weight")
        assert set(folded.state_dict()) == {f"{prefix}weight", f"{prefix}bias"}


@pytest.mark.parametrize("name", ["speech_features", "big_transfer", "spectral_critic"])
def test_architectures_with_computed_weights(name):
    model, _ = architecture(name)
    model = model.eval()
    folded = model.copy().eval()
    found = fold_computed_weights(folded)
    assert set(found) <= {site.weight for site in sites(folded.graph)} and found
    assert not {site.weight for site in sites(model.graph)} & {*found}
    leaves = [item.example for item in model.inputs]
    for ours, whole in zip(folded.graph(*leaves), model.graph(*leaves), strict=True):
        assert torch.equal(ours, whole)


def test_a_table_that_something_else_reads_stays_one():
    model = captured(Tied(), torch.arange(4)[None])
    assert fold_computed_weights(model) == []
    assert list(model.state_dict()) == ["table.weight"]


def test_masked_parameters_stay():
    model = captured(parametrizations.weight_norm(nn.Linear(8, 8)), torch.randn(2, 8))
    name = "parametrizations.weight.original1"
    model.masks[name] = torch.ones(8, 8, dtype=torch.bool)
    assert fold_computed_weights(model) == []


@pytest.mark.parametrize(
    "step",
    [
        Quantize("int8"),
        QuantizeWeights(8),
        Binarize(),
        LowRank(0.3),
        ShareWeights(4),
        HashWeights(0.25),
        PruneWeights(0.5),
    ],
    ids=lambda step: type(step).__name__,
)
def test_every_step_that_changes_weights_reaches_them(step):
    layers = [parametrizations.weight_norm(nn.Linear(64, 64)) for _ in range(3)]
    module = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    data = TensorDataset(torch.randn(64, 64), torch.zeros(64))
    task = Task(example=(torch.randn(1, 64),), score=None, calibration=data)
    made = paredown.apply(module, [step], task)
    assert not [name for name in made.state_dict() if "parametrizations" in name]
    changed = len(quantizers(made.graph)) or made.masks or made.shared
    assert changed or any("_down" in name for name in made.state_dict())


def test_a_temporal_network_quantizes_whole():
    module, example = make("temporal_conv")
    entry = ARCHITECTURES["temporal_conv"]
    examples = torch.randn(8, *example[0].shape[1:])
    task = Task(
        example=example,
        score=None,
        calibration=TensorDataset(examples, torch.zeros(8)),
        dynamic=entry.dynamic,
    )
    made = Quantize("int8").apply(paredown.capture(module, example, entry.dynamic), task)
    behind = {site.weight for site in sites(made.graph) if site.node.args[1].op != "get_attr"}
    assert behind == {site.weight for site in sites(made.graph)}
