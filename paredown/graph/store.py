"""A model in one safetensors file: weights, and the graph as JSON in the header.

Nothing in such a file is executed: ops are looked up among ATen's by name, never imported.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, fx, nn

from paredown.core.errors import UserError
from paredown.core.files import sha256
from paredown.graph import lazily, structure
from paredown.graph.graph_json import graph_from_json, graph_to_json
from paredown.graph.holds.every import HOLDS
from paredown.graph.parts import Input, Parts
from paredown.graph.quantized import packed, quantizers  # noqa: F401  (they register ops)
from paredown.graph.state import keep_state, order_parameters, owner_of

M = TypeVar("M", bound=Parts)
FORMAT = 1
MAPPED = 1 << 26  # bytes of a file that are mapped at once


@dataclass(frozen=True)
class Encoded:
    """A model as its file holds it: a header, and the tensors in their order.

    To go through it gives the file's bytes in parts, read from the model as it is then.
    """

    header: bytes
    tensors: list[Tensor]

    def __iter__(self) -> Iterator[bytes | memoryview]:
        yield self.header
        for tensor in self.tensors:
            yield from lazily.parts(tensor)


def encode(model: Parts) -> bytes:
    """The file's bytes; the same model gives the same bytes."""
    return b"".join(encoded(model))


def digest(model: Parts) -> str:
    """The SHA-256 of the model's file."""
    return sha256(encoded(model))


def encoded(model: Parts) -> Encoded:
    """The model as its file holds it, without a copy of its tensors."""
    tensors, ties = _untied(model.graph)
    header = {
        "format": FORMAT,
        "graph": graph_to_json(model.graph),
        "inputs": [
            {"name": i.name, "dynamic": {str(d): n for d, n in i.dynamic.items()}}
            | ({"limits": {str(d): list(of) for d, of in i.limits.items()}} if i.limits else {})
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
    for name, dims in model.kept.items():
        stored |= {f"kept:{dim}:{name}": indices for dim, indices in dims.items()}
    stored |= {f"example:{n}": item.example for n, item in enumerate(model.inputs)}
    for hold in HOLDS:
        told, parts, besides = hold.stored(model)
        header |= {} if told is None else {hold.field: told}
        for name in besides:
            stored.pop(f"state:{ties.get(name, name)}")
        stored |= parts
    return laid_out(stored, {"paredown": json.dumps(header)})


def laid_out(stored: dict[str, Tensor], metadata: dict[str, str]) -> Encoded:
    """Tensors in the order and the header that safetensors gives them."""
    alike = {name: torch.zeros(1, dtype=each.dtype) for name, each in sorted(stored.items())}
    small = to_bytes(alike, metadata)
    told = json.loads(small[8 : 8 + int.from_bytes(small[:8], "little")])
    names, end = [name for name in told if name != "__metadata__"], 0
    for name in names:
        start, end = end, end + stored[name].nbytes
        told[name] |= {"shape": list(stored[name].shape), "data_offsets": [start, end]}
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Encoded(header, [stored[name] for name in names])


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


def decode(data: bytes, path: str, make: Callable[..., M]) -> M:
    """The model in a file's bytes, which came from ``path``; see `load`."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return _load(Path(file.name), path, make)


def load(path: Path, make: Callable[..., M]) -> M:
    """The model in the file: ``make`` of its `Parts`, by their names.

    Raises:
        UserError: it cannot be read, is damaged, or not a paredown model.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return _load(path, str(path), make)


def _load(file: Path, path: str, make: Callable[..., M]) -> M:
    try:
        header, tensors = _read(file)
        ties = header["ties"]
        held = {h.field: h.restored(header.get(h.field), ties, tensors) for h in HOLDS}
        _refuse_nan(tensors)
        graph = _module(header, tensors)
        examples = [tensors[f"example:{n}"] for n in range(len(header["inputs"]))]
        inputs = tuple(
            Input(
                item["name"],
                example,
                {int(d): n for d, n in item["dynamic"].items()},
                {int(d): (least, most) for d, (least, most) in item.get("limits", {}).items()},
            )
            for item, example in zip(header["inputs"], examples, strict=True)
        )
        arguments, outputs = header["arguments"], header["outputs"]
        notes, kept = tuple(header["notes"]), _kept(tensors)
        model = make(graph, inputs, arguments, outputs, kept=kept, notes=notes, **held)
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


def _check(model: Parts) -> None:
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
        for dim, limit in item.limits.items():
            if dim not in item.dynamic or not _is_limit(*limit):
                raise ValueError(f"input {item.name!r} has no such limit")
    if not all(isinstance(note, str) for note in model.notes):
        raise ValueError("a note of it is no text")
    state = model.graph.state_dict()
    for name, mask in model.masks.items():
        if mask.dtype is not torch.bool or (name in state and state[name].shape != mask.shape):
            raise ValueError(f"the mask of {name!r} does not fit its weight")
    for name, dims in model.kept.items():
        for dim, indices in dims.items():
            whole = indices.dtype is torch.int64 and indices.dim() == 1 and dim >= 0
            if not whole or (name in state and state[name].shape[dim] != len(indices)):
                raise ValueError(f"what is kept of {name!r} does not fit it")


def _is_limit(least: Any, most: Any) -> bool:
    return type(least) is int and (most is None or (type(most) is int and most >= least))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("the header is longer than the file")
        _refuse_duplicates(file.read(size))
    with safe_open(path, "pt") as opened:
        text = (opened.metadata() or {}).get("paredown")
        if text is None:
            raise ValueError("no graph in its header")
        waiting = list(opened.keys())
    tensors: dict[str, Tensor] = {}
    while waiting:
        read = 0  # what is read of a mapped file stays in memory as long as it is mapped
        with safe_open(path, "pt") as opened:
            while waiting and read < MAPPED:
                key = waiting.pop(0)
                tensors[key] = opened.get_tensor(key).clone()
                read += tensors[key].nbytes
    header = json.loads(text)
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}; this paredown reads format {FORMAT}")
    return header, tensors


def _refuse_nan(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        told = name.startswith("state:") and tensor.is_floating_point()
        if told and lazily.extremes(tensor).isnan().any():
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
    graph = graph_from_json(header["graph"], root)
    keep_state(root, graph, set(root.state_dict()))
    order_parameters(graph, header["parameters"])
    return graph
