"""A graph as JSON; ops are looked up among ATen's by name, and never imported."""

from __future__ import annotations

import keyword
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.core.errors import UserError
from paredown.graph import mode

NAMESPACES = ("aten", "prims", "paredown")
NODES = ("placeholder", "get_attr", "call_function", "output")  # no methods: they reach anything
_FUNCTIONS = {
    f"{f.__module__}.{f.__name__}": f
    for f in (
        *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv),
        *(operator.truediv, operator.mod, operator.neg, operator.pow, operator.eq, operator.ne),
        *(operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_),
        *(torch.sym_float, torch.sym_int, torch.sym_max, torch.sym_min, torch.sym_not),
        *(torch.sym_ite, torch.sym_sum),
    )
}
_ENUMS: dict[str, dict[str, Any]] = {
    "dtype": {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)},
    "layout": {str(v): v for v in (torch.strided, torch.sparse_coo)},
    "memory_format": {
        str(v): v
        for v in (
            *(torch.contiguous_format, torch.preserve_format),
            *(torch.channels_last, torch.channels_last_3d),
        )
    },
}


def graph_to_json(module: fx.GraphModule) -> dict[str, Any]:
    nodes = []
    for node in module.graph.nodes:
        row: dict[str, Any] = {"name": node.name, "op": node.op, "target": _target(node)}
        row["args"], row["kwargs"] = _to_json(node.args), _to_json(node.kwargs)
        if mode.KEY in node.meta:
            row["training"] = [
                [where, value.name() if where == "target" else _to_json(value)]
                for where, value in node.meta[mode.KEY].items()
            ]
        if node.op == "call_function":
            stack = node.meta.get("nn_module_stack") or {}
            row["modules"] = [[str(path), _class_name(kind)] for path, kind in stack.values()]
            row["line"] = node.meta.get("stack_trace")
        nodes.append(row)
    children = {
        name: graph_to_json(child)
        for name, child in module.named_children()
        if isinstance(child, fx.GraphModule)
    }
    return {"nodes": nodes, "graphs": children}


def _class_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _target(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.name()}:{node.target._overloadname}"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"higher_order:{node.target.name()}"
    name = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"
    if name not in _FUNCTIONS:
        raise UserError(f"model: cannot be saved: it calls {name}, which is not an ATen op.")
    return name


def _to_json(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_to_json(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": {key: _to_json(item) for key, item in value.items()}}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise UserError("model: cannot be saved: a symbolic size stands outside the graph.")
    for kind, members in _ENUMS.items():
        if str(value) in members:
            return {kind: str(value)}
    raise UserError(f"model: cannot be saved: an op takes a {type(value).__name__}.")


def graph_from_json(rows: dict[str, Any], root: nn.Module) -> fx.GraphModule:
    for name, child in rows["graphs"].items():
        root.add_module(name, graph_from_json(child, nn.Module()))
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for row in rows["nodes"]:
        args, kwargs = _from_json(row["args"], nodes), _from_json(row["kwargs"], nodes)
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise ValueError(f"the arguments of {row['name']!r} are damaged")
        target = _node_target(row["op"], row["target"], root)
        node = graph.create_node(row["op"], target, args, _keywords(kwargs), name=row["name"])
        if node.name != row["name"]:
            raise ValueError(f"no node can be called {row['name']!r} here")
        node.meta |= _meta(row)
        nodes[row["name"]] = node
    graph.lint()
    return fx.GraphModule(root, graph, class_name="Captured")


def _meta(row: dict[str, Any]) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    if row.get("modules"):
        meta["nn_module_stack"] = {path: (path, kind) for path, kind in row["modules"]}
    if row.get("line"):
        meta["stack_trace"] = row["line"]
    if "training" in row:
        kept = {
            where: _overload(value) if where == "target" else _from_json(value, {})
            for where, value in row["training"]
        }
        _keywords({where: value for where, value in kept.items() if not isinstance(where, int)})
        meta[mode.KEY] = kept
    return meta


def _node_target(op: str, target: Any, root: nn.Module) -> Any:
    """What a node calls or reads.

    ``fx`` writes a graph out as Python source and runs that, so that a name which is not what it
    seems would run too.
    """
    if op not in NODES or not isinstance(target, str):
        raise ValueError(f"a node {op!r} is not known")
    if op == "call_function":
        return _resolve(target)
    if op == "get_attr":
        plain = target.isprintable() and not set(target) & {'"', "\\"}
        if not plain or not isinstance(_attribute(root, target), (Tensor, fx.GraphModule)):
            raise ValueError(f"it reads {target!r}, which is none of its tensors")
    elif not _is_name(target):
        raise ValueError(f"{target!r} is not a name")
    return target


def _attribute(root: nn.Module, target: str) -> Any:
    found: Any = root
    for part in target.split("."):
        if not isinstance(found, nn.Module):
            raise ValueError(f"it reads {target!r}, which is none of its tensors")
        found = getattr(found, part)
    return found


def _keywords(found: dict[str, Any]) -> dict[str, Any]:
    for name in found:
        if not _is_name(name):
            raise ValueError(f"{name!r} is not the name of an argument")
    return found


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and text.isidentifier() and not keyword.iskeyword(text)


def _resolve(target: str) -> Any:
    if target in _FUNCTIONS:
        return _FUNCTIONS[target]
    if target.startswith("higher_order:"):
        return _higher_order(target.removeprefix("higher_order:"))
    return _overload(target.rpartition(":")[0])


def _overload(name: str) -> Any:
    """``aten::conv2d`` or ``aten::add.Tensor`` -> the op, from the allowed namespaces alone."""
    namespace, _, rest = name.partition("::")
    if namespace not in NAMESPACES:
        raise ValueError(f"op {name} is not one of {', '.join(NAMESPACES)}")
    operation, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), operation)
    op = getattr(packet, overload or "default")
    if not isinstance(op, torch._ops.OpOverload):
        raise ValueError(f"{name} is not an op")
    if any(argument.name == "filename" for argument in op._schema.arguments):
        raise ValueError(f"op {name} would touch files")
    return op


def _higher_order(name: str) -> Any:
    if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
        raise ValueError(f"higher-order op {name} is not known")
    return getattr(torch.ops.higher_order, name)


def _from_json(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return nodes[inner]
    if kind == "float":
        return float(inner)
    if kind == "device":
        return torch.device(inner)
    if kind in ("list", "tuple"):
        items = [_from_json(item, nodes) for item in inner]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {key: _from_json(item, nodes) for key, item in inner.items()}
    return _ENUMS[kind][inner]
