"""A model in one safetensors file: weights, and the graph as JSON in the header.

Nothing in such a file is executed: ops are looked up among ATen's by name, never imported.
"""

from __future__ import annotations

import io
import json
import keyword
import operator
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, fx, nn

from paredown.files import write_atomically
from paredown.graph import mode, packed, quantized, shared_store, structure  # noqa: F401  (two register ops)
from paredown.graph.model import Input, Model, keep_state, owner_of
from paredown.types import UserError

FORMAT = 1
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


def save(model: Model, path: Path) -> None:
    write_atomically(path, encode(model))


def encode(model: Model) -> bytes:
    """The file's bytes; the same model gives the same bytes."""
    tensors, ties = _untied(model.graph)
    header = {
        "format": FORMAT,
        "graph": _graph_to_json(model.graph),
        "inputs": [
            {"name": i.name, "dynamic": {str(d): n for d, n in i.dynamic.items()}}
            for i in model.inputs
        ],
        "arguments": model.arguments,
        "outputs": model.outputs,
        "notes": list(model.notes),
        "ties": ties,
        "parameters": [name for name, _ in model.graph.named_parameters(remove_duplicate=False)],
        "transient": sorted(_transient(model.graph)),
    }
    stored = {f"state:{name}": tensor for name, tensor in tensors.items()}
    stored |= {f"mask:{name}": mask for name, mask in model.masks.items()}
    for name, dims in model.kept.items():
        stored |= {f"kept:{dim}:{name}": indices for dim, indices in dims.items()}
    stored |= {f"example:{n}": item.example for n, item in enumerate(model.inputs)}
    if model.shared:  # each value once, in the place of the weights
        header["shared"], values = shared_store.stored(model)
        for name in header["shared"]:
            stored.pop(f"state:{ties.get(name, name)}")
        stored |= values
    contiguous = {k: stored[k].detach().cpu().contiguous().clone() for k in sorted(stored)}
    return to_bytes(contiguous, {"paredown": json.dumps(header)})


def _untied(graph: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and name -> the name that holds its tensor."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[int, str] = {}
    named = [
        *graph.named_parameters(remove_duplicate=False),
        *graph.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        if id(tensor) in seen:
            ties[name] = seen[id(tensor)]
        else:
            seen[id(tensor)] = name
            tensors[name] = tensor
    return tensors, ties


def _transient(graph: nn.Module) -> set[str]:
    kept = graph.state_dict()
    return {n for n, _ in graph.named_buffers(remove_duplicate=False) if n not in kept}


def _graph_to_json(module: fx.GraphModule) -> dict[str, Any]:
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
        name: _graph_to_json(child)
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


def load(path: Path) -> Model:
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return decode(data, str(path))


def decode(data: bytes, path: str) -> Model:
    """The model in the file's bytes.

    Raises:
        UserError: they are damaged, or not a paredown model.
    """
    try:
        header, tensors = _read(data)
        tied = shared_store.restored(header.get("shared", {}), header["ties"], tensors)
        _refuse_nan(tensors)
        graph = _module(header, tensors)
        examples = [tensors[f"example:{n}"] for n in range(len(header["inputs"]))]
        inputs = tuple(
            Input(item["name"], example, {int(d): n for d, n in item["dynamic"].items()})
            for item, example in zip(header["inputs"], examples, strict=True)
        )
        masks = {k.removeprefix("mask:"): v for k, v in tensors.items() if k.startswith("mask:")}
        arguments, outputs = header["arguments"], header["outputs"]
        notes, kept = tuple(header["notes"]), _kept(tensors)
        model = Model(graph, inputs, arguments, outputs, masks, kept, notes, tied)
        _check(model)
        return model
    except Exception as error:  # there is no end to what a damaged file can fail with
        raise UserError(f"{path}: not a paredown model, or a damaged one ({error}).") from error


def _kept(tensors: dict[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    found: dict[str, dict[int, Tensor]] = {}
    for key, indices in tensors.items():
        kind, _, rest = key.partition(":")
        if kind == "kept":
            dim, _, name = rest.partition(":")
            found.setdefault(name, {})[int(dim)] = indices
    return found


def _check(model: Model) -> None:
    """That the parts of a file belong together: else a later call would fail, far from here."""
    nodes = list(model.graph.graph.nodes)
    placeholders = sum(node.op == "placeholder" for node in nodes)
    if not placeholders == len(model.inputs) == structure.count(model.arguments):
        raise ValueError("its inputs are not those of its graph")
    if [node.op for node in nodes].count("output") != 1 or nodes[-1].op != "output":
        raise ValueError("its graph has no output, or goes on after it")
    results: Any = nodes[-1].args[0]
    if not isinstance(results, tuple) or len(results) != structure.count(model.outputs):
        raise ValueError("its outputs are not those of its graph")
    if not isinstance(model.arguments["tuple"][1]["dict"], dict):
        raise ValueError("its inputs have no keywords")
    for item in model.inputs:
        names = [item.name, *item.dynamic.values()]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a name of its inputs is no text")
        if any(not 0 <= dim < item.example.dim() for dim in item.dynamic):
            raise ValueError(f"input {item.name!r} has no such dynamic dimension")
    if not all(isinstance(note, str) for note in model.notes):
        raise ValueError("a note of it is no text")
    state = model.state_dict()
    for name, mask in model.masks.items():
        if mask.dtype is not torch.bool or (name in state and state[name].shape != mask.shape):
            raise ValueError(f"the mask of {name!r} does not fit its weight")
    for name, dims in model.kept.items():
        for dim, indices in dims.items():
            whole = indices.dtype is torch.int64 and indices.dim() == 1 and dim >= 0
            if not whole or (name in state and state[name].shape[dim] != len(indices)):
                raise ValueError(f"what is kept of {name!r} does not fit it")


def _read(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    size = int.from_bytes(data[:8], "little")
    if size > len(data):
        raise ValueError("the header is longer than the file")
    _refuse_duplicates(data[8 : 8 + size])
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with safe_open(file.name, "pt") as opened:
            text = (opened.metadata() or {}).get("paredown")
            if text is None:
                raise ValueError("no graph in its header")
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    header = json.loads(text)
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}; this paredown reads format {FORMAT}")
    return header, tensors


def _refuse_nan(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.startswith("state:") and tensor.is_floating_point() and tensor.isnan().any():
            raise ValueError(f"{name.removeprefix('state:')} holds NaN")


def _refuse_duplicates(header: bytes) -> None:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        if len(set(keys)) != len(keys):
            raise ValueError("a name stands twice in its header")
        return dict(items)

    json.load(io.BytesIO(header), object_pairs_hook=pairs)


def _module(header: dict[str, Any], tensors: dict[str, Tensor]) -> fx.GraphModule:
    root = nn.Module()
    parameters, transient = set(header["parameters"]), set(header["transient"])
    made: dict[str, Tensor] = {}
    names = [k.removeprefix("state:") for k in tensors if k.startswith("state:")]
    for name in [*names, *header["ties"]]:
        source = header["ties"].get(name, name)
        if source not in made:
            tensor = tensors[f"state:{source}"]
            trainable = tensor.is_floating_point()
            made[source] = nn.Parameter(tensor, trainable) if source in parameters else tensor
        owner, leaf = owner_of(root, name), name.rpartition(".")[2]
        if name in parameters:
            owner.register_parameter(leaf, made[source])  # type: ignore[arg-type]
        else:
            owner.register_buffer(leaf, made[source], persistent=name not in transient)
    graph = _graph_from_json(header["graph"], root)
    keep_state(root, graph, set(root.state_dict()))
    return graph


def _graph_from_json(rows: dict[str, Any], root: nn.Module) -> fx.GraphModule:
    for name, child in rows["graphs"].items():
        root.add_module(name, _graph_from_json(child, nn.Module()))
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
