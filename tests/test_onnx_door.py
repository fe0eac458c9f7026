"""The door for ONNX files: what comes out is a model like any other."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import paredown

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


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
