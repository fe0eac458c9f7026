"""Parameters and buffers of a graph by their names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn


def getattr_or_none(graph: nn.Module, name: str) -> Any:
    found: Any = graph
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def set_parameter(graph: nn.Module, name: str, value: Tensor) -> None:
    """Put a trainable tensor at that name, in place of what stood there."""
    owner, leaf = owner_of(graph, name), name.rpartition(".")[2]
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    owner.register_parameter(leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))


def set_buffer(graph: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor that does not train at that name."""
    owner, leaf = owner_of(graph, name), name.rpartition(".")[2]
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    owner.register_buffer(leaf, value)


def remove_state(graph: fx.GraphModule, name: str) -> None:
    """Delete a parameter or buffer, unless an op still reads it."""
    if any(n.op == "get_attr" and n.target == name and n.users for n in graph.graph.nodes):
        return
    for node in [n for n in graph.graph.nodes if n.op == "get_attr" and n.target == name]:
        graph.graph.erase_node(node)
    owner, leaf = owner_of(graph, name), name.rpartition(".")[2]
    if hasattr(owner, leaf):
        delattr(owner, leaf)


def keep_state(source: nn.Module, target: nn.Module, persistent: set[str]) -> None:
    """Every parameter and buffer of ``source``, also those that no op uses."""
    for name, parameter in source.named_parameters(remove_duplicate=False):
        owner_of(target, name).register_parameter(name.rpartition(".")[2], parameter)
    constants = dict(target.named_buffers(remove_duplicate=False))  # that the graph alone knows
    for name, buffer in {**constants, **dict(source.named_buffers(remove_duplicate=False))}.items():
        owner = owner_of(target, name)
        owner.register_buffer(name.rpartition(".")[2], buffer, persistent=name in persistent)


def owner_of(target: nn.Module, name: str) -> nn.Module:
    """The submodule that holds the parameter ``name``, made where it does not exist."""
    owner = target
    for part in name.split(".")[:-1]:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    return owner


def order_parameters(target: nn.Module, names: Iterable[str]) -> None:
    """Let parameters stand in this order, that of a walk through the modules; a graph is built with
    them in the order of its ops."""
    for name in names:
        owner, parts = target, name.split(".")
        for part in parts[:-1]:
            owner._modules[part] = owner._modules.pop(part)
            owner = getattr(owner, part)
        if parts[-1] in owner._parameters:
            owner._parameters[parts[-1]] = owner._parameters.pop(parts[-1])


def tensor_of(graph: fx.GraphModule, name: str) -> Tensor:
    """The parameter or buffer of that name."""
    found: Any = graph
    for part in name.split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found


def taken(tensor: Tensor, keep: dict[int, Tensor]) -> Tensor:
    """The tensor with only these indices of each dimension named."""
    for dim, indices in keep.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.contiguous()
