"""Regions of a captured graph: what stands in ``torch.no_grad()`` or ``torch.autocast``.

The exporter puts each into a graph of its own, into which no step looks. Here their ops become part
of the graph around them, which computes and trains as it did.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator

from paredown.core.errors import UserError
from paredown.graph.edit import copy_ops, is_unpacked

aten = torch.ops.aten
GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast
PLAIN = ("placeholder", "call_function", "output")


def inline_regions(graph: fx.GraphModule, casts: bool = False) -> bool:
    """Make regions part of the graph, in place; returns whether any was.

    Args:
        casts: also those in which autocast lowers the precision; they then compute in the precision
            of what comes in.
    """
    changed = False
    for node in list(graph.graph.nodes):
        if node.target in (GRADIENTS, AUTOCAST) and (casts or not _casts(node)):
            changed |= _inline(graph, node, casts)
    if changed:
        _drop_unused(graph)
        graph.recompile()
    return changed


def has_regions(graph: fx.GraphModule) -> bool:
    return any(node.target in (GRADIENTS, AUTOCAST) for node in graph.graph.nodes)


def refuse_graphs_apart(graph: fx.GraphModule) -> None:
    """Refuse ops that compute in graphs of their own and are no regions, such as ``torch.cond``.

    Raises:
        UserError: there is one; names the user's line.
    """
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            op = node.target
            if isinstance(op, HigherOrderOperator) and op not in (GRADIENTS, AUTOCAST):
                raise UserError(
                    f"model: {_line_of(node)}{op} computes in graphs of its own, which no step and "
                    "no file takes; compute both branches and choose by torch.where, or write a "
                    "loop of fixed length in Python."
                )


def _line_of(node: fx.Node) -> str:
    """``file.py:12 `code`: `` of the user's line that an op comes from, where it is known."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    found = [re.match(r'\s*File "([^<].*)", line (\d+)', line) for line in lines]
    own = [n for n, each in enumerate(found) if each and "site-packages" not in each[1]]
    match = found[own[-1]] if own else None
    if match is None:
        return ""
    code = "".join(lines[own[-1] + 1 : own[-1] + 2]).strip()
    return f"{Path(match[1]).name}:{match[2]} `{code}`: "


def _casts(node: fx.Node) -> bool:
    """Whether autocast may change a precision here: it is on, for a device that is in use."""
    if node.target is not AUTOCAST:
        return False
    device, _, enabled = node.args[:3]
    return bool(enabled) and device == "cpu"


def _inline(graph: fx.GraphModule, node: fx.Node, casts: bool) -> bool:
    place = 1 if node.target is GRADIENTS else 4
    inner: Any = node.args[place]
    region = getattr(graph, inner.target)
    inline_regions(region, casts)
    if not is_unpacked(node) or any(each.op not in PLAIN for each in region.graph.nodes):
        return False
    with graph.graph.inserting_before(node):
        results: Any = copy_ops(graph.graph, region.graph, node.args[place + 1 :])
        if node.target is GRADIENTS and node.args[0] is False:
            results = [_without_gradient(graph.graph, result) for result in results]
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)
    return True


def _without_gradient(graph: fx.Graph, result: Any) -> Any:
    """What a region without gradients gives: nothing behind it is trained through it."""
    value = result.meta.get("val") if isinstance(result, fx.Node) else None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return result
    made = graph.call_function(aten.detach.default, (result,))
    made.meta = {
        k: result.meta[k] for k in ("val", "nn_module_stack", "stack_trace") if k in result.meta
    }
    return made


def _drop_unused(graph: fx.GraphModule) -> None:
    """Leave out the graphs that nothing calls any more."""
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            if isinstance(getattr(graph, str(node.target), None), fx.GraphModule):
                graph.graph.erase_node(node)
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name, child in list(graph.named_children()):
        if isinstance(child, fx.GraphModule) and name not in used:
            delattr(graph, name)
