"""What every runtime promises, checked for each entry of RUNTIMES; a new one needs no line here."""

import copy
import dataclasses
import hashlib
import inspect
import itertools
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

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
from paredown.graph.quantized.forms import WEIGHT_FORMS
from paredown.targets import parity, runtimes
from paredown.targets.artifact import digest, parts, size_bytes
from paredown.targets.devices.local import Probe
from paredown.targets.runtimes import RUNTIMES, Runtime, ready, runtime
from tests.architectures import ARCHITECTURES, with_batch
from tests.architectures.captured import captured
from tests.test_contract import KINDS, build

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parent.parent
FLOAT = "float32"
CASES = [
    (name, form, kind)
    for name in RUNTIMES
    for form, kind in itertools.product([FLOAT, *WEIGHT_FORMS], KINDS)
    if form == FLOAT or form in runtime(name).FORMS
]
INTEGER = ("int8", "int8-dynamic", "int4")  # forms whose activations are integers too
# In the small models the graph weighs as much as the weights: those alone must shrink.
MOST_OF_WEIGHTS = {"int8": 0.6, "int4": 0.6, "fp16": 0.6, "bf16": 0.6}
QUICK = {
    "openvino": ("resnet8", "vit", "lstm", "siamese"),
    "executorch": ("resnet8", "lstm"),
    "litert": ("recommender",),
}
# The default runtime's are in test_architectures.py; PyTorch runs its own graphs.
OTHERS = [name for name in RUNTIMES if name not in ("onnxruntime", "pytorch")]
# (runtime, architecture) -> what is said
KNOWN_FAILURES = {
    ("executorch", "conv3d"): "cannot run it: Check failed",
    ("executorch", "fnet"): "Missing operator: .*fft_c2c",
    ("openvino", "fnet"): "output 'logits' differs from the model's",  # its Fourier transform
    ("litert", "fnet"): "LiteRT's converter cannot take it: torch.complex64",
    ("litert", "deeplab"): "LiteRT failed: .*broadcast_to",  # an image of one pixel, enlarged
    ("litert", "mobilevit_v2"): "LiteRT failed: .*stablehlo.scatter",  # im2col
}
FAIL_IN_INT8 = {
    ("executorch", "focalnet"): "Weight and Input should both be quantized",
    ("executorch", "multihead_attention"): "Missing out variants",
    ("executorch", "mobilevit_v2"): "Init failed for backend XnnpackBackend",
    # Its residual stream gathers what rounding every layer's input anew costs.
    ("litert", "levit"): "output 'distillation_logits' differs from the model's",
}
FIXED_BATCH = {("litert", "clip")}  # whose outputs compare the examples of a batch
PARTLY_IN_FLOAT = {  # as the census tells
    ("executorch", "mobilevit"),
    ("openvino", "deberta"),
    ("openvino", "squeezebert"),
    ("openvino", "swin_v2"),
    ("litert", "hrnet"),
}


def step(form: str):
    """The step that the record of a form names, as a person would type it."""
    return eval(
        WEIGHT_FORMS[form].made_by, {name: getattr(paredown, name) for name in paredown.__all__}
    )


@pytest.fixture(scope="module")
def built():
    return {kind: build(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def shaped(built):
    """(form, kind) -> the model in that form, made once."""
    made = {}

    def get(form, kind):
        if (form, kind) not in made:
            model, task = built[kind]
            made[form, kind] = model if form == FLOAT else step(form).apply(model, task)
        return made[form, kind]

    return get


@pytest.fixture(scope="module")
def lowered(shaped, tmp_path_factory):
    """(runtime, form, kind) -> its file, made once."""
    made = {}

    def get(name, form, kind):
        if (name, form, kind) not in made:
            try:
                chosen = ready(name)
            except UserError as error:
                pytest.skip(str(error))
            path = tmp_path_factory.mktemp(name) / f"model{chosen.SUFFIX}"
            made[name, form, kind] = chosen.lower(shaped(form, kind), path)  # asserts parity
        return made[name, form, kind]

    return get


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_has_all_that_a_runtime_has(name):
    for member, promised in vars(Runtime).items():
        if isinstance(promised, property):
            kind = get_type_hints(promised.fget)["return"]
            each = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
            plain = tuple(get_origin(one) or one for one in each)
            assert isinstance(getattr(runtime(name), member), plain), member
        elif not member.startswith("_"):
            asked = list(inspect.signature(promised).parameters.values())[1:]
            given = list(inspect.signature(getattr(runtime(name), member)).parameters.values())
            assert [(p.name, p.default) for p in given] == [(p.name, p.default) for p in asked]


def test_a_type_checker_sees_what_is_no_runtime(tmp_path):
    """What `runtime` gives is cast to a `Runtime`; here each module is checked to be one."""
    package = Runtime.__module__
    modules = [*RUNTIMES.values(), package]  # the last is none
    lines = [f"import {module}" for module in modules]
    lines += [f"n{n}: {package}.Runtime = {module}" for n, module in enumerate(modules)]
    written = tmp_path / "runtimes_checked.py"
    written.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(written)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if f"{written.name}:" in line]
    wrong = {int(line.split(":")[1]) for line in said if ": error: " in line}
    assert wrong == {len(lines)}, done.stdout + done.stderr


def outputs(model, leaves):
    with torch.no_grad():
        return list(model.graph(*[leaf.clone() for leaf in leaves]))


def agree(model, got, leaves, original=None):
    """Other inputs than the example's agree as well as rounding ties allow: by far less than the
    output, or than rounding has moved it from the original's. Where random weights multiply what a
    tie changes, file and model are at least equally near to the original."""
    exact = outputs(original or model, leaves)
    for ours, theirs, whole in zip(outputs(model, leaves), got, exact, strict=True):
        assert tuple(ours.shape) == theirs.shape
        error = np.linalg.norm(theirs.astype(np.float64) - ours.double().numpy())
        moved = float((ours.double() - whole.double()).norm())
        files = float(np.linalg.norm(theirs.astype(np.float64) - whole.double().numpy()))
        few = error <= max(0.15 * float(ours.double().norm()), moved / 2) + 1e-6
        assert few or files <= 1.3 * moved, f"{error:.3g} apart, {files:.3g} and {moved:.3g} moved"


FIXED_LENGTHS = ("litert",)  # whose files have the shapes of the example, the batch aside


@pytest.mark.parametrize(("name", "form", "kind"), CASES)
def test_a_file_computes_what_its_model_does(name, form, kind, shaped, lowered):
    model, path = shaped(form, kind), lowered(name, form, kind)
    predict = runtime(name).open(path)
    assert predict.input_names == [item.name for item in model.inputs]
    names = [found.replace(".", "_") or "output" for found in structure.names(model.outputs)]
    assert predict.output_names == names
    [item] = model.inputs
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (5,), (1,)] if kind == "cnn" else [(1, 6), (5, 6), (3, 9), (1, 6)]
    if name in FIXED_LENGTHS:
        shapes = [shape for shape in shapes if shape[1:] in ((), (6,))]
    for shape in shapes:  # other batch sizes, another length, and back
        if kind == "cnn":
            leaf = torch.randn(*shape, *item.example.shape[1:], generator=generator)
        else:
            leaf = torch.randint(16, shape, generator=generator)
        agree(model, predict(leaf.numpy()), [leaf])


@pytest.mark.parametrize(
    ("name", "form", "kind"),
    [pytest.param(*case, marks=pytest.mark.slow if case[2] == "encoder" else ()) for case in CASES],
)
def test_the_same_model_gives_the_same_bytes_and_nothing_else(
    name, form, kind, shaped, lowered, tmp_path
):
    first = lowered(name, form, kind)
    again = runtime(name).lower(shaped(form, kind), tmp_path / f"other{runtime(name).SUFFIX}")
    assert digest(again) == digest(first)
    assert sorted(tmp_path.iterdir()) == sorted(parts(again))  # no caches, no half-written files
    for part in parts(again):
        raw = part.read_bytes()
        for word in (str(ROOT), str(tmp_path), "Traceback", 'File "'):
            assert word.encode() not in raw, word


@pytest.mark.parametrize(("name", "form", "kind"), CASES)
def test_the_census_is_of_what_runs(name, form, kind, lowered):
    census = runtime(name).census(lowered(name, form, kind))
    simulated = form in INTEGER and runtime(name).INT8_BYTES is None
    if form in (FLOAT, *INTEGER, "fp16", "bf16"):
        assert bool(sum(census.integer_ops.values())) == (form in INTEGER and not simulated)
    assert sum(census.integer_ops.values()) + sum(census.float_ops.values()) > 0
    assert census.unfused == ()
    if form in MOST_OF_WEIGHTS and not simulated:
        whole = runtime(name).census(lowered(name, FLOAT, kind))
        held, before = (sum(each.bytes_by_dtype.values()) for each in (census, whole))
        assert held < MOST_OF_WEIGHTS[form] * before


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_damaged_file_is_refused_in_words(name, lowered, tmp_path):
    source = lowered(name, FLOAT, "cnn")
    for number, damage in enumerate((lambda raw: raw[: len(raw) // 2], lambda raw: b"", None)):
        for victim in range(len(parts(source))):
            path = tmp_path / f"{number}{victim}{source.suffix}"
            for n, (old, new) in enumerate(zip(parts(source), parts(path), strict=True)):
                raw = old.read_bytes()
                if n == victim and damage is None:
                    raw = hashlib.sha256(raw).digest() * (1 + len(raw) // 64)
                new.write_bytes(damage(raw) if n == victim and damage else raw)
            if damage is None and victim > 0:
                continue  # other weights are weights too: that is what the digest is for
            with (
                pytest.raises(UserError, match=rf"{path.name}: opening it ") as told,
                Probe(path, runtimes.source(name)),
            ):
                pass
            assert "Traceback" not in str(told.value) and ".cpp" not in str(told.value)


@pytest.mark.parametrize("name", [name for name in RUNTIMES if name != "pytorch"])
def test_a_file_that_differs_is_not_left_behind(name, built, lowered, monkeypatch, tmp_path):
    lowered(name, FLOAT, "cnn")  # installed
    said = "model: output 'x' differs"

    def differs(*_):
        raise UserError(said)

    monkeypatch.setattr(parity, "confirm", differs)
    with pytest.raises(UserError, match=said):
        runtime(name).lower(built["cnn"][0], tmp_path / f"model{runtime(name).SUFFIX}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RUNTIMES)
def test_packages_are_imported_only_when_needed(name):
    code = f"import sys; from paredown.targets import runtimes; runtimes.runtime({name!r})"
    code += "; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {each.split(".")[0] for each in done.stdout.split()}
    assert not loaded & {"onnxruntime", "openvino", "executorch", "litert_torch", "ai_edge_litert"}


def architectures():
    for name, each in itertools.product(OTHERS, ARCHITECTURES):
        yield pytest.param(
            name, each, marks=() if each in QUICK.get(name, ()) else pytest.mark.slow
        )


@pytest.mark.parametrize(("name", "each"), list(architectures()))
def test_architecture(name, each, tmp_path):
    """Float and int8 through the runtime: parity, other batches, what runs on integers."""
    try:
        chosen = ready(name)
    except UserError as error:
        pytest.skip(str(error))
    entry = ARCHITECTURES[each]
    model, example = captured(each)
    said = KNOWN_FAILURES.get((name, each))
    if said:
        with pytest.raises(UserError, match=said) as told:
            chosen.lower(model, tmp_path / f"model{chosen.SUFFIX}")
        assert "\n" not in str(told.value) and not list(tmp_path.iterdir())
        return
    fixed = (name, each) in FIXED_BATCH
    leaves = structure.flatten(example if fixed else with_batch(example, 3))[0]
    path = chosen.lower(model, tmp_path / f"float{chosen.SUFFIX}")
    assert chosen.census(path).integer_ops == {}
    agree(model, chosen.open(path)(*[leaf.numpy() for leaf in leaves]), leaves)
    try:
        quantized = step("int8").apply(model, page.calibration_task(entry, example))
    except UserError as error:
        assert page.NO_INTEGERS in str(error)
        return
    if (name, each) in FAIL_IN_INT8:
        with pytest.raises(UserError, match=FAIL_IN_INT8[name, each]):
            chosen.lower(quantized, tmp_path / f"int8{chosen.SUFFIX}")
        return
    path = chosen.lower(quantized, tmp_path / f"int8{chosen.SUFFIX}")
    census = chosen.census(path)
    assert sum(census.integer_ops.values()) > 0
    assert bool(census.unfused) == ((name, each) in PARTLY_IN_FLOAT)
    agree(quantized, chosen.open(path)(*[leaf.numpy() for leaf in leaves]), leaves, model)


def test_layers_without_a_bias(runtime_name, tmp_path):
    """OpenVINO 2026.4 would read memory at random there, once shapes are fixed."""
    torch.manual_seed(0)
    layers = [nn.Linear(32, 16, bias=False), nn.Linear(16, 24, bias=False), nn.ReLU()]
    module = nn.Sequential(*layers, nn.Linear(24, 4)).eval()
    x = torch.randn(64, 32)
    data = TensorDataset(x, torch.zeros(64))
    task = Task(example=(x[:1],), score=None, calibration=data)
    model = paredown.apply(module, [paredown.Quantize()], task)
    chosen = runtime(runtime_name)
    predict = chosen.open(chosen.lower(model, tmp_path / f"model{chosen.SUFFIX}"))
    for count in (1, 5):
        agree(model, predict(x[:count].numpy()), [x[:count]])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.uint16, torch.uint64]
)
def test_inputs_of_any_type_agree_or_are_refused_by_name(runtime_name, dtype, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x.float())

    x = torch.tensor([[0, 1, 1, 0, 1, 0]]).to(dtype)
    model = paredown.capture(Net(), (x,))
    chosen = runtime(runtime_name)
    wide = dtype in (torch.uint16, torch.uint64) and runtime_name in ("executorch", "litert")
    if wide:
        with pytest.raises(UserError, match=r"its input 'x' is uint\d\d, which .* does not take"):
            chosen.lower(model, tmp_path / f"model{chosen.SUFFIX}")
        return
    predict = chosen.open(chosen.lower(model, tmp_path / f"model{chosen.SUFFIX}"))
    agree(model, predict(x.numpy()), [x])


def test_sizes_count_all_files(lowered):
    for name in RUNTIMES:
        path = lowered(name, FLOAT, "cnn")
        assert size_bytes(path) == sum(part.stat().st_size for part in parts(path))
        assert dataclasses.is_dataclass(runtime(name).census(path))


class Axes(nn.Module):
    """Attention on other axes than (batch, heads, length, size)."""

    def __init__(self, shape, mask=None, **options):
        super().__init__()
        self.layer = nn.Linear(8, 24)
        self.shape, self.mask, self.options = shape, mask, options

    def forward(self, x):
        mixed = self.layer(x).view(-1, *self.shape, 24)
        query, key, value = mixed.chunk(3, -1)
        made = nn.functional.scaled_dot_product_attention(
            query, key, value, self.mask, **self.options
        )
        return made.reshape(x.shape)


SEEN = torch.ones(6, 6).tril().bool()
AXES = {
    "three": Axes((6,)),
    "four": Axes((2, 6)),
    "five": Axes((2, 2, 6)),
    "causal": Axes((2, 2, 6), is_causal=True),
    "six": Axes((2, 1, 2, 6)),
    "masked": Axes((2, 2, 6), SEEN),
    "each masked": Axes((3, 2, 6), torch.randn(3, 1, 6, 6)),
}


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "executorch"])
def test_attention_on_any_axes(name, axes, tmp_path):
    ready(name)
    torch.manual_seed(0)
    module = AXES[axes]
    length = math.prod(module.shape)
    model = paredown.capture(module, (torch.randn(2, length, 8),))
    path = runtime(name).lower(model, tmp_path / f"model{runtime(name).SUFFIX}")
    x = torch.randn(3, length, 8)
    (got,) = runtime(name).open(path)(x.numpy())
    assert parity.agreement_db(module(x).detach().numpy(), got) > 80


class Twice(nn.Module):
    """A layer whose results two norms take, on one input each."""

    def __init__(self, layer, norm):
        super().__init__()
        self.layer, self.norms = layer, nn.ModuleList([norm, copy.deepcopy(norm)])
        for each in self.norms:
            for tensor in (each.weight, each.bias, each.running_mean):
                nn.init.normal_(tensor)

    def forward(self, x, y):
        first, second = self.norms
        return first(self.layer(x)).relu() + second(self.layer(y))


TWICE = {
    "image": lambda: (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), (2, 4, 6, 6)),
    "image without bias": lambda: (nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), (2, 4, 6, 6)),
    "line": lambda: (nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), (2, 4, 6)),
    "row": lambda: (nn.Linear(4, 4), nn.BatchNorm1d(4), (2, 4)),
}


@pytest.mark.parametrize("kind", TWICE)
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "executorch"])
def test_a_layer_that_two_norms_follow(name, kind, tmp_path):
    ready(name)
    torch.manual_seed(0)
    layer, norm, shape = TWICE[kind]()
    module = Twice(layer, norm).eval()
    before = copy.deepcopy(module.state_dict())
    model = paredown.capture(module, (torch.randn(shape), torch.randn(shape)))
    path = runtime(name).lower(model, tmp_path / f"model{runtime(name).SUFFIX}")
    x, y = torch.randn(shape), torch.randn(shape)
    (got,) = runtime(name).open(path)(x.numpy(), y.numpy())
    assert parity.agreement_db(module(x, y).detach().numpy(), got) > 80
    assert all(torch.equal(before[key], held) for key, held in module.state_dict().items())
