"""ONNX files without what only people read, and what still finds its way in them."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.utils.data import TensorDataset

import paredown
from paredown.graph.quantized.quantizers import quantizers
from paredown.targets.formats.onnx import values, write
from paredown.targets.formats.onnx.file import File, without_numbers
from paredown.targets.formats.onnx.names import shortened
from paredown.targets.runtimes import onnxruntime


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first_layer, self.second_layer = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, image):
        x = self.second_layer(self.first_layer(image).relu()).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    images = torch.randn(16, 3, 12, 12)
    task = paredown.Task(
        example=(images[:1],), score=None, calibration=TensorDataset(images, torch.zeros(16))
    )
    net = paredown.capture(Net().eval(), task.example)
    return paredown.apply(net, [paredown.Quantize("int8")], task)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return onnxruntime.lower(model, tmp_path_factory.mktemp("short") / "net.onnx")


def test_a_small_file_is_a_third_smaller_and_runs_the_same(model, file):
    whole = bytes(write.encode(model))
    assert file.stat().st_size < 0.67 * len(whole)
    x = np.random.default_rng(0).normal(size=(1, 3, 12, 12)).astype(np.float32)
    outputs = [ort.InferenceSession(each).run(None, {"image": x}) for each in (whole, str(file))]
    assert np.array_equal(outputs[0][0], outputs[1][0])


def test_a_file_is_looked_at_without_its_numbers(file):
    whole = onnx.load(str(file))
    for tensor in whole.graph.initializer:
        assert tensor.HasField("raw_data")
        tensor.ClearField("raw_data")
    assert without_numbers(file) == whole


def test_what_callers_and_readers_need_keeps_its_name(model, file):
    graph, whole = onnx.load(str(file)).graph, write.encode(model).proto.graph
    for kind in ("input", "output"):
        names = [[value.name for value in getattr(each, kind)] for each in (graph, whole)]
        assert names[0] == names[1]
    layers = [t.name for t in graph.initializer if len(t.dims) > 1]
    assert {name.split(".")[0] for name in layers} == {"first_layer", "second_layer", "head"}
    others = {name for node in graph.node for name in node.output} - {graph.output[0].name}
    others |= {t.name for t in graph.initializer if len(t.dims) < 2}
    assert max(map(len, others)) <= 2


def test_inner_values_are_found_by_the_graphs_names(model, file):
    names = {node.name for node in quantizers(model.graph)}
    example = [item.example for item in model.inputs]
    found = values.open_inside(model, file, names)(example)[1]
    assert len(found) >= 3
    assert values.worst_tensor(model, file)[0] > 30  # decibels


def test_what_is_not_fused_is_called_by_its_layer():
    nodes = [
        helper.make_node("DequantizeLinear", ["body.weight_quantized", "a"], ["b"]),
        helper.make_node("DequantizeLinear", ["x", "a"], ["c"]),
        helper.make_node("Conv", ["c", "b"], ["d"]),
        helper.make_node("QuantizeLinear", ["d", "a"], ["e"]),
    ]
    weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.int8), "body.weight_quantized")
    scale = numpy_helper.from_array(np.float32(1), "a")
    x, e = (helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, [1, 1, 4, 4]) for n in "xe")
    graph = helper.make_graph(nodes, "g", [x], [e], [weight, scale])
    names = {"body.weight_quantized", "a"}
    found = onnxruntime.unfused(list(graph.node), names, {"body.weight_quantized"})
    assert found == ["DequantizeLinear body.weight_quantized", "Conv body.weight"]


def test_graphs_inside_nodes_read_the_same_values():
    """And what is held twice is held once, also for them."""
    twice = [numpy_helper.from_array(np.arange(64, dtype=np.float32), n) for n in ("one", "other")]
    branches = [
        helper.make_graph(
            [helper.make_node(op, ["doubled_input", held], ["inner_result"])],
            "branch",
            [],
            [helper.make_tensor_value_info("inner_result", 1, [64])],
        )
        for op, held in (("Add", "one"), ("Sub", "other"))
    ]
    nodes = [
        helper.make_node("Add", ["x", "x"], ["doubled_input"]),
        helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    x, y = (helper.make_tensor_value_info(n, 1, [64]) for n in "xy")
    c = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    graph = helper.make_graph(nodes, "a graph", [x, c], [y], twice)
    whole = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    short = bytes(shortened(File.read(whole)))
    onnx.checker.check_model(short)
    assert len(onnx.load_from_string(short).graph.initializer) == 1
    assert len(short) < len(whole) - 256 and bytes(shortened(File.read(short))) == short
    for condition in (True, False):
        feeds = {"x": np.ones(64, np.float32), "c": np.array(condition)}
        made = [ort.InferenceSession(each).run(None, feeds)[0] for each in (whole, short)]
        assert np.array_equal(*made)
