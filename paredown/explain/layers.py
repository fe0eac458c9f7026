"""The layers of a compressed graph, and where the result of each stands in the original's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.fold import fold_batch_norm
from paredown.graph.model import Model
from paredown.graph.quantized.quantizers import (
    ACTIVATION_QUANTIZERS,
    weight_forms,
)
from paredown.graph.quantized.regions import FOLLOWERS
from paredown.graph.sites import Site, sites

aten = torch.ops.aten
# kind -> the weight's dimensions of output and of input channels
_CHANNELS = {
    "conv": (0, 1),
    "conv_transpose": (1, 0),
    "linear": (0, 1),
    "matmul": (1, 0),
    "embedding": (1, 0),
}


@dataclass(frozen=True)
class Layer:
    """One weight and the ops that run as one with it, at the first place that uses it.

    Attributes:
        name: of the weight.
        chain: the op, the batch norm and activation that belong to it, and the quantizer of
            their result; each is the only user of the one before.
        reference: the node of the original, batch norms folded, that computes the same; None
            where it has none.
        bits: that a weight takes, None where it is not quantized.
    """

    name: str
    site: Site
    chain: tuple[fx.Node, ...]
    reference: str | None
    bits: int | None

    @property
    def result(self) -> fx.Node:
        """What the next layers read."""
        return self.chain[-1]

    @property
    def exact(self) -> fx.Node:
        """The result before it is rounded."""
        return next(n for n in reversed(self.chain) if n.target not in ACTIVATION_QUANTIZERS)

    @property
    def channels(self) -> int:
        """The dimension of the result that holds the layer's output channels."""
        return 1 if self.site.kind in ("conv", "conv_transpose") else -1


def folded(original: Model) -> Model:
    """The original in evaluation mode, its batch norms folded: a layer is then one op."""
    made = original.copy().eval()
    fold_batch_norm(made.graph)
    return made


def find_layers(compressed: fx.GraphModule, original: fx.GraphModule) -> list[Layer]:
    """The layers of a graph in the order it runs them; ``original`` is `folded`.

    Example:
        >>> import paredown
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU())
        >>> graph = paredown.capture(net, (torch.zeros(1, 4),)).graph
        >>> [(each.name, each.result.name, each.reference) for each in find_layers(graph, graph)]
        [('0.weight', 'relu', 'relu')]
    """
    known = {node.name: node for node in original.graph.nodes}
    bits = {name: form.bits for name, form in weight_forms(compressed).items()}
    first: dict[str, Site] = {}
    for site in sites(compressed):
        first.setdefault(site.weight, site)
    found = []
    for site in first.values():
        chain = _chain(site.node)
        reference = _reference(chain, known)
        found.append(Layer(site.weight, site, chain, reference, bits.get(site.weight)))
    return found


def _chain(node: fx.Node) -> tuple[fx.Node, ...]:
    chain = [node]
    while len(chain[-1].users) == 1 and chain[-1].target not in ACTIVATION_QUANTIZERS:
        user = next(iter(chain[-1].users))
        known = user.target in FOLLOWERS or user.target in ACTIVATION_QUANTIZERS
        if not known and user.target is not aten.batch_norm.default:
            break
        chain.append(user)
    return tuple(chain)


def _reference(chain: tuple[fx.Node, ...], known: dict[str, fx.Node]) -> str | None:
    """The last op of the chain, by its name in the original; its batch norm is folded there."""
    for node in reversed(chain):
        if node.target in ACTIVATION_QUANTIZERS:
            continue
        if node.name in known:
            return node.name
        if node.target is not aten.batch_norm.default:
            return None
    return None


def kept_outputs(compressed: Model, layer: Layer) -> Tensor | None:
    """Which of the original's output channels the layer still has; None where that is all."""
    return _kept(compressed, layer, 0)


def kept_inputs(compressed: Model, layer: Layer) -> Tensor | None:
    """Which of the original's input channels the layer still reads; None where that is all."""
    groups: Any = layer.site.node.args[6] if len(layer.site.node.args) > 6 else 1
    if layer.site.kind == "conv" and groups != 1:  # one group for each channel: in as out
        return _kept(compressed, layer, 0)
    return _kept(compressed, layer, 1)


def _kept(compressed: Model, layer: Layer, side: int) -> Tensor | None:
    dims = _CHANNELS.get(layer.site.kind)
    return compressed.kept.get(layer.name, {}).get(dims[side]) if dims else None


def chosen(value: Tensor, dim: int, kept: Tensor | None, like: Tensor) -> Tensor | None:
    """The original's value without the channels that were cut; None where shapes do not agree."""
    if kept is not None and value.dim() and value.shape != like.shape:
        if int(kept.max()) >= value.shape[dim]:
            return None
        value = value.index_select(dim, kept.to(value.device))
    return value if value.shape == like.shape else None
