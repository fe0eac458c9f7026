"""Low-rank factorization: a large weight becomes the product of two or three smaller ones."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from paredown import progress
from paredown.graph.coupling import Costs, analyze
from paredown.graph.cut import give_values
from paredown.graph.factored import factor
from paredown.graph.model import Model
from paredown.graph.names import check_exclude, with_layer
from paredown.graph.quantized import quantizers
from paredown.graph.sites import sites, tensor_of
from paredown.reconstruct import reconstruct
from paredown.steps.factor_layers import METHODS, FactorLayer, factor_layers
from paredown.steps.factor_options import Search
from paredown.steps.factor_rows import look_up, own_bias
from paredown.steps.latency import search
from paredown.steps.ranks import Option, Ranks, front
from paredown.timing import speedup
from paredown.types import Target, Task, UserError, human

AMOUNTS = ("parameters", "macs", "energy", "latency")
LOOSER = "method, round_to, include or exclude"  # the settings that allow more


@dataclass(frozen=True)
class LowRank:
    """Replace weights by products of smaller ones (low-rank factorization).

    It pays in large linear layers, embeddings and wide convolutions whose outputs lie near a
    subspace, in parameters and multiply-adds on every runtime, and best with `FineTune` behind it.
    It does not pay in layers that are narrow or depthwise, and two small ops can take longer than
    the one they replace: ask for `amount="latency"`, or let a run undo it.

    A weight `NAME` becomes `NAME_down` and `NAME_up`, and `NAME_core` between them in a Tucker
    decomposition. Layers in which no rank pays stay whole, as do recurrent and depthwise ones, and
    weights that different ops share, such as tied embeddings.

    Args:
        ratio: share of ``amount`` to remove, above 0 and below 1.
        amount: "parameters" or "macs" (multiply-adds): of the whole model's, at least, the ranks
            being chosen over all layers at once. "energy": of each layer's outputs, at most, as
            calibration data show them. "latency": of the exported file's, measured; see `settle`.
        method: of convolutions whose kernel is larger than one: "channel" (arXiv 1505.06798),
            "spatial" (1405.3866), "tucker" (1511.06530), or "auto", for each the one that loses
            least for what it saves. Elsewhere, and where it does not apply, it is "channel", the
            SVD.
        rank: in place of ``ratio`` one rank for the layers that ``include`` names; of each group
            of a grouped convolution. "auto" is "channel" then.
        include: names or globs of the layers or weights that may be factored; all by default.
        exclude: names or globs of those to leave alone.
        round_to: ranks are multiples of so many channels in layers where two such pay. None takes
            16 from 64 channels on, 8 below; 1 allows every rank.
        whiten: lose least of the layers' outputs on calibration data (activation-aware), not of
            their weights (plain SVD).
        reconstruct: fit what follows each factor to the original's outputs by least squares on
            calibration data, without labels.
        examples: at most so many of the calibration split are run.

    Raises:
        UserError: a setting is out of its range; a name fits nothing; a rank above the full one,
            or that makes a layer larger; no layer can be factored with a gain; the amount cannot
            be reached; a weight is pruned, or the model quantized.

    Example:
        >>> import paredown, torch
        >>> model = paredown.capture(torch.nn.Linear(64, 64), (torch.zeros(1, 64),))
        >>> made = LowRank(0.4, whiten=False, reconstruct=False).apply(model, None)
        >>> {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
        {'bias': (64,), 'weight_down': (16, 64), 'weight_up': (64, 16)}
    """

    # Which data it needs depends on its settings; see `PruneChannels`.
    needs: ClassVar[frozenset[str]] = frozenset()

    ratio: float = 0.25
    amount: str = "parameters"
    method: str = "auto"
    rank: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    round_to: int | None = None
    whiten: bool = True
    reconstruct: bool = True
    examples: int = 256

    def __post_init__(self) -> None:
        if not (isinstance(self.ratio, (int, float)) and 0 < self.ratio < 1):
            raise UserError(f"ratio: expected a share above 0 and below 1, got {self.ratio!r}.")
        _check_name("amount", self.amount, AMOUNTS)
        _check_name("method", self.method, METHODS)
        for name, value in (("rank", self.rank), ("round_to", self.round_to)):
            if value is not None:
                _check_count(name, value, 1)
        _check_count("examples", self.examples, 2)
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise UserError(f"{name}: expected a tuple of names, got the text {value!r}.")
            object.__setattr__(self, name, tuple(value))
        if self.rank is not None and not self.include:
            raise UserError('rank: name the layers that it is for, as in include=("fc",).')
        needs = {"calibration"} if self.whiten or self.reconstruct else set()
        object.__setattr__(self, "needs", frozenset(needs))

    def apply(self, model: Model, task: Task) -> Model:
        """A copy with factors in place of weights."""
        if self.amount == "latency" and self.rank is None:
            return self.settle(model, task, Target()).apply(model, task)
        source = _source(self, model)
        layers, whole = _layers(self, source)
        ranks = self.ranks(source, task, layers, whole)
        choice = self._choice(ranks, layers, whole, analyze(source).costs())
        made = replaced(source, layers, choice)
        if self.reconstruct:
            reconstruct(source, made, task)
        progress.say(_told(source, made, layers, choice, whole))
        return made

    def ranks(
        self, model: Model, task: Task, layers: list[FactorLayer], whole: Counter[str]
    ) -> Ranks:
        """The options of every layer; of those that pay the ones that can be the best.

        Raises:
            UserError: there is none, or ``rank`` does not fit a layer.
        """

        def saving(option: Option) -> float:
            return option.macs if self.amount in ("macs", "latency") else option.parameters

        def keep(found: list[Option]) -> list[Option]:
            if self.rank is not None:
                return found
            if self.amount != "energy":
                return front(found, saving)
            near = [option for option in found if option.loss <= self.ratio]
            return [max(near, key=saving)] if near else []

        if self.rank is not None:
            _check_rank(self.rank, self.method, layers)
        method = "channel" if self.rank is not None and self.method == "auto" else self.method
        asked = Search(method, self.round_to, self.rank)
        found = look_up(model, task if self.whiten else None, layers, self.examples, asked, keep)
        made = Ranks(tuple(tuple(each) for each in found), saving)
        if not any(found):
            limit = f" within {self.ratio:g} of its energy" if self.amount == "energy" else ""
            raise UserError(
                f"LowRank: changed nothing; no layer is smaller{limit} as factors"
                f"{_reasons(whole, len(layers))}."
            )
        return made

    def _choice(
        self, ranks: Ranks, layers: list[FactorLayer], whole: Counter[str], costs: Costs
    ) -> dict[int, Option]:
        if self.rank is not None or self.amount == "energy":
            return {place: made[0] for place, made in enumerate(ranks.fronts) if made}
        asked = self.ratio * (costs.macs if self.amount == "macs" else costs.parameters)
        if ranks.most < asked:
            most = self.ratio * ranks.most / asked
            raise UserError(
                f"ratio: a share of {self.ratio:.4g} of the {self.amount} was asked; with these "
                f"settings at most {math.floor(most * 1e4) / 1e4:.4g} can be removed"
                f"{_reasons(whole, 0)}. Lower the ratio, or allow more by {LOOSER}."
            )
        return ranks.choice(asked)

    def settle(self, model: Model, task: Task, target: Target) -> LowRank:
        """The same step with the share of multiply-adds that removes ``ratio`` of the latency.

        The share is found once and kept, so that the settled step gives the same bytes again. It
        exports and times the files of at most six choices; any other amount is settled as it is.

        Raises:
            UserError: the smallest model is not quick enough; says what it reaches.
        """
        if self.amount != "latency" or self.rank is not None:
            return self
        source = _source(self, model)
        layers, whole = _layers(self, source)
        ranks = self.ranks(source, task, layers, whole)
        total = analyze(source).costs().macs

        def removed(share: float) -> float:
            made = replaced(source, layers, ranks.choice(share * total))
            return 1 - 1 / speedup(source, made, target).estimate

        most = math.floor(ranks.most / total * 1000) / 1000
        share = search(removed, self.ratio, most, LOOSER)
        return replace(self, amount="macs", ratio=share)


def replaced(model: Model, layers: Sequence[FactorLayer], choice: dict[int, Option]) -> Model:
    """A copy with the layers at these places factored so."""
    made = model.copy()
    nodes = {node.name: node for node in made.graph.graph.nodes}
    for place, option in choice.items():
        layer = layers[place]
        factors, shift = option.make()
        uses = [replace(site, node=nodes[site.node.name]) for site in layer.uses]
        bias = uses[0].bias if shift is not None and own_bias(model, layer) else None
        if bias is not None and shift is not None:
            old = tensor_of(made.graph, bias)
            old.data = (old.data.double() + shift.to(old.device)).to(old.dtype)
        factor(made, uses, layer.laid_out(factors), layer.carried(option.method))
    made.graph.graph.lint()
    give_values(made)
    return made


def _source(step: LowRank, model: Model) -> Model:
    """A copy in evaluation mode of a model whose weights are whole and in float."""
    if quantizers(model.graph):
        raise UserError(
            "LowRank: the model is quantized, and factors would need scales of their own; factor "
            "before Quantize."
        )
    return model.copy().eval()


def _layers(step: LowRank, model: Model) -> tuple[list[FactorLayer], Counter[str]]:
    """The layers that the settings let it factor, and why others may not be."""
    names = [name for site in sites(model.graph) for name in with_layer(site.weight)]
    check_exclude(step.exclude, names, "layer or weight")
    check_exclude(step.include, names, "layer or weight", "include")
    layers, whole = factor_layers(model, step.include, step.exclude)
    pruned = [layer.name for layer in layers if layer.name in model.masks]
    if pruned:
        raise UserError(
            f"LowRank: {pruned[0]!r} is pruned, and the product of factors has no zeros; factor "
            "before PruneWeights, or exclude it."
        )
    if not layers:
        raise UserError(
            "LowRank: changed nothing; the model has no layer that can be factored"
            f"{_reasons(whole, 0)}."
        )
    return layers, whole


def _check_rank(rank: int, method: str, layers: Sequence[FactorLayer]) -> None:
    for layer in layers:
        asked = layer.methods(method)
        chosen = asked[0]
        full = layer.full(chosen)
        if rank > full:
            raise UserError(
                f"rank: expected from 1 to {full}, the full rank of {layer.name!r}, got {rank}."
            )
        paying = [r for r in range(1, full + 1) if layer.pays(chosen, _both(layer, chosen, r))]
        most = max(paying, default=0)
        if rank > most:
            usual = f"at most {most} pays" if most else "no rank pays; exclude it"
            raise UserError(f"rank: {rank} makes {layer.name!r} no smaller or quicker; {usual}.")


def _both(layer: FactorLayer, method: str, rank: int) -> tuple[int, ...]:
    outputs, inputs = layer.weight.shape[1:3]
    return (min(rank, inputs), min(rank, outputs)) if method == "tucker" else (rank,)


def _reasons(whole: Counter[str], narrow: int) -> str:
    """Why layers stay whole, behind a colon.

    Example:
        >>> _reasons(Counter({"depthwise": 3}), 1), _reasons(Counter(), 0)
        (': 1 too narrow, 3 depthwise', '')
    """
    counts = ({"too narrow": narrow} if narrow else {}) | dict(whole)
    return ": " * bool(counts) + ", ".join(f"{n} {why}" for why, n in counts.items())


def _told(
    before: Model,
    after: Model,
    layers: Sequence[FactorLayer],
    choice: dict[int, Option],
    whole: Counter[str],
) -> str:
    old, new = (analyze(model).costs() for model in (before, after))
    kinds = Counter(option.method for option in choice.values())
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    left = _reasons(whole, len(layers) - len(choice)).replace("too narrow", "better whole")
    return (
        f"  {len(choice)} of {len(layers) + sum(whole.values())} layers factored ({told}); "
        f"{human('count', old.parameters)} to {human('count', new.parameters)} parameters, "
        f"{human('count', old.macs)} to {human('count', new.macs)} multiply-adds"
        + (f"; whole{left}" if left else "")
    )


def _check_name(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1, 0.0)[0]
        raise UserError(
            f"{name}: {value!r} is not one of {', '.join(known)}; did you mean {near!r}?"
        )


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name}: expected a whole number from {least} up, got {value!r}.")
