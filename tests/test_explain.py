# ruff: noqa: F811 (fixtures are imported)
"""Where the score went: noise by layer, what restoring wins, and faults that were planted."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import paredown
from paredown import FineTune, PruneChannels, PruneWeights, Quantize
from paredown.core.errors import UserError
from paredown.core.results import Run
from paredown.core.task import Target, Task
from paredown.explain import explanation
from paredown.explain.cause import KINDS
from paredown.explain.explanation import explain_file
from paredown.explain.noise import Outputs
from paredown.graph.quantized.runner import Runner
from paredown.graph.sites import sites
from tests.architectures import ARCHITECTURES
from tests.architectures.captured import captured
from tests.test_run import NO_TRAIN, here, paredown_cli, user  # noqa: F401

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


def test_no_time_is_a_batch_and_no_remedy(tmp_path, monkeypatch):
    made = []
    apply = Quantize.apply
    monkeypatch.setattr(Quantize, "apply", lambda *all: made.append(1) or apply(*all))
    found, _, _ = explained(*clipped_range(), tmp_path, seconds=0.0)
    assert len(made) == 1 and found.ranking is None  # the recipe's own alone
    assert found.causes and 0 < found.examples <= 256


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
    return net, task(), [Quantize(smooth=0.0)]


def outlier_input():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        net[0].weight[3] *= 60
        net[1].weight[:, 3] /= 60
    return net, task(rows), [Quantize(smooth=0.0)]


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
    return Joined().eval(), task(), [Quantize(smooth=0.0)]


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
    return Offset().eval(), task(rows), [Quantize(smooth=0.0)]


def outlying_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        net[0].weight[:, 5] = 12.0

    def small(seed):
        data = rows(seed)
        data.tensors[0][:, 5] *= 0.01
        return data

    return net, task(small), [Quantize(smooth=0.0)]


def few_levels():
    return conv_net(), task(), [Quantize("int4")]


def dead_channels():
    net = conv_net()
    with torch.no_grad():
        net[2].weight[:8] = 0.0
        net[2].bias[:8] = -1.0
    return net, task(), [Quantize(smooth=0.0)]


FAULTS = [
    *(clipped_range, saturation, wide_range, outlier_channel, outlier_input, shared_scale),
    *(held_scale, outlying_weights, few_levels, dead_channels),
]


def mended(name, found, its_task, steps):
    """The task and the recipe with the remedy that was named."""
    if name == "saturation":
        return dataclasses.replace(its_task, calibration=images(1)), steps
    recipes = {
        "few_levels": [Quantize("int4", exclude=tuple(found.causes[0]["layers"]))],
        "dead_channels": [PruneChannels(0.19, criterion="weight_activation"), *steps],
    }
    if name in recipes:
        return its_task, recipes[name]
    changed = partial(dataclasses.replace, steps[-1])  # the remedy tells what is new alone
    return its_task, [eval(found.causes[0]["remedy"], {"Quantize": changed})]


def test_every_kind_has_its_fault():
    assert {fault.__name__ for fault in FAULTS} == set(KINDS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_named_and_its_remedy_helps(fault, tmp_path):
    module, its_task, steps = fault()
    found, model, made = explained(module, its_task, steps, tmp_path)
    assert [cause["kind"] for cause in found.causes] == [fault.__name__]
    remedied_task, remedied_steps = mended(fault.__name__, found, its_task, steps)
    better = paredown.apply(model, remedied_steps, remedied_task)
    if fault.__name__ == "dead_channels":  # they cost bytes, not decibels
        sizes = [sum(p.numel() for p in each.parameters()) for each in (better, made)]
        assert sizes[0] < 0.8 * sizes[1]
        assert output_db(model, better, its_task) > output_db(model, made, its_task) - 1
        return
    won = output_db(model, better, its_task) - output_db(model, made, its_task)
    assert won > 1
    tried = found.causes[0]["tried_db"]
    assert (tried is None) == (fault.__name__ in ("saturation", "few_levels"))
    assert tried is None or abs(tried - won) < 3


# --- figures ---------------------------------------------------------------------------------


def test_the_figures_of_the_file_are_those_of_the_graph(tmp_path):
    steps = [Quantize()]
    file, _, _ = explained(conv_net(), task(), steps, tmp_path)
    graph, _, _ = explained(conv_net(), task(), steps, tmp_path, runtime="pytorch")
    assert file.source == "file" and file.agreement_db > 40 and graph.agreement_db == 140.0
    assert file.output_db == pytest.approx(graph.output_db, abs=1)
    for ours, theirs in zip(file.layers, graph.layers, strict=True):
        assert ours["snr_db"] == pytest.approx(theirs["snr_db"], abs=1)
        assert ours["own_db"] == theirs["own_db"]
        assert ours["weights"] + ours["input"] + ours["output"] == pytest.approx(1, abs=0.01)


def test_the_ranking_is_that_of_excluding_each_layer(tmp_path):
    its_task = task()
    plain = Quantize(smooth=0.0, correct_bias=False)  # what changes weights looks at all layers
    found, model, made = explained(conv_net(), its_task, [plain], tmp_path)
    rows = found.ranking["restored"]
    assert len(rows) == 4 and found.ranking["layers"] == 4
    gains = [row["won_db"] for row in rows]
    assert gains == sorted(gains, reverse=True)
    now = output_db(model, made, its_task)
    for row in rows:
        step = dataclasses.replace(plain, exclude=tuple(row["layers"]))
        excluded = paredown.apply(model, [step], its_task)
        assert output_db(model, excluded, its_task) - now == pytest.approx(row["won_db"], abs=0.05)


def test_pruned_weights_are_given_back_as_if_excluded(tmp_path):
    its_task = task()
    found, model, made = explained(conv_net(), its_task, [PruneWeights(0.7)], tmp_path)
    assert found.rounding_db is None and found.output_db < 20
    rows, now = found.ranking["restored"], output_db(model, made, its_task)
    assert len(rows) == 4 and all(row["bytes"] == 0 for row in rows)
    for row in rows:
        excluded = PruneWeights(0.7, exclude=tuple(row["layers"])).apply(model, its_task)
        assert output_db(model, excluded, its_task) - now == pytest.approx(row["won_db"], abs=0.05)


def test_what_was_cut_is_told_apart_from_what_was_rounded(tmp_path):
    steps = [PruneChannels(0.3), FineTune(epochs=1), Quantize()]
    found, _, _ = explained(conv_net(), task(), steps, tmp_path)
    assert found.rounding_db > found.output_db + 10
    assert all(row["snr_db"] < row["rounding_db"] for row in found.layers)


@pytest.mark.slow
def test_many_layers_are_tried_in_blocks(tmp_path):
    torch.manual_seed(0)
    layers = [each for _ in range(100) for each in (nn.Linear(32, 32), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(32, 4)).eval()
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight *= 2.4
    small = task(lambda seed: rows(seed, 32))
    found, _, _ = explained(net, small, [Quantize()], tmp_path, remedies=False)
    assert len(found.layers) == found.ranking["layers"] == 101
    assert 0 < len(found.ranking["restored"]) <= 48


# --- run folders -----------------------------------------------------------------------------

RUN = ("run", "net.py", "--size", "0.5x", "--out", "r")


def test_explain_on_the_command_line(user, paredown_cli):
    user(NO_TRAIN)
    paredown_cli(*RUN)
    first = Run.load("r").details["explanation"]
    assert first["source"] == "file" and len(first["layers"]) == 4
    code, out, err = paredown_cli("explain", "r", "--top", "2")
    assert (code, err) == (0, "")
    assert "Noise by layer" in out and "2 of 4; --top shows more" in out
    assert "What restoring a layer wins" in out and "exported file, as it ships" in out
    code, out, _ = paredown_cli("explain", "r", "--json")
    found = json.loads(out)
    assert code == 0 and len(found["ranking"]["restored"]) == 4
    assert Run.load("r").details["explanation"] == found
    assert "Where the score went" in Path("r/report.html").read_text()
    assert "This run is finished" in paredown_cli(*RUN)[1]  # and the explanation is still there
    assert Run.load("r").details["explanation"] == found


def test_what_cannot_be_explained_is_said(user, paredown_cli):
    code, _, err = paredown_cli("explain", "nowhere")
    assert code == 1 and "holds no finished run" in err
    paredown_cli("run", user(NO_TRAIN), "--size", "10MB", "--out", "same")
    code, _, err = paredown_cli("explain", "same")
    assert code == 1 and "nothing was compressed in this run" in err
    paredown_cli(*RUN)
    before = Path("r/run.json").read_bytes()
    user(NO_TRAIN.replace("images(0))", "images(0), validation=images(7))"))
    code, _, err = paredown_cli("explain", "r")
    assert code == 1 and "r: the validation split is not the one of the run." in err
    user("two = task\ndef task():\n    return two(validation=None, train=None)\n")
    code, _, err = paredown_cli("explain", "r")
    assert code == 1 and "is not the one of the run" in err
    Path("net.py").unlink()
    code, _, err = paredown_cli("explain", "r")
    assert code == 1 and "explain: net.py: no such file here; name it with --file." in err
    user(NO_TRAIN, name="moved.py")
    Path("r/model.onnx").write_bytes(b"other")
    code, _, err = paredown_cli("explain", "r", "--file", "moved.py")
    assert code == 1 and "not the file of the run: its SHA-256 is" in err
    assert Path("r/run.json").read_bytes() == before


def test_a_failure_is_told_and_does_not_cost_the_run(user, paredown_cli, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such op")

    monkeypatch.setattr(explanation, "explain_file", broken)
    user(NO_TRAIN)
    code, out, _ = paredown_cli(*RUN)
    assert code == 0 and "left out: RuntimeError: no such op" in out
    assert "Left out: RuntimeError: no such op" in Path("r/report.html").read_text()


# --- every architecture ----------------------------------------------------------------------


QUICK = ("resnet8", "siamese", "crnn", "vae")  # the rest are slow


class Drawn(Dataset):
    """Examples of an architecture, drawn by their number."""

    def __init__(self, entry, count=8):
        self.entry, self.count = entry, count

    def __len__(self):
        return self.count

    def __getitem__(self, n):
        torch.manual_seed(n)
        inputs = self.entry.example()
        if isinstance(inputs, dict):
            return {key: value[0] for key, value in inputs.items()}, 0
        return tuple(value[0] for value in inputs), 0


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ARCHITECTURES],
)
def test_every_architecture_is_explained(name, tmp_path):
    entry = ARCHITECTURES[name]
    model, example = captured(name)
    data = Drawn(entry)
    its_task = Task(example, None, calibration=data, validation=data, dynamic=entry.dynamic)
    steps = [Quantize()]
    try:
        made = paredown.apply(model, steps, its_task)
    except UserError:  # nothing to quantize
        steps = [PruneWeights(0.5)]
        made = paredown.apply(model, steps, its_task)
    path = tmp_path / "model.onnx"
    paredown.export(made, Target(), path)
    found = explain_file(model, made, path, "onnxruntime", its_task, steps, 30.0, False)
    known = {site.weight for site in sites(made.graph)}
    assert {row["name"] for row in found.layers} == known
    rounded = [row for row in found.layers if row["bits"]]
    assert all(row["own_db"] is not None for row in rounded)
    assert all(row["snr_db"] is not None for row in rounded)
    assert found.output_db is not None and json.dumps(found.to_json(), allow_nan=False)
    assert found.ranking is not None and found.ranking["restored"]
