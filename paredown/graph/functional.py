"""A captured graph in functional form: no op changes a tensor in place, no region stands apart."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

from paredown.graph.edit import copy_ops, hand_over, is_unpacked
from paredown.graph.memory import aliases, marked, users_after

aten = torch.ops.aten
REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
MUTATED = "mutated"  # node.meta of an op that stands for one that changed its first argument
PLAIN = ("placeholder", "call_function", "output")


class Untraceable(Exception):
    """The graph, or one of its ops, cannot be taken as it stands."""


def make_functional(source: fx.GraphModule) -> None:
    """Change a graph, in place, to one of the same values for export, which needs no gradients.

    Raises:
        Untraceable: an op changes what another op may see too, or a region cannot be taken in.
    """
    _inline_regions(source)
    _replace_mutations(source)
    for node in source.graph.nodes:
        if isinstance(node.target, OpOverload):
            _drop_defaults(node)


def _inline_regions(source: fx.GraphModule) -> None:
    """Regions without gradients become part of the graph, which is exported without them."""
    for node in list(source.graph.nodes):
        if node.target is REGION:
            _, inner, *arguments = node.args
            region = getattr(source, inner.target).graph
            if not is_unpacked(node) or any(each.op not in PLAIN for each in region.nodes):
                raise Untraceable
            with source.graph.inserting_before(node):
                made = copy_ops(source.graph, region, arguments)
            hand_over(node, made)
            if not inner.users:
                source.graph.erase_node(inner)
    used = {str(node.target) for node in source.graph.nodes if node.op == "get_attr"}
    for name, child in list(source.named_children()):
        if isinstance(child, fx.GraphModule):
            if name in used:
                raise Untraceable
            delattr(source, name)


def _replace_mutations(source: fx.GraphModule) -> None:
    """Ops that change a tensor in place become those that make a new one."""
    for node in list(source.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            source.graph.erase_node(node)
        elif isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            changed = _check_unseen(node)
            node.target = _functional(node.target)
            for user in [user for user in changed.users if node < user]:
                user.replace_input_with(changed, node)
            node.meta[MUTATED] = True


def _functional(op: OpOverload) -> OpOverload:
    packet, _, overload = str(op).removeprefix(f"{op.namespace}.").partition(".")
    named = getattr(getattr(torch.ops, op.namespace), packet.removesuffix("_"), None)
    if not packet.endswith("_") or named is None or overload not in named.overloads():
        raise Untraceable
    return getattr(named, overload)  # type: ignore[no-any-return]


def _check_unseen(node: fx.Node) -> fx.Node:
    """What an op changes: made by the graph, and read by nothing later under another name."""
    written = marked(node, True)
    if len(written) != 1 or written[0] is not node.args[0]:
        raise Untraceable
    shared = {value for value in aliases(written[0], without=node) if value < node}
    if any(value.op != "call_function" for value in shared):
        raise Untraceable
    if any(users_after(shared - {written[0]}, node)):
        raise Untraceable
    return written[0]


def _drop_defaults(node: fx.Node) -> None:
    """Leave out the last arguments where they are the defaults, as tracing does."""
    kinds = node.target._schema.arguments  # type: ignore[union-attr]
    args = list(node.args)
    while args and _is_default(kinds[len(args) - 1], args[-1]):
        args.pop()
    node.args = tuple(args)


def _is_default(kind: torch.Argument, value: object) -> bool:
    if not kind.has_default_value():
        return False
    default = kind.default_value
    return default is value or (type(default) is type(value) and bool(default == value))


def is_composite(op: OpOverload) -> bool:
    """Whether an op is defined by other ops alone."""
    return op.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd)
