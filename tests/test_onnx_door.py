"""The door for ONNX files: what comes out is a model like any other."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from torch import nn

import paredown
from paredown.core.errors import UserError
from paredown.graph.doors.onnx.door import open_onnx
from paredown.graph.quantized.quantizers import quantizers

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def file_of(path, nodes, inputs, outputs, known=(), opset=17, domains=(), **more):
    """An ONNX file of these nodes; inputs and outputs are (name, type, shape)."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(array, name) for name, array in dict(known).items()],
    )
    imports = [helper.make_opsetid("", opset), *[helper.make_opsetid(d, 1) for d in domains]]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, **more)
    onnx.save(model, path)
    return path


def runtime(path, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options)
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def outputs(value):
    return list(value.values()) if isinstance(value, dict) else [value]


def agrees(made, path, inputs, tolerance=1e-4):
    """Whether a module or model computes what ONNX Runtime does with the file."""
    with torch.no_grad():
        ours = [each.numpy() for each in outputs(made(**inputs))]
    theirs = runtime(path, inputs)
    assert [each.shape for each in ours] == [each.shape for each in theirs]
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1e-6, float(np.abs(b).max())) if b.size else 1.0
        np.testing.assert_allclose(a, b, tolerance, tolerance * scale)
    return True


def perceptron(path):
    rng = np.random.default_rng(0)
    known = {
        "first.weight": rng.standard_normal((8, 4)).astype(np.float32),
        "first.bias": rng.standard_normal(8).astype(np.float32),
        "second": rng.standard_normal((8, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "first.weight", "first.bias"], ["a"], transB=1),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "second"], ["y"]),
    ]
    return file_of(path, nodes, [("x", FLOAT, ["batch", 4])], [("y", FLOAT, ["batch", 3])], known)


def test_a_file_becomes_a_model_with_its_own_names(tmp_path):
    path = perceptron(tmp_path / "model.onnx")
    model = paredown.capture(path)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "first.weight": (8, 4),
        "first.bias": (8,),
        "second": (3, 8),  # as PyTorch has it
    }
    assert [item.name for item in model.inputs] == ["x"]
    assert model.inputs[0].dynamic == {0: "batch"}
    assert [str(n.target) for n in model.graph.graph.nodes if n.op == "call_function"] == [
        "aten.linear.default",
        "aten.relu.default",
        "aten.linear.default",
    ]
    assert agrees(model, path, {"x": torch.randn(5, 4)})


def capture_exported(module, example, path, opset, dynamic=None, **more):
    """PyTorch's own exporter's file, and the model that it becomes."""
    torch.onnx.export(
        module.eval(),
        example,
        path,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=dynamic,
        verbose=False,
        external_data=False,
        **more,
    )
    return paredown.capture(path)


class Small(nn.Module):
    """A net of convolutions with batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        x = F.max_pool2d(F.silu(self.conv2(x)), 2)
        return self.head(x.mean((2, 3)))


def small_file(path):
    """As TorchScript's exporter writes one: batch norms, and weights by their names."""
    module = Small().eval()
    names = {k: v.detach().numpy() for k, v in module.state_dict().items() if "num" not in k}
    norm = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "conv1.weight"], ["a"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["a", *norm], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("Conv", ["c", "conv2.weight", "conv2.bias"], ["d"], pads=[1] * 4, strides=[2, 2]),
        node("Sigmoid", ["d"], ["e"]),
        node("Mul", ["d", "e"], ["f"]),
        node("MaxPool", ["f"], ["g"], kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["g"], ["h"]),
        node("Dropout", ["h"], ["dropped"]),
        node("Flatten", ["dropped"], ["i"]),
        node("Gemm", ["i", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    shape = ["batch", 3, "height", "width"]
    file_of(path, nodes, [("x", FLOAT, shape)], [("y", FLOAT, ["batch", 4])], names)
    return module, path


def test_it_trains_as_the_module_does(tmp_path):
    module, path = small_file(tmp_path / "model.onnx")
    model = paredown.capture(path, {"x": torch.randn(2, 3, 16, 16)})
    wanted = {name for name in module.state_dict() if "num_batches" not in name}
    assert set(model.state_dict()) == wanted
    assert {name for name, _ in model.named_parameters()} == dict(module.named_parameters()).keys()
    model.train()
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    x, y = torch.randn(16, 3, 16, 16), torch.arange(16) % 4
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x=x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 1.5
    assert not torch.equal(before["norm.running_mean"], model.state_dict()["norm.running_mean"])
    assert not torch.equal(model(x=x), model(x=x))  # its dropout
    model.eval()
    assert torch.equal(model(x=x), model(x=x))


def test_sizes_that_the_file_leaves_open_stay_open(tmp_path):
    _, path = small_file(tmp_path / "model.onnx")
    model = paredown.capture(path)
    assert model.inputs[0].dynamic == {0: "batch", 2: "height", 3: "width"}
    assert any("leaves sizes of its inputs open" in note for note in model.notes)
    for shape in ((1, 3, 32, 32), (3, 3, 20, 28)):
        assert agrees(model, path, {"x": torch.randn(shape)})


def pare(folder):
    """The model of a file, what four steps make of it, and inputs."""
    _, path = small_file(folder / "model.onnx")
    x = torch.randn(64, 3, 16, 16)
    model = paredown.capture(path, {"x": x[:2]})
    with torch.no_grad():
        data = [({"x": each}, int(model(x=each[None]).argmax())) for each in x]
    task = paredown.Task(
        example={"x": x[:2]},
        train=data,
        calibration=data[:32],
        validation=data[:32],
        score=lambda output, target: (output.argmax(1) == target).float(),
        loss=F.cross_entropy,
    )
    steps = [
        paredown.PruneChannels(0.5),
        paredown.FineTune(epochs=1),
        paredown.LowRank(0.5),
        paredown.Quantize("int8"),
    ]
    made = paredown.apply(model, steps, task)
    return model, made, x[:2]


@pytest.fixture(scope="module")
def pared(tmp_path_factory):
    return pare(tmp_path_factory.mktemp("pared"))


def test_it_is_pared_as_any_model(pared):
    model, made, _ = pared
    count = sum(p.numel() for p in made.parameters())
    assert count < 0.7 * sum(p.numel() for p in model.parameters())
    assert quantizers(made.graph)


@pytest.mark.parametrize(
    "name, ending",
    [
        ("onnxruntime", "onnx"),
        ("openvino", "xml"),
        pytest.param("executorch", "pte", marks=pytest.mark.slow),
        pytest.param("litert", "tflite", marks=pytest.mark.slow),
    ],
)
def test_it_goes_out_to_each_runtime(pared, tmp_path, name, ending):
    _, made, x = pared
    with torch.no_grad():
        wanted = made(x=x).numpy()
    artifact = paredown.export(made, paredown.Target(name), tmp_path / f"out.{ending}")
    got = paredown.open(artifact.path)(x=x.numpy())
    got = got[0] if isinstance(got, (list, tuple)) else outputs(got)[0]
    np.testing.assert_allclose(got, wanted, 0.1, 0.1 * abs(wanted).max())


class Attends(nn.Module):
    """One block of a transformer over tokens."""

    def __init__(self):
        super().__init__()
        self.table, self.place = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, tokens):
        x = self.table(tokens) + self.place(torch.arange(tokens.shape[1]))
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(F.gelu(y)).mean(1)


@pytest.mark.parametrize("opset", [18, 20])
def test_a_transformer_keeps_its_length_open(tmp_path, opset):
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}
    path = tmp_path / "model.onnx"
    example = (torch.randint(0, 50, (2, 12)),)
    model = capture_exported(Attends(), example, path, opset, {"tokens": dims})
    (item,) = model.inputs
    assert set(item.dynamic) == {0, 1}
    ops = [str(node.target) for node in model.graph.graph.nodes]
    assert "aten.scaled_dot_product_attention.default" in ops
    assert "aten.gelu.default" in ops and "aten.layer_norm.default" in ops
    for shape in ((1, 5), (4, 33)):
        assert agrees(model, path, {"tokens": torch.randint(0, 50, shape)})


def test_external_data_is_mapped(tmp_path):
    path = perceptron(tmp_path / "model.onnx")
    inside = open_onnx(path)
    model = onnx.load(path)
    external_data_helper.convert_model_to_external_data(
        model, location="model.data", size_threshold=0
    )
    onnx.save(model, tmp_path / "large.onnx")
    made = open_onnx(tmp_path / "large.onnx")
    bias = made.module.program.known["first.bias"]
    while bias.base is not None and not isinstance(bias, np.memmap):
        bias = bias.base
    assert isinstance(bias, np.memmap)
    for name, value in inside.module.state_dict().items():
        assert torch.equal(value, made.module.state_dict()[name])
    with torch.no_grad():  # what is trained stays in memory
        made.module.get_parameter("first.bias").add_(1.0)
    again = open_onnx(tmp_path / "large.onnx")
    assert torch.equal(
        again.module.get_parameter("first.bias"), inside.module.get_parameter("first.bias")
    )


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_floats_of_other_widths_compute_in_32_bits(tmp_path, kind):
    number = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(kind)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = file_of(
        tmp_path / "m.onnx",
        nodes,
        [("x", number, ["n", 4])],
        [("y", number, ["n", 3])],
        {"w": weight},
    )
    model = paredown.capture(path)
    name = np.dtype(kind).name
    assert any(name in note and "float32" in note for note in model.notes)
    x = np.random.default_rng(1).standard_normal((2, 4)).astype(kind)
    with torch.no_grad():
        made = model(x=torch.from_numpy(x.astype(np.float32))).numpy()
    (wanted,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})
    assert np.allclose(made, wanted.astype(np.float32), 1e-2, 1e-2)


def test_a_branch_on_a_constant_is_taken(tmp_path):
    def branch(name, op):
        value = helper.make_tensor_value_info(name, FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["x"], [name])], name, [], [value])

    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "one"], ["n"]),
        helper.make_node("Equal", ["n", "four"], ["c"]),
        helper.make_node(
            "If", ["c"], ["y"], then_branch=branch("t", "Relu"), else_branch=branch("e", "Neg")
        ),
    ]
    known = {"one": np.array(1), "four": np.array(4)}
    path = file_of(
        tmp_path / "m.onnx", nodes, [("x", FLOAT, ["n", 4])], [("y", FLOAT, None)], known
    )
    model = paredown.capture(path)
    assert agrees(model, path, {"x": torch.randn(3, 4)})


def test_a_batch_that_the_file_mixes_stays_as_it_is(tmp_path):
    nodes = [
        helper.make_node("Reshape", ["x", "s"], ["a"]),
        helper.make_node("Softmax", ["a"], ["y"]),
    ]
    path = file_of(
        tmp_path / "m.onnx",
        nodes,
        [("x", FLOAT, [1, 2, 3])],
        [("y", FLOAT, [1, 6])],
        {"s": np.array([1, -1])},
    )
    model = paredown.capture(path)
    assert 0 not in model.inputs[0].dynamic
    assert any("batch of 1" in note for note in model.notes)
    assert agrees(model, path, {"x": torch.randn(1, 2, 3)})


def test_what_is_written_is_captured_twice_alike(tmp_path):
    """A file that went through is the same model: names, values and outputs."""
    _, path = small_file(tmp_path / "model.onnx")
    one, two = paredown.capture(path), paredown.capture(path)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(one(x=x), two(x=x))
    assert list(one.state_dict()) == list(two.state_dict())


def test_an_example_must_fit_the_file(tmp_path):
    path = perceptron(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="lacks input 'x'"):
        paredown.capture(path, {"other": torch.zeros(1, 4)})
    with pytest.raises(UserError, match=r"has 2 inputs, and model\.onnx wants 1: x"):
        paredown.capture(path, (torch.zeros(1, 4), torch.zeros(1)))


def test_a_branch_reads_the_weights_around_it(tmp_path):
    """One branch has a layer by a weight that is turned there, and not elsewhere."""

    def branch(name, *nodes):
        told = helper.make_tensor_value_info(name, FLOAT, None)
        return helper.make_graph(list(nodes), name, [], [told])

    node = helper.make_node
    taken = branch("t", node("MatMul", ["x", "w"], ["t"]))
    other = branch("e", node("Neg", ["x"], ["e"]))
    nodes = [
        node("Shape", ["x"], ["s"], start=1, end=2),
        node("Equal", ["s", "four"], ["c"]),
        node("If", ["c"], ["a"], then_branch=taken, else_branch=other),
        node("ReduceSum", ["w"], ["b"]),
        node("Add", ["a", "b"], ["y"]),
    ]
    known = {"four": np.array([4]), "w": np.random.RandomState(0).randn(4, 4).astype(np.float32)}
    ends = [("x", FLOAT, ["n", 4])], [("y", FLOAT, None)]
    path = file_of(tmp_path / "m.onnx", nodes, *ends, known)
    model = paredown.capture(path)
    assert agrees(model, path, {"x": torch.randn(3, 4)})
