"""Weight-only quantization in an ONNX file: small on disk, and what ONNX Runtime runs of it.

Each reader of a rounded weight gets the form that ONNX Runtime has a kernel for:

- a matrix product: a DequantizeLinear, by blocks where there are groups, which becomes one
  MatMulNBits with the product, whose bytes are all that stays in memory;
- a lookup: GatherBlockQuantized (com.microsoft), which dequantizes the rows it picks. The standard
  ops would dequantize the whole table at every inference, or, with Gather first, keep the product
  behind it from fusing. A product with the same table is a MatMulNBits on the same bytes;
- all else (convolutions, recurrent layers): Cast and Mul, which a session carries out once, when it
  is loaded. A DequantizeLinear there would run at every inference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import values as onnxscript_values

from paredown.graph.quantized.codes import to_bytes
from paredown.graph.quantized.forms import Rounded, of_grid
from paredown.graph.quantized.grouped import PER_GROUP
from paredown.targets.formats.onnx.bits import DOMAIN
from paredown.targets.formats.onnx.edit import (
    SIGNED,
    UNSIGNED,
    attribute,
    initializer,
    insert,
    replace,
    tensor,
)

OP = "FakeQuantizeGroup"
MICROSOFT = "com.microsoft"
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: what it takes for a fused product by default
MERGED = frozenset(
    {
        *("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Elu", "Selu", "Softplus"),
        *("Softsign", "ThresholdedRelu"),
    }
)
LEAST_BLOCK = 16  # of the kernels, whose blocks are powers of two


def register() -> None:
    """The opaque op that carries the fake quantizer through the exporter's optimiser."""
    formal, kinds = OpSchema.FormalParameter, OpSchema.AttrType
    optional = OpSchema.FormalParameterOption.Optional
    onnx.defs.register_schema(
        OpSchema(
            OP,
            DOMAIN,
            1,
            inputs=[
                formal("weight", "T"),
                formal("scale", "T"),
                formal("zero_point", "Z", param_option=optional),
            ],
            outputs=[formal("y", "T")],
            type_constraints=[("T", ["tensor(float)"], ""), ("Z", ["tensor(int8)"], "")],
            attributes=[
                OpSchema.Attribute(key, kinds.INT, "") for key in ("axis", "group", "low", "high")
            ],
        )
    )


def _fake_quantize_group(
    weight: Any, scale: Any, zero_point: Any, axis: int, group: int, low: int, high: int
) -> Any:
    op = onnxscript_values.Opset(DOMAIN, 1)
    return op.FakeQuantizeGroup(
        weight, scale, zero_point, axis=axis, group=group, low=low, high=high
    )


TRANSLATIONS: dict[Any, Callable[..., Any]] = {PER_GROUP: _fake_quantize_group}  # for the exporter


@dataclass(frozen=True)
class _Rounded:
    """A weight as integers: rows (R, F), scales (R, G), and zero points (R, G) where it has them.

    With zero points the integers are unsigned, else signed.
    """

    name: str
    integers: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    shape: tuple[int, ...]  # of the weight
    axis: int  # of its rows
    group: int
    bits: int

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return self.group or self.integers.shape[1]

    @property
    def kind(self) -> np.dtype:
        return (SIGNED if self.zero is None else UNSIGNED)[self.bits]


def lower(model: ir.Model, standard: bool = False) -> None:
    """Every weight behind a group quantizer becomes integers, in the form each reader wants.

    Args:
        standard: with ONNX's own ops alone, for other runtimes than ONNX Runtime.
    """
    graph = model.graph
    for node in [n for n in graph if n.op_type == OP]:
        weight, value = _laid(read(node)), node.outputs[0]
        products = _products(value, weight)
        lookups = [] if standard else _lookups(value, weight)
        shared = _shared_block(weight) if products and lookups else 0
        for each in lookups:
            _lookup(graph, each, weight, shared or _lookup_block(weight))
        for each in products:
            (_shared_product if shared else _product)(graph, each, weight)
        for turned in [usage.node for usage in value.uses()]:
            if turned.op_type == "Transpose" and not turned.outputs[0].uses():
                graph.remove(turned, safe=True)
        if value.uses():
            replace(graph, node, _folded(graph, node, weight))
        graph.remove(node, safe=True)
    if any(node.domain == MICROSOFT for node in graph):
        model.opset_imports[MICROSOFT] = 1


def read(node: ir.Node) -> Rounded:
    """What a fake quantizer of groups makes of its weight."""
    weight, scale, zero = (tensor(value) for value in (*node.inputs, None)[:3])
    assert weight is not None and scale is not None and node.inputs[0] is not None
    axis, group, low, high = (attribute(node, key) for key in ("axis", "group", "low", "high"))
    form, name = of_grid(PER_GROUP, low, high), str(node.inputs[0].name)
    return form.read(name, weight, scale, zero, axis, group, low, high)


def _laid(weight: Rounded) -> _Rounded:
    """The same as a file holds it."""
    integers, form, zero = weight.integers.numpy(), weight.form, None
    if weight.zero_points is not None:
        both = (integers, weight.zero_points.numpy())
        integers, zero = (each.astype(np.int16) - form.low for each in both)
    shape, scale = tuple(weight.weight.shape), weight.scales.numpy()
    return _Rounded(weight.name, integers, scale, zero, shape, weight.axis, weight.group, form.bits)


def folded(graph: ir.Graph, before: ir.Node, weight: Rounded) -> ir.Value:
    """The weight in float, from ops on constants alone."""
    return _folded(graph, before, _laid(weight))


def _held(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    return initializer(graph, name, np.ascontiguousarray(values))


def _float(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    return insert(graph, before, ir.node("Cast", [value], {"to": ir.DataType.FLOAT}))


def _scales(graph: ir.Graph, before: ir.Node, name: str, values: np.ndarray) -> ir.Value:
    """Scales, in two bytes each where that loses nothing, and float once a session is loaded."""
    half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        return _held(graph, name, values)
    return _float(graph, before, _held(graph, name, half))


# --- matrix products -------------------------------------------------------------------------


def _products(value: ir.Value, weight: _Rounded) -> list[ir.Node]:
    """The products that take the weight, or its transpose, as (inputs, outputs)."""
    if len(weight.shape) != 2:
        return []
    found = []
    for reader in [usage.node for usage in value.uses()]:
        turns = reader.op_type == "Transpose"
        for node in [u.node for u in reader.outputs[0].uses()] if turns else [reader]:
            taken = reader.outputs[0] if turns else value
            plain = node.op_type == "MatMul" or (node.op_type == "Gemm" and _is_plain(node))
            if plain and node.inputs[1] is taken and node.inputs[0] is not taken:
                columns_last = turns != bool(_option(node, "transB", 0))
                if weight.axis == (0 if columns_last else 1):
                    found.append(node)
    return found


def _option(node: ir.Node, name: str, default: Any) -> Any:
    return attribute(node, name) if name in node.attributes else default


def _is_plain(gemm: ir.Node) -> bool:
    scales = {_option(gemm, "alpha", 1.0), _option(gemm, "beta", 1.0)}
    return scales == {1.0} and not _option(gemm, "transA", 0)


def _product(graph: ir.Graph, node: ir.Node, weight: _Rounded) -> None:
    """``x @ DequantizeLinear(integers (F, R))``: ONNX Runtime makes one MatMulNBits of the two."""
    name = f"{weight.name}_columns"
    scale = weight.scale.T if weight.group else weight.scale[:, 0]  # (G, R) or (R,)
    inputs = [
        _held(graph, name, weight.integers.T.astype(weight.kind)),
        _scales(graph, node, f"{name}_scale", scale),
    ]
    if weight.zero is not None:
        zero = weight.zero.T if weight.group else weight.zero[:, 0]
        inputs.append(_held(graph, f"{name}_zero", zero.astype(weight.kind)))
    blocks = {"axis": 0, "block_size": weight.group} if weight.group else {"axis": 1}
    made = insert(graph, node, ir.node("DequantizeLinear", inputs, blocks))
    node.replace_input_with(1, made)
    node.attributes.pop("transB", None)
    _keep_from_activation(graph, node)


def _keep_from_activation(graph: ir.Graph, node: ir.Node) -> None:
    """ONNX Runtime merges a Gemm with the activation behind it before it has folded the scales,
    and then no more with its weights; a Flatten of (B, N) to (B, N), which moves nothing, parts
    the two."""
    users = [usage.node for usage in node.outputs[0].uses()]
    if node.op_type == "Gemm" and len(users) == 1 and users[0].op_type in MERGED:
        parting = ir.node("Flatten", [node.outputs[0]], {"axis": 1})
        users[0].replace_input_with(0, insert(graph, users[0], parting))


# --- lookups ---------------------------------------------------------------------------------


def _lookups(value: ir.Value, weight: _Rounded) -> list[ir.Node]:
    """The ops that pick rows of the weight; none where a row ends within a byte."""
    readers = [usage.node for usage in value.uses()]
    if len(weight.shape) != 2 or weight.axis != 0 or weight.shape[1] * weight.bits % 8:
        return []
    return [
        each
        for each in readers
        if each.op_type == "Gather" and not _option(each, "axis", 0) and each.inputs[0] is value
    ]


def _lookup(graph: ir.Graph, node: ir.Node, weight: _Rounded, block: int) -> None:
    table, scale, zero = _byte_table(graph, node, weight, block)
    how = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": weight.bits}
    inputs = [table, node.inputs[1], scale, *([] if zero is None else [zero])]
    made = ir.node("GatherBlockQuantized", inputs, how, domain=MICROSOFT)
    replace(graph, node, insert(graph, node, made))
    graph.remove(node, safe=True)


def _lookup_block(weight: _Rounded) -> int:
    """A kernel's block is a power of 2, and may be longer than a row."""
    return weight.group or max(LEAST_BLOCK, 1 << (weight.shape[1] - 1).bit_length())


def _byte_table(
    graph: ir.Graph, before: ir.Node, weight: _Rounded, block: int
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Unsigned integers (R, bytes), scales and zero points (R, bytes) of blocks, as Microsoft's
    ops take them: low half of a byte first, zero points in the middle where none are given."""
    name, repeats = f"{weight.name}_table", -(-weight.block // block)
    blocks = -(-weight.shape[1] // block)
    middle = 0 if weight.zero is not None else 1 << (weight.bits - 1)
    integers = (weight.integers.astype(np.int16) + middle).astype(np.uint8)
    scale = np.repeat(weight.scale, repeats, 1)[:, :blocks]
    zero = None
    if weight.zero is not None:
        each = np.repeat(weight.zero, repeats, 1)[:, :blocks].astype(np.uint8)
        zero = _held(graph, f"{name}_zero", _packed(each, weight.bits))
    return (
        _held(graph, name, _packed(integers, weight.bits)),
        _scales(graph, before, f"{name}_scale", scale),
        zero,
    )


def _packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Rows of unsigned numbers -> bytes."""
    packed: np.ndarray = to_bytes(torch.from_numpy(values), bits).numpy()
    return packed


def _shared_block(weight: _Rounded) -> int:
    """The largest block for one table that is both looked up and multiplied with; 0 is none."""
    features = weight.shape[1]
    block = features & -features  # the largest power of 2 that divides it
    block = min(block, weight.group) if weight.group else block
    return block if block >= LEAST_BLOCK else 0


def _shared_product(graph: ir.Graph, node: ir.Node, weight: _Rounded) -> None:
    """A product with the table that is looked up: the same bytes in another shape."""
    block = _shared_block(weight)
    table, scale, zero = _byte_table(graph, node, weight, block)
    outputs, inputs = weight.shape
    blocks = _reshaped(graph, node, table, [outputs, inputs // block, block * weight.bits // 8])
    how = {"K": inputs, "N": outputs, "bits": weight.bits, "block_size": block}
    made = ir.node(
        "MatMulNBits",
        [node.inputs[0], blocks, scale, *([] if zero is None else [zero])],
        how | {"accuracy_level": INT8_ACTIVATIONS},
        domain=MICROSOFT,
    )
    result = insert(graph, node, made)
    if len(node.inputs) > 2:
        result = insert(graph, node, ir.node("Add", [result, node.inputs[2]]))
    replace(graph, node, result)
    graph.remove(node, safe=True)


# --- all else --------------------------------------------------------------------------------


def _folded(graph: ir.Graph, node: ir.Node, weight: _Rounded) -> ir.Value:
    name = f"{weight.name}_integers"
    integers = _aligned(weight, weight.integers).astype(weight.kind)
    made = _float(graph, node, _held(graph, name, integers))
    if weight.zero is not None:
        zero = _held(graph, f"{name}_zero", _aligned(weight, weight.zero).astype(weight.kind))
        made = insert(graph, node, ir.node("Sub", [made, _float(graph, node, zero)]))
    scale = _scales(graph, node, f"{name}_scale", _aligned(weight, weight.scale))
    made = insert(graph, node, ir.node("Mul", [made, scale]))
    return _ungrouped(graph, node, weight, made) if weight.group else made


def _aligned(weight: _Rounded, values: np.ndarray) -> np.ndarray:
    """Integers (R, F), or scales (R, G), in shapes that go together: without groups that of the
    weight, with them (R, G, B), the last one filled up, and (R, G, 1)."""
    rows, features = weight.integers.shape
    whole = values.shape[1] == features
    if not weight.group:
        sizes = [s if whole else 1 for d, s in enumerate(weight.shape) if d != weight.axis]
        return np.moveaxis(values.reshape(rows, *sizes), 0, weight.axis)
    if not whole:
        return values[:, :, None]
    filled = np.pad(values, ((0, 0), (0, -features % weight.group)))
    return filled.reshape(rows, -1, weight.group)


def _ungrouped(graph: ir.Graph, node: ir.Node, weight: _Rounded, made: ir.Value) -> ir.Value:
    """(R, G, B) -> the weight's shape."""
    rows, features = weight.integers.shape
    sizes = [size for dim, size in enumerate(weight.shape) if dim != weight.axis]
    if features % weight.group:
        made = _reshaped(graph, node, made, [rows, -1])
        ends = [_held(graph, f"index_{i}", np.array([i])) for i in (0, features, 1)]
        made = insert(graph, node, ir.node("Slice", [made, *ends]))
    made = _reshaped(graph, node, made, [rows, *sizes])
    order = list(range(1, len(weight.shape)))
    order.insert(weight.axis, 0)
    if order == sorted(order):
        return made
    return insert(graph, node, ir.node("Transpose", [made], {"perm": order}))


def _reshaped(graph: ir.Graph, node: ir.Node, value: ir.Value, shape: list[int]) -> ir.Value:
    held = _held(graph, f"shape_{'_'.join(map(str, shape))}", np.array(shape))
    return insert(graph, node, ir.node("Reshape", [value, held]))
