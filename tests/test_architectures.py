"""Every architecture through capture, storage, pruning, quantization and ONNX, none special."""

import math
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from docs import make_architectures as page
from paredown.core.errors import UserError
from paredown.graph import store, structure
from paredown.graph.capture import capture
from paredown.graph.coupling.coupling import analyze
from paredown.graph.coupling.cut import cut
from paredown.graph.coupling.verify import verify
from paredown.graph.doors.module import ONLY_EVALUATION
from paredown.graph.model import Model
from paredown.steps.pruning.prune_weights import PruneWeights
from paredown.steps.quantization.quantize import Quantize
from paredown.targets.runtimes import onnxruntime
from tests.architectures import (
    ARCHITECTURES,
    FAILING,
    KNOWN_FAILURES,
    call,
    make,
    with_batch,
)
from tests.architectures.captured import captured

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architectures.md"
QUICK = (  # one of each kind; the rest are slow
    *("resnet8", "conv_mixer", "mobilenet_v2", "unet", "vae", "vit", "bert", "llama"),
    *("lstm", "image_and_table", "tied_language_model", "dcgan"),
)
# What training and evaluation compute is not the same there: only evaluation is captured.
EVALUATION_ONLY = {"vae", "spectral_critic"}
NOTHING_TO_QUANTIZE = {"dcgan"}  # transposed convolutions alone
LEAST_SNR_DB = {"mobilevit_v2": 3.0}  # random weights: 1 % of noise on its input is 19 % after it
USUAL_SNR_DB = 13.0


def case(name: str):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


every = pytest.mark.parametrize("name", [case(name) for name in ARCHITECTURES])


def tensors(value) -> list[Tensor]:
    return structure.flatten(value)[0]


def run(model: Model) -> list[Tensor]:
    with torch.no_grad():
        return list(model.graph(*[item.example.clone() for item in model.inputs]))


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Equal up to the order of float sums, beside each output's largest value."""
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    return all(
        torch.equal(a, b)
        if not a.is_floating_point()
        else torch.allclose(a, b, rtol=1e-4, atol=1e-4 * max(1e-6, float(b.abs().max())))
        for a, b in zip(ours, theirs, strict=True)
    )


def ties(module: nn.Module) -> set[frozenset[str]]:
    """The groups of names that share one parameter."""
    groups: dict[int, set[str]] = {}
    for key, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(key)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


@every
def test_architecture(name, tmp_path):
    entry = ARCHITECTURES[name]
    module, example = make(name)
    model = capture(module, example, entry.dynamic)
    check_capture(name, module, model, example)
    check_training(model)
    check_storage(module, model, tmp_path)
    check_pruning(model, tmp_path)
    check_cutting(model, example, tmp_path)
    check_onnx(name, model, example, tmp_path)


def check_capture(name, module, model, example):
    assert list(model.state_dict()) and set(model.state_dict()) == set(module.state_dict())
    for key, value in module.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert ties(model.graph) == ties(module)
    assert (ONLY_EVALUATION in model.notes) == (name in EVALUATION_ONLY)
    assert all(0 in item.dynamic for item in model.inputs)
    asked = tensors_dynamic(ARCHITECTURES[name])
    for item, names in zip(model.inputs, asked, strict=True):
        kept = set(names) - set(ARCHITECTURES[name].fixed)
        assert kept <= set(item.dynamic.values()), f"{item.name} lost {kept}"
    for batch in (2, 3):
        inputs = with_batch(example, batch)
        with torch.no_grad():
            ours, theirs = call(model, inputs), call(module, inputs)
        assert close(tensors(ours), tensors(theirs)), f"batch {batch}"
        assert type(ours) is type(theirs)
    assert all(map(torch.equal, run(model), run(model)))


def tensors_dynamic(entry) -> list[list[str]]:
    """The names of the dimensions that each input was asked to vary in."""
    if entry.dynamic is None:
        return [[] for _ in page.draw(entry, 0)]
    specs = entry.dynamic.values() if isinstance(entry.dynamic, dict) else entry.dynamic
    return [list((spec or {}).values()) for spec in specs]


def check_training(model):
    before = store.encode(model)
    trained = model.copy().train()
    outputs = trained.graph(*[item.example.clone() for item in trained.inputs])
    floats = [t for t in outputs if t.is_floating_point() and t.requires_grad]
    loss = sum(t[t.isfinite()].square().mean() for t in floats)
    loss.backward()
    grads = [p.grad for p in trained.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)
    assert sum(bool(g.any()) for g in grads) > len(grads) / 2
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    trained.eval()
    assert all(torch.isfinite(t).all() or not torch.equal(t, t) for t in run(trained))
    assert store.encode(model) == before


def check_storage(module, model, folder):
    path = folder / "model.safetensors"
    model.save(path)
    loaded = Model.load(path)
    assert all(map(torch.equal, run(model), run(loaded)))
    assert store.encode(loaded) == path.read_bytes() == store.encode(model)
    assert ties(loaded.graph) == ties(module)
    assert set(loaded.state_dict()) == set(module.state_dict())


def check_pruning(model, folder):
    pruned = PruneWeights(0.5).apply(model, None)
    assert pruned.masks and not model.masks
    state = pruned.state_dict()
    for key, mask in pruned.masks.items():
        assert int((~mask).sum()) == round(0.5 * mask.numel()), key
        assert not state[key][~mask].any(), key
    untouched = set(state) - set(pruned.masks)
    shared = {key for names in ties(model.graph) if names & set(pruned.masks) for key in names}
    for key in untouched - shared:
        assert torch.equal(state[key], model.state_dict()[key]), key
    assert all(
        torch.isfinite(a).all()
        for a, b in zip(run(pruned), run(model), strict=True)
        if b.isfinite().all()
    )
    loaded = reload(pruned, folder)
    assert all(torch.equal(mask, loaded.masks[key]) for key, mask in pruned.masks.items())


def check_cutting(model, example, folder):
    """Half of every group goes; where the mathematics allows it, that is as if it were zero."""
    coupling = analyze(model)
    assert coupling.groups
    half = {g.name: np.arange(g.size) >= g.size // 2 for g in coupling.groups}
    small = cut(model, coupling, half)
    expected = coupling.costs(half)
    assert sum(p.numel() for p in small.parameters()) == expected.parameters
    assert expected.parameters < coupling.costs().parameters and expected.macs > 0
    for batch in (1, 2, 3):
        leaves = tensors(with_batch(example, batch))
        with torch.no_grad():
            ours, theirs = small.graph(*leaves), model.graph(*leaves)
        assert [t.shape for t in ours] == [t.shape for t in theirs]
    again = analyze(small)
    assert again.costs() == expected
    exact = {g.name: half[g.name] for g in coupling.groups if g.exact}
    if exact:
        found = verify(model, cut(model, coupling, exact))
        assert found.error < 1e-4 and found.change > 1e-3
    check_file_of_cut(small, with_batch(example, 3), folder)
    reload(small, folder)


def check_file_of_cut(small, inputs, folder):
    leaves = tensors(inputs)
    path = onnxruntime.lower(small, folder / "small.onnx")  # asserts parity on the example
    got = onnxruntime.open(path)(*[leaf.numpy() for leaf in leaves])
    with torch.no_grad():
        expected = small.graph(*[leaf.clone() for leaf in leaves])
    for ours, theirs in zip(expected, got, strict=True):
        finite = ours.isfinite()
        error = float((torch.from_numpy(theirs) - ours)[finite].double().norm())
        assert error <= 1e-3 * float(ours[finite].double().norm()) + 1e-6


def reload(model: Model, folder: Path) -> Model:
    model.save(folder / "again.safetensors")
    loaded = Model.load(folder / "again.safetensors")
    assert all(map(torch.equal, run(model), run(loaded)))
    return loaded


def check_onnx(name, model, example, folder):
    """Each file's outputs are those of its model: `lower` asserts it."""
    original = onnxruntime.lower(model, folder / "float.onnx")
    assert onnxruntime.census(original).integer_ops == {}
    task = page.calibration_task(ARCHITECTURES[name], example)
    if name in NOTHING_TO_QUANTIZE:
        with pytest.raises(UserError, match=page.NO_INTEGERS):
            Quantize("int8").apply(model, task)
        return
    quantized = Quantize("int8").apply(model, task)
    path = onnxruntime.lower(quantized, folder / "int8.onnx")
    census = onnxruntime.census(path)
    assert census.unfused == ()
    assert sum(census.integer_ops.values()) > 0 and census.bytes_by_dtype["int8"] > 0
    assert float_ops_on_dequantized(path) == []
    seen = [page.draw(ARCHITECTURES[name], seed) for seed in page.SEEDS]
    assert page.snr_db(model, quantized, seen) > LEAST_SNR_DB.get(name, USUAL_SNR_DB)
    check_file(path, quantized, with_batch(example, 3))
    reload(quantized, folder)


def check_file(path, model, inputs):
    """Another batch size than the example's, and a file of weights and graph alone."""
    leaves = tensors(inputs)
    got = onnxruntime.open(path)(*[leaf.numpy() for leaf in leaves])
    with torch.no_grad():
        expected = model.graph(*[leaf.clone() for leaf in leaves])
    for ours, theirs in zip(expected, got, strict=True):
        assert ours.shape == theirs.shape
        finite = ours.isfinite()
        error = float((torch.from_numpy(theirs) - ours)[finite].double().norm())
        assert error <= 0.15 * float(ours[finite].double().norm()) + 1e-6
    loaded = onnx.load(str(path))
    assert not loaded.metadata_props and not any(n.metadata_props for n in loaded.graph.node)
    assert str(ROOT).encode() not in path.read_bytes()


def optimised_nodes(path: Path) -> list[onnx.NodeProto]:
    """What ONNX Runtime really runs."""
    import onnxruntime as ort

    options = onnxruntime.session_options(1)
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(onnx.load(options.optimized_model_filepath).graph.node)


def float_ops_on_dequantized(path: Path) -> list[str]:
    """Ops with integer inputs and weights that compute in float: bytes for nothing."""
    nodes = optimised_nodes(path)
    made_by = {output: node.op_type for node in nodes for output in node.output}
    weighted = {"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm"}
    return [
        f"{node.op_type} {node.name}"
        for node in nodes
        if node.op_type in weighted
        and sum(made_by.get(name) == "DequantizeLinear" for name in node.input) > 1
    ]


def test_the_quick_ones_are_one_of_each_kind():
    assert set(QUICK) <= set(ARCHITECTURES)
    assert len({ARCHITECTURES[name].family for name in QUICK}) >= 11
    assert EVALUATION_ONLY | NOTHING_TO_QUANTIZE | set(LEAST_SNR_DB) <= set(ARCHITECTURES)


# --- what fuses ------------------------------------------------------------------------------

POOL = "QLinearGlobalAveragePool"
# Architecture -> exactly the integer ops that ONNX Runtime runs, and the float ones it may.
FUSED = {
    "resnet_basic": {"QLinearConv": 20, "QLinearAdd": 8, POOL: 1, "QGemm": 1},
    "mobilenet_v2": {"QLinearConv": 16, "QLinearAdd": 2, POOL: 1, "QGemm": 1},
    "unet": {"QLinearConv": 11, "QLinearConcat": 2},
    "mlp": {"QGemm": 3},
    "transformer_encoder": {"GatherBlockQuantized": 1, "MatMulIntegerToFloat": 6, "QGemm": 3},
}
fused = pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n not in ("mobilenet_v2", "mlp") else ())
        for n in FUSED
    ],
)
COMPUTING = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


@pytest.mark.parametrize("name", FUSED)
def test_every_op_that_can_runs_on_integers(name, tmp_path):
    entry = ARCHITECTURES[name]
    module, _ = make(name)
    model, example = captured(name)
    quantized = Quantize("int8").apply(model, page.calibration_task(entry, example))
    path = onnxruntime.lower(quantized, tmp_path / "model.onnx")
    census = onnxruntime.census(path)
    assert census.integer_ops == FUSED[name]
    assert census.unfused == ()
    nodes = optimised_nodes(path)
    made_by = {output: node.op_type for node in nodes for output in node.output}
    for node in nodes:
        if node.op_type in COMPUTING:
            sources = [made_by.get(item) for item in node.input]
            assert "DequantizeLinear" not in sources, f"{node.op_type} {node.name} is not fused"
    counts = {
        kind: sum(isinstance(m, kind) for m in module.modules()) for kind in (nn.Conv2d, nn.Linear)
    }
    integer = census.integer_ops
    assert integer.get("QLinearConv", 0) == counts[nn.Conv2d]
    gemms = integer.get("QGemm", 0) + integer.get("MatMulIntegerToFloat", 0)
    attention = sum(isinstance(m, nn.MultiheadAttention) for m in module.modules())
    assert gemms == counts[nn.Linear] + attention  # whose input projections are no nn.Linear
    held = [m.weight.detach().numpy() for m in module.modules() if type(m) in counts]
    distinct = {weight.tobytes(): weight.size for weight in held}  # equal ones are in a file once
    assert census.bytes_by_dtype["int8"] >= sum(distinct.values())


@fused
def test_cut_and_quantized_both_gains_multiply(name, tmp_path):
    """With a quarter of every group gone the same ops fuse, and int8 saves its share of it."""
    entry = ARCHITECTURES[name]
    model, example = captured(name)
    coupling = analyze(model)
    quarter = {g.name: np.arange(g.size) >= g.size // 4 for g in coupling.groups if g.size >= 4}
    small = cut(model, coupling, quarter)
    task = page.calibration_task(entry, example)
    files = {
        kind: onnxruntime.lower(each, tmp_path / f"{kind}.onnx")
        for kind, each in (
            ("whole", model),
            ("small", small),
            ("int8", Quantize("int8").apply(model, task)),
            ("both", Quantize("int8").apply(small, task)),
        )
    }
    census = onnxruntime.census(files["both"])
    assert census.integer_ops == FUSED[name] and census.unfused == ()
    sizes = {kind: weight_bytes(path) for kind, path in files.items()}
    expected = sizes["small"] * sizes["int8"] / sizes["whole"]
    assert sizes["both"] == pytest.approx(expected, rel=0.15) and sizes["both"] < sizes["small"] / 2


def weight_bytes(path: Path) -> int:
    tensors_ = onnx.load(str(path)).graph.initializer
    return sum(onnx.numpy_helper.to_array(t).nbytes for t in tensors_)


# --- what fails ------------------------------------------------------------------------------

FAILS_WITH = {
    "transformer_unhinted": "sequence.py",
    "mixtral_looped": "data-dependent",
    "mixtral_grouped": "cannot be written as ONNX",
    "hourglass_any_size": "dimension 2 (height) of input 'x' became fixed at 32",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "_grouped" in n else ()) for n in FAILING]
)
def test_a_known_failure_is_told_plainly(name, tmp_path, capfd):
    module, example = make(name)
    try:
        model = capture(module, example, FAILING[name].dynamic)
        onnxruntime.lower(model, tmp_path / "model.onnx")
        text = next(note for note in model.notes if "became fixed" in note)
    except UserError as error:
        text = str(error)
        assert text.startswith("model: ")
    assert FAILS_WITH[name] in text
    assert "\n" not in text and "Traceback" not in text and 'File "' not in text
    assert len(text) < 700
    assert not list(tmp_path.glob("*.onnx")) or name == "hourglass_any_size"
    noise = capfd.readouterr()
    assert noise.out == "" and len(noise.err) < 300, "torch's own graph dumps are no message"


def test_known_failures_are_those_that_are_built():
    assert set(KNOWN_FAILURES) == set(FAILING) == set(FAILS_WITH)


def test_the_page_names_every_known_failure_and_every_architecture():
    rows = re.findall(r"^\| (\w+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    found = dict(rows)
    assert len(found) == len(rows), "an architecture stands twice"
    missing = {*ARCHITECTURES, *FAILING} - set(found)
    assert not missing, f"run python docs/make_architectures.py: no row for {sorted(missing)}"
    assert set(found) - {*ARCHITECTURES, *FAILING} == {"name"}
    for name, why in KNOWN_FAILURES.items():
        assert why in found[name], name
    for name, text in found.items():
        cells = re.split(r" \| ", text)
        assert len(cells) == len(page.COLUMNS) - 1, name
        if name in ARCHITECTURES:
            assert cells[0] == ARCHITECTURES[name].family
            assert cells[2] == ("evaluation" if name in EVALUATION_ONLY else "training")


def test_a_row_of_the_table():
    text = page.table(["mlp"])
    head, rule, row = text.splitlines()
    assert head == "| " + " | ".join(page.COLUMNS) + " |"
    assert set(rule) <= set("| -:")
    cells = row.strip("| ").split(" | ")
    module, _ = make("mlp")
    assert cells[:2] == ["mlp", "structure"]
    assert int(cells[2].replace(",", "")) == sum(p.numel() for p in module.parameters())
    assert cells[6] == "3 of 3" and 20 < float(cells[5]) < 80 and 0.2 < float(cells[7]) < 1
    assert math.isfinite(float(cells[5]))
