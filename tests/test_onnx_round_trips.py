"""Every architecture out as an ONNX file and in again: the same model, and pruned alike."""

from collections import Counter

import pytest
import torch

import paredown
from docs import make_architectures as page
from paredown.graph import structure
from paredown.graph.capture import capture
from paredown.graph.coupling.coupling import analyze
from paredown.steps.quantization.quantize import Quantize
from paredown.targets.runtimes import onnxruntime
from tests.architectures import ARCHITECTURES, call, make
from tests.test_architectures import close, run

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

QUICK = ("resnet8", "group_norm", "vit", "lstm", "siamese", "tied_language_model")
FUSED = ("resnet8", "vit", "mobilenet_v3", "bert", "unet")
# Groups that are others in the file than in the module, and why.
OTHERWISE = {
    "dinov2": "the mask token that nothing reads is not in the file",
    "wav2vec2": "the embedding of masks that nothing reads is not in the file",
    "transformer_encoder": "its layers began alike, and are one in the file",
    "transformer": "its layers began alike, and are one in the file",
    "speech_features": "its layers began alike, and are one in the file",
    "fnet": "the transform over two axes is two over one each in the file",
    "nbeats": "the backcast that nothing reads is not in the file",
    "bloom": "not traced: fewer of its groups are found from the file",
    "mamba": "its layers' A began alike, and is one in the file",
    "swin_v2": "its table of positions is computed in the file",
    "gru_bidirectional": "its two layers are two ops in the file, which are cut apart",
}


def task(name, model):
    """Random examples for the ranges, by the names of the model's inputs."""
    names = [item.name for item in model.inputs]
    data = []
    for seed in range(4):
        drawn = structure.flatten(page.draw(ARCHITECTURES[name], seed))[0]
        batch = dict(zip(names, drawn, strict=True))
        data += [({key: each[row] for key, each in batch.items()}, 0) for row in range(2)]
    example = {item.name: item.example for item in model.inputs}
    return paredown.Task(example=example, score=lambda output, _: output[:, 0], calibration=data)


def case(name):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


def sizes(model):
    return Counter(group.size for group in analyze(model).groups)


def back(model, path):
    """The file of a model, captured with its own example and open dimensions."""
    onnxruntime.lower(model, path)
    example = {item.name: item.example for item in model.inputs}
    dynamic = {
        item.name: {dim: name for dim, name in item.dynamic.items() if dim} or None
        for item in model.inputs
    }
    return capture(path, example, dynamic)


@pytest.mark.parametrize("name", [case(name) for name in ARCHITECTURES])
def test_out_and_in_again(name, tmp_path):
    module, example = make(name)
    model = capture(module, example, ARCHITECTURES[name].dynamic)
    made = back(model, tmp_path / "one.onnx")
    assert close(run(made), run(model))
    assert [item.dynamic for item in made.inputs] == [item.dynamic for item in model.inputs]
    if name not in OTHERWISE:
        assert sizes(made) == sizes(model)
    again = back(made, tmp_path / "two.onnx")
    assert close(run(again), run(model))
    if name not in OTHERWISE:
        assert sizes(again) == sizes(made)


@pytest.mark.parametrize("name", [case(name) for name in FUSED])
def test_the_same_ops_fuse(name, tmp_path):
    module, example = make(name)
    model = capture(module, example, ARCHITECTURES[name].dynamic)
    direct = Quantize("int8").apply(model, page.calibration_task(ARCHITECTURES[name], example))
    made = back(model, tmp_path / "one.onnx")
    counts = []
    for each in (direct, Quantize("int8").apply(made, task(name, made))):
        path = onnxruntime.lower(each, tmp_path / f"int8_{len(counts)}.onnx")
        found = onnxruntime.census(path)
        counts.append((found.integer_ops, found.unfused))
    assert counts[0] == counts[1] and counts[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v3", "unet", "vit", "bert", "lstm", "gpt2"])
def test_files_of_pytorchs_own_exporter(name, opset, tmp_path):
    module, example = make(name)
    path = tmp_path / "model.onnx"
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    torch.onnx.export(
        module, args, path, kwargs=kwargs, dynamo=True, opset_version=opset, verbose=False
    )
    made = capture(path)
    named = {item.name: item.example for item in made.inputs}
    drawn = structure.flatten(example)[0]
    inputs = dict(zip(named, drawn, strict=True))
    with torch.no_grad():
        ours = structure.flatten(made(**inputs))[0]
        theirs = structure.flatten(call(module, example))[0]
    assert close(ours, theirs)
    model = capture(module, example)
    if name not in OTHERWISE:
        assert sizes(made) == sizes(model)
