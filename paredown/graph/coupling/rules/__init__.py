"""One small record per family of ops: how labels go through it, and how it is rewritten.

``propagate(walk, node)`` gives the result's value; ``rewrite(cut, node)`` changes the sizes that
are written out in the op's arguments. An op without a record pins all of its operands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from paredown.graph.coupling.labels import Result, Walk
from paredown.graph.coupling.rules.common import (
    elementwise,
    first_operand,
    getitem,
    pinned,
    symbolic,
    unknown,
)
from paredown.graph.coupling.rules.images import (
    channel_shuffle,
    glu,
    im2col,
    pixel_shuffle,
    pixel_unshuffle,
    spatial,
    unfold,
)
from paredown.graph.coupling.rules.lookups import (
    embedding_bag,
    fixed_along,
    gather,
    index_add,
    scatter,
)
from paredown.graph.coupling.rules.norms import (
    along,
    channel_norm,
    cosine,
    group_norm,
    index_of_extreme,
    last_norm,
    reduction,
    rewrite_group_norm,
    rewrite_last_norm,
)
from paredown.graph.coupling.rules.picks import (
    cat,
    copy_part,
    flip,
    index_rule,
    index_select,
    narrow,
    pad,
    rewrite_narrow,
    rewrite_pad,
    rewrite_select,
    rewrite_slice,
    rewrite_split,
    roll,
    select,
    slice_rule,
    split,
    stack,
    triangle,
    unbind,
)
from paredown.graph.coupling.rules.products import (
    addmm,
    attention,
    baddbmm,
    bilinear,
    distances,
    einsum,
    linear,
    matmul,
    outer,
    rewrite_attention,
)
from paredown.graph.coupling.rules.recurrent import recurrent_cell, recurrent_layer
from paredown.graph.coupling.rules.shapes import (
    as_real,
    counted,
    expand,
    expand_as,
    filled,
    permute,
    repeat,
    repeat_interleave,
    reshape,
    rewrite_counted,
    rewrite_repeat,
    rewrite_reshape,
    rewrite_sizes,
    rewrite_squeeze,
    squeeze,
    unsqueeze,
    view_as,
)
from paredown.graph.coupling.rules.weights import (
    convolution,
    embedding,
    quantize_channel,
    rewrite_convolution,
    weight_norm,
)

if TYPE_CHECKING:
    from paredown.graph.coupling.sizes import Cut


@dataclass(frozen=True)
class Rule:
    propagate: Callable[[Walk, fx.Node], Result]
    rewrite: Callable[[Cut, fx.Node], None] | None = None


def _named(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_named("linear", Rule(linear)),
    **_named("addmm", Rule(addmm)),
    **_named("baddbmm", Rule(baddbmm)),
    **_named("matmul mm bmm mv dot vdot inner", Rule(matmul)),
    **_named("einsum", Rule(einsum)),
    **_named("bilinear", Rule(bilinear)),
    **_named("cdist _cdist_forward", Rule(distances)),
    **_named("outer ger", Rule(outer)),
    **_named("embedding", Rule(embedding)),
    **_named("embedding_bag _embedding_bag", Rule(embedding_bag)),
    **_named(
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution",
        Rule(convolution, rewrite_convolution),
    ),
    **_named("lstm gru rnn_tanh rnn_relu", Rule(recurrent_layer)),
    **_named("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", Rule(recurrent_cell)),
    **_named("_weight_norm", Rule(weight_norm)),
    **_named("scaled_dot_product_attention", Rule(attention, rewrite_attention)),
    **_named("fake_quantize_channel fake_quantize_group", Rule(quantize_channel)),
    **_named("batch_norm native_batch_norm instance_norm prelu", Rule(channel_norm)),
    **_named("layer_norm rms_norm native_layer_norm", Rule(last_norm, rewrite_last_norm)),
    **_named("group_norm", Rule(group_norm, rewrite_group_norm)),
    **_named(
        "mean sum nansum prod amax amin max min var std var_mean std_mean logsumexp norm any all "
        "linalg_vector_norm median mode aminmax",
        Rule(reduction),
    ),
    **_named("argmax argmin", Rule(index_of_extreme)),
    **_named("softmax log_softmax _softmax _log_softmax softmin cumsum cumprod", Rule(along)),
    **_named("cosine_similarity", Rule(cosine)),
    **_named("view reshape _unsafe_view flatten unflatten", Rule(reshape, rewrite_reshape)),
    **_named("view_as reshape_as", Rule(view_as)),
    **_named("squeeze", Rule(squeeze, rewrite_squeeze)),
    **_named("unsqueeze", Rule(unsqueeze)),
    **_named(
        "permute transpose t mT mH movedim moveaxis swapaxes swapdims adjoint numpy_T",
        Rule(permute),
    ),
    **_named("expand broadcast_to", Rule(expand, rewrite_sizes)),
    **_named("expand_as", Rule(expand_as)),
    **_named("repeat tile", Rule(repeat, rewrite_repeat)),
    **_named("repeat_interleave", Rule(repeat_interleave)),
    **_named("cat concat concatenate", Rule(cat)),
    **_named("stack", Rule(stack)),
    **_named("slice", Rule(slice_rule, rewrite_slice)),
    **_named("narrow", Rule(narrow, rewrite_narrow)),
    **_named("split split_with_sizes chunk unsafe_chunk unsafe_split", Rule(split, rewrite_split)),
    **_named("tensor_split", Rule(split, rewrite_split)),
    **_named("select", Rule(select, rewrite_select)),
    **_named("unbind", Rule(unbind)),
    **_named("index", Rule(index_rule)),
    **_named("index_select", Rule(index_select)),
    **_named("pad constant_pad_nd", Rule(pad, rewrite_pad)),
    **_named(
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d "
        "grid_sampler grid_sampler_2d grid_sampler_3d reflection_pad1d reflection_pad2d "
        "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
        Rule(spatial),
    ),
    **_named("pixel_shuffle", Rule(pixel_shuffle)),
    **_named("pixel_unshuffle", Rule(pixel_unshuffle)),
    **_named("channel_shuffle", Rule(channel_shuffle)),
    **_named("im2col col2im", Rule(im2col)),
    **_named("unfold", Rule(unfold)),
    **_named("glu", Rule(glu)),
    **_named("flip", Rule(flip)),
    **_named("roll", Rule(roll)),
    **_named("tril triu", Rule(triangle)),
    **_named("zeros ones full empty rand randn", Rule(filled, rewrite_sizes)),
    **_named("arange linspace logspace eye", Rule(counted, rewrite_counted)),
    **_named("new_zeros new_ones new_full new_empty", Rule(filled, rewrite_sizes)),
    **_named(
        "scalar_tensor meshgrid one_hot bucketize searchsorted affine_grid_generator",
        Rule(pinned),
    ),
    **_named(
        "topk sort argsort msort kthvalue cummax cummin fft_fft fft_ifft fft_rfft fft_irfft "
        "fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn "
        "fft_irfftn fft_fftshift fft_ifftshift rot90",
        Rule(fixed_along),
    ),
    **_named("gather", Rule(gather)),
    **_named("scatter scatter_add scatter_reduce", Rule(scatter)),
    **_named("index_add index_copy", Rule(index_add)),
    **_named("view_as_real view_as_complex", Rule(as_real)),
    **_named("slice_scatter select_scatter", Rule(copy_part)),
    **_named("type_as to", Rule(first_operand)),
    **_named(
        "dropout feature_dropout alpha_dropout clone contiguous _to_copy alias "
        "detach lift_fresh lift_fresh_copy copy fill zeros_like ones_like full_like empty_like "
        "rand_like randn_like bernoulli masked_fill where float real imag conj fake_quantize "
        "hardswish hardsigmoid hardtanh relu6 celu selu rrelu softplus threshold mish addcmul "
        "addcdiv lerp gelu silu leaky_relu elu log_sigmoid clamp_min clamp_max clamp type "
        "__and__ __or__ __xor__ polar complex _conj resolve_conj floor_divide square rsqrt "
        "multiply divide subtract true_divide negative absolute nan_to_num",
        Rule(elementwise),
    ),
}
BINARY_EXTREMES = ("max.other", "min.other")


def rule_of(node: fx.Node) -> Rule:
    """The record of an op; an elementwise one where PyTorch itself says that it is."""
    target: Any = node.target
    if target is operator.getitem:
        return Rule(getitem)
    if not isinstance(target, torch._ops.OpOverload):
        return Rule(unknown if _of_tensors(node) else symbolic)
    if not _of_tensors(node) and not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
        return Rule(symbolic)
    name = _name(target)
    if "sym_" in name or "_assert" in name:
        return Rule(symbolic)
    if torch.Tag.pointwise in target.tags and name not in ("prelu",):
        return Rule(elementwise)
    if f"{name}.{target._schema.overload_name}" in BINARY_EXTREMES:
        return Rule(elementwise)
    return RULES.get(name) or RULES.get(name.removesuffix("_")) or Rule(unknown)


def rewrite_of(node: fx.Node) -> Callable[[Cut, fx.Node], None] | None:
    """What changes the sizes that are written out in the op's arguments, where there are any."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    found = RULES.get(_name(node.target))
    return found.rewrite if found else None


def _name(target: Any) -> str:
    return target._schema.name.split("::")[1]  # type: ignore[no-any-return]


def _of_tensors(node: fx.Node) -> bool:
    values = node.meta.get("val")
    if isinstance(values, (list, tuple)):
        return any(isinstance(v, Tensor) for v in values)
    return isinstance(values, Tensor)
