"""Model -> OpenVINO IR: from the ONNX form, and nothing but weights and graph in the files."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import fx

from paredown.graph.edit import keep_meta
from paredown.graph.model import Model
from paredown.graph.parts import Input
from paredown.graph.quantized.quantizers import PER_TENSOR
from paredown.targets import parity
from paredown.targets.formats.onnx import values as onnx_values
from paredown.targets.formats.onnx import write
from paredown.targets.formats.openvino import edit

aten = torch.ops.aten
KEPT_NAMES = (
    "Parameter",
    "Result",
    "Convolution",
    "GroupConvolution",
    "MatMul",
)  # kinds of layers whose names a user sees
MADE_UP = re.compile(r"(^|/)[A-Z]\w*_\d+")  # names that OpenVINO counts up in each process
NUMBER_BYTES = 8
DEFAULTS = {"auto_broadcast": "numpy", "auto_pad": "explicit"}  # attributes that go without saying


def encode(model: Model) -> tuple[bytes, bytes]:
    """The bytes of the graph (.xml) and of the weights (.bin); the same model gives the same.

    Raises:
        RuntimeError: an op that OpenVINO does not have.
    """
    with tempfile.TemporaryDirectory() as folder:
        graph, weights = Path(folder) / "model.xml", Path(folder) / "model.bin"
        _serialize(_converted(model), graph, weights)
        return _squeezed(graph.read_bytes(), _sizes(model)), weights.read_bytes()


def without_inner_roundings(model: Model) -> Model:
    """A copy whose ``x * sigmoid(x)`` is rounded at its end alone: OpenVINO's kernels end with it.

    With the roundings of ``x`` and of the sigmoid it would read and write the values three times
    more, and take a fifth longer for EfficientNet-B0.
    """
    made = model.frozen()
    graph = made.graph.graph
    for node in [node for node in graph.nodes if node.target is aten.mul.Tensor]:
        value, gate = _swish(node)
        if value is None:
            continue
        with graph.inserting_before(node):
            swish = graph.call_function(aten.silu.default, (value.args[0],))
        keep_meta(swish, node)
        node.replace_all_uses_with(swish)
        for gone in (node, gate, gate.args[0], value):
            graph.erase_node(gone)
    made.graph.recompile()
    return made


def _swish(node: fx.Node) -> tuple[Any, Any]:
    """The rounded value and its rounded sigmoid that a product reads, where nothing else does."""
    factors: Any = node.args
    for value, gate in (factors, factors[::-1]):
        if not all(isinstance(each, fx.Node) and each.target is PER_TENSOR for each in factors):
            break
        sigmoid: Any = gate.args[0]
        if sigmoid.target is aten.sigmoid.default and sigmoid.args[0] is value:
            if set(value.users) == {node, sigmoid} and len(gate.users) == len(sigmoid.users) == 1:
                return value, gate
    return None, None


def _converted(model: Model) -> Any:
    """The model in OpenVINO's ops, quantize and dequantize pairs as FakeQuantize.

    This is what ``openvino.convert_model`` does, which would report its use to its makers.
    """
    import openvino
    from openvino._offline_transformations import apply_moc_transformations

    graph = openvino.Core().read_model(bytes(write.encode(model, standard=True)))
    apply_moc_transformations(graph, cf=True)
    edit.rewrite(graph)
    if any(item.limits for item in model.inputs):
        graph.reshape({place: _bounded(item) for place, item in enumerate(model.inputs)})
    return graph


def _sizes(model: Model) -> str:
    """The names of the inputs' sizes that vary; "" where there are fewer than two."""
    named = [
        [item.dynamic.get(dim, "") for dim in range(item.example.dim())] for item in model.inputs
    ]
    several = sum(bool(name) for each in named for name in each) > 1
    return ";".join(",".join(each) for each in named) if several else ""


def _bounded(item: Input) -> Any:
    """An input's shape, of the sizes that vary the least and the most that they may be."""
    import openvino

    sizes = []
    for dim, size in enumerate(item.example.shape):
        least, most = item.limits.get(dim, (0, None)) if dim in item.dynamic else (size, size)
        sizes.append(openvino.Dimension(least, -1 if most is None else most))
    return openvino.PartialShape(sizes)


def worst_tensor(model: Model, opened: Callable[[Any], Any]) -> tuple[float, str] | None:
    """Agreement in dB and name of the inner tensor that differs most, as in an ONNX file; the
    tensors have names before the graph is squeezed alone, so it is made again.

    Args:
        opened: gives the predictor over a graph.
    """
    graph = _converted(model)
    made = {name for op in graph.get_ops() for value in op.outputs() for name in value.get_names()}
    known = {name for value in graph.outputs for name in value.get_names()}

    shown = onnx_values.shown_values(model.graph, made)
    if not shown:
        return None
    graph.add_outputs([name for name in dict.fromkeys(shown.values()) if name not in known])
    outputs = opened(graph)(*[item.example.numpy() for item in model.inputs])
    values = {
        name: value
        for output, value in zip(graph.outputs, outputs, strict=True)
        for name in output.get_names()
    }
    ranked = parity.stretches(model, {node: values[name] for node, name in shown.items()})
    return ranked[0] if ranked else None


def _serialize(graph: Any, path: Path, weights: Path) -> None:
    from openvino import passes

    manager = passes.Manager()
    manager.register_pass(passes.Serialize(str(path), str(weights)))
    manager.run_passes(graph)


def _squeezed(text: bytes, sizes: str = "") -> bytes:
    """The graph without blanks, notes and inner names, without the shapes that are worked out
    again on reading, and with each number once: a fifth of the bytes for an int8 model.

    What is left says the same: names of inputs and outputs, ops, attributes, edges.
    """
    net = ElementTree.fromstring(text)
    net.set("name", "model")
    outputs = _output_ports(net)
    for parent in list(net.iter()):
        parent.text = (parent.text or "").strip() or None
        parent.tail = None
        for notes in parent.findall("rt_info"):
            parent.remove(notes)
    for body in [each for each in net.iter() if each.find("layers") is not None]:
        _name_by_number(body, outputs if body is net else set())
        _merge_constants(body)
    if sizes:  # read by the predictor in paredown/targets/runtimes/openvino.py
        ElementTree.SubElement(ElementTree.SubElement(net, "rt_info"), "paredown", value=sizes)
    return ElementTree.tostring(net).replace(b" />", b"/>")


def _output_ports(net: ElementTree.Element) -> set[tuple[str, str]]:
    """The layers and ports whose values are the model's outputs."""
    results = {layer.get("id") for layer in _layers(net) if layer.get("type") == "Result"}
    return {
        (edge.get("from-layer", ""), edge.get("from-port", ""))
        for edge in net.iterfind("edges/edge")
        if edge.get("to-layer") in results
    }


def _layers(body: ElementTree.Element) -> list[ElementTree.Element]:
    return body.findall("layers/layer")


def _name_by_number(body: ElementTree.Element, outputs: set[tuple[str, str]]) -> None:
    for layer in _layers(body):
        if layer.get("type") not in KEPT_NAMES or MADE_UP.search(layer.get("name", "")):
            layer.set("name", layer.get("id", ""))
        for data in layer.findall("data"):
            data.attrib = {k: v for k, v in data.items() if DEFAULTS.get(k) != v}
        for port in layer.findall("input/port"):
            port.attrib = {"id": port.get("id", "")}
        for port in [*layer.findall("input/port"), *layer.findall("output/port")]:
            for dim in port.findall("dim"):
                port.remove(dim)
            shown = layer.get("type") in ("Parameter", "Result")
            if not shown and (layer.get("id"), port.get("id")) not in outputs:
                port.attrib.pop("names", None)


def _merge_constants(body: ElementTree.Element) -> None:
    """Layers that hold the same number become one."""
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    for layer in [each for each in _layers(body) if each.get("type") == "Const"]:
        data, number = layer.find("data"), layer.get("id", "")
        assert data is not None
        named = any(port.get("names") for port in layer.iter("port"))
        if int(data.get("size", 0)) <= NUMBER_BYTES and not named:
            same[number] = first.setdefault(tuple(sorted(data.items())), number)
    layers, edges = body.find("layers"), body.find("edges")
    assert layers is not None
    for layer in list(layers):
        if same.get(layer.get("id", ""), layer.get("id")) != layer.get("id"):
            layers.remove(layer)
    for edge in edges if edges is not None else ():
        edge.set("from-layer", same.get(edge.get("from-layer", ""), edge.get("from-layer", "")))
