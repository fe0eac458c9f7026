"""Shared weights in an ONNX file as they are.

The exporter would fold norms into convolutions, which gives each channel values of its own; ONNX
Runtime folds them all the same, when it opens the file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import values as onnxscript_values
from torch import Tensor

from paredown.graph.edit import insert_after
from paredown.graph.model import Model
from paredown.graph.sites import sites
from paredown.graph.state import getattr_or_none, tensor_of
from paredown.targets.formats.onnx import bits


@torch.library.custom_op("paredown::keep", mutates_args=())
def keep(weight: Tensor) -> Tensor:
    """The weight itself, in a box that the exporter does not look into.

    Example:
        >>> keep(torch.tensor([1.0]))
        tensor([1.])
    """
    return weight.clone()


@keep.register_fake
def _(weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


KEEP = torch.ops.paredown.keep.default


def _keep(x: Any) -> Any:
    return onnxscript_values.Opset(bits.DOMAIN, 1).Keep(x)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {KEEP: _keep}  # for the exporter


def box(model: Model) -> Model:
    """A copy whose shared convolution weights are out of the exporter's reach."""
    if not model.shared:
        return model
    made = model.copy()
    shared = {id(getattr_or_none(made.graph, name)) for name in made.shared}
    for site in sites(made.graph):
        direct = [n for n in site.node.all_input_nodes if n.target == site.weight]
        if "conv" in site.kind and direct and id(tensor_of(made.graph, site.weight)) in shared:
            insert_after(direct[0], KEEP, (), [site.node])  # behind a quantizer there is no norm
    made.graph.recompile()
    return made


def unbox(graph: ir.Graph) -> None:
    """The weights in the place of the ops that kept them."""
    for node in [n for n in graph if n.op_type == "Keep" and n.domain == bits.DOMAIN]:
        weight = node.inputs[0]
        assert weight is not None
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)
