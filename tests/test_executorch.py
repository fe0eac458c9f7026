"""ExecuTorch: what XNNPACK runs on integers, what is left outside, files that can be trusted."""

import functools
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from docs import make_architectures as page
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.graph import structure
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.graph.quantized.quantizers import PER_TENSOR, fake_quantize, quantizers
from paredown.steps.quantization.cast import Cast
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.quantization.quantize_weights import QuantizeWeights
from paredown.targets.devices.device import write_batches
from paredown.targets.devices.local import Probe
from paredown.targets.formats.executorch.shape import shape_for_xnnpack
from paredown.targets.parity import QUANTIZED_DB, agreement_db
from paredown.targets.runtimes import executorch, ready
from tests.architectures import ARCHITECTURES
from tests.architectures.captured import captured

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parent.parent
aten = torch.ops.aten
ready("executorch")


def build(name: str, form: str = "float") -> Model:
    entry = ARCHITECTURES[name]
    model, example = captured(name)
    if form == "float":
        return model
    return Quantize(form).apply(model, page.calibration_task(entry, example))


def run(model: Model, leaves: list[Tensor] | None = None) -> list[Tensor]:
    with torch.no_grad():
        made = leaves or [item.example for item in model.inputs]
        return list(model.graph(*[leaf.clone() for leaf in made]))


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """The model of that name and form, and its file; each is written once."""
    folder = tmp_path_factory.mktemp("files")

    @functools.cache
    def write(name: str, form: str = "float") -> tuple[Model, Path]:
        model = build(name, form)
        return model, executorch.lower(model, folder / f"{name}-{form}.pte")

    return write


# --- rewrites --------------------------------------------------------------------------------


def rewritten(module: nn.Module, *example: Tensor) -> tuple[Model, Model]:
    model = capture(module, example)
    return model, shape_for_xnnpack(model)


def targets(model: Model) -> list:
    return [node.target for node in model.graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", ["vit", "unet"])
def test_rewrites_of_floats_change_nothing(name):
    """And nothing of attention's guards or of drop-path is left."""
    model = build(name)
    made = shape_for_xnnpack(model)
    gone = {aten.scaled_dot_product_attention.default, aten.fill_.Scalar, aten.div_.Tensor}
    assert not gone & set(targets(made)) and (name != "vit" or gone <= set(targets(model)))
    for ours, theirs in zip(run(made), run(model), strict=True):
        assert agreement_db(theirs.numpy(), ours.numpy()) > 100


class Attention(nn.Module):
    def __init__(self, causal: bool, mask: Tensor | None, scale: float | None):
        super().__init__()
        self.causal, self.scale = causal, scale
        self.register_buffer("mask", mask)

    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.causal, scale=self.scale
        )


@pytest.mark.parametrize(
    ("causal", "mask", "scale"),
    [
        (False, None, None),
        (True, None, None),
        (False, torch.ones(5, 5).tril() > 0, 0.3),
        (False, torch.randn(5, 5, generator=torch.Generator().manual_seed(0)), None),
    ],
)
def test_every_kind_of_attention_is_spelled_out(causal, mask, scale):
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(1))
    model, made = rewritten(Attention(causal, mask, scale), q, k, v)
    assert aten.scaled_dot_product_attention.default not in targets(made)
    torch.testing.assert_close(made(q, k, v), model(q, k, v), rtol=1e-5, atol=1e-6)


class Clamped(nn.Module):
    def __init__(self, clamp, scale: float, zero: int):
        super().__init__()
        self.clamp, self.scale, self.zero = clamp, scale, zero

    def forward(self, x):
        return fake_quantize(self.clamp(x), self.scale, self.zero, 0, 255)


@settings(max_examples=10)
@given(
    st.sampled_from([torch.relu, nn.functional.relu6, lambda x: x.clamp(-1.5, 4.0)]),
    st.floats(1e-3, 1.0),
    st.integers(0, 255),
)
def test_a_clamp_goes_only_where_rounding_clips_alike(clamp, scale, zero):
    values = torch.linspace(-300 * scale - 8, 300 * scale + 8, 4001)[None]
    model, made = rewritten(Clamped(clamp, scale, zero), values)
    assert torch.equal(made(values), model(values))
    kept = {aten.relu.default, aten.relu6.default, aten.hardtanh.default} & set(targets(made))
    grid = torch.tensor([-zero * scale, (255 - zero) * scale])
    assert bool(kept) == (not torch.equal(clamp(grid), grid))


def quantized(module: nn.Module, x: Tensor) -> Model:
    data = TensorDataset(x, torch.zeros(len(x)))
    task = Task(example=(x[:2],), score=None, calibration=data)
    return Quantize("int8").apply(capture(module, (x[:2],)), task)


class Far(nn.Module):
    """Two convolutions, their sum and product, a mean and two linear layers, all on integers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8))
        self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x).relu()
        y = self.b(x)
        x = torch.cat([(x + y) * y, x], 1)[:, ::2]
        return self.d(self.c(x.mean((2, 3))))


@pytest.mark.slow
def test_scales_that_lie_too_far_apart_for_xnnpack_still_run(tmp_path):
    """Each op that would be refused runs in float instead, and says so."""
    torch.manual_seed(0)
    model = quantized(Far(), torch.randn(8, 3, 6, 6))
    for node in quantizers(model.graph):
        if node.target is PER_TENSOR and node.args[0].name in ("conv2d_1", "mean", "linear"):
            node.update_arg(1, node.args[1] * 1e-6)
    model.graph.recompile()
    path = executorch.lower(model, tmp_path / "far.pte")
    census = executorch.census(path)
    assert census.float_ops["Conv2d"] == 1 and census.integer_ops["Conv2d"] == 1
    assert census.float_ops["GlobalAvgPooling2d"] == 1


# --- what fuses ------------------------------------------------------------------------------

# Architecture -> the ops on integers, and all else that runs; kernels outside XNNPACK as aten::...
FUSED = {
    "resnet8": (
        {"Conv2d": 9, "Add": 3, "FullyConnected": 1, "StaticTranspose": 2, "StaticReshape": 1},
        {"Convert", "AvgPooling2d"},
    ),
    "mlp": ({"FullyConnected": 3}, {"Convert", "Tanh"}),
}


@pytest.mark.parametrize("name", FUSED)
def test_every_op_that_can_runs_on_integers(name, lowered):
    model, path = lowered(name, "int8")
    census = executorch.census(path)
    integer, others = FUSED[name]
    assert census.integer_ops == integer and set(census.float_ops) <= others
    assert census.unfused == ()
    weights = sum(p.numel() for p in build(name).parameters() if p.dim() > 1)
    assert census.bytes_by_dtype["int8"] == weights
    assert census.bytes_by_dtype["float"] < weights / 4 + 1000


@pytest.mark.slow
def test_the_file_of_integers_is_really_smaller(lowered):
    sizes = {form: lowered("resnet8", form)[1].stat().st_size for form in ("float", "int8")}
    assert sizes["int8"] < 0.32 * sizes["float"]
    assert executorch.census(lowered("resnet8")[1]).integer_ops == {}


def test_half_precision_halves_convolutions_too(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10))
    x = torch.randn(2, 3, 6, 6)
    model = capture(net, (x,))
    half = Cast("fp16").apply(model, Task(example=(x,), score=None))
    path = executorch.lower(half, tmp_path / "half.pte")
    count = sum(p.numel() for p in net.parameters())
    assert executorch.census(path).bytes_by_dtype == {"float16": 2 * count}
    # where the processor has them, the kernels add in 16 bits: 1,024 terms cost some decibels
    assert agreement_db(run(model)[0].numpy(), executorch.open(path)(x.numpy())[0]) > 45


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 131])
def test_any_batch_runs_in_parts_where_it_must(batch, lowered):
    for form in ("float", "int8"):
        model, path = lowered("resnet8", form)
        predictor = executorch.open(path)
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        [got] = predictor(x.numpy())
        [expected] = run(model, [x])
        assert agreement_db(expected.numpy(), got) > (100 if form == "float" else 30)


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes_in_another_process(lowered, tmp_path):
    model, path = lowered("mlp", "int8")
    model.save(tmp_path / "model.safetensors")
    code = (
        "from paredown import Model; from paredown.targets.runtimes import executorch;"
        f"model = Model.load({str(tmp_path / 'model.safetensors')!r});"
        f"executorch.lower(model, {str(tmp_path / 'again.pte')!r})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "again.pte").read_bytes() == path.read_bytes()


def test_the_file_tells_nothing_of_where_it_was_made(lowered):
    for name, form in (("resnet8", "int8"), ("mlp", "int8"), ("resnet8", "float")):
        raw = lowered(name, form)[1].read_bytes()
        assert not any(text in raw for text in (b".py", b"/home", b"site-packages", b"torch/nn"))
        assert str(ROOT).encode() not in raw


def test_lowering_is_silent_and_leaves_logging_alone(tmp_path, capfd):
    before = list(logging.getLogger().handlers), logging.getLogger().level
    executorch.lower(build("mlp"), tmp_path / "mlp.pte")
    assert capfd.readouterr() == ("", "")
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == before
    assert logging.root.manager.disable == 0


def test_names_of_inputs_and_outputs_are_kept(lowered):
    model, path = lowered("mlp", "int8")
    predictor = executorch.open(path)
    assert predictor.input_names == [item.name for item in model.inputs]
    names = [name.replace(".", "_") or "output" for name in structure.names(model.outputs)]
    assert predictor.output_names == names


def test_opening_needs_the_runtime_alone(lowered):
    """Neither ExecuTorch's exporter, which takes seconds to import, nor torchao, nor paredown."""
    _, path = lowered("mlp", "int8")
    code = f"""
import sys, importlib.util
spec = importlib.util.spec_from_file_location("runtime", {executorch.__file__!r})
runtime = importlib.util.module_from_spec(spec)
sys.modules["runtime"] = runtime
spec.loader.exec_module(runtime)
runtime.open({str(path)!r})
print([name for name in ("executorch.exir", "torchao", "paredown", "onnx") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_outputs_are_copies(lowered):
    model, path = lowered("mlp", "float")
    predictor = executorch.open(path)
    [leaf] = [item.example.numpy() for item in model.inputs]
    [first] = predictor(leaf)
    kept = first.copy()
    predictor(leaf + 1)
    assert np.array_equal(first, kept) and first.flags.writeable


def test_predictors_with_other_threads_live_side_by_side(lowered):
    """One pool serves a process: a method loaded for the old one would wait forever for it."""
    model, path = lowered("resnet8", "int8")
    binding = executorch._binding()
    x = model.inputs[0].example.numpy()
    one, two = executorch.open(path, 1), executorch.open(path, 2)
    assert binding._threadpool_get_thread_count() == 2
    for _ in range(2):
        assert all(np.array_equal(one(x)[0], each(x)[0]) for each in (one, two))
    executorch.open(path, 1)
    assert binding._threadpool_get_thread_count() == 1


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ([], "expected 1 inputs, got 0"),
        ([np.zeros((1, 3, 32, 32))], "input 'x': expected float32, got float64"),
        ([np.zeros((1, 3, 32, 31), np.float32)], "shape \\(batch up to 64, 3, 32, 32\\), got"),
        ([np.zeros((3, 32, 32), np.float32)], "input 'x': expected shape"),
        ([np.zeros((0, 3, 32, 32), np.float32)], "input 'x': expected shape"),
    ],
)
def test_wrong_inputs_are_refused_in_words(arrays, said, lowered):
    predictor = executorch.open(lowered("resnet8", "int8")[1])
    with pytest.raises(ValueError, match=said):
        predictor(*arrays)


def test_damaged_files_end_in_words(lowered, tmp_path):
    """Whatever a file holds, the process that opens it may end, and this one says what happened."""
    raw = lowered("mlp", "int8")[1].read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", b"no program", raw[:40], raw[: len(raw) // 2], raw[:-100]]
    for _ in range(3):
        noisy = bytearray(raw)
        for place in rng.integers(0, len(raw), 20):
            noisy[place] = rng.integers(0, 256)
        damaged.append(bytes(noisy))
    write_batches(tmp_path / "in.npz", [[np.zeros((1, 20), np.float32)]])
    for number, each in enumerate(damaged):
        path = tmp_path / f"{number}.pte"
        path.write_bytes(each)
        try:
            with Probe(path, Path(executorch.__file__), timeout_s=60) as probe:
                probe.run(tmp_path / "in.npz", tmp_path / "out.npz")
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert number > 4, "a file that is cut short was opened"


def test_a_census_of_something_else_is_refused(tmp_path):
    (tmp_path / "other.pte").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"other\.pte: is no ExecuTorch program"):
        executorch.census(tmp_path / "other.pte")


class Unknown(nn.Module):
    def forward(self, x):
        return torch.linalg.svd(x)[1]


def test_an_op_without_a_kernel_is_told_in_one_line_and_leaves_no_file(tmp_path):
    model = capture(Unknown(), (torch.randn(2, 4, 4),))
    with pytest.raises(UserError, match=r"cannot load it: Missing operator.*svd") as caught:
        executorch.lower(model, tmp_path / "model.pte")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


# --- architectures ---------------------------------------------------------------------------


# --- weights alone ---------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(300, 64), nn.Conv1d(64, 64, 3, padding=1)
        self.inner, self.head = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 96) / 8)

    def forward(self, ids):
        x = self.conv(self.table(ids).transpose(1, 2)).relu().transpose(1, 2)
        return self.inner(x) @ self.head


@pytest.fixture(scope="module")
def words():
    torch.manual_seed(0)
    ids = torch.randint(300, (16, 8))
    task = Task(example=(ids[:1],), score=None, calibration=TensorDataset(ids, torch.zeros(16)))
    return capture(Words().eval(), (ids[:1],)), task, ids


@pytest.mark.parametrize(("bits", "group", "most"), [(8, 0, 0.55), (4, 32, 0.5), (4, 64, 0.5)])
def test_weights_alone_are_integers_where_a_linear_layer_reads_them(
    bits, group, most, words, tmp_path
):
    model, task, ids = words
    made = QuantizeWeights(bits, group=group, zero_point=False).apply(model, task)
    path = executorch.lower(made, tmp_path / "words.pte")
    whole = executorch.lower(model, tmp_path / "float.pte").stat().st_size
    assert path.stat().st_size < most * whole  # the convolution's weights stay in float
    [got] = executorch.open(path)(ids.numpy())
    assert agreement_db(made(ids).detach().numpy(), got) > QUANTIZED_DB


def test_weights_that_xnnpack_lacks_are_told(words, tmp_path):
    model, task, _ = words
    made = QuantizeWeights(4, group=16, zero_point=False).apply(model, task)
    with pytest.raises(
        UserError, match=r"4 bits in groups of 16, 64 to a row\. XNNPACK takes .* group=32"
    ):
        executorch.lower(made, tmp_path / "words.pte")
    assert not list(tmp_path.iterdir())


# --- what ExecuTorch lacks -------------------------------------------------------------------


class Blocks(nn.Module):
    """Pooling over blocks, over windows of one size, and a maximum over all places."""

    def forward(self, x):  # (N, 2, 4, 6, 6)
        mean = nn.functional.avg_pool3d(x, 2).flatten(1)
        most = nn.functional.max_pool3d(x, (2, 3, 3), stride=2, padding=1).flatten(1)
        image = x.flatten(1, 2)  # (N, 8, 6, 6)
        windows = nn.functional.adaptive_avg_pool2d(image, 3).flatten(1)
        return mean, most, windows, nn.functional.adaptive_max_pool2d(image, 1).flatten(1)


def test_pooling_that_executorch_lacks_is_spelled_out(tmp_path):
    model = capture(Blocks(), (torch.randn(2, 2, 4, 6, 6),))
    predict = executorch.open(executorch.lower(model, tmp_path / "blocks.pte"))
    x = torch.randn(5, 2, 4, 6, 6)
    for ours, theirs in zip(run(model, [x]), predict(x.numpy()), strict=True):
        np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-5, atol=1e-6)


class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(4, 8, 5, stride=2, padding=2)
        self.wide = nn.Conv1d(8, 8, 3, dilation=2, padding="same", groups=2)
        self.up = nn.ConvTranspose1d(8, 4, 4, stride=2, padding=1)

    def forward(self, x):
        return self.up(self.wide(self.stem(x).relu()).relu())


@pytest.mark.parametrize("form", ["float", "int8"])
def test_a_batch_and_a_length_may_vary_at_once(form, tmp_path):
    torch.manual_seed(0)
    dynamic = ({0: "batch", 2: "length"},)
    sound = Sound().eval()
    model = capture(sound, (torch.randn(2, 4, 32),), dynamic)
    assert len(model.inputs[0].dynamic) == 2
    if form == "int8":
        data = TensorDataset(torch.randn(16, 4, 32), torch.zeros(16))
        task = Task(example=(torch.randn(2, 4, 32),), score=None, calibration=data)
        model = Quantize("int8").apply(model, task)
    path = executorch.lower(model, tmp_path / "sound.pte")
    if form == "int8":
        assert executorch.census(path).integer_ops["Conv2d"] == 2  # and transposed ones in float
    for batch, length in ((2, 32), (1, 8), (3, 50)):
        x = torch.randn(batch, 4, length)
        [ours], [theirs] = run(model, [x]), executorch.open(path)(x.numpy())
        assert agreement_db(ours.numpy(), theirs) > (QUANTIZED_DB if form == "int8" else 80)


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3)

    def forward(self, x):
        return self.conv(x)


def test_a_kernel_that_refuses_is_told_in_one_line(tmp_path):
    model = capture(Volume(), (torch.randn(1, 2, 4, 4, 4),))
    with pytest.raises(UserError, match=r"cannot run it: Check failed.*3-D or 4-D") as caught:
        executorch.lower(model, tmp_path / "volume.pte")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_convolutions_of_4_bits(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    data = TensorDataset(torch.randn(16, 3, 6, 6), torch.zeros(16))
    task = Task(example=(torch.randn(2, 3, 6, 6),), score=None, calibration=data)
    model = Quantize("int4").apply(capture(module, task.example), task)
    path = executorch.lower(model, tmp_path / "model.pte")
    x = torch.randn(2, 3, 6, 6)
    (got,) = executorch.open(path)(x.numpy())
    assert agreement_db(model(x).detach().numpy(), got) > QUANTIZED_DB
