"""Training and evaluation of a captured graph.

A graph is captured in training mode, so that it keeps its drop-path and dropout probabilities.
Evaluation rewrites the arguments that differ and keeps the training ones in the node's ``meta``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
KEY = "training_args"  # node.meta: {argument position or name, or "target": value in training}

# op -> (position of the argument, its name, its value in evaluation)
_SWITCHES: dict[Any, tuple[int, str, Any]] = {
    aten.batch_norm.default: (5, "training", False),
    aten.dropout.default: (2, "train", False),
    aten.dropout_.default: (2, "train", False),
    aten.feature_dropout.default: (2, "train", False),
    aten.feature_dropout_.default: (2, "train", False),
    aten.alpha_dropout.default: (2, "train", False),
    aten.alpha_dropout_.default: (2, "train", False),
    aten.feature_alpha_dropout.default: (2, "train", False),
    aten.native_dropout.default: (2, "train", False),
    aten.rrelu.default: (3, "training", False),
    aten.rrelu_.default: (3, "training", False),
    aten.scaled_dot_product_attention.default: (4, "dropout_p", 0.0),
    aten.lstm.input: (6, "train", False),
    aten.gru.input: (6, "train", False),
    aten.rnn_tanh.input: (6, "train", False),
    aten.rnn_relu.input: (6, "train", False),
}


def set_training(graph: fx.GraphModule, training: bool) -> None:
    """Switch a captured graph in place; its counters and random masks stop in evaluation."""
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            changed = [_switch(node, training) for node in module.graph.nodes]
            if any(changed):
                module.recompile()


def _switch(node: fx.Node, training: bool) -> bool:
    if training:
        return _restore(node)
    if node.op != "call_function" or KEY in node.meta:
        return False
    if node.target is aten.batch_norm.default and node.args[3] is None:
        return False  # it has no running statistics: the same in both modes
    if node.target in _SWITCHES:
        position, name, value = _SWITCHES[node.target]
        if name in node.kwargs or len(node.args) > position:
            return _replace(node, name if name in node.kwargs else position, value)
    if node.target is aten.instance_norm.default and node.args[3] is not None:
        return _replace(node, 5, False)  # running statistics exist: use them
    if node.target in (aten.bernoulli_.float, aten.bernoulli.p):
        node.args = (*node.args, 0.5)[:2]  # a probability of one half is the default and left out
        in_place = node.target is aten.bernoulli_.float
        return _retarget(node, aten.fill_.Scalar if in_place else aten.full_like.default)
    if node.target in (aten.floor_.default, aten.floor.default):
        return _keep_floored(node)
    if is_counter(node):
        return _replace(node, 1, 0)
    return False


def _keep_floored(node: fx.Node) -> bool:
    """Drop-path as ``floor(p + rand(shape))`` and a division by p: p itself keeps every path."""
    total = node.args[0]
    if not isinstance(total, fx.Node) or total.target not in (aten.add.Tensor, aten.add_.Tensor):
        return False
    drawn = [a for a in total.args[:2] if isinstance(a, fx.Node) and a.target is aten.rand.default]
    kept = [a for a in total.args[:2] if isinstance(a, (int, float))]
    if not drawn or not kept or len(drawn[0].users) > 1:
        return False
    return _retarget(drawn[0], aten.zeros.default) and _retarget(node, aten.clone.default)


def _retarget(node: fx.Node, target: Any) -> bool:
    """Another op on the same arguments: ``meta`` may name no node, since it is copied as it is."""
    node.meta[KEY] = {"target": node.target}
    node.target = target
    return True


def is_counter(node: fx.Node) -> bool:
    """Whether the op adds to a batch norm's count of batches."""
    if node.target is not aten.add_.Tensor:
        return False
    counter = node.args[0]
    while isinstance(counter, fx.Node) and counter.target is aten.add_.Tensor:
        counter = counter.args[0]  # a norm that runs twice counts twice
    return isinstance(counter, fx.Node) and str(counter.target).endswith("num_batches_tracked")


def _replace(node: fx.Node, where: int | str, value: Any) -> bool:
    if isinstance(where, str):
        node.meta[KEY] = {where: node.kwargs[where]}
        node.update_kwarg(where, value)
    else:
        node.meta[KEY] = {where: node.args[where]}
        node.update_arg(where, value)
    return True


def _restore(node: fx.Node) -> bool:
    kept = node.meta.pop(KEY, {})
    for where, value in kept.items():
        if where == "target":
            node.target = value
        elif isinstance(where, int):
            node.update_arg(where, value)
        else:
            node.update_kwarg(where, value)
    return bool(kept)
