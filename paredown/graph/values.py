"""The shape and dtype of every op's result, found without computing where that is possible."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from paredown.core.errors import UserError
from paredown.graph.interpret import Pass
from paredown.graph.model import Model

META = torch.device("meta")


def has_values(model: Model) -> bool:
    """Whether every op knows its result's shape, in sizes that stand for a number."""
    nodes = [n for n in model.graph.graph.nodes if n.op == "call_function"]
    return all("val" in n.meta and _known(n.meta["val"]) for n in nodes)


def _known(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_known, value))
    sizes = value.shape if isinstance(value, Tensor) else ()
    return all(isinstance(s, int) or s.node.hint is not None for s in sizes)


def values_of(model: Model) -> dict[str, Any]:
    """Node name -> its value, tensors on the meta device; nothing of the model is changed.

    A run on the meta device takes no arithmetic; where the data decides a shape it does not
    work, and the model is run on its example.
    """
    leaves = [wide(item.example, 0 in item.dynamic) for item in model.inputs]
    try:
        return _found(model.graph, [leaf.to(META) for leaf in leaves], META)
    except Exception:  # a kernel without a meta form, a shape that depends on the data
        return _found(model.copy().graph, leaves, None)


def _found(
    graph: fx.GraphModule, leaves: list[Tensor], device: torch.device | None
) -> dict[str, Any]:
    """Node name -> what it gives where all runs on this device, or where it is."""
    found: dict[str, Any] = {}

    def rule(run: Pass, node: fx.Node) -> Any:
        value = _on(device, run, node) if device else run.compute(node)
        found[node.name] = tree_map(lambda v: v.to(META) if isinstance(v, Tensor) else v, value)
        return value

    Pass(graph, rule).outputs(leaves)
    return found


def _on(device: torch.device, run: Pass, node: fx.Node) -> Any:
    """What the node gives on another device."""
    args, kwargs = run.arguments(node)
    if node.op == "get_attr":
        value = run.compute(node)
        return value.to(device) if isinstance(value, Tensor) else value
    if node.op != "call_function":
        return run.compute(node)
    if node.target is torch.ops.aten.batch_norm.default:
        return torch.empty_like(args[0])  # its meta form takes most of the time
    moved = tree_map(lambda v: device if isinstance(v, torch.device) else v, (args, kwargs))
    return run.compute(node, moved)


def give_values(made: Model) -> None:
    """Give every op its new shape; where the data decides one, by running the model."""
    try:
        try:
            refresh_values(made)
        except Exception:  # fake tensors cannot tell; if the graph is wrong, running it says so
            _set_values(made)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the edited graph does not run: {reason}") from error


def wide(example: Tensor, dynamic: bool) -> Tensor:
    """Two of an example whose batch varies: a size of 1 would be taken for a fixed one."""
    return torch.cat([example, example]) if dynamic and example.shape[0] == 1 else example


def refresh_values(model: Model) -> None:
    """Give every node its ``meta["val"]`` again: shape and dtype, from a run on fake tensors.

    Where the data decides a shape, as in ``h[h < 0]``, it is that of the example.
    """
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    leaves = [wide(item.example, 0 in item.dynamic) for item in model.inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            FakeTensorProp(model.graph, fake).propagate(*leaves)
        except DynamicOutputShapeException:
            _set_values(model)


def _set_values(model: Model) -> None:
    """Give every node its value on the meta device."""
    values = values_of(model)
    for node in model.graph.graph.nodes:
        node.meta["val"] = values.get(node.name)
