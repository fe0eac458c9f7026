"""Which values of a graph should pass through integers, so that runtimes fuse the ops between.

Convolutions and linear layers take integers. From there integers spread: through ops that only
move or pick values, through a ReLU into the op before it, and into additions, products and
concatenations whose result is wanted as integers. Everything else stays in float.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.edit import keep_meta
from paredown.graph.model import Model
from paredown.graph.sites import Site, sites
from paredown.graph.values import refresh_values

aten = torch.ops.aten

INTEGER_KINDS = ("conv", "linear", "matmul")  # of layers with an integer kernel
ROUNDED_KINDS = (*INTEGER_KINDS, "recurrent")  # whose weights become integers, whatever runs them

# A ReLU runs inside the op before it: no rounding between the two.
FOLLOWERS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default}
# These only move or pick values: output and input share one scale.
MOVERS = {
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.flatten.using_ints, aten.unflatten.int, aten.view.default, aten.reshape.default),
    *(aten.transpose.int, aten.permute.default, aten.movedim.int, aten.movedim.intlist),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default),
    *(aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.contiguous.default),
    *(aten.clone.default, aten.dropout.default, aten.feature_dropout.default),
    *(aten.upsample_nearest2d.vec, aten.upsample_nearest1d.vec, aten.pixel_shuffle.default),
    *(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.alias.default),
    *(aten.channel_shuffle.default, aten.expand.default, aten.detach.default, operator.getitem),
    *(aten.expand_as.default, aten.reshape_as.default, aten.view_as.default),
}
# Activations that ONNX Runtime merges into a matrix product in float.
MERGED = {
    *(aten.relu.default, aten.leaky_relu.default, aten.sigmoid.default, aten.tanh.default),
    *(aten.elu.default, aten.softplus.default, aten.hardsigmoid.default, aten.selu.default),
}
AVERAGES = {aten.avg_pool2d.default, aten.avg_pool1d.default}
# Unary ops with an integer kernel (a table of 256 entries).
TABLES = {aten.sigmoid.default, aten.leaky_relu.default}
COMBINERS = {aten.add.Tensor, aten.mul.Tensor, aten.cat.default}
_FUNCTIONAL: dict[Any, Any] = {
    aten.relu_.default: aten.relu.default,
    aten.relu6_.default: aten.relu6.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.silu_.default: aten.silu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.hardswish_.default: aten.hardswish.default,
    aten.gelu_.default: aten.gelu.default,
    aten.elu_.default: aten.elu.default,
    aten.dropout_.default: aten.dropout.default,
}
_VIEWS = {
    *(aten.view.default, aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.t.default),
    *(aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default),
    *(operator.getitem, aten.reshape.default, aten.flatten.using_ints, aten.detach.default),
}


@dataclass
class Regions:
    """The sites that run on integers, and the values that are quantized.

    ``own`` are the values with a range of their own; ``shared`` maps a value to the one whose
    scale it takes over. ``takers`` are the users that read a value as integers where it is computed
    in float: its other users, such as a residual sum in float, need not lose by it.
    """

    sites: list[Site]
    own: list[fx.Node] = field(default_factory=list)
    shared: dict[fx.Node, fx.Node] = field(default_factory=dict)
    takers: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)


def prepare(model: Model) -> None:
    """Rewrite a graph, in place and without changing what it computes, so that more of it fuses."""
    refresh_values(model)
    graph = model.graph
    for node in list(graph.graph.nodes):
        if node.target in _FUNCTIONAL:
            _make_functional(node)
    for node in list(graph.graph.nodes):
        if node.target is aten.silu.default:
            _split_silu(node)
        elif node.target is aten.mean.dim:
            _keep_mean_dims(node)
    graph.graph.lint()
    graph.recompile()


def _make_functional(node: fx.Node) -> None:
    """``relu_(x)`` becomes ``relu(x)``, and what read ``x`` afterwards reads the result."""
    changed = node.args[0]
    if (
        not isinstance(changed, fx.Node)
        or changed.target in _VIEWS
        or changed.op != "call_function"
    ):
        return
    if any(user.target in _VIEWS and user < node for user in changed.users):
        return
    node.target = _FUNCTIONAL[node.target]
    later = [user for user in changed.users if node < user]
    for user in later:
        user.replace_input_with(changed, node)


def _split_silu(node: fx.Node) -> None:
    with node.graph.inserting_before(node):
        gate = node.graph.call_function(aten.sigmoid.default, (node.args[0],))
    keep_meta(gate, node)
    node.target, node.args = aten.mul.Tensor, (node.args[0], gate)


def _keep_mean_dims(node: fx.Node) -> None:
    """A mean over both image axes keeps its dimensions and is flattened after: then it fuses."""
    if not _is_image_mean(node) or (len(node.args) > 2 and node.args[2]) or node.kwargs:
        return
    with node.graph.inserting_after(node):
        flat = node.graph.call_function(aten.flatten.using_ints, (node, 1))
    keep_meta(flat, node)
    node.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)
    node.args = (node.args[0], [2, 3], True)
    value = node.meta["val"]
    node.meta["val"] = value.reshape(*value.shape, 1, 1)


def _is_image_mean(node: fx.Node) -> bool:
    if node.target is aten.adaptive_avg_pool2d.default:
        return node.args[1] in ([1, 1], 1)
    if node.target is not aten.mean.dim or not isinstance(node.args[0], fx.Node):
        return False
    value = node.args[0].meta.get("val")
    dims: Any = node.args[1]
    rank = value.dim() if isinstance(value, Tensor) else 0
    return rank == 4 and dims is not None and sorted(d % 4 for d in dims) == [2, 3]


def find_regions(model: Model, skip: set[str]) -> Regions:
    """Where integers pay in this graph; ``skip`` names weights whose layers stay in float."""
    chosen = [s for s in sites(model.graph) if s.weight not in skip and _runs_on_integers(s)]
    weighted = {site.node: site for site in chosen}
    nodes = [node for node in model.graph.graph.nodes if _is_float(node)]
    wanted = _wanted(nodes, weighted)
    integer: dict[fx.Node, bool] = {}
    for node in nodes:
        integer[node] = _becomes_integer(node, weighted, wanted, integer)
    regions = Regions(chosen)
    for node in nodes:
        if integer[node] and not _absorbed(node, integer):
            source = _moved_from(node)
            if source is None:
                regions.own.append(node)
            else:
                regions.shared[node] = regions.shared.get(source, source)
        elif not integer[node]:
            takers = {user for user in node.users if _takes(user, node, weighted, integer)}
            if takers:
                regions.own.append(node)
                regions.takers[node] = takers
    return regions


def _runs_on_integers(site: Site) -> bool:
    if site.kind not in INTEGER_KINDS:
        return False
    source = site.node.args[1 if site.node.target is aten.addmm.default else 0]
    return isinstance(source, fx.Node) and source.op != "get_attr" and _is_float(site.node)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return node.target in MOVERS and all(isinstance(v, Tensor) for v in value)
    return node.op != "output" and isinstance(value, Tensor) and value.dtype is torch.float32


def _wanted(nodes: list[fx.Node], weighted: dict[fx.Node, Site]) -> set[fx.Node]:
    """The values that an integer op downstream would take, perhaps through other ops."""
    wanted: set[fx.Node] = set()
    spreads = FOLLOWERS | MOVERS | AVERAGES | TABLES | COMBINERS
    for node in reversed(nodes):
        for user in node.users:
            passes = (user.target in spreads or _is_image_mean(user)) and user in wanted
            if passes or (user in weighted and weighted[user].input is node):
                wanted.add(node)
    return wanted


def _becomes_integer(
    node: fx.Node,
    weighted: dict[fx.Node, Site],
    wanted: set[fx.Node],
    integer: dict[fx.Node, bool],
) -> bool:
    if node.op == "get_attr":
        return False
    if node in weighted:  # a convolution fuses only with a quantized output
        return weighted[node].kind == "conv" or node in wanted or _fuses_in_float(node)
    if node.op == "placeholder":
        return False
    inputs = [arg for arg in node.all_input_nodes if _is_float(arg)]
    available = [integer.get(arg, False) for arg in inputs]
    if node.target in FOLLOWERS or node.target in MOVERS:
        return bool(available) and available[0]
    if node.target in AVERAGES or _is_image_mean(node):
        return available[0] and node in wanted
    if node.target in TABLES:
        return available[0] and node in wanted
    if node.target in COMBINERS and _combines_activations(node):
        return node in wanted and any(available)
    return False


def _fuses_in_float(node: fx.Node) -> bool:
    """ONNX Runtime merges a plain matrix product with the activation behind it before it looks for
    integers; a quantizer between or behind the two prevents that."""
    users = list(node.users)
    return node.meta["val"].dim() == 2 and len(users) == 1 and users[0].target in MERGED


def _combines_activations(node: fx.Node) -> bool:
    """Both operands are computed values: not a number, not a parameter, not scaled."""
    operands: Any = node.args[0] if node.target is aten.cat.default else node.args[:2]
    plain = all(isinstance(arg, fx.Node) and arg.op != "get_attr" for arg in operands)
    return plain and "alpha" not in node.kwargs and all(_is_float(arg) for arg in operands)


def _absorbed(node: fx.Node, integer: dict[fx.Node, bool]) -> bool:
    """Its only user is a ReLU, which carries the quantizer instead; or it is a tuple."""
    if isinstance(node.meta.get("val"), (list, tuple)):
        return True
    users = list(node.users)
    return len(users) == 1 and users[0].target in FOLLOWERS and integer.get(users[0], False)


def _moved_from(node: fx.Node) -> fx.Node | None:
    """The value whose scale a moved value takes over."""
    if node.target not in MOVERS:
        return None
    source: Any = node.args[0]
    while isinstance(source.meta.get("val"), (list, tuple)):
        source = source.args[0]
    return source  # type: ignore[no-any-return]


def source_of(node: fx.Node) -> fx.Node:
    """What a value was moved or picked from; itself where it was computed.

    Example:
        >>> graph = fx.Graph()
        >>> x = graph.placeholder("x")
        >>> source_of(graph.call_function(aten.permute.default, (x, [1, 0]))).name
        'x'
    """
    while node.target in MOVERS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _takes(
    user: fx.Node, node: fx.Node, weighted: dict[fx.Node, Site], integer: dict[fx.Node, bool]
) -> bool:
    if user in weighted:
        return weighted[user].input is node
    return user.target in COMBINERS and integer.get(user, False)
