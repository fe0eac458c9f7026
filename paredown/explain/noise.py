"""How far each layer's result is from what it should be, in decibels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from paredown.explain.layers import Layer, chosen, kept_inputs, kept_outputs
from paredown.graph.model import Model
from paredown.graph.quantized.forms import form_of
from paredown.graph.quantized.quantizers import ACTIVATION_QUANTIZERS
from paredown.graph.quantized.runner import Runner, all_quantizers
from paredown.graph.state import tensor_of
from paredown.targets.runtimes import Inside

SAME_DB = 140.0  # no difference at all, or one that float32 cannot hold
ALIKE_DB = 6.0  # far below what the exporter's check of a file allows, far above another tensor's
PARTS = ("weights", "input", "output")  # what a layer's own rounding consists of


@dataclass
class Power:
    """Signal and error of a value, summed over batches; what is not finite in both is left out.

    Example:
        >>> power = Power()
        >>> power.add(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        >>> round(power.db)
        20
    """

    signal: float = 0.0
    error: float = 0.0
    values: int = 0

    def add(self, reference: Tensor, value: Tensor) -> None:
        if not reference.is_floating_point() or reference.shape != value.shape:
            return
        a, b = reference.double(), value.double()
        finite = torch.isfinite(a) & torch.isfinite(b)
        if not bool(finite.all()):
            a, b = a[finite], b[finite]
        self.signal += float(a.square().sum())
        self.error += float((a - b).square().sum())
        self.values += a.numel()

    @property
    def db(self) -> float | None:
        """Signal over error; None where nothing could be compared."""
        return to_db(self.signal, self.error) if self.values else None


def to_db(signal: float, error: float) -> float:
    """Signal over error in decibels, at most `SAME_DB` to either side of 0.

    Example:
        >>> to_db(100.0, 1.0), to_db(1.0, 0.0), to_db(0.0, 1.0)
        (20.0, 140.0, -140.0)
    """
    if error <= 0:
        return SAME_DB
    if signal <= 0:
        return -SAME_DB
    return max(-SAME_DB, min(SAME_DB, 10 * math.log10(signal / error)))


@dataclass
class Outputs:
    """Signal and error of all outputs of a model, each counting alike whatever its size."""

    powers: list[Power] = field(default_factory=list)

    def add(self, references: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.powers = self.powers or [Power() for _ in references]
        for power, reference, value in zip(self.powers, references, values, strict=True):
            power.add(reference, value)

    @property
    def db(self) -> float | None:
        found = [power for power in self.powers if power.values]
        if not found:
            return None
        errors = [power.error / power.signal if power.signal else 0.0 for power in found]
        return to_db(1.0, sum(errors) / len(errors))


@dataclass
class Noise:
    """The noise in one layer's result.

    Attributes:
        original: of the file beside the original: everything that was done so far.
        exact: of the file beside the same graph without rounding: the rounding so far.
        own: added by this layer alone, given exact inputs.
        parts: of that, what each of `PARTS` adds alone.
        shown: whether the exported file shows this value; else it is that of the graph.
    """

    original: Power = field(default_factory=Power)
    exact: Power = field(default_factory=Power)
    own: Power = field(default_factory=Power)
    parts: dict[str, Power] = field(default_factory=lambda: {part: Power() for part in PARTS})
    shown: bool = False

    def shares(self) -> dict[str, float]:
        """The share that each part has in the layer's own noise; they sum to 1."""
        total = sum(part.error for part in self.parts.values())
        return {name: part.error / total if total else 0.0 for name, part in self.parts.items()}


class Meter:
    """Gathers the noise of every layer, batch by batch; holds one batch's values at a time.

    Args:
        original: `folded`.
        note: called with every node and value of the compressed graph without rounding.
    """

    def __init__(
        self,
        original: Model,
        compressed: Model,
        layers: Sequence[Layer],
        inside: Inside | None = None,
        note: Callable[[fx.Node, Any], None] | None = None,
    ):
        self.noise = {layer.name: Noise() for layer in layers}
        self.original, self.exact = Outputs(), Outputs()  # the file's outputs beside those of both
        self.agreement = Outputs()  # of the file with the graph
        self._compressed, self._layers, self._inside, self._note = compressed, layers, inside, note
        self._reference = Runner(original.graph)
        self._runner = Runner(compressed.graph)
        self._all = all_quantizers(compressed.graph)
        self._rounds = bool(self._all)

    def add(self, leaves: Sequence[Tensor]) -> None:
        """One batch, through the original, the graph with and without rounding, and the file."""
        wanted = {layer.reference or "" for layer in self._layers}
        inputs = {name for layer in self._layers for name in read_by(layer)}
        if not self._rounds:
            wanted |= inputs
        references, whole = _recorded(self._reference, leaves, wanted)
        exact, plain = references, whole
        if self._rounds:
            wanted = {layer.exact.name for layer in self._layers} | inputs
            exact, plain = _recorded(self._runner, leaves, wanted, self._all, self._note)
        ends = {layer.result.name for layer in self._layers}
        also = None if self._rounds else self._note
        simulated, outputs = _recorded(self._runner, leaves, ends, also=also)
        shown: dict[str, Tensor] = {}
        if self._inside:
            simulation, (outputs, shown) = outputs, self._inside(leaves)
            self.agreement.add(simulation, outputs)
        for layer in self._layers:
            self._compare(layer, references, exact, simulated, shown)
        self.original.add(whole, outputs)
        self.exact.add(plain, outputs)

    def _compare(
        self,
        layer: Layer,
        references: Mapping[str, Tensor],
        exact: Mapping[str, Tensor],
        simulated: Mapping[str, Tensor],
        shown: Mapping[str, Tensor],
    ) -> None:
        noise, mine = self.noise[layer.name], simulated.get(layer.result.name)
        if mine is None or not mine.is_floating_point():
            return
        value = shown.get(layer.result.name)
        if value is not None and _alike(mine, value):
            noise.shown = True
        else:
            value = mine
        reference = self._original_value(layer, references, value)
        if reference is not None:
            noise.original.add(reference, value)
        if self._rounds and layer.exact.name in exact:
            noise.exact.add(exact[layer.exact.name], value)
        self._add_own(
            noise, layer, exact, exact.get(layer.exact.name) if self._rounds else reference
        )

    def _original_value(
        self, layer: Layer, references: Mapping[str, Tensor], like: Tensor
    ) -> Tensor | None:
        found = references.get(layer.reference or "")
        if found is None or found.dim() < 2:
            return None
        return chosen(found, layer.channels, kept_outputs(self._compressed, layer), like)

    def _add_own(
        self,
        noise: Noise,
        layer: Layer,
        exact: Mapping[str, Tensor],
        reference: Tensor | None,
    ) -> None:
        if reference is None or (self._rounds and layer.bits is None):
            return
        given = {name: exact[name] for name in read_by(layer) if name in exact}
        if len(given) < len(read_by(layer)):
            return
        if not self._rounds:
            given = {name: self._cut(layer, value) for name, value in given.items()}
        value = run_alone(layer, self._runner, given)
        if value is None:
            return
        noise.own.add(reference, value)
        for part in PARTS if self._rounds else ():
            value = run_alone(layer, self._runner, given, {part})
            if value is not None:
                noise.parts[part].add(reference, value)

    def _cut(self, layer: Layer, value: Tensor) -> Tensor:
        """An input of the original as the layer reads it after its channels were cut."""
        kept, dim = kept_inputs(self._compressed, layer), layer.channels
        if kept is None or value.dim() < 2 or int(kept.max()) >= value.shape[dim]:
            return value
        return value.index_select(dim, kept)


def _alike(mine: Tensor, shown: Tensor) -> bool:
    """Whether the file's tensor can be the graph's value: exporters may use a name anew."""
    power = Power()
    power.add(mine, shown)
    return power.db is not None and power.db >= ALIKE_DB


def _recorded(
    runner: Runner,
    leaves: Sequence[Tensor],
    wanted: set[str],
    passed: set[str] | frozenset[str] = frozenset(),
    also: Callable[[fx.Node, Any], None] | None = None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The wanted values as they were when they were made, and the outputs."""
    found: dict[str, Tensor] = {}

    def note(node: fx.Node, value: Any) -> None:
        result = _result(value)
        if node.name in wanted and result is not None:
            found[node.name] = result.detach().clone()
        if also is not None:
            also(node, value)

    outputs = runner.outputs(leaves, passed, note=note)
    return found, outputs


def read_by(layer: Layer) -> list[str]:
    """The nodes, quantizers aside, whose values the ops of a layer read."""
    found: dict[str, None] = {}
    for node in layer.chain:
        for arg in node.all_input_nodes:
            while arg.target in ACTIVATION_QUANTIZERS and arg not in layer.chain:
                arg = arg.all_input_nodes[0]
            if arg not in layer.chain and not _is_state(arg):
                found[arg.name] = None
    return list(found)


def _is_state(node: fx.Node) -> bool:
    return node.op == "get_attr" or form_of(node) is not None


def run_alone(
    layer: Layer,
    runner: Runner,
    given: Mapping[str, Tensor],
    rounding: set[str] | None = None,
) -> Tensor | None:
    """The result of one layer given exact inputs; None where it does not take them.

    Args:
        rounding: which of `PARTS` are rounded; by default all.
    """
    parts = set(PARTS) if rounding is None else rounding
    values: dict[fx.Node, Any] = {}

    def value_of(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        if node.op == "get_attr":
            return tensor_of(runner.source, str(node.target)).detach()
        if form_of(node) is not None:
            source: Any = node.args[0]
            return runner.weight(node) if "weights" in parts else value_of(source)
        if node.target in ACTIVATION_QUANTIZERS:
            source = node.args[0]
            part = "output" if node in layer.chain else "input"
            return _call(node, value_of) if part in parts else value_of(source)
        return given[node.name]

    with torch.no_grad():
        try:
            for node in layer.chain:
                if node.target in ACTIVATION_QUANTIZERS:
                    values[node] = value_of(node)
                else:
                    values[node] = _call(node, value_of)
        except (RuntimeError, KeyError):  # the original's input does not fit a cut layer
            return None
    return _result(values[layer.result])


def _result(value: Any) -> Tensor | None:
    """What a layer gives: of a recurrent one its states, the first of several tensors."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def _call(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    args = fx.node.map_arg(node.args, value_of)
    kwargs = fx.node.map_arg(node.kwargs, value_of)
    return node.target(*args, **kwargs)  # type: ignore[operator]
