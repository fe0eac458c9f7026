"""The inner values of an ONNX file, beside those of the graph that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from paredown.core.files import read_parts, sha256
from paredown.graph.model import Model
from paredown.graph.quantized.quantizers import PER_TENSOR, quantizers
from paredown.targets.formats.onnx import write
from paredown.targets.formats.onnx.names import shortened
from paredown.targets.parity import stretches

Values = tuple[list[Tensor], dict[str, Tensor]]  # the outputs; graph node -> its value


def open_inside(
    model: Model, path: Path, names: Collection[str]
) -> Callable[[Sequence[Tensor]], Values]:
    """What runs the file on the inputs' tensors and gives its outputs and the named inner values.

    The file's names are short: what it runs is written once more, with names. A quantized value is
    taken as the integers that the file holds, so that its kernels stay those
    that ship. A value that the file does not hold under the node's name is left out.
    """
    loaded = _with_names(model, path)
    made = {name for node in loaded.graph.node for name in node.output}
    results = [
        arg for node in model.graph.graph.nodes if node.op == "output" for arg in node.args[0]
    ]
    integers = {
        node: f"{name}_quantized"
        for node, name in _named(model.graph, made).items()
        if node.name in names and f"{name}_quantized" in made
    }
    floats = {
        name: name
        for name in names
        if name in made and name not in {node.name for node in (*integers, *results)}
    }
    wanted = list(dict.fromkeys([*integers.values(), *floats.values()]))
    session = _session(loaded, wanted)
    outputs = [item.name for item in session.get_outputs()][: len(results)]

    def values(leaves: Sequence[Tensor]) -> Values:
        feeds = {
            item.name: leaf.numpy() for item, leaf in zip(session.get_inputs(), leaves, strict=True)
        }
        found = dict(zip(outputs + wanted, session.run(outputs + wanted, feeds), strict=True))
        tensors = {name: torch.from_numpy(array) for name, array in found.items()}
        inner = {node.name: _float(node, tensors[name]) for node, name in integers.items()}
        inner |= {node: tensors[name] for node, name in floats.items()}
        inner |= {
            arg.name: tensors[name]
            for arg, name in zip(results, outputs, strict=True)
            if isinstance(arg, fx.Node) and arg.name in names
        }
        return [tensors[name] for name in outputs], inner

    return values


def _float(quantizer: fx.Node, integers: Tensor) -> Tensor:
    scale: Any = quantizer.args[1]
    zero_point: Any = quantizer.args[2]
    return (integers.float() - zero_point) * scale


def _with_names(model: Model, path: Path) -> onnx.ModelProto:
    """The file with the names of the graph it was made of; as it is where it is of another."""
    file = write.encode(model)
    if sha256(shortened(file)) != sha256(read_parts(path)):
        return onnx.load(str(path))
    return onnx.load_from_string(bytes(file))


def _session(loaded: onnx.ModelProto, names: Sequence[str]) -> Any:
    """A session of a file some of whose inner values are outputs too."""
    import onnxruntime

    known = {value.name for value in loaded.graph.output}
    extra = [name for name in names if name not in known]
    loaded.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        loaded.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def worst_tensor(model: Model, path: Path) -> tuple[float, str] | None:
    """Agreement in dB and name of the inner tensor that differs most, each stretch between two
    quantizers being compared on the file's own values before it; None where none can be."""
    loaded = _with_names(model, path)
    made = {name for node in loaded.graph.node for name in node.output}
    shown = shown_values(model.graph, made)
    if not shown:
        return None
    wanted = list(dict.fromkeys(shown.values()))
    session = _session(loaded, wanted)
    pairs = zip(session.get_inputs(), model.inputs, strict=True)
    found = session.run(wanted, {given.name: item.example.numpy() for given, item in pairs})
    values = dict(zip(wanted, found, strict=True))
    ranked = stretches(model, {node: values[name] for node, name in shown.items()})
    return ranked[0] if ranked else None


def shown_values(graph: fx.GraphModule, made: set[str]) -> dict[str, str]:
    """Graph node -> the file's tensor to compare: at the quantizers, else at every op."""
    named = _named(graph, made)
    if not named:
        nodes = [node for node in graph.graph.nodes if node.op != "output"]
        return {node.name: node.name for node in nodes if node.name in made}
    pairs = {node.name: f"{name}_dequantized" for node, name in named.items()}
    return {node: name for node, name in pairs.items() if name in made}


def _named(graph: fx.GraphModule, made: set[str]) -> dict[fx.Node, str]:
    """Quantizer of an activation -> its name in the file.

    It has its own there, unless the graph was traced anew: then they are numbered in the order
    they run.
    """
    found = [node for node in quantizers(graph) if node.target is PER_TENSOR]
    if any(f"{node.name}_dequantized" in made for node in found):
        return {node: node.name for node in found}
    return {node: f"fake_quantize{f'_{n}' if n else ''}" for n, node in enumerate(found)}
