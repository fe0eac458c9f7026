"""Sums of two products that leave 16 bits, as x86 processors without VNNI add them.

There ``vpmaddubsw`` multiplies unsigned bytes by signed ones and adds neighbours in 16 bits, which
saturate; ``vpmaddwd`` then adds on in 32. Neighbours are inputs 0 and 1, 2 and 3, ... of a layer,
in the order in which kernels pack them, channels last: a kernel's places, and at each its channels.

- ONNX Runtime (``mlas/lib``: QgemmU8X8KernelAvx2, QgemvU8S8KernelAvx2, ConvSymKernelAvx2 and their
  Avx512Core forms; ``ReorderFilter`` of qlinearconv.cc): pairs go on across a kernel's places,
  which matters where channels are odd in number.
- oneDNN, under OpenVINO (jit_uni_x8s8s32x_conv_kernel, jit_avx512_core_x8s8s32x_conv_kernel,
  jit_brgemm_kernel): channels are filled up with zeros at each place, so pairs stay within it.

Both multiply depthwise convolutions in 32 bits, and VNNI (``vpdpbusd``) adds in 32.

Shapes: G independent parts of a layer (a grouped convolution has several), P places of the output,
R outputs and K inputs of a part, J pairs of them. ``codes`` (G, P, K) are bytes, ``integers``
(G, R, K) weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from paredown.graph.interpret import Pass
from paredown.graph.patches import groups_of, layer_inputs
from paredown.graph.quantized.forms import form_of
from paredown.graph.quantized.per_channel import PER_CHANNEL
from paredown.graph.quantized.quantizers import (
    DYNAMIC,
    PER_TENSOR,
    read,
)
from paredown.graph.quantized.regions import INTEGER_KINDS
from paredown.graph.quantized.rounding import affine_of
from paredown.graph.quantized.scales import LEVELS
from paredown.graph.sites import Site, sites

LEAST, MOST = -(2**15), 2**15 - 1
SAFE = 63  # weights of 7 bits: no pair of theirs leaves 16, whatever comes
ACROSS, WITHIN = "across", "within"  # a kernel's places
CHUNK = 1 << 22  # sums in memory at a time


def excess(codes: Tensor, integers: Tensor) -> Tensor:
    """By how much the sums of pairs leave 16 bits, added up: (G, P, K) x (G, R, K) -> (G, P, R).

    What a saturating kernel gives is the exact product less this.

    Example:
        >>> codes, integers = torch.tensor([[[255, 255, 255]]]), torch.tensor([[[127, 127, 127]]])
        >>> exact = (codes.double() @ integers.double().mT).long()
        >>> exact, exact - excess(codes, integers)
        (tensor([[[97155]]]), tensor([[[65152]]]))
    """
    groups, places, _ = codes.shape
    outputs = integers.shape[1]
    over = torch.zeros(groups * outputs, places, dtype=torch.int64)
    for rows, sums in _pair_sums(codes, integers):
        over.index_add_(0, rows, sums - sums.clamp(LEAST, MOST))
    return over.reshape(groups, outputs, places).mT


def saturates(codes: Tensor, integers: Tensor) -> bool:
    """Whether the sum of any pair leaves 16 bits.

    Example:
        >>> weights = torch.tensor([[[127, 0, 127]]])
        >>> saturates(torch.tensor([[[255, 0, 255]]]), weights)
        False
        >>> saturates(torch.tensor([[[255, 255, 0]]]), weights + 2)
        True
    """
    for _, sums in _pair_sums(codes, integers):
        low, high = torch.aminmax(sums)
        if int(low) < LEAST or int(high) > MOST:
            return True
    return False


def _pair_sums(codes: Tensor, integers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The sums (n, P) of the pairs that can leave 16 bits, a part of them at a time, with the
    outputs (n,) that they belong to, those of all G parts numbered on."""
    codes, integers = (_in_pairs(each) for each in (codes, integers))  # (G, P, J, 2), (G, R, J, 2)
    part, output, pair = _reaching(codes.amax(1), integers)
    each = max(1, CHUNK // max(1, codes.shape[1]))
    for start in range(0, len(part), each):
        g, r, j = (found[start : start + each] for found in (part, output, pair))
        taken, weights = codes[g, :, j].long(), integers[g, r, j].long()[:, None]  # (n, P, 2)
        sums = taken[..., 0] * weights[..., 0] + taken[..., 1] * weights[..., 1]
        yield g * integers.shape[1] + r, sums


def _in_pairs(values: Tensor) -> Tensor:
    return F.pad(values, (0, values.shape[-1] % 2)).unflatten(-1, (-1, 2))


def _reaching(largest: Tensor, integers: Tensor) -> tuple[Tensor, ...]:
    """The part, output and pair of what can leave 16 bits where codes (G, J, 2) are the largest."""
    found = []
    for rows in integers.split(max(1, CHUNK // max(1, largest.numel())), 1):
        # the two of each pair by name: a sum over so short a dimension takes four times as long
        one, other = (rows[..., n].int() * largest[:, None, :, n].int() for n in (0, 1))
        top = one.clamp(min=0) + other.clamp(min=0)  # (G, R, J)
        bottom = one.clamp(max=0) + other.clamp(max=0)
        found.append((top > MOST) | (bottom < LEAST))
    return torch.cat(found, 1).nonzero(as_tuple=True)


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies bytes by weights of 8 bits, and could leave 16 bits.

    ``integers`` (G, R, places, C), int8, are its weights, ``scales`` (G * R,) theirs.
    """

    site: Site
    integers: Tensor
    scales: Tensor
    weight: Tensor

    def packed(self, codes: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
        """Codes (G, P, places, C) and the integers as a kernel pairs them: (G, P, K), (G, R, K)."""
        odd = self.integers.shape[-1] % 2 if pairs == WITHIN else 0
        made = [F.pad(each, (0, odd)).flatten(2) for each in (codes, self.integers)]
        return made[0], made[1]

    def codes(self, shifted: Tensor, zero_point: int) -> Iterator[Tensor]:
        """What each example's places multiply, (G, P, places, C), from codes less the zero point:
        padding is the zero point."""
        groups, channels = self.integers.shape[0], self.integers.shape[-1]
        if self.site.kind != "conv":
            rows = shifted.reshape(-1, shifted.shape[-1])
            yield (rows + zero_point)[None, :, None]
            return
        batched = shifted if shifted.dim() == self.weight.dim() else shifted[None]
        last = batched.movedim(1, -1).contiguous().movedim(-1, 1)  # whole pixels are copied below
        for image in last:
            seen = layer_inputs(self.site, self.weight, image[None])  # (*places, C, *kernel)
            seen = seen.movedim(1 - self.weight.dim(), -1).flatten(self.weight.dim() - 1, -2)
            seen = seen.flatten(0, -3) + zero_point  # (P, places, C)
            yield seen.unflatten(2, (groups, channels)).permute(2, 0, 1, 3)

    def reached(self, shifted: Tensor, zero_point: int) -> Tensor:
        """The largest code of each input, (G, 1, places, C)."""
        groups, _, places, channels = self.integers.shape
        axis = shifted.dim() - 1
        if self.site.kind == "conv":
            axis = shifted.dim() - self.weight.dim() + 1
        others = [dim for dim in range(shifted.dim()) if dim != axis]
        largest = shifted.amax(others) if others else shifted
        largest = (largest.clamp(min=0) if self.site.kind == "conv" else largest) + zero_point
        return largest.reshape(groups, 1, 1, channels).expand(-1, -1, places, -1)

    def saturates(self, shifted: Tensor, zero_point: int) -> bool:
        """Whether any pair of this input leaves 16 bits, in either order of packing."""
        orders = (ACROSS, WITHIN) if self.integers.shape[-1] % 2 else (ACROSS,)
        if not any(self._reaches(self.reached(shifted, zero_point), order) for order in orders):
            return False
        return any(
            saturates(*self.packed(codes, order))
            for codes in self.codes(shifted, zero_point)
            for order in orders
        )

    def _reaches(self, codes: Tensor, order: str) -> bool:
        codes, integers = (_in_pairs(each) for each in self.packed(codes, order))
        return len(_reaching(codes[:, 0], integers)[0]) > 0

    def could(self) -> bool:
        """Whether any input at all makes a pair leave 16 bits."""
        codes = torch.full_like(self.integers[:, :1], LEVELS, dtype=torch.int16)
        return any(self._reaches(codes, order) for order in (ACROSS, WITHIN))


def layers(graph: fx.GraphModule) -> Iterator[Layer]:
    """The layers of a quantized graph of which some input could make a pair leave 16 bits."""
    return _could(graph, INTEGER_KINDS)


def unseen(graph: fx.GraphModule) -> Iterator[Layer]:
    """The same of recurrent layers, whose kernels round a state that only they see."""
    return _could(graph, ("recurrent",))


def _could(graph: fx.GraphModule, kinds: Collection[str]) -> Iterator[Layer]:
    for site in sites(graph):
        if site.kind in kinds and site.input.target in (PER_TENSOR, DYNAMIC):
            made = _layer(graph, site)
            if made is not None and made.could():
                yield made


def _layer(graph: fx.GraphModule, site: Site) -> Layer | None:
    """None where kernels multiply in 32 bits: of a depthwise convolution, or of float weights."""
    read_by = [node for node in site.node.all_input_nodes if node.target is PER_CHANNEL]
    quantizer = next((n for n in read_by if _names(n) == site.weight), None)
    if quantizer is None:
        return None
    made, groups = read(graph, quantizer), groups_of(site)
    if site.kind == "conv":
        each = made.shaped().flatten(2).mT  # (R, places, C)
        if each.shape[-1] == 1 and len(each) == groups:
            return None
    else:
        each = made.integers[:, None]  # (R, 1, K)
    return Layer(site, each.unflatten(0, (groups, -1)), made.scales[:, 0], made.weight)


def _names(quantizer: fx.Node) -> str:
    """The weight that it rounds."""
    return str(quantizer.args[0].target)  # type: ignore[union-attr]


class Watch:
    """Runs batches through a quantized graph and finds the layers with pairs that leave 16 bits."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._left: dict[fx.Node, Layer] = {layer.site.node: layer for layer in layers(graph)}
        self._codes: dict[fx.Node, tuple[Tensor, int]] = {}
        self._weights: dict[fx.Node, Any] = {}  # rounded once, not at every batch
        self._pass = Pass(graph, self._value)
        self.found: set[str] = set()

    @property
    def done(self) -> bool:
        """Whether no batch could find more."""
        return not self._left

    def run(self, leaves: Sequence[Tensor]) -> None:
        """One batch, its inputs in the graph's order."""
        with torch.no_grad():
            self._pass.run(*[leaf.clone() for leaf in leaves])
        self._left = {n: e for n, e in self._left.items() if e.site.weight not in self.found}
        self._codes.clear()

    def _value(self, run: Pass, node: fx.Node) -> Any:
        if form_of(node) is not None:
            if node not in self._weights:
                self._weights[node] = run.compute(node)
            return self._weights[node]
        value = run.compute(node)
        if node.target is DYNAMIC:
            self._codes[node] = _dynamic_codes(*run.arguments(node)[0]), 0
        layer = self._left.get(node)
        if layer is not None and layer.site.weight not in self.found:
            source = layer.site.input
            given = self._codes.get(source) or _static_codes(source, run.env[source])
            if layer.saturates(*given):
                self.found.add(layer.site.weight)
        return value


def _static_codes(quantizer: fx.Node, value: Tensor) -> tuple[Tensor, int]:
    """The codes of a value on its quantizer's grid less the zero point, and that."""
    _, scale, zero_point, *_ = quantizer.args
    codes = (value / scale).round().short()  # type: ignore[operator]
    return codes, zero_point  # type: ignore[return-value]


def _dynamic_codes(x: Tensor, low: int, high: int) -> Tensor:
    """The codes that each example would have as a batch of its own."""
    made = []
    for each in x if x.dim() > 1 else x[None]:
        scale, zero_point = affine_of(each, low, high)
        made.append(((each / scale).round() + zero_point).clamp(low, high).short())
    return torch.stack(made)


def simulate(graph: fx.GraphModule, leaves: Sequence[Tensor], pairs: str) -> list[Tensor]:
    """The outputs of a quantized graph as a saturating kernel that pairs so gives them.

    Layers whose ranges are found at each inference are computed exactly.
    """
    known = {layer.site.node: layer for layer in layers(graph)}

    def rule(run: Pass, node: fx.Node) -> Any:
        value: Any = run.compute(node)
        layer = known.get(node)
        if layer is None or layer.site.input.target is not PER_TENSOR:
            return value
        source = layer.site.input
        given = _static_codes(source, run.env[source])
        over = [excess(*layer.packed(codes, pairs)) for codes in layer.codes(*given)]
        flat = torch.cat([each.transpose(0, 1).flatten(1) for each in over])  # (places, G * R)
        scale: Any = source.args[1]
        lost = flat * layer.scales * scale
        if layer.site.kind != "conv":
            return value - lost.reshape(value.shape)
        axis = value.dim() - layer.weight.dim() + 1
        return value - lost.reshape(value.movedim(axis, -1).shape).movedim(-1, axis)

    return Pass(graph, rule).outputs(leaves)
