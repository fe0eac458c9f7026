"""The quantized form in PyTorch's own ops: pairs of quantize and dequantize around integers.

ExecuTorch and LiteRT recognise the ops of ``quantized_decomposed``, which this module puts in the
place of the fake quantizers; the graph computes the same numbers, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.ao.quantization.fx import _decomposed as _defines_the_ops  # noqa: F401

from paredown.graph.edit import keep_meta
from paredown.graph.model import Model
from paredown.graph.quantized.per_channel import PER_CHANNEL
from paredown.graph.quantized.quantizers import DYNAMIC, PER_TENSOR
from paredown.graph.state import remove_state, set_buffer, tensor_of

ops = torch.ops.quantized_decomposed
QUANTIZE = ops.quantize_per_tensor.default
DEQUANTIZE = ops.dequantize_per_tensor.default
QUANTIZE_CHANNEL = ops.quantize_per_channel.default
DEQUANTIZE_CHANNEL = ops.dequantize_per_channel.default


def decompose(model: Model, fold_weights: bool = True) -> Model:
    """A copy of the model with quantize and dequantize ops in the place of the fake quantizers.

    Activations become int8: an unsigned byte and its zero point are both shifted by 128, which
    changes no value. Each op that reads a quantized value has a dequantize op of its own, so that
    the two can go to one kernel. Biases stay float, and so do values whose scale is found at each
    inference, which a runtime rounds by itself. Weights and tables that are rounded alone stay
    behind their quantizers: each runtime has a form of its own for them.

    Args:
        fold_weights: keep weights as int8 buffers ``NAME_quantized`` in place of the parameters,
            with a dequantize op behind them; else as float parameters with both ops behind them.

    Example:
        >>> import torch, paredown
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(16, 4), torch.zeros(16))
        >>> task = paredown.Task(example=(torch.zeros(1, 4),), score=None, calibration=data)
        >>> model = paredown.apply(torch.nn.Linear(4, 2), [paredown.Quantize("int8")], task)
        >>> made = decompose(model)
        >>> sorted(made.state_dict())
        ['bias', 'weight_quantized', 'weight_scale', 'weight_zero_point']
        >>> torch.equal(made(torch.ones(1, 4)), model(torch.ones(1, 4)))
        True
    """
    made = model.copy().eval()
    for node in list(made.graph.graph.nodes):
        if node.target is PER_TENSOR:
            _decompose_activation(node)
        elif node.target is DYNAMIC:  # its scale is not known here: the runtime finds it
            _replace(node, [], node.args[0])
        elif node.target is PER_CHANNEL:
            _decompose_weight(made.graph, node, fold_weights)
    _part_dequantizers(made.graph)
    made.graph.graph.lint()
    made.graph.recompile()
    return made


def _decompose_activation(node: fx.Node) -> None:
    arguments: Any = node.args
    source, scale, zero_point, low, high = arguments
    shift = 128 if high > 127 else 0
    rounded = float(np.float32(scale))  # as the fake quantizer's kernel does
    parameters = (rounded, zero_point - shift, low - shift, high - shift, torch.int8)
    _replace(node, [(QUANTIZE, parameters), (DEQUANTIZE, parameters)], source)


def _decompose_weight(graph: fx.GraphModule, node: fx.Node, fold: bool) -> None:
    source, scale, axis, low, high = node.args
    assert isinstance(source, fx.Node) and isinstance(scale, fx.Node)
    name = str(source.target)
    weight, scales = (tensor_of(graph, str(n.target)).detach() for n in (source, scale))
    zeros = torch.zeros(scales.shape, dtype=torch.int64, device=scales.device)
    rest: tuple[Any, ...] = (axis, low, high, torch.int8)
    parameters = (scale, _held(graph, node, f"{name}_zero_point", zeros), *rest)
    if fold:
        integers = QUANTIZE_CHANNEL(weight, scales, zeros, *rest)
        held = _held(graph, node, f"{name}_quantized", integers)
        _replace(node, [(DEQUANTIZE_CHANNEL, parameters)], held)
        remove_state(graph, name)
    else:
        both = [(QUANTIZE_CHANNEL, parameters), (DEQUANTIZE_CHANNEL, parameters)]
        _replace(node, both, source)


def _part_dequantizers(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.target in (DEQUANTIZE, DEQUANTIZE_CHANNEL):
            for user in list(node.users)[1:]:
                with graph.graph.inserting_before(user):
                    made = graph.graph.node_copy(node)
                user.replace_input_with(node, made)


def _held(graph: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """A buffer of that name, and the node that reads it."""
    set_buffer(graph, name, value)
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)


def _replace(node: fx.Node, chain: list[tuple[Any, tuple[Any, ...]]], value: Any) -> None:
    """Put a chain of ops, each ``(op, what follows the value)``, in the place of a node."""
    with node.graph.inserting_before(node):
        for op, arguments in chain:
            value = node.graph.call_function(op, (value, *arguments))
            keep_meta(value, node)
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
