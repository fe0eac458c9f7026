"""Float16 in an ONNX file, so that ONNX Runtime's own rewrites survive it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from paredown.targets.formats.onnx.edit import attribute, insert

MOVERS = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"})


def widen_transposes(graph: ir.Graph) -> None:
    """Transposes of float16 that move the first axis, on their way to a product, are of float32.

    Where there is no float16 kernel, ONNX Runtime puts a cast between such a transpose and the
    product, and its MatmulTransposeFusion (up to 1.31) then crashes as the session opens. The
    product is in float32 there anyway, and float32 holds each of the values.
    """
    found = [node for each in graph if each.op_type == "MatMul" for node in _behind(each)]
    for node in dict.fromkeys(found):
        source, moved = node.inputs[0], node.outputs[0]
        if moved.dtype != ir.DataType.FLOAT16 or attribute(node, "perm")[0] == 0:
            continue
        wide = insert(graph, node, ir.node("Cast", [source], {"to": ir.DataType.FLOAT}))
        turned = insert(
            graph, node, ir.node("Transpose", [wide], {"perm": attribute(node, "perm")})
        )
        back = ir.node("Cast", [turned], {"to": ir.DataType.FLOAT16})
        replaced = insert(graph, node, back)
        moved.replace_all_uses_with(replaced)
        graph.remove(node, safe=True)


def _behind(product: ir.Node) -> Iterator[ir.Node]:
    """The transposes that a product reads, with nothing between but what moves values."""
    waiting = [value.producer() for value in product.inputs if value is not None]
    while waiting:
        node = waiting.pop()
        if node is None or node.op_type not in MOVERS:
            continue
        if node.op_type == "Transpose" and not node.outputs[0].is_graph_output():
            yield node
        waiting.append(node.inputs[0].producer() if node.inputs[0] is not None else None)
