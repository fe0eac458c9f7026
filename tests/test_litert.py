"""LiteRT: what a .tflite file holds, computes and refuses."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import paredown
from docs import make_architectures as page
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.graph import structure
from paredown.graph.quantized.quantizers import quantized_weights
from paredown.steps.quantization.cast import Cast
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.quantization.quantize_weights import QuantizeWeights
from paredown.steps.step import Setting
from paredown.targets import parity
from paredown.targets.devices.local import Probe
from paredown.targets.formats.litert import write
from paredown.targets.runtimes import litert, ready
from paredown.targets.runtimes.litert_worker import worker
from tests.architectures import ARCHITECTURES, make, with_batch
from tests.architectures.captured import captured
from tests.test_architectures import NOTHING_TO_QUANTIZE

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parent.parent
STEPS = {
    "fp16": Cast("fp16"),
    "int8": Quantize("int8"),
    "int4": Quantize("int4"),
    "int8-weights": QuantizeWeights(8, method="rtn", zero_point=True),
}


@pytest.fixture(scope="module", autouse=True)
def _installed():
    try:
        ready("litert")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """(architecture, form) -> the model and its file, made once."""
    made = {}

    def get(name: str, form: str):
        if (name, form) not in made:
            model, example = captured(name)
            task = page.calibration_task(ARCHITECTURES[name], example)
            model = STEPS[form].apply(model, task) if form in STEPS else model
            path = tmp_path_factory.mktemp(name) / f"{form}.tflite"
            made[name, form] = model, litert.lower(model, path)
        return made[name, form]

    return get


def leaves(name: str, batch: int) -> list[torch.Tensor]:
    return structure.flatten(with_batch(make(name)[1], batch))[0]


def agreement(model, path, inputs: list[torch.Tensor]) -> float:
    """The least agreement in dB of an output with the model's."""
    got = litert.open(path)(*[leaf.numpy() for leaf in inputs])
    with torch.no_grad():
        expected = model.graph(*[leaf.clone() for leaf in inputs])
    assert [str(t.dtype).removeprefix("torch.") for t in expected] == [a.dtype.name for a in got]
    return min(parity.agreement_db(a.numpy(), b) for a, b in zip(expected, got, strict=True))


# --- what runs on integers -------------------------------------------------------------------

# Architecture -> exactly the integer ops of its file.
FUSED = {
    "mlp": {"FULLY_CONNECTED": 3, "TANH": 1},
    "mobilenet_v2": {
        **{"CONV_2D": 11, "DEPTHWISE_CONV_2D": 5, "ADD": 2, "MEAN": 1, "FULLY_CONNECTED": 1},
    },
    "transformer_encoder": {"EMBEDDING_LOOKUP": 1, "FULLY_CONNECTED": 9},
    "resnet_basic": {"CONV_2D": 20, "ADD": 8, "MAX_POOL_2D": 1, "MEAN": 1, "FULLY_CONNECTED": 1},
    "unet": {"CONV_2D": 11, "MAX_POOL_2D": 2, "CONCATENATION": 2},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in list(FUSED)[:2] else pytest.mark.slow) for n in FUSED]
)
def test_every_op_that_can_runs_on_integers(name, lowered):
    model, path = lowered(name, "int8")
    census = litert.census(path)
    assert census.integer_ops == FUSED[name] and census.unfused == ()
    weights = [model.state_dict()[weight] for weight in quantized_weights(model.graph)]
    assert census.bytes_by_dtype["int8"] >= sum(weight.numel() for weight in weights)
    assert agreement(model, path, leaves(name, 2)) > parity.QUANTIZED_DB


def test_each_form_takes_its_bits(lowered):
    files = {form: lowered("mlp", form)[1] for form in ("fp32", "fp16", "int8", "int4")}
    sizes = {form: path.stat().st_size for form, path in files.items()}
    assert sizes["fp16"] < 0.6 * sizes["fp32"] and sizes["int4"] < sizes["int8"] < sizes["fp16"]
    held = {form: litert.census(path).bytes_by_dtype for form, path in files.items()}
    assert set(held["fp32"]) == {"float32"} and held["fp16"]["float16"] > 9000
    assert held["int4"]["int4"] == (64 * 48) / 2  # the first and the last layer stay at 8 bits
    model, path = lowered("mlp", "fp32")
    assert litert.census(path).integer_ops == {} and agreement(model, path, leaves("mlp", 2)) > 100
    assert litert.census(lowered("mlp", "int8-weights")[1]).integer_ops == {}
    assert lowered("mlp", "int8-weights")[1].stat().st_size < 0.5 * sizes["fp32"]
    for form, least_db in (("fp16", 50), ("int4", parity.QUANTIZED_DB), ("int8-weights", 100)):
        assert agreement(*lowered("mlp", form), leaves("mlp", 2)) > least_db


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_computes_what_its_model_does(name, lowered):
    for form in ("fp32",) if name in NOTHING_TO_QUANTIZE else ("fp32", "int8"):
        model, path = lowered(name, form)  # asserts it on the example
        least_db = 50 if form == "fp32" else parity.QUANTIZED_DB
        assert agreement(model, path, leaves(name, 2)) > least_db
        census = litert.census(path)
        assert census.unfused == () and bool(census.integer_ops) == (form == "int8")


class Words(nn.Module):
    """A table, a convolution, a linear layer and a product."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(300, 128), nn.Conv1d(128, 128, 3, padding=1)
        self.inner, self.head = nn.Linear(128, 128), nn.Parameter(torch.randn(128, 96) / 8)

    def forward(self, ids):
        x = self.conv(self.table(ids).transpose(1, 2)).relu().transpose(1, 2)
        return self.inner(x) @ self.head


@pytest.mark.parametrize(("group", "tables", "most"), [(32, 8, 0.56), (0, 8, 0.56), (64, 4, 0.52)])
def test_weights_of_4_bits_are_stored_and_multiplied_so(group, tables, most, tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(300, (16, 8))
    task = Task(example=(ids[:1],), score=None, calibration=TensorDataset(ids, torch.zeros(16)))
    model = paredown.capture(Words().eval(), (ids[:1],))
    step = QuantizeWeights(4, group=group, embedding_bits=tables)
    settled = step.settle(model, task, Setting(target=paredown.Target("litert")))
    assert settled.zero_point is False and step.settle(model, task, Setting()) is step
    made = settled.apply(model, task)
    path = litert.lower(made, tmp_path / "words.tflite")
    whole = litert.lower(model, tmp_path / "float.tflite").stat().st_size
    assert path.stat().st_size < most * whole  # the convolution's weights stay in float
    counted = litert.census(path)
    assert counted.integer_ops == {"EMBEDDING_LOOKUP": 1, "FULLY_CONNECTED": 2}
    assert counted.bytes_by_dtype["int4"] == (128 + 96 + 300 * (tables == 4)) * 128 // 2
    [got] = litert.open(path)(ids.numpy())
    assert parity.agreement_db(made(ids).detach().numpy(), got) > 35


def test_weights_in_groups_are_refused_in_a_line(tmp_path):
    model = paredown.capture(nn.Linear(64, 32), (torch.zeros(1, 64),))
    grouped = QuantizeWeights(8, group=32, method="rtn").apply(model, None)
    with pytest.raises(UserError, match=r"8 bits in groups of 32, 64 to a row\. XNNPACK takes"):
        litert.lower(grouped, tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


class Shared(nn.Module):
    """A value in float that is moved, and then read by an integer layer and by others."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        moved = self.first(x).unflatten(1, (4, 4)).transpose(1, 2).flatten(1)
        return {"scores": self.second(moved), "moved": moved, "best": moved.argmax(1)}


def test_only_integer_readers_see_a_rounded_value(tmp_path):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 8), torch.zeros(64))
    task = Task(example=(torch.randn(2, 8),), score=None, calibration=data)
    model = paredown.capture(Shared().eval(), task.example)
    quantized = Quantize(exclude=("first.weight",)).apply(model, task)
    path = litert.lower(quantized, tmp_path / "model.tflite")
    predictor = litert.open(path)
    assert predictor.input_names == ["x"]
    assert predictor.output_names == ["scores", "moved", "best"]
    scores, moved, best = predictor(task.example[0].numpy())
    expected = quantized.graph(task.example[0])
    np.testing.assert_allclose(moved, expected[1].detach().numpy(), rtol=1e-5, atol=1e-6)
    assert best.dtype == np.int64 and np.array_equal(best, expected[2].numpy())
    assert litert.census(path).integer_ops["FULLY_CONNECTED"] == 1


class Adaptive(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.conv, self.pool = nn.Conv1d(3, 4, 3, padding=1), nn.AdaptiveMaxPool1d(size)

    def forward(self, x):
        return self.pool(self.conv(x))


@pytest.mark.parametrize(("size", "left"), [(1, False), (4, False), (5, True)])
def test_an_adaptive_maximum_becomes_windows_where_they_are_of_one_size(size, left):
    model = paredown.capture(Adaptive(size).eval(), (torch.randn(2, 3, 16),))
    made, _ = write._prepared(model)
    inputs = torch.randn(3, 3, 16)
    assert torch.equal(made(inputs), model(inputs))
    assert any("adaptive" in str(node.target) for node in made.graph.graph.nodes) == left


# --- the file and its predictor --------------------------------------------------------------


def test_the_same_model_gives_the_same_bytes(lowered, tmp_path):
    model, path = lowered("mlp", "int8")
    again = litert.lower(model, tmp_path / "again.tflite")
    assert again.read_bytes() == path.read_bytes()
    assert str(ROOT).encode() not in path.read_bytes() and b"tests" not in path.read_bytes()


def test_another_batch_runs_in_slices(lowered):
    for form in ("fp32", "int8"):
        model, path = lowered("mlp", form)
        for batch in (1, 3, 8):
            assert agreement(model, path, leaves("mlp", batch)) > parity.QUANTIZED_DB


def test_another_shape_is_refused_in_words(lowered):
    predictor = litert.open(lowered("mlp", "fp32")[1])
    with pytest.raises(ValueError, match=r"expected inputs of shape \(2, 20\), got \(2, 21\): a"):
        predictor(np.zeros((2, 21), np.float32))
    with pytest.raises(ValueError, match="expected 1 inputs, got 2"):
        predictor(np.zeros((2, 20), np.float32), np.zeros(2, np.float32))


@pytest.mark.parametrize("damage", ["empty", "other", "cut", "noise"])
def test_a_damaged_file_is_refused_in_words(damage, lowered, tmp_path):
    raw = bytearray(lowered("mlp", "fp32")[1].read_bytes())
    if damage == "noise":
        for place in range(8, 4000, 7):
            raw[place] ^= 0xA5
    bad = tmp_path / "bad.tflite"
    bad.write_bytes({"empty": b"", "other": b"PK\x03\x04" * 9, "cut": raw[:900]}.get(damage, raw))
    said = r"bad.tflite: opening it (failed: \w|crashed)"
    with pytest.raises(UserError, match=said) as caught, Probe(bad, Path(litert.__file__)):
        pass
    assert "\n" not in str(caught.value)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return torch.linalg.eigvalsh(x * self.scale)


def test_an_op_without_a_form_is_told_in_a_line_and_leaves_no_file(tmp_path):
    model = paredown.capture(Unknown().eval(), (torch.eye(4).expand(2, 4, 4),))
    with pytest.raises(UserError, match=r"model: LiteRT's converter cannot take it: .*eigh") as why:
        litert.lower(model, tmp_path / "model.tflite")
    assert "\n" not in str(why.value) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_ends_with_a_file_that_litert_measured(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(120, 32)
    data = TensorDataset(inputs, inputs[:, :4].argmax(1))
    module = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 4))
    task = Task(example=(inputs[:1],), score=paredown.accuracy, calibration=data)
    task = dataclasses.replace(task, validation=data, test=data)
    goals, target = paredown.Goals(max_drop="5%", size="0.5x"), paredown.Target("litert")
    run = paredown.compress(
        module.eval(), task, goals, target, steps=[Quantize("int8")], out=tmp_path / "run"
    )
    measured = run.on_device["compressed"]
    assert run.met and run.artifact.path.endswith(".tflite") and measured.examples == 120
    assert measured.where["runtime"].startswith("ai_edge_litert ") and measured.latency_ms_p50 > 0
    assert run.details["census"]["integer_ops"] == {"FULLY_CONNECTED": 2}


# --- the process in which the converter works ------------------------------------------------


def test_a_converter_that_dies_is_told_and_replaced(lowered, tmp_path):
    model, path = lowered("mlp", "fp32")
    os.kill(worker()._running().pid, signal.SIGSTOP)  # or it might answer before it dies
    os.kill(worker()._running().pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"LiteRT's converter crashed \(SIGKILL\)"):
        worker().names(path)
    assert worker().names(path) == ["output"]


@pytest.mark.slow
def test_lowering_leaves_no_trace_in_the_caller(tmp_path):
    code = (
        "import sys, torch, paredown; from paredown.targets.runtimes import litert\n"
        "model = paredown.capture(torch.nn.Linear(4, 2), (torch.zeros(1, 4),))\n"
        f"litert.open(litert.lower(model, {str(tmp_path / 'model.tflite')!r}))\n"
        "print(*(m for m in ('jax', 'litert_torch', 'litert_converter') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
