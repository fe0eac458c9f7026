"""An ONNX file without what only people read: short names, nothing twice, no producer.

In a small net half of the file were names: each is written where a value is made and wherever it
is read. Inputs, outputs and the weights keep theirs, so that callers feed by name and a layer can
still be told; what is inside is found again by writing the same model once more with its names
(`paredown/targets/formats/onnx/values.py`).
"""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Iterator

import onnx

from paredown.core.files import sha256
from paredown.targets.formats.onnx.file import File

LETTERS = string.ascii_letters
LOOKED_AT = 4096  # bytes of a tensor, before it is compared with another whole
WEIGHT_AXES = 2  # of an initializer whose name tells a layer


def shortened(file: File) -> File:
    """The same model in fewer bytes; the same file gives the same.

    Example:
        >>> node = onnx.helper.make_node("Relu", ["x"], ["a_long_name"])
        >>> last = onnx.helper.make_node("Neg", ["a_long_name"], ["y"])
        >>> x, y = (onnx.helper.make_tensor_value_info(n, 1, [2]) for n in "xy")
        >>> model = onnx.helper.make_model(onnx.helper.make_graph([node, last], "g", [x], [y]))
        >>> short = shortened(File.read(model.SerializeToString()))
        >>> [list(each.output) for each in short.proto.graph.node]
        [['a'], ['y']]
    """
    model = onnx.ModelProto()
    model.CopyFrom(file.proto)
    model.ClearField("producer_name")
    model.graph.name = "g"
    _share(file, model.graph)
    names = _short_names(model.graph)
    kept = {tensor.name for tensor in model.graph.initializer}
    # What is told of a weight under its old name must not be read of what has that name now.
    told = [each for each in model.graph.value_info if each.name not in set(names.values())]
    del model.graph.value_info[:]
    model.graph.value_info.extend(told)
    for graph in _graphs(model.graph):
        _rename(graph, names)
    numbers = {names.get(n, n): held for n, held in file.numbers.items() if n in kept}
    return File(model, numbers)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes, which may read its values by name."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else []
            for each in (*inner, *attribute.graphs):
                yield from _graphs(each)


def _share(file: File, graph: onnx.GraphProto) -> None:
    """Keep one of the initializers that hold the same."""
    kept: list[onnx.TensorProto] = []
    first: dict[str, str] = {}
    known = {value.name for value in graph.output}
    instead: dict[str, str] = {}
    starts = {tensor.name: _start(file, tensor) for tensor in graph.initializer}
    several = Counter(starts.values())
    for tensor in graph.initializer:
        if several[starts[tensor.name]] == 1:
            kept.append(tensor)
            continue
        whole = sha256([starts[tensor.name], *file.parts(tensor.name)])
        same = first.setdefault(whole, tensor.name)
        if same == tensor.name or tensor.name in known:
            kept.append(tensor)
        else:
            instead[tensor.name] = same
    if not instead:
        return
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for inner in _graphs(graph):
        for node in inner.node:
            for place, name in enumerate(node.input):
                node.input[place] = instead.get(name, name)


def _start(file: File, tensor: onnx.TensorProto) -> bytes:
    """What an initializer is, and the first of its numbers."""
    bare = onnx.TensorProto()
    bare.CopyFrom(tensor)
    bare.ClearField("name")
    first = next(file.parts(tensor.name), b"")[:LOOKED_AT]
    return bare.SerializeToString(deterministic=True) + bytes(first)


def _short_names(graph: onnx.GraphProto) -> dict[str, str]:
    """Long name -> short one, the shortest for those that are written most."""
    kept = {value.name for value in (*graph.input, *graph.output)}
    kept |= {t.name for t in graph.initializer if len(t.dims) >= WEIGHT_AXES}
    kept.add("")  # an input that is left out
    counts: Counter[str] = Counter()
    for inner in _graphs(graph):
        counts.update(name for name in _names(inner) if name not in kept)
    short = (each for each in _spelled() if each not in kept)
    return {name: next(short) for name, _ in counts.most_common()}


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    for value in (*graph.initializer, *graph.input, *graph.output):
        yield value.name
    for node in graph.node:
        yield from node.input
        yield from node.output


def _spelled() -> Iterator[str]:
    """a, b, ..., Z, aa, ab, ..."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(LETTERS, repeat=length))


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for value in (*graph.initializer, *graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            for place, name in enumerate(field):
                field[place] = names.get(name, name)
