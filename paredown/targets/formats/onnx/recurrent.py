"""LSTM, GRU and plain recurrent layers in an ONNX file, their weights as the kernels read them.

The exporter would put the gates into ONNX's order by ops that a session carries out when it opens
the file, and unroll plain recurrent layers over the example's length. Here a placeholder carries
the whole op through its optimiser; then each layer becomes one node that reads initializers.

Where an LSTM's weights are 8-bit integers with a scale for each channel, that node is ONNX
Runtime's DynamicQuantizeLSTM, which rounds what comes, and its own state, at each step. GRU and
plain layers have no such kernel: their weights, and those that are rounded in another way, lie in
the file as integers and are floats again once a session has opened it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import values as onnxscript_values

from paredown.core.errors import UserError
from paredown.graph.quantized.forms import Rounded
from paredown.graph.quantized.grouped import spread
from paredown.targets.formats.onnx import blocks, channels
from paredown.targets.formats.onnx.bits import DOMAIN
from paredown.targets.formats.onnx.dynamic import OP as DYNAMIC
from paredown.targets.formats.onnx.edit import (
    array,
    attribute,
    initializer,
    insert,
    insert_all,
    replace_value,
)

aten = torch.ops.aten
OP = "Recurrent"
GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}  # ONNX's order in PyTorch's
QUANTIZERS = {channels.OP: channels.read, blocks.OP: blocks.read}


def register() -> None:
    """The opaque op that carries a recurrent op through the exporter's optimiser."""
    formal, kinds = OpSchema.FormalParameter, OpSchema.AttrType
    several = OpSchema.FormalParameterOption.Variadic  # the input, its states, the weights
    attributes = {
        **dict.fromkeys(("kind", "activation"), kinds.STRING),
        **dict.fromkeys(("layers", "directions", "batch_first", "biases"), kinds.INT),
    }
    onnx.defs.register_schema(
        OpSchema(
            OP,
            DOMAIN,
            1,
            inputs=[formal("tensors", "T", param_option=several)],
            outputs=[formal("y", "T"), formal("last_h", "T"), formal("last_c", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(double)"], "")],
            attributes=[OpSchema.Attribute(key, kind, "") for key, kind in attributes.items()],
        )
    )


def _carried(kind: str, activation: str = "Tanh") -> Callable[..., Any]:
    """The translation of a PyTorch op with these gates."""

    def translate(
        x: Any,
        state: Any,
        weights: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        states = state if kind == "LSTM" else [state]
        directions = 2 if bidirectional else 1
        if len(weights) != num_layers * directions * (4 if has_biases else 2):
            raise UserError(
                "an LSTM with a projection (proj_size) has no form in ONNX; take a linear layer "
                "behind an LSTM of that size in its place."
            )
        made = onnxscript_values.Opset(DOMAIN, 1).Recurrent(
            *(x, *states, *weights),
            kind=kind,
            activation=activation,
            layers=num_layers,
            directions=directions,
            batch_first=int(batch_first),
            biases=int(has_biases),
        )
        return made if kind == "LSTM" else made[:2]

    return translate


TRANSLATIONS: dict[Any, Callable[..., Any]] = {  # for the exporter
    aten.lstm.input: _carried("LSTM"),
    aten.gru.input: _carried("GRU"),
    aten.rnn_tanh.input: _carried("RNN"),
    aten.rnn_relu.input: _carried("RNN", "Relu"),
}


def lower(graph: ir.Graph, standard: bool = False) -> None:
    """Each recurrent op becomes one node for each of its layers.

    Args:
        standard: with ONNX's own ops alone, for other runtimes than ONNX Runtime.
    """
    # Beside values in integers OpenVINO folds no weights, and its recurrent kernels want constants.
    floats = standard and any(node.op_type == "FakeQuantize" for node in graph)
    for node in [n for n in graph if n.op_type == OP]:
        _Lowering(graph, node, standard, floats).run()
    for node in [n for n in graph if n.op_type in (*QUANTIZERS, DYNAMIC)]:
        if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)


@dataclass(frozen=True)
class _Lowering:
    graph: ir.Graph
    node: ir.Node
    standard: bool
    floats: bool  # whether the file holds rounded weights as floats

    @property
    def kind(self) -> str:
        kind: str = attribute(self.node, "kind")
        return kind

    @property
    def directions(self) -> int:
        count: int = attribute(self.node, "directions")
        return count

    def add(self, op: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        return insert(self.graph, self.node, ir.node(op, inputs, attributes))

    def held(self, name: str, values: np.ndarray) -> ir.Value:
        return initializer(self.graph, name, np.ascontiguousarray(values))

    def run(self) -> None:
        node = self.node
        states = 2 if self.kind == "LSTM" else 1
        x, weights = node.inputs[0], node.inputs[1 + states :]
        assert x is not None
        if _makes(x, DYNAMIC):  # a kernel rounds by itself what comes to integer weights
            x = x.producer().inputs[0]  # type: ignore[union-attr]
            assert x is not None
        if attribute(node, "batch_first"):
            x = self.add("Transpose", [x], perm=[1, 0, 2])
        layers, lasts = attribute(node, "layers"), list[list[ir.Value]]()
        each = len(weights) // layers
        for layer in range(layers):
            mine = weights[layer * each : (layer + 1) * each]
            starts = [self._start(state, layer, layers) for state in node.inputs[1 : 1 + states]]
            y, *last = self._layer(x, mine, starts)
            lasts.append(last)
            x = self._joined(y, layer == layers - 1)
        made = [x, *(self._stacked(list(each)) for each in zip(*lasts, strict=True))]
        for old, new in zip(node.outputs, made, strict=False):
            replace_value(self.graph, old, new)
        self.graph.remove(node, safe=True)

    def _start(self, state: ir.Value | None, layer: int, layers: int) -> ir.Value | None:
        """The state (D, B, H) that a layer starts from; None where it is zeros."""
        if state is None or _is_zeros(state):
            return None
        if layers == 1:
            return state
        first = layer * self.directions
        ends = [
            self.held(f"index_{at}", np.array([at])) for at in (first, first + self.directions, 0)
        ]
        return self.add("Slice", [state, *ends])

    def _layer(
        self, x: ir.Value, weights: Sequence[ir.Value | None], starts: list[ir.Value | None]
    ) -> list[ir.Value]:
        """The node of one layer: all its states (T, D, B, H), and the last (D, B, H)."""
        each = len(weights) // self.directions
        parts = [weights[place::each] for place in range(each)]  # W, R and biases by direction
        size = _shape(parts[1][0])[1]
        how: dict[str, Any] = {"hidden_size": size}
        if self.directions == 2:
            how["direction"] = "bidirectional"
        if self.kind == "GRU":
            how["linear_before_reset"] = 1
        if attribute(self.node, "activation") != "Tanh":
            how["activations"] = [attribute(self.node, "activation")] * self.directions
        bias = self._bias(parts[2:]) if len(parts) > 2 else None
        both = [self._read(part) for part in parts[:2]]
        count = 3 if self.kind == "LSTM" else 2
        if self.kind == "LSTM" and not self.standard and all(map(_by_channel, both)):
            held = [self._for_kernel(each) for each in both if each is not None]
            grids = [value for _, *grid in held for value in grid]
            inputs = [x, held[0][0], held[1][0], bias, None, *starts, None, *grids]
            made = ir.node(
                "DynamicQuantizeLSTM", inputs, how, num_outputs=count, domain=blocks.MICROSOFT
            )
        else:
            pairs = zip(parts[:2], both, strict=True)
            matrices = [self._matrix(part, found) for part, found in pairs]
            inputs = [x, *matrices, bias, None, *starts]
            while inputs[-1] is None:
                inputs.pop()
            made = ir.node(self.kind, inputs, how, num_outputs=count)
        return insert_all(self.graph, self.node, made)

    def _joined(self, y: ir.Value, last: bool) -> ir.Value:
        """States (T, D, B, H) as what the next layer reads, (T, B, D H), or as the op's result."""
        turns = last and attribute(self.node, "batch_first")
        if self.directions == 1:
            y = self.add("Squeeze", [y, self.held("axis_1", np.array([1]))])
            return self.add("Transpose", [y], perm=[1, 0, 2]) if turns else y
        y = self.add("Transpose", [y], perm=[2, 0, 1, 3] if turns else [0, 2, 1, 3])
        return self.add("Reshape", [y, self.held("shape_joined", np.array([0, 0, -1]))])

    def _stacked(self, states: list[ir.Value]) -> ir.Value:
        return states[0] if len(states) == 1 else self.add("Concat", states, axis=0)

    # --- weights ---------------------------------------------------------------------------------

    def _read(self, part: Sequence[ir.Value | None]) -> Rounded | None:
        """The weights of all directions as one of integers, gates in ONNX's order; None where they
        are in float, or not all on one kind of grid, or read elsewhere too."""
        made = []
        for value in part:
            node = value.producer() if value is not None else None
            if node is None or node.op_type not in QUANTIZERS or not _alone(part):
                return None
            made.append(QUANTIZERS[node.op_type](node))
        return _together(made, GATES[self.kind])

    def _for_kernel(self, weight: Rounded) -> list[ir.Value]:
        """Integers (D, F, G H), their scales and zero points (D, G H), as DynamicQuantizeLSTM
        takes them."""
        integers = weight.integers.unflatten(0, (self.directions, -1)).mT.numpy()
        scales = weight.scales[:, 0].unflatten(0, (self.directions, -1)).numpy()
        zeros = self.held(f"zeros_{'_'.join(map(str, scales.shape))}", np.zeros_like(scales, "i1"))
        name = f"{weight.name}_gates"
        return [self.held(name, integers), self.held(f"{name}_scale", scales), zeros]

    def _matrix(self, part: Sequence[ir.Value | None], weight: Rounded | None) -> ir.Value:
        """A weight of all directions (D, G H, F), gates in ONNX's order."""
        if weight is None:
            return self._ordered(part, f"{_name(part[0])}_gates")
        if self.floats:
            rounded = _values(weight).unflatten(0, (self.directions, -1)).numpy()
            return self.held(f"{weight.name}_gates", rounded)
        made = blocks.folded(self.graph, self.node, weight)
        shape = [self.directions, -1, weight.integers.shape[1]]
        name = f"shape_{'_'.join(map(str, shape))}"
        return self.add("Reshape", [made, self.held(name, np.array(shape))])

    def _bias(self, parts: Sequence[Sequence[ir.Value | None]]) -> ir.Value:
        """Both biases of all directions (D, 2 G H)."""
        if all(array(value) is not None and _alone(part) for part in parts for value in part):
            both = [[_ordered(array(v), GATES[self.kind]) for v in part] for part in parts]
            name = f"{_name(parts[0][0])}_gates"
            return self.held(name, np.concatenate([np.stack(each) for each in both], 1))
        made = [self._ordered(part, f"{_name(part[0])}_gates") for part in parts]
        return self.add("Concat", made, axis=1)

    def _ordered(self, part: Sequence[ir.Value | None], name: str) -> ir.Value:
        """Floats of all directions, one behind the other, in ONNX's order of gates: one constant,
        or where they are computed, or read elsewhere too, by ops."""
        order = GATES[self.kind]
        arrays = [array(value) for value in part]
        if all(each is not None for each in arrays) and _alone(part):
            return self.held(name, np.stack([_ordered(each, order) for each in arrays]))
        made = []
        for value in part:
            if len(order) > 1:
                split = ir.node(
                    "Split", [value], {"num_outputs": len(order), "axis": 0}, num_outputs=len(order)
                )
                gates = insert_all(self.graph, self.node, split)
                value = self.add("Concat", [gates[gate] for gate in order], axis=0)
            made.append(self.add("Unsqueeze", [value, self.held("axis_0", np.array([0]))]))
        return made[0] if len(made) == 1 else self.add("Concat", made, axis=0)


def _makes(value: ir.Value, op: str) -> bool:
    node = value.producer()
    return node is not None and node.op_type == op


def _shape(value: ir.Value | None) -> list[int]:
    """Of a weight, behind its quantizer or not."""
    assert value is not None
    node = value.producer()
    if node is not None and node.op_type in QUANTIZERS:
        return _shape(node.inputs[0])
    assert value.shape is not None
    return [int(size) for size in value.shape]  # type: ignore[arg-type]


def _name(value: ir.Value | None) -> str:
    assert value is not None
    return str(value.name)


def _is_zeros(value: ir.Value) -> bool:
    """Whether it is zeros, of whatever sizes."""
    node = value.producer()
    if node is not None and node.op_type == "Expand" and node.inputs[0] is not None:
        return _is_zeros(node.inputs[0])
    held = array(value)
    return held is not None and not held.any()


def _alone(part: Sequence[ir.Value | None]) -> bool:
    """Whether nothing but recurrent layers reads these weights, nor a layer one of them twice."""
    if len({id(value) for value in part}) < len(part):
        return False
    readers = [usage.node for value in part if value is not None for usage in value.uses()]
    return all(reader.op_type == OP for reader in readers)


def _ordered(values: np.ndarray | None, order: Sequence[int]) -> np.ndarray:
    """Rows (G H, ...) in another order of the gates."""
    assert values is not None
    return np.concatenate([np.split(values, len(order))[gate] for gate in order])


def _by_channel(weight: Rounded | None) -> bool:
    """Whether ONNX Runtime's kernel reads it: 8 bits, each channel with a scale and no more."""
    return weight is not None and weight.form.bits == 8 and not weight.form.alone


def _values(weight: Rounded) -> torch.Tensor:
    """Rows (R, F) of floats."""
    rows, features = weight.integers.float(), weight.integers.shape[1]
    if weight.zero_points is not None:
        rows -= spread(weight.zero_points, weight.group, features)
    return rows * spread(weight.scales, weight.group, features)


def _together(parts: list[Rounded], order: Sequence[int]) -> Rounded | None:
    """Weights on one kind of grid as one, rows behind one another, gates in that order."""
    first = parts[0]
    same = {(p.form.name, p.group, p.axis, p.zero_points is None) for p in parts}
    if len(same) > 1 or first.axis != 0:
        return None

    def joined(tensors: Sequence[torch.Tensor | None]) -> Any:
        gates = [t.chunk(len(order)) for t in tensors if t is not None]
        return torch.cat([each[gate] for each in gates for gate in order]) if gates else None

    names = ("weight", "integers", "scales", "zero_points")
    made = {name: joined([getattr(part, name) for part in parts]) for name in names}
    return Rounded(
        first.name, first.form, arguments=first.arguments, axis=0, group=first.group, **made
    )
