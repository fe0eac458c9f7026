"""Weights of one bit or two: binary and ternary, to be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.settings import check_fields, names_of
from paredown.core.task import Task
from paredown.graph.computed import fold_computed_weights
from paredown.graph.edit import keep_meta
from paredown.graph.holds import own_zeros
from paredown.graph.holds.shared import refuse_shared
from paredown.graph.model import Model
from paredown.graph.names import check_exclude, fits, with_layer
from paredown.graph.ops import arguments
from paredown.graph.quantized.forms import WEIGHT_FORMS
from paredown.graph.quantized.quantizers import quantizers
from paredown.graph.sites import Site, sites
from paredown.graph.state import getattr_or_none, tensor_of
from paredown.steps.step import ALONE, Entry, Setting, Step

KINDS = ("conv", "conv_transpose", "linear", "matmul")


@dataclass(frozen=True)
class Binarize(Step):
    """Weights to signs with one scale for each output channel (XNOR-Net, arXiv 1603.05279), or to
    signs and zeros (ternary weight networks, arXiv 1605.04711).

    The float weights stay in the graph and train through the rounding, so a `FineTune` belongs
    behind it. Biases, norms and activations stay float; ``Quantize("int8")`` after the training
    makes activations and the layers left out 8-bit.

    It pays in size: the digits example goes from 1,233 KB to 57 KB (binary) or 95 KB (ternary) at a
    test score of 99.75 % and 99.00 %, against 99.75 %. It does not pay untrained (10 % and 32 %),
    nor in latency or memory: runtimes unpack the weights and run float kernels, or int8 ones.

    Args:
        form: "binary", one bit a weight, or "ternary", two.
        first, last: whether the first and the last layer are binarized too.
        depthwise: whether depthwise convolutions are, which have few weights and lose much.
        exclude: names or globs of weights or layers to leave in float: "fc", "layer1.*".

    Raises:
        UserError: an unknown form; a name in ``exclude`` fits nothing; a model that is quantized
            or 16-bit already, or has no layer left; "binary" for a pruned weight.

    Example:
        >>> import torch, paredown
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> model = paredown.capture(net, (torch.zeros(1, 4),))
        >>> made = paredown.Binarize("ternary").apply(model, None)
        >>> [node.args[0].target for node in made.graph.graph.nodes if "ternary" in node.name]
        ['1.weight']
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    table: ClassVar[tuple[Entry, ...]] = (
        Entry(
            call='Binarize("binary")',
            does='signs with a scale for each channel, one bit a weight, or `"ternary"`, two; '
            "trained on with `FineTune`",
            pays="the size of wide convolutional and linear layers: 1/32 or 1/16 of their bytes",
            does_not="without training; latency is that of float, or of int8 with `Quantize` "
            "behind it",
        ),
    )

    form: str = "binary"
    first: bool = False
    last: bool = False
    depthwise: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.form not in WEIGHT_FORMS or not WEIGHT_FORMS[self.form].follows:
            raise UserError(f'form: expected "binary" or "ternary", got {self.form!r}.')
        object.__setattr__(self, "exclude", names_of("exclude", self.exclude))

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        """A copy whose weights pass through signs."""
        if quantizers(model.graph):
            raise UserError("Binarize: the model is quantized already; binarize before.")
        made = model.copy()
        fold_computed_weights(made)
        no_zero = 0 not in WEIGHT_FORMS[self.form].grid
        sparse = own_zeros.found(made) if no_zero else {}
        chosen = self._chosen(made, set(sparse))
        names = [site.weight for site in chosen]
        refuse_shared(made, names, "Binarize: {}, which signs do not keep; exclude them.")
        if no_zero:
            _refuse_pruned(made, chosen)
        _insert(made, chosen, WEIGHT_FORMS[self.form].op)
        return made

    def _spares(self, model: Model, site: Site) -> bool:
        return not self.depthwise and _is_depthwise(site, tensor_of(model.graph, site.weight))

    def _chosen(self, model: Model, sparse: set[str]) -> list[Site]:
        found = sites(model.graph)
        names = (name for site in found for name in with_layer(site.weight))
        check_exclude(self.exclude, names, "layer or weight")
        layers = list(dict.fromkeys(site.weight for site in found if site.kind in KINDS))
        spared = {*([] if self.first else layers[:1]), *([] if self.last else layers[-1:])}
        for site in found:
            excluded = fits(with_layer(site.weight), self.exclude)
            if excluded or site.kind not in KINDS or self._spares(model, site):
                spared.add(site.weight)
        wanted = list(_apart(model, [site for site in found if site.weight not in spared]))
        chosen = [site for site in wanted if site.weight not in sparse]
        left = dict.fromkeys(site.weight for site in wanted if site.weight in sparse)
        if left:
            progress.say(f"  left in float: {_came_sparse(list(left))}")
        if not chosen:
            raise UserError(
                f"Binarize: of the layers that it may take {_came_sparse(list(left))}."
                if left
                else "Binarize: no convolution or linear layer is left besides the first, the last "
                "and those excluded; set first=True or last=True to take those too."
            )
        _refuse_half(model, chosen)
        return chosen


def _came_sparse(names: list[str]) -> str:
    """Why these weights stay in float.

    Example:
        >>> _came_sparse(["fc.weight"])
        'fc.weight came sparse, and one bit has no zero; Binarize("ternary") keeps zeros'
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    told = 'came sparse, and one bit has no zero; Binarize("ternary") keeps zeros'
    return f"{', '.join(names[:3])}{more} {told}"


def _is_depthwise(site: Site, weight: Tensor) -> bool:
    """A convolution whose every output channel reads one of many input channels."""
    if site.kind not in ("conv", "conv_transpose"):
        return False
    return weight.shape[1] == 1 and arguments(site.node).get("groups", 1) > 1


def _apart(model: Model, chosen: list[Site]) -> Iterator[Site]:
    """The sites whose weight no other op reads as it is: a tied embedding keeps its head float."""
    graph, nodes = model.graph, {site.node for site in chosen}
    for site in chosen:
        weight = tensor_of(graph, site.weight)
        names = (n for n in graph.graph.nodes if n.op == "get_attr")
        shared = [n for n in names if getattr_or_none(graph, str(n.target)) is weight]
        if all(user in nodes for name in shared for user in name.users):
            yield site


def _refuse_half(model: Model, chosen: list[Site]) -> None:
    for site in chosen:
        kind = tensor_of(model.graph, site.weight).dtype
        if kind is not torch.float32:
            raise UserError(
                f"Binarize: {site.weight} is {str(kind).removeprefix('torch.')}, in which training "
                "does not converge; binarize and train before Cast."
            )


def _refuse_pruned(model: Model, chosen: list[Site]) -> None:
    pruned = [site.weight for site in chosen if not model.masks.get(site.weight, _ALL).all()]
    if pruned:
        raise UserError(
            f"Binarize: {pruned[0]} is pruned, and one bit has no zero; "
            'use Binarize("ternary"), which keeps zeros, or PruneChannels in place of PruneWeights.'
        )


_ALL = torch.ones(1, dtype=torch.bool)


def _insert(model: Model, chosen: list[Site], quantizer: Any) -> None:
    graph = model.graph.graph
    made: dict[str, fx.Node] = {}
    for site in chosen:
        source = next(n for n in site.node.all_input_nodes if n.target == site.weight)
        if site.weight not in made:
            with graph.inserting_before(site.node):  # one rounded weight in memory at a time
                made[site.weight] = graph.call_function(quantizer, (source, site.axis))
            keep_meta(made[site.weight], source)
        site.node.replace_input_with(source, made[site.weight])
    graph.lint()
    model.graph.recompile()
