"""Model -> .tflite file: LiteRT's converter, and what is done to the file after it."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.core.errors import UserError
from paredown.graph import structure
from paredown.graph.edit import erase_counters, keep_meta
from paredown.graph.fold import fold_batch_norm
from paredown.graph.model import Model
from paredown.graph.quantized.decomposed import DEQUANTIZE_CHANNEL, QUANTIZE_CHANNEL, decompose
from paredown.graph.quantized.forms import Rounded
from paredown.graph.quantized.grouped import PER_GROUP
from paredown.graph.quantized.quantizers import (
    ACTIVATION_QUANTIZERS,
    PER_TENSOR,
    quantizers,
    read,
    weight_forms,
)
from paredown.graph.quantized.regions import FOLLOWERS, MOVERS
from paredown.graph.sites import sites
from paredown.graph.state import remove_state, set_buffer, tensor_of
from paredown.graph.values import refresh_values
from paredown.targets.formats import rowwise
from paredown.targets.formats.litert import edit, passes
from paredown.targets.formats.types import refuse_wide_unsigned

aten = torch.ops.aten
ADAPTIVE: dict[Any, Any] = {
    aten.adaptive_max_pool1d.default: aten.max_pool1d.default,
    aten.adaptive_max_pool2d.default: aten.max_pool2d.default,
    aten.adaptive_max_pool3d.default: aten.max_pool3d.default,
}
BROADCASTING = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)


def encode(model: Model) -> bytes:
    """The .tflite file's bytes; the same model gives the same bytes.

    Raises:
        UserError: LiteRT's converter has no form of an op, or of an input's type.
    """
    refuse_wide_unsigned(model, "LiteRT")
    half = any(p.dtype is torch.float16 for p in model.parameters())
    prepared, grouped = _prepared(model)
    made = decompose(prepared, fold_weights=False)
    erase_counters(made.graph)
    if half:
        _widen(made)
    file = edit.File(_convert(made))
    passes.finish(file, _rounds_values(model))
    passes.hold_groups(file, grouped)
    if 4 in {form.bits for form in weight_forms(model.graph).values()}:
        passes.pack_four_bits(file)
    if half:
        passes.store_half(file)
    inputs, outputs = names(model)
    edit.name(file, inputs, outputs)
    edit.note(file, {"inputs": inputs, "outputs": outputs, **_facts(model)})
    return file.encode()


def _rounds_values(model: Model) -> bool:
    """Whether more than weights is rounded."""
    return any(node.target in ACTIVATION_QUANTIZERS for node in quantizers(model.graph))


def _prepared(model: Model) -> tuple[Model, list[Rounded]]:
    """A copy in which the converter leaves quantizers where they are, and the weights that stand in
    it as floats though they were rounded in groups.

    Past a concatenation it gets scales wrong; and what a float op only picks, joins or moves, it
    would round to the scale of an input that came from integers.
    """
    made, grouped = model.copy().eval(), list[Rounded]()
    refresh_values(made)
    for node in list(made.graph.graph.nodes):
        if node.target in ADAPTIVE:
            _pool_by_window(node)
        elif node.target in (aten.expand.default, aten.expand_as.default):
            _broadcast_later(node)
        elif node.target is aten.conv_transpose2d.input:
            _crop_after(node)
        elif node.target in (aten.eye.default, aten.eye.m):
            _hold(made, node)
        elif node.target is PER_GROUP:
            grouped += _rounded_alone(made, node)
    weighted = {site.node for site in sites(made.graph)}
    for node in quantizers(made.graph):
        if node.target is not PER_TENSOR:
            continue
        source: Any = node.args[0]
        if source.target is aten.cat.default:
            _bar(source)
        if source.target is aten.cat.default or not _single_path(source):
            _bar(node)
        for user in [user for user in node.users if not _runs_on_integers(user, weighted)]:
            _bar_from(node, user)
    made.graph.recompile()
    return made, grouped


def _rounded_alone(model: Model, node: fx.Node) -> list[Rounded]:
    """A weight of 8 bits with a scale for each channel as integers, and any other, which is given
    back, as floats, which the converter takes."""
    weight = read(model.graph, node)
    if weight.form.bits == 8 and not weight.group:
        _by_channel(model, node, weight)
        return []
    linear = [site for site in sites(model.graph) if site.weight == weight.name]
    if any(site.kind in ("linear", "matmul") for site in linear):
        rowwise.refuse_unfit(weight)
    held = rowwise.hold_before(model.graph, node, f"{weight.name}_rounded", weight.values())
    rowwise.replace_by(node, held)
    remove_state(model.graph, weight.name)
    return [weight]


def _by_channel(model: Model, node: fx.Node, weight: Rounded) -> None:
    """A weight with a scale, and perhaps a zero point, for each channel, in PyTorch's own ops."""
    name, scales, form = weight.name, weight.scales, weight.form
    tensor_of(model.graph, name).data = weight.values()
    zeros = torch.zeros(scales.numel(), dtype=torch.int64)
    if weight.zero_points is not None:
        zeros = weight.zero_points.flatten().long()
    set_buffer(model.graph, f"{name}_channel_scale", scales.flatten())
    set_buffer(model.graph, f"{name}_channel_zero_point", zeros)
    with node.graph.inserting_before(node):
        held = [node.graph.get_attr(f"{name}_channel_{kind}") for kind in ("scale", "zero_point")]
        rest: Any = (*held, weight.axis, form.low, form.high, torch.int8)
        integers = node.graph.call_function(QUANTIZE_CHANNEL, (node.args[0], *rest))
        floats = node.graph.call_function(DEQUANTIZE_CHANNEL, (integers, *rest))
    keep_meta(floats, node)
    node.replace_all_uses_with(floats)
    node.graph.erase_node(node)


def _pool_by_window(node: fx.Node) -> None:
    """An adaptive maximum, which the converter lacks, whose windows are all of one size."""
    arguments: Any = node.args
    source, sizes = arguments
    shape = source.meta["val"].shape[-len(sizes) :]
    places = [user for user in node.users if user.args[1] == 1 and user.users]
    if places or any(size % count for size, count in zip(shape, sizes, strict=True)):
        return
    window = [size // count for size, count in zip(shape, sizes, strict=True)]
    with node.graph.inserting_before(node):
        made = node.graph.call_function(ADAPTIVE[node.target], (source, window, window))
    for pick in list(node.users):
        keep_meta(made, pick)
        pick.replace_all_uses_with(made)
        node.graph.erase_node(pick)
    node.graph.erase_node(node)


def _broadcast_later(node: fx.Node) -> None:
    """An operand that is expanded first is broadcast by the op itself: with channels last, the
    converter expands it to the wrong shape."""
    source: Any = node.args[0]
    behind = next(iter(node.users), None)
    held = behind if behind is not None and behind.target is PER_TENSOR else node
    for user in held.users:
        others = [each for each in user.all_input_nodes if each is not held]
        if user.target not in BROADCASTING or len(others) != 1:
            return
        if getattr(others[0].meta["val"], "shape", None) != node.meta["val"].shape:
            return
    if held is node or len(node.users) == 1:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def _hold(model: Model, node: fx.Node) -> None:
    """What an op without inputs makes, for which LiteRT has no kernel, is a constant."""
    name = f"{node.name}_held"
    set_buffer(model.graph, name, node.target(*node.args, **node.kwargs))  # type: ignore[operator]
    with node.graph.inserting_before(node):
        held = node.graph.get_attr(name)
    keep_meta(held, node)
    node.replace_all_uses_with(held)
    node.graph.erase_node(node)


def _crop_after(node: fx.Node) -> None:
    """A transposed convolution with padding, for which LiteRT has no kernel, is one without whose
    result is cropped; exact."""
    usual: list[Any] = [None, [1, 1], [0, 0], [0, 0], 1, [1, 1]]
    arguments: list[Any] = [*node.args, *usual[len(node.args) - 2 :]]
    x, weight, bias, stride, padding, more, groups, dilation = arguments
    if not any(padding) or any(a > b for a, b in zip(more, padding, strict=True)):
        return
    with node.graph.inserting_before(node):
        rest = (stride, [0, 0], [0, 0], groups, dilation)
        made = node.graph.call_function(aten.conv_transpose2d.input, (x, weight, bias, *rest))
        keep_meta(made, node)
        for dim, start in zip((2, 3), padding, strict=True):
            end = start + node.meta["val"].shape[dim]
            made = node.graph.call_function(aten.slice.Tensor, (made, dim, start, end))
            keep_meta(made, node)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _bar(node: fx.Node) -> None:
    """Put a barrier before an op, at each of the values that it joins or rounds."""
    values: Any = node.args[0]
    barred = []
    for value in values if isinstance(values, (list, tuple)) else [values]:
        with node.graph.inserting_before(node):
            made = node.graph.call_function(aten.mul.Tensor, (value, passes.BARRIER))
        keep_meta(made, value)
        barred.append(made)
    node.update_arg(0, barred if isinstance(values, (list, tuple)) else barred[0])


def _runs_on_integers(node: fx.Node, weighted: set[fx.Node]) -> bool:
    """Whether an op is one of ``weighted``, or what it makes is quantized, perhaps once moved."""
    if node in weighted or isinstance(node.meta.get("val"), (list, tuple)):
        return True
    return any(
        user.target is PER_TENSOR
        or (user.target in FOLLOWERS | MOVERS and _runs_on_integers(user, set()))
        for user in node.users
    )


def _bar_from(value: fx.Node, user: fx.Node) -> None:
    """Put a barrier between a value and one of its users."""
    with user.graph.inserting_before(user):
        made = user.graph.call_function(aten.mul.Tensor, (value, passes.BARRIER))
    keep_meta(made, value)
    user.replace_input_with(value, made)


def _single_path(source: fx.Node) -> bool:
    """Whether a value came from the op that made it by ops that move it for nobody else.

    The converter quantizes before such ops instead of after, for all that read them.
    """
    single = True
    while source.target in MOVERS:
        single = single and len(source.users) == 1
        source = source.args[0]  # type: ignore[assignment]
    several = isinstance(source.meta.get("val"), (list, tuple))
    return source.target in ACTIVATION_QUANTIZERS or (single and not several)


def _widen(model: Model) -> None:
    """16-bit floats to 32 bits, in place: LiteRT stores weights in 16 bits and computes in 32.

    Batch norms are folded first, and the folded weights rounded again, so that 16 bits hold them.
    """
    graph = model.graph
    for tensor in [*graph.parameters(), *graph.buffers()]:
        if tensor.dtype is torch.float16:
            tensor.data = tensor.data.float()
    for node in graph.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, _wide)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _wide)
    refresh_values(model)
    folded = fold_batch_norm(graph)
    for name in folded:
        weight = tensor_of(graph, name)
        weight.data = weight.data.half().float()
    graph.recompile()


def _wide(item: Any) -> Any:
    return torch.float32 if item is torch.float16 else item


class _Module(nn.Module):
    """The graph as a plain module, in evaluation mode."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.wrapped = graph  # "graph" is taken in what torch.export makes
        self.eval()

    def forward(self, *leaves: Tensor) -> Any:
        return self.wrapped(*leaves)


def _convert(model: Model) -> bytes:
    """What LiteRT's converter makes of a graph with quantize and dequantize ops."""
    os.environ["LITERT_TORCH_SHOW_PROGRESS"] = "n"
    import litert_torch
    from litert_converter.mlir._mlir_libs import converter_api_ext

    plain = converter_api_ext.ConvertToTFLConfig

    def strict() -> Any:
        """Integers where the graph says so and nowhere else; floats at both ends."""
        config = plain()
        config.qdq_conversion_mode, config.strict_qdq_mode = "STATIC", True
        return config

    logging.disable(logging.WARNING)
    leaves = tuple(item.example for item in model.inputs)
    converter_api_ext.ConvertToTFLConfig = strict
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return bytes(litert_torch.convert(_Module(model.graph), leaves).model_content())
    except Exception as error:
        raise UserError(f"model: LiteRT's converter cannot take it: {_reason(error)}") from error
    finally:
        converter_api_ext.ConvertToTFLConfig = plain


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def names(model: Model) -> tuple[list[str], list[str]]:
    """The names of the inputs and of the outputs, none of them twice."""
    inputs = [item.name for item in model.inputs]
    outputs = structure.output_names(model.outputs)
    return inputs, [f"{name}_out" if name in inputs else name for name in outputs]


def _facts(model: Model) -> dict[str, Any]:
    """The inputs' and outputs' types, and which outputs grow with the batch; None where that
    is fixed."""
    leaves = [item.example for item in model.inputs]
    outputs = _run(model, leaves)
    takes, types = (
        [str(t.dtype).removeprefix("torch.") for t in each] for each in (leaves, outputs)
    )
    if not all(0 in item.dynamic for item in model.inputs):
        return {"takes": takes, "types": types, "batched": None}
    twice = _run(model, [torch.cat([leaf, leaf]) for leaf in leaves])
    grows = [
        new.dim() > 0 and new.shape[0] == 2 * old.shape[0] and new.shape[1:] == old.shape[1:]
        for old, new in zip(outputs, twice, strict=True)
    ]
    same = [new.shape == old.shape for old, new in zip(outputs, twice, strict=True)]
    whole = all(grow or keep for grow, keep in zip(grows, same, strict=True))
    return {"takes": takes, "types": types, "batched": grows if whole else None}


def _run(model: Model, leaves: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(model.copy().eval().graph(*[leaf.clone() for leaf in leaves]))
