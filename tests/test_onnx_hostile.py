"""Files that are damaged, or hold what cannot be taken: one sentence, and no traceback."""

import os
import random

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import paredown
from paredown.core.errors import UserError
from paredown.graph.doors.onnx.door import open_onnx

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

FLOAT = TensorProto.FLOAT
node = helper.make_node
value = helper.make_tensor_value_info


def saved(path, nodes, known=None, inputs=None, outputs=None, opset=17, change=None):
    """A file of these nodes, from x (2, 4) to y unless told, as it is: nothing is checked."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("x", FLOAT, [2, 4])] if inputs is None else inputs,
        [value("y", FLOAT, None)] if outputs is None else outputs,
        [numpy_helper.from_array(array, name) for name, array in (known or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    if change is not None:
        change(model)
    path.write_bytes(model.SerializeToString())
    return path


def refused(path, *words):
    """The sentence with which a file is refused, which has these words."""
    with pytest.raises(UserError) as caught:
        paredown.capture(path)
    told = str(caught.value)
    assert "\n" not in told
    for word in words:
        assert word in told, told
    return told


WEIGHT = {"w": np.ones((4, 3), np.float32)}
PRODUCT = [node("MatMul", ["x", "w"], ["y"])]


def test_the_plain_one_is_taken(tmp_path):
    model = paredown.capture(saved(tmp_path / "m.onnx", PRODUCT, WEIGHT))
    assert model(x=torch.ones(2, 4)).tolist() == [[4.0] * 3] * 2


def test_what_is_no_onnx_file(tmp_path):
    path = tmp_path / "m.onnx"
    for data in (b"", b"not an ONNX file at all", os.urandom(500), b"\x80" * 40):
        path.write_bytes(data)
        refused(path, "m.onnx")
    refused(tmp_path / "none.onnx", "no such file")


def test_a_file_that_is_cut_off_anywhere(tmp_path):
    whole = saved(tmp_path / "whole.onnx", PRODUCT, WEIGHT).read_bytes()
    path = tmp_path / "m.onnx"
    for end in range(1, len(whole) - 1, 7):
        path.write_bytes(whole[:end])
        try:
            paredown.capture(path)
        except UserError:
            continue


def test_bytes_that_are_others(tmp_path):
    whole = saved(tmp_path / "whole.onnx", PRODUCT, WEIGHT).read_bytes()
    chance = random.Random(0)
    path = tmp_path / "m.onnx"
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            open_onnx(path)
        except UserError:
            continue


def external(model, location, offset=0, length=48):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, told in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(told))


@pytest.mark.parametrize(
    "location, words",
    [("none.data", "missing"), ("../w.data", "another folder"), ("/etc/passwd", "another folder")],
)
def test_external_data_that_are_not_beside_it(tmp_path, location, words):
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "w.data").write_bytes(bytes(48))
    change = lambda model: external(model, location)  # noqa: E731
    refused(saved(folder / "m.onnx", PRODUCT, WEIGHT, change=change), words)


def test_external_data_of_another_length(tmp_path):
    (tmp_path / "w.data").write_bytes(bytes(40))
    path = saved(tmp_path / "m.onnx", PRODUCT, WEIGHT, change=lambda m: external(m, "w.data"))
    refused(path, "has 40")
    (tmp_path / "w.data").write_bytes(bytes(400))
    change = lambda model: external(model, "w.data", 0, 400)  # noqa: E731
    refused(saved(tmp_path / "m.onnx", PRODUCT, WEIGHT, change=change), "takes 48 bytes")


def test_an_opset_that_is_too_new(tmp_path):
    path = saved(tmp_path / "m.onnx", PRODUCT, WEIGHT, opset=999)
    refused(path, "opset 999", str(onnx.defs.onnx_opset_version()))


def test_a_circle(tmp_path):
    nodes = [node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Neg", ["b"], ["y"])]
    refused(saved(tmp_path / "m.onnx", nodes), "depends on itself", "circle")


def test_names_that_are_there_twice(tmp_path):
    nodes = [node("Relu", ["x"], ["a"]), node("Neg", ["x"], ["a"]), node("Exp", ["a"], ["y"])]
    refused(saved(tmp_path / "m.onnx", nodes), "'a'", "twice")

    def twice(model):
        model.graph.initializer.append(model.graph.initializer[0])

    refused(saved(tmp_path / "m.onnx", PRODUCT, WEIGHT, change=twice), "two tensors")


def test_nodes_out_of_order_are_put_in_order(tmp_path):
    nodes = [node("Neg", ["a"], ["y"]), node("Relu", ["x"], ["a"])]
    model = paredown.capture(saved(tmp_path / "m.onnx", nodes))
    assert model(x=torch.tensor([[-1.0, 2.0] * 2] * 2)).tolist() == [[0.0, -2.0] * 2] * 2


def test_what_nothing_gives(tmp_path):
    refused(saved(tmp_path / "m.onnx", [node("Add", ["x", "z"], ["y"])]), "'z'", "nothing gives")
    refused(saved(tmp_path / "m.onnx", [node("Relu", ["x"], ["a"])]), "'y'", "no node")


def test_no_nodes_and_no_inputs(tmp_path):
    refused(saved(tmp_path / "m.onnx", [], outputs=[value("x", FLOAT, [2, 4])]), "no nodes")
    nodes = [node("Relu", ["w"], ["y"])]
    refused(saved(tmp_path / "m.onnx", nodes, WEIGHT, inputs=[]), "no inputs")
    refused(saved(tmp_path / "m.onnx", nodes, WEIGHT), "depend on no input")


def test_shapes_that_lie(tmp_path):
    def longer(model):
        model.graph.initializer[0].dims[0] = 5

    refused(saved(tmp_path / "m.onnx", PRODUCT, WEIGHT, change=longer), "takes 60 bytes", "has 48")

    def vast(model):
        model.graph.initializer[0].dims[0] = 1 << 50

    refused(saved(tmp_path / "m.onnx", PRODUCT, WEIGHT, change=vast), "no shape")
    path = saved(tmp_path / "m.onnx", PRODUCT, WEIGHT, inputs=[value("x", FLOAT, [2, 7])])
    refused(path, "cannot be multiplied", "at none of the sizes")


def test_sizes_that_no_memory_has(tmp_path):
    vast = [value("x", FLOAT, [1 << 20, 1 << 20])]
    refused(saved(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], inputs=vast), "no example")
    nodes = [node("ConstantOfShape", ["s"], ["a"]), node("Add", ["x", "a"], ["y"])]
    shape = {"s": np.array([1 << 20, 1 << 20])}
    refused(saved(tmp_path / "m.onnx", nodes, shape), "ConstantOfShape", "no size")


def test_types_that_no_net_has(tmp_path):
    def unknown(model):
        model.graph.initializer[0].data_type = 77

    refused(saved(tmp_path / "m.onnx", PRODUCT, WEIGHT, change=unknown), "type 77")
    text = [value("x", TensorProto.STRING, [2])]
    refused(saved(tmp_path / "m.onnx", [node("Identity", ["x"], ["y"])], inputs=text), "STRING")
    many = [helper.make_tensor_sequence_value_info("x", FLOAT, None)]
    nodes = [node("ConcatFromSequence", ["x"], ["y"], axis=0)]
    refused(saved(tmp_path / "m.onnx", nodes, inputs=many), "sequence")


def test_weights_that_are_inputs_too_are_weights(tmp_path):
    inputs = [value("x", FLOAT, [2, 4]), value("w", FLOAT, [4, 3])]
    model = paredown.capture(saved(tmp_path / "m.onnx", PRODUCT, WEIGHT, inputs=inputs))
    assert [item.name for item in model.inputs] == ["x"]
    assert any("'w'" in note and "no inputs" in note for note in model.notes)


def test_an_input_that_is_never_used_stays(tmp_path):
    inputs = [value("x", FLOAT, [2, 4]), value("idle", FLOAT, [2, 1])]
    model = paredown.capture(saved(tmp_path / "m.onnx", PRODUCT, WEIGHT, inputs=inputs))
    assert [item.name for item in model.inputs] == ["x", "idle"]


def body():
    return helper.make_graph(
        [node("Identity", ["go"], ["go_on"]), node("Relu", ["a"], ["b"])],
        "body",
        [
            value("n", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("a", FLOAT, None),
        ],
        [value("go_on", TensorProto.BOOL, []), value("b", FLOAT, None)],
    )


@pytest.mark.parametrize(
    "nodes, words",
    [
        (
            [node("Loop", ["m", "", "x"], ["y"], body=body(), name="L")],
            ("'L' (Loop)", "control flow"),
        ),
        (
            [node("Foo", ["x"], ["y"], domain="com.acme", name="F")],
            ("'F' (com.acme.Foo)", "domain"),
        ),
        ([node("NonZero", ["x"], ["y"])], ("(NonZero)", "size depends on the data")),
        ([node("RandomNormalLike", ["x"], ["y"])], ("(RandomNormalLike)", "random")),
        ([node("SequenceConstruct", ["x"], ["y"])], ("(SequenceConstruct)", "sequences")),
        (
            [node("Cast", ["x"], ["s"], to=7), node("Reshape", ["x", "s"], ["y"])],
            ("computed from the data",),
        ),
        ([node("BatchNormalization", ["x", *"vvvv"], ["y"], training_mode=1)], ("training mode",)),
        ([node("Relu", ["x"], ["y"], strange=3)], ("strange=3",)),
        ([node("GRU", ["t", "g", "r"], ["y"], hidden_size=2)], ("(GRU)", "linear_before_reset")),
    ],
)
def test_what_cannot_be_taken_is_told_by_node(tmp_path, nodes, words):
    known = {
        **{"m": np.array(3), "v": np.ones(4, np.float32), "t": np.ones((1, 2, 4), np.float32)},
        **{"g": np.ones((1, 6, 4), np.float32), "r": np.ones((1, 6, 2), np.float32)},
    }
    told = refused(saved(tmp_path / "m.onnx", nodes, known), *words)
    assert "usually helps" in told or "captured" in told


def test_a_branch_on_data(tmp_path):
    def branch(name, op):
        return helper.make_graph([node(op, ["x"], [name])], name, [], [value(name, FLOAT, None)])

    nodes = [
        node("ReduceMax", ["x"], ["m"], keepdims=0),
        node("Greater", ["m", "zero"], ["c"]),
        node("If", ["c"], ["y"], then_branch=branch("t", "Relu"), else_branch=branch("e", "Neg")),
    ]
    known = {"zero": np.zeros((), np.float32)}
    refused(saved(tmp_path / "m.onnx", nodes, known), "(If)", "condition is computed from the data")


def test_weights_that_are_not_numbers(tmp_path):
    bad = {"w": np.full((4, 3), np.nan, np.float32)}
    refused(saved(tmp_path / "m.onnx", PRODUCT, bad), "NaN")
    mask = {"w": np.where(np.eye(4) > 0, 0, -np.inf).astype(np.float32)[:2]}
    path = saved(
        tmp_path / "m.onnx", [node("Add", ["x", "w"], ["a"]), node("Exp", ["a"], ["y"])], mask
    )
    model = paredown.capture(path)
    assert model(x=torch.zeros(2, 4)).tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]


def test_states_of_another_batch_are_told(tmp_path):
    """PyTorch's op would read beyond them, and end the process."""
    rng = np.random.default_rng(0)
    known = {"W": rng.normal(size=(1, 16, 3)), "R": rng.normal(size=(1, 16, 4))}
    known = {name: array.astype(np.float32) for name, array in known.items()}
    states = [value(name, FLOAT, [1, "N", 4]) for name in ("h", "c")]
    layer = node("LSTM", ["x", "W", "R", "", "", "h", "c"], ["y"], name="rnn", hidden_size=4)
    inputs = [value("x", FLOAT, ["T", "B", 3]), *states]
    path = saved(tmp_path / "states.onnx", [layer], known, inputs)
    given = {"x": torch.randn(5, 2, 3), "h": torch.zeros(1, 9, 4), "c": torch.zeros(1, 9, 4)}
    with pytest.raises(UserError, match=r"rnn.*expected a tensor of \(1, 2, 4\), got \(1, 9, 4\)"):
        paredown.capture(path, given)
    given |= {"h": torch.zeros(1, 2, 4), "c": torch.zeros(1, 2, 4)}
    assert [each.name for each in paredown.capture(path, given).inputs] == ["x", "h", "c"]
