"""Mixed precision: the layers that cost the score stay in float, and no more than needed."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import paredown
from paredown.core.errors import UserError
from paredown.core.goals import Goals
from paredown.core.task import Task
from paredown.graph.capture import capture
from paredown.graph.quantized.quantizers import quantized_weights
from paredown.graph.quantized.runner import Runner, all_quantizers
from paredown.report.sections import mixed
from paredown.steps import recipe
from paredown.steps.quantization.mixed import least_floats, mean_score, sensitivities
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.step import Setting

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Four layers and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.head = nn.Linear(64, 6)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.mul_(2)
        before, layer = net.layers[1], net.layers[2]
        before.weight[6], before.bias[6] = before.weight[5], before.bias[5]
        layer.weight[:, 5] += 8.0  # of two equal values: what is large cancels out
        layer.weight[:, 6] -= 8.0
    x = torch.randn(512, 64)
    y = net(x).argmax(1).detach()
    data = TensorDataset(x, y)
    task = Task((x[:1],), paredown.accuracy, nn.functional.cross_entropy, calibration=data,
                validation=data, test=data)  # fmt: skip
    return capture(net, task.example), task


INT4 = {"scheme": "int4", "smooth": 0.0, "edge_bits": 8}


@given(st.integers(1, 30), st.integers(0, 30))
def test_halving_finds_the_least(count, needed):
    order = [str(n) for n in range(count)]
    asked = []

    def score(kept):
        asked.append(len(kept))
        assert order[: len(kept)] == list(kept)
        return float(len(kept))

    found = least_floats(order, score, float(needed))
    assert found == (order[:needed] if needed <= count else None)
    assert len(asked) == len(set(asked)) <= 1 + (count + 1).bit_length()
    assert count in asked or needed < count  # all in float is looked at only where need be


def test_the_layer_that_suffers_is_told_apart(made):
    model, task = made
    found = sensitivities(Quantize(**INT4).apply(model, task), task)
    names = [*(f"layers.{n}.weight" for n in range(4)), "head.weight"]
    assert [each.weight for each in found] == names
    worst = max(found, key=lambda each: each.noise)
    assert worst.weight == "layers.2.weight" and worst.drop > 0
    assert {each.weight: each.saved_bytes for each in found}["layers.1.weight"] == 64 * 64 * 7 // 2


class Shared(nn.Module):
    """Two layers read one value, which another op writes into before the second does."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        y = self.one(x)
        z = self.two(y)
        y.relu_()
        return self.three(y) + z


@pytest.mark.parametrize("net", [Net, Shared])
def test_what_layers_share_is_run_once_and_alike(net):
    width = {Net: 64, Shared: 16}[net]
    torch.manual_seed(0)
    x = torch.randn(32, width)
    task = Task((x[:1],), None, calibration=TensorDataset(x, torch.zeros(32)))
    quantized = Quantize("int8", smooth=0.0).apply(capture(net().eval(), task.example), task)
    runner = Runner(quantized.graph)
    every = all_quantizers(quantized.graph)
    groups = {"inputs": {n for n in every if "weight" not in n}} | {n: {n} for n in every}
    exact, found = runner.alone([x], groups)
    assert torch.equal(exact[0], runner.outputs([x], every)[0])
    for name, group in groups.items():
        alone = runner.outputs([x], every - group)[0]
        assert torch.equal(found[name][0], alone) and not torch.equal(alone, exact[0])


def test_as_few_as_needed_stay_in_float(made):
    model, task = made
    whole = mean_score(Quantize(**INT4).apply(model, task), task)
    assert whole < 0.97
    step = Quantize(**INT4, max_drop="3%")
    noted: list = []
    settled = step.settle(model, task, Setting(note=noted.append))
    assert settled.max_drop is None and "layers.2.weight" in settled.exclude
    quantized = settled.apply(model, task)
    held = quantized_weights(quantized.graph)
    assert 0 < len(held) < 5 and set(settled.exclude).isdisjoint(held)
    assert mean_score(quantized, task) >= 0.97
    [note] = noted
    below = [row for row in note["tried"] if row[0] < len(settled.exclude)]
    assert below and all(score < 0.97 for _, _, score in below)
    assert recipe.from_toml(recipe.to_toml([step])) == [step]
    assert recipe.from_toml(recipe.to_toml([settled])) == [settled]
    again = step.apply(model, task)  # settles by itself, in the same way
    assert sorted(quantized_weights(again.graph)) == sorted(held)


def test_nothing_stays_in_float_where_int8_does(made):
    model, task = made
    settled = Quantize("int8", max_drop="10%").settle(model, task, Setting())
    assert settled == Quantize("int8")


def test_a_drop_that_cannot_be_kept_is_told(made):
    model, task = made
    x = task.example[0]
    exact = TensorDataset(x, model(x).detach())
    worse = dataclasses.replace(
        task, score=lambda out, y: -(out - y).abs().amax(1), validation=exact
    )
    with pytest.raises(UserError, match=r"with all layers but .* in float the score is"):
        Quantize(**INT4, max_drop=1e-9).settle(model, worse, Setting())
    with pytest.raises(UserError, match="max_drop: cannot read 'much'"):
        Quantize(max_drop="much")
    [said] = recipe.problems([Quantize(max_drop="1%")], Task(task.example, None))
    assert "needs calibration and score and validation" in said


def test_a_run_keeps_the_curve_and_replays(made, tmp_path):
    model, task = made
    step = Quantize(**INT4, max_drop="6%")
    run = paredown.compress(model, task, Goals(max_drop="10%"), steps=[step], out=tmp_path / "run")
    [trial] = run.trials
    assert trial.kept and "exclude=" in trial.steps[0]
    told = mixed.facts(run)
    assert "stay in float, so that the score falls by at most 6.00 points." in told["summary"]
    assert {row["now"] for row in told["rows"]} == {"float", "integers"}
    paredown.report(run, tmp_path / "page.html")
    assert "Which layers stay in float" in (tmp_path / "page.html").read_text()
