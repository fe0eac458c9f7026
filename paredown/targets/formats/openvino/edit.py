"""Rewrites of a graph of OpenVINO's ops, in place, so that its CPU kernels take the integers."""

from __future__ import annotations

from typing import Any

import numpy as np

NOTHING = 1e-30  # of a bias: zeros, or numbers that are all alike, would be merged elsewhere
SMALL_BYTES = 2**20  # of a constant that is written out again for another reader


def rewrite(graph: Any) -> None:
    """Everything that is done to a graph before it is written; what it computes stays the same."""
    drop_repeated_quantizers(graph)
    give_each_its_own_constants(graph)
    fold_scales(graph)
    add_biases(graph)
    pack_nibbles(graph)
    graph.validate_nodes_and_infer_types()


def kind(op: Any) -> str:
    name: str = op.get_type_name()
    return name


def source(op: Any, position: int) -> Any:
    """The op that gives an input."""
    return op.input(position).get_source_output().get_node()


def sources(op: Any) -> list[Any]:
    return [value.get_source_output().get_node() for value in op.inputs()]


def drop_repeated_quantizers(graph: Any) -> None:
    """A FakeQuantize on values of the same grid changes nothing."""
    for op in graph.get_ordered_ops():
        if kind(op) == "FakeQuantize" and kind(source(op, 0)) == "FakeQuantize":
            bounds = [
                [each.get_data().tolist() for each in sources(one)[1:]]
                for one in (op, source(op, 0))
            ]
            if bounds[0] == bounds[1]:
                op.output(0).replace(op.input(0).get_source_output())


def give_each_its_own_constants(graph: Any) -> None:
    """A bias or a weight that two ops share is given to each anew: a kernel takes in neither a
    shared bias nor a shared dequantize op. The file still holds the bytes once."""
    from openvino import opset13

    for op in graph.get_ordered_ops():
        for value in op.inputs()[:2]:
            made = value.get_source_output().get_node()
            if not _shared(made):
                continue
            if kind(op) in ("Add", "Multiply", "Subtract") and kind(made) == "Constant":
                if 4 < made.get_byte_size() <= SMALL_BYTES:
                    value.replace_source_output(opset13.constant(made.get_data()).output(0))
            elif kind(made) == "Multiply" and kind(source(made, 0)) == "Convert":
                inner = source(source(made, 0), 0)
                if kind(inner) == "Constant":
                    again = opset13.convert(inner, "f32")
                    value.replace_source_output(opset13.multiply(again, source(made, 1)).output(0))


def _shared(op: Any) -> bool:
    return sum(len(value.get_target_inputs()) for value in op.outputs()) > 1


def fold_scales(graph: Any) -> None:
    """What multiplies each output channel of a product with integer weights goes into the scales of
    these weights; OpenVINO would multiply the weights themselves, and lose the integers."""
    from openvino import opset13

    for op in graph.get_ordered_ops():
        if kind(op) != "Multiply" or kind(source(op, 1)) != "Constant":
            continue
        product = source(op, 0)
        if kind(product) != "MatMul" or _shared(product) or not _has_integer_weights(product):
            continue
        factor, weight = source(op, 1).get_data(), source(product, 1)
        scale = source(weight, 1).get_data()
        turned = product.get_attributes()["transpose_b"]
        channels = weight.get_output_shape(0)[0 if turned else 1]
        if factor.size not in (1, channels) or factor.shape[-1:] not in ((1,), (channels,)):
            continue
        along = factor.reshape(-1, 1) if turned else factor.reshape(1, -1)
        held = opset13.constant((scale * along).astype(np.float32))
        weight.input(1).replace_source_output(held.output(0))
        op.output(0).replace(product.output(0))


def add_biases(graph: Any) -> None:
    """A product with integer weights and an integer result gets a bias that adds nothing.

    Without one, OpenVINO 2026.4's kernel for shapes that are fixed adds what its memory holds by
    chance.
    """
    from openvino import opset13

    for op in graph.get_ordered_ops():
        if kind(op) != "MatMul" or not _has_integer_weights(op) or _shared(op):
            continue
        [reader] = [value.get_node() for value in op.output(0).get_target_inputs()]
        if kind(reader) == "FakeQuantize":
            channels = source(op, 1).get_output_shape(0)
            count = channels[0 if op.get_attributes()["transpose_b"] else 1]
            nothing = NOTHING * np.arange(1, count + 1, dtype=np.float32)[None]
            made = opset13.add(op, opset13.constant(nothing))
            for value in op.output(0).get_target_inputs():
                if value.get_node() != made:
                    value.replace_source_output(made.output(0))


def pack_nibbles(graph: Any) -> None:
    """Bytes that fit 4 bits are stored in 4; they are bytes again once a model is loaded."""
    import openvino
    from openvino import opset13

    for op in graph.get_ordered_ops():
        if kind(op) != "Constant" or op.get_element_type().get_type_name() != "i8":
            continue
        data = op.get_data()
        if data.size < 2 or data.min() < -8 or data.max() > 7:
            continue
        packed = opset13.constant(data, openvino.Type.i4)
        for value in op.output(0).get_target_inputs():
            value.replace_source_output(opset13.convert(packed, "i8").output(0))


def _has_integer_weights(op: Any) -> bool:
    weight = source(op, 1)
    if kind(weight) != "Multiply" or kind(source(weight, 1)) != "Constant":
        return False
    return kind(source(weight, 0)) == "Convert" and len(weight.get_output_shape(0)) == 2
