"""Convolutions along a length, for ExecuTorch, where the length varies besides the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from paredown.graph.model import Model
from paredown.graph.quantized.decomposed import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE
from paredown.graph.state import remove_state, tensor_of
from paredown.targets.formats.executorch.integers import quantized_result
from paredown.targets.formats.rowwise import add_before, args_of, hold_before, replace_by, shape_of

aten = torch.ops.aten


def widen_convolutions(made: Model) -> None:
    """A convolution along a length becomes one over an image one pixel high.

    XNNPACK's own pass makes it one pixel wide inside the part that it runs, where it takes but one
    size that varies. Here the reshapes stand outside, as XNNPACK takes none in the middle, and a
    batch and a length may vary.
    """
    if len({name for item in made.inputs for name in item.dynamic.values()}) < 2:
        return
    replaced = set()
    for node in [node for node in made.graph.graph.nodes if node.target in _ALONG_A_LENGTH]:
        weight = args_of(node)[1]
        if len(shape_of(node)) == 3 and _stored(weight).op == "get_attr":
            _widen_convolution(made.graph, node, weight)
            replaced.add(str(_stored(weight).target))
    made.graph.graph.eliminate_dead_code()
    for name in replaced:
        remove_state(made.graph, name)
    made.graph.graph.lint()
    made.graph.recompile()


# op -> where its stride, paddings and dilation stand, and what one more dimension needs
_SIZES = ((3, 1), (4, 0), (5, 1))
_TRANSPOSED_SIZES = ((3, 1), (4, 0), (5, 0), (7, 1))
_ALONG_A_LENGTH: dict[Any, tuple[Any, tuple[tuple[int, int], ...]]] = {
    aten.conv1d.default: (aten.conv2d.default, _SIZES),
    aten.conv1d.padding: (aten.conv2d.padding, (_SIZES[0], _SIZES[2])),
    aten.conv_transpose1d.default: (aten.conv_transpose2d.input, _TRANSPOSED_SIZES),
}


def _stored(weight: fx.Node) -> fx.Node:
    """The parameter or buffer behind a weight, which may be integers."""
    return args_of(weight)[0] if weight.target is DEQUANTIZE_CHANNEL else weight


def _widen_convolution(graph: fx.GraphModule, node: fx.Node, weight: fx.Node) -> None:
    op, sizes = _ALONG_A_LENGTH[node.target]
    stored = _stored(weight)
    values = tensor_of(graph, str(stored.target)).detach().unsqueeze(2)  # (O, I, 1, K)
    held = hold_before(graph, node, f"{stored.target}_widened", values)
    if weight is not stored:
        held = add_before(node, weight.target, held, *args_of(weight)[1:])
    x = args_of(node)[0]
    wide = add_before(node, aten.unsqueeze.default, x, 2)
    if x.target is DEQUANTIZE:
        wide = _round_again(node, wide, x)
    args = list(args_of(node))
    args[:2] = wide, held
    for place, more in sizes:
        if place < len(args):
            given = args[place]
            args[place] = [more, *(given if isinstance(given, (list, tuple)) else [given])]
    made = add_before(node, op, *args)
    result = quantized_result(node)
    if result is None:
        return replace_by(node, add_before(node, aten.squeeze.dim, made, 2))
    follower: Any = result.args[0]  # the convolution, or its activation
    if follower is not node:
        made = add_before(result, follower.target, made, *follower.args[1:])
    made = add_before(result, aten.squeeze.dim, _round_again(result, made, result), 2)
    result.update_arg(0, made)
    for each in dict.fromkeys((follower, node)):
        graph.graph.erase_node(each)


def _round_again(before: fx.Node, value: fx.Node, grid: fx.Node) -> fx.Node:
    """A value that is on a grid already, so that kernels on both sides find integers there."""
    parameters = grid.args[1:]
    integers = add_before(before, QUANTIZE, value, *parameters)
    return add_before(before, DEQUANTIZE, integers, *parameters)
