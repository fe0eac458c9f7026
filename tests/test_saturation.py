"""Products whose sums leave 16 bits on x86 without VNNI: found, kept within, told."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import paredown
from paredown.core.errors import UserError
from paredown.core.task import Target, Task
from paredown.graph.capture import capture
from paredown.graph.quantized.grouped import PER_GROUP
from paredown.graph.quantized.per_channel import PER_CHANNEL
from paredown.graph.quantized.quantizers import quantized_weights, quantizers, read, rounded
from paredown.graph.quantized.saturation import (
    ACROSS,
    SAFE,
    WITHIN,
    Watch,
    excess,
    layers,
    saturates,
    simulate,
)
from paredown.graph.store import encode
from paredown.report.sections import census
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.quantization.saturation import instruction_sets
from paredown.steps.step import Setting
from paredown.targets import parity
from paredown.targets.runtimes import onnxruntime

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

QEMU = "qemu-x86_64"
RUN = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
name = session.get_inputs()[0].name
images = np.load(sys.argv[2])
found = [session.run(None, {name: images[n : n + 1]})[0] for n in range(len(images))]
np.save(sys.argv[3], np.concatenate(found))
"""


def as_the_instruction_adds(codes, integers):
    """``vpmaddubsw`` and ``vpmaddwd``, a number at a time."""
    made = np.zeros((len(codes), len(integers)), np.int64)
    for p, code in enumerate(codes.tolist()):
        for r, weight in enumerate(integers.tolist()):
            products = [a * w for a, w in zip(code, weight, strict=True)] + [0]
            for j in range(0, len(code), 2):
                made[p, r] += max(-32768, min(32767, products[j] + products[j + 1]))
    return made


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 1000))
def test_the_simulation_adds_as_the_instruction_does(places, outputs, inputs, seed):
    generator = np.random.default_rng(seed)
    codes = torch.from_numpy(generator.integers(0, 256, (places, inputs)))
    integers = torch.from_numpy(generator.choice([-127, -100, 3, 110, 127], (outputs, inputs)))
    exact = (codes @ integers.T).numpy()
    over = excess(codes[None], integers[None])[0].numpy()
    assert np.array_equal(exact - over, as_the_instruction_adds(codes, integers))
    pairs = over != 0  # what goes over above and below may cancel out, but then something goes over
    assert saturates(codes[None], integers[None]) or not pairs.any()
    assert not excess(codes[None], integers[None].clamp(-SAFE - 1, SAFE)).any()


def extreme(net):
    """The net with weights that are as large as each other, so that neighbours often add up."""
    for parameter in net.parameters():
        if parameter.dim() > 1:
            size = parameter.detach().abs().max()
            parameter.data = parameter.detach().sign() * size
    return net


def convolutions():
    """Odd channels, groups, dilation, a depthwise convolution: (B, 3, 9, 9) -> (B, 8, 3, 3)."""
    torch.manual_seed(0)
    return extreme(
        nn.Sequential(
            *(nn.Conv2d(3, 12, 3, 1, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 1, 1, groups=12)),
            *(nn.ReLU(), nn.Conv2d(12, 9, 3, 1, 2, 2, groups=3), nn.ReLU(), nn.Conv2d(9, 8, 3, 3)),
        )
    )


def calibrated(x):
    data = TensorDataset(x, torch.zeros(len(x)))
    return Task(example=(x[:1],), score=None, calibration=data)


@pytest.fixture(scope="module")
def images():
    return torch.rand(24, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(images):
    """Quantized for kernels with VNNI, and for all."""
    model, task = capture(convolutions(), (images[:1],)), calibrated(images)
    return {how: Quantize(saturation=how).apply(model, task) for how in ("vnni", "safe")}


def integers(model):
    return {
        name: read(model.graph, q).integers for name, q in quantized_weights(model.graph).items()
    }


def agreement(a, b):
    return parity.agreement_db(a.detach().numpy(), b.detach().numpy())


@pytest.mark.parametrize("pairs", [ACROSS, WITHIN])
def test_layers_that_saturate_keep_to_7_bits(made, images, pairs):
    before, after = integers(made["vnni"]), integers(made["safe"])
    graphs = {how: model.frozen().graph for how, model in made.items()}
    watch = Watch(graphs["vnni"])
    watch.run([images])
    assert watch.found == {"0.weight", "4.weight", "6.weight"}  # never the depthwise one
    for name, held in after.items():
        most = SAFE if name in watch.found else 127
        assert int(held.abs().max()) == most and int(before[name].abs().max()) == 127
    exact = {how: model(images) for how, model in made.items()}
    assert agreement(exact["vnni"], simulate(graphs["vnni"], [images], pairs)[0]) < 25
    assert torch.equal(exact["safe"], simulate(graphs["safe"], [images], pairs)[0])
    assert not [layer for layer in layers(graphs["safe"]) if layer.site.weight in watch.found]


def test_what_was_found_is_told(made, images):
    told = []
    setting = Setting(note=told.append)
    Quantize().apply(capture(convolutions(), (images[:1],)), calibrated(images), setting)
    [found] = told
    assert found["kind"] == "saturation" and found["runtime"] == "onnxruntime" and found["safe"]
    assert found["layers"] == ["0.weight", "4.weight", "6.weight"]
    assert "3 layers are held within 7 bits" in made["safe"].notes[-1]
    assert "there the file gives other results" in made["vnni"].notes[-1]
    task = calibrated(images)
    assert "the same on x86" in instruction_sets(made["safe"], task, "onnxruntime")
    assert "differ between" in instruction_sets(made["vnni"], task, "openvino")
    assert "every processor" in instruction_sets(made["vnni"], task, "executorch")
    assert instruction_sets(capture(convolutions(), (images[:1],)), task, "onnxruntime") is None


def test_the_report_says_on_which_instruction_sets_a_file_is_the_same(made, images):
    same = instruction_sets(made["safe"], calibrated(images), "onnxruntime")
    run = SimpleNamespace(
        details={"census": {"integer_ops": {"QGemm": 1}}, "instruction_sets": same}
    )
    assert census.facts(run)["notes"] == [same]


def test_other_runtimes_keep_8_bits(made, images):
    model, task = capture(convolutions(), (images[:1],)), calibrated(images)
    for runtime in ("executorch", "litert"):
        other = paredown.apply(model, [Quantize()], task, Target(runtime))
        assert int(integers(other)["0.weight"].abs().max()) == 127 and not other.notes
        assert integers(other).keys() == integers(made["vnni"]).keys()


def test_where_no_sum_leaves_16_bits_nothing_changes():
    torch.manual_seed(0)
    half = torch.randn(6, 8)
    net = nn.Linear(16, 6)
    net.weight.data = torch.stack([half, -half], 2).flatten(1)  # neighbours take each other back
    x = torch.rand(32, 16)
    model, task = capture(net, (x[:1],)), calibrated(x)
    safe, vnni = (
        Quantize(smooth=0.0, saturation=how).apply(model, task) for how in ("safe", "vnni")
    )
    assert encode(safe) == encode(vnni) and not safe.notes
    assert "whatever comes" in instruction_sets(safe, task, "onnxruntime")


def test_ranges_found_at_inference_count_without_data():
    torch.manual_seed(0)
    model = capture(extreme(nn.Linear(16, 6)), (torch.rand(2, 16),))
    blind = Task(example=(torch.rand(2, 16),), score=None)
    plain = {"smooth": 0.0, "correct_bias": False}
    made = Quantize("int8-dynamic", **plain).apply(model, blind)
    assert int(integers(made)["weight"].abs().max()) == SAFE
    x = torch.cat([torch.rand(31, 16), 100 * torch.rand(1, 16)])  # alone, each spans 0 to 255
    seen = Quantize("int8-dynamic", **plain).apply(model, calibrated(x))
    assert int(integers(seen)["weight"].abs().max()) == SAFE


@pytest.mark.parametrize("bits", [8, 4])
def test_a_tied_table_of_bytes_holds_the_same_integers(bits):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.words(ids))

    torch.manual_seed(0)
    ids = torch.randint(0, 64, (24, 5))
    step = Quantize(smooth=0.0, embedding_bits=bits)
    made = step.apply(capture(extreme(Tied()), (ids[:1],)), calibrated(ids))
    forms = {PER_CHANNEL: "linear", PER_GROUP: "table"}
    held = {
        forms[node.target]: read(made.graph, node).integers
        for node in made.graph.graph.nodes
        if node.target in forms
    }
    assert int(held["linear"].abs().max()) == SAFE
    assert torch.equal(held["linear"], held["table"]) == (bits == 8)
    if bits == 4:  # on a grid of its own
        table = rounded(
            made.graph, next(n for n in quantizers(made.graph) if n.target is PER_GROUP)
        )
        assert agreement(made.state_dict()["words.weight"], table) > 15


def test_settings_are_checked():
    with pytest.raises(UserError, match="got 'avx'"):
        Quantize(saturation="avx")


class Here:
    """A predictor that runs a model as a processor without VNNI does."""

    output_names = ("logits",)

    def __init__(self, model):
        self.graph = model.frozen().graph

    def __call__(self, *arrays):
        leaves = [torch.from_numpy(each) for each in arrays]
        return [each.numpy() for each in simulate(self.graph, leaves, ACROSS)]


def test_a_file_that_saturates_is_told_at_its_check(made, tmp_path, monkeypatch):
    said, model = [], made["vnni"]
    monkeypatch.setattr(parity, "say", said.append)
    onnxruntime.lower(model, tmp_path / "model.onnx")
    if "avx512_vnni" in cpu_flags() or "avx_vnni" in cpu_flags():
        assert len(said) == 1 and "x86 without VNNI" in said[0] and "dB" in said[0]
    with pytest.raises(UserError, match="this processor adds two products in 16 bits"):
        parity.confirm(model, tmp_path / "model.onnx", Here(model), pairs=ACROSS)
    said.clear()
    parity.confirm(made["safe"], tmp_path, Here(made["safe"]), pairs=ACROSS)
    assert not said


def cpu_flags():
    try:
        with open("/proc/cpuinfo") as file:
            return file.read()
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["vnni", "safe"])
def test_a_processor_without_vnni_gives_what_was_simulated(made, images, tmp_path, how):
    if shutil.which(QEMU) is None:
        pytest.skip("qemu-user is not installed; run apt-get install qemu-user")
    path = onnxruntime.lower(made[how], tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", images.numpy())
    here = [str(path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    command = [QEMU, "-cpu", "Haswell", sys.executable, "-c", RUN, *here]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    found = torch.from_numpy(np.load(tmp_path / "y.npy"))
    assert agreement(simulate(made[how].frozen().graph, [images], ACROSS)[0], found) > 40
    assert (agreement(made[how](images), found) > 40) == (how == "safe")
