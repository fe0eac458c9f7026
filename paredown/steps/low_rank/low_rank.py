"""Low-rank factorization: a large weight becomes the product of two or three smaller ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.settings import check_choice, check_count, check_fields, names_of
from paredown.core.task import Task
from paredown.core.units import human
from paredown.graph.computed import fold_computed_weights
from paredown.graph.coupling.coupling import Costs, analyze
from paredown.graph.model import Model
from paredown.graph.names import check_exclude, with_layer
from paredown.graph.quantized.quantizers import quantizers
from paredown.graph.sites import sites
from paredown.graph.state import tensor_of
from paredown.graph.values import give_values
from paredown.measure.timing import speedup
from paredown.steps.latency import search
from paredown.steps.low_rank.factor_layers import METHODS, FactorLayer, factor_layers
from paredown.steps.low_rank.factor_options import Search
from paredown.steps.low_rank.factor_rows import look_up
from paredown.steps.low_rank.factored import factor
from paredown.steps.low_rank.ranks import Option, Ranks, front
from paredown.steps.low_rank.rejoin import Joined, check_free, rejoin
from paredown.steps.low_rank.sensitivity import sensitivities
from paredown.steps.step import ALONE, Entry, Setting, Step
from paredown.train.reconstruct import reconstruct

AMOUNTS = ("parameters", "macs", "energy", "latency")
LOOSER = "method, round_to, include or exclude"  # the settings that allow more


@dataclass(frozen=True)
class LowRank(Step):
    """Replace weights by products of smaller ones (low-rank factorization).

    It pays in large linear layers, embeddings and wide convolutions whose outputs lie near a
    subspace, in parameters and multiply-adds on every runtime: 85 % of a ResNet-8's parameters and
    half of a small GPT's went without a loss that could be measured, before any training
    (docs/low-rank.md). It does not pay in layers that are narrow or depthwise, and two small ops
    can take longer than the one they replace: ask for `amount="latency"`, or let a run undo it.

    A weight `NAME` becomes `NAME_down` and `NAME_up`, and `NAME_core` between them in a Tucker
    decomposition. Layers in which no rank pays stay whole, as do recurrent and depthwise ones, and
    weights that different ops share, such as tied embeddings. No layer gets larger or slower by
    multiply-adds; only an embedding, whose lookup takes none, gets a small product behind it, and
    none where multiply-adds or latency are asked for.

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
        whiten: lose least of the layers' outputs on calibration data (activation-aware), most of
            those that the model's outputs mind most; not of the weights (plain SVD).
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
    table: ClassVar[tuple[Entry, ...]] = (
        Entry(
            call="LowRank(0.5)",
            does="a weight as the product of two or three smaller ones: SVD whitened by what "
            "the layer reads, spatial and Tucker-2 for convolutions, ranks over all layers "
            "at once, to a share of parameters, multiply-adds or measured latency",
            pays="parameters of convolutions, linear layers and embeddings, with little or no "
            "training",
            does_not="narrow, depthwise and recurrent layers; latency where the ops are small",
        ),
    )

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
        check_fields(self)
        if not (isinstance(self.ratio, (int, float)) and 0 < self.ratio < 1):
            raise UserError(f"ratio: expected a share above 0 and below 1, got {self.ratio!r}.")
        check_choice("amount", self.amount, AMOUNTS)
        check_choice("method", self.method, METHODS)
        for name, value in (("rank", self.rank), ("round_to", self.round_to)):
            if value is not None:
                check_count(name, value, 1)
        check_count("examples", self.examples, 2)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, names_of(name, getattr(self, name)))
        if self.rank is not None and not self.include:
            raise UserError('rank: name the layers that it is for, as in include=("fc",).')
        needs = {"calibration"} if self.whiten or self.reconstruct else set()
        object.__setattr__(self, "needs", frozenset(needs))

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        """A copy with factors in place of weights; those of an earlier step may become smaller."""
        if self.amount == "latency" and self.rank is None:
            return self.settle(model, task, setting).apply(model, task, setting)
        ground = Ground.of(self, model)
        choice = self._choice(self._ranks(ground, task), ground)
        made = replaced(ground, choice)
        if self.reconstruct:
            reconstruct(ground.source, made, task, examples=self.examples)
        progress.say(_told(ground, made, choice))
        return made

    def settle(self, model: Model, task: Task, setting: Setting) -> LowRank:
        """The same step with the share of multiply-adds that removes ``ratio`` of the latency.

        The share is found once and kept, so that the settled step gives the same bytes again. It
        exports and times the files of at most six choices; any other amount is settled as it is.

        Raises:
            UserError: the smallest model is not quick enough; says what it reaches.
        """
        if self.amount != "latency" or self.rank is not None:
            return self
        ground = Ground.of(self, model)
        ranks = self._ranks(ground, task)
        total, owed = ground.costs.macs, ground.owed(ranks.saving)

        def removed(share: float) -> float:
            made = replaced(ground, ranks.choice(share * total + owed))
            return 1 - 1 / speedup(model, made, setting.target).estimate

        most = math.floor((ranks.most - owed) / total * 1000) / 1000
        share = search(removed, self.ratio, most, LOOSER)
        return replace(self, amount="macs", ratio=share)

    def _ranks(self, ground: Ground, task: Task) -> Ranks:
        """The options of every layer; of those that pay the ones that can be the best.

        Raises:
            UserError: there is none, or ``rank`` does not fit a layer.
        """

        def saving(option: Option) -> float:
            return option.macs if self.amount in ("macs", "latency") else option.parameters

        def keep(layer: FactorLayer, found: list[Option]) -> list[Option]:
            was = [ground.joined[layer.name].option(layer)] if layer.name in ground.joined else []
            if self.rank is not None:
                return found
            if self.amount != "energy":
                return front([*found, *was], saving)
            near = [option for option in found if option.loss <= self.ratio]
            return [max([*near, *was], key=saving)] if near or was else []

        if self.rank is not None:
            _check_rank(self.rank, self.method, ground)
        method = "channel" if self.rank is not None and self.method == "auto" else self.method
        asked = Search(method, self.round_to, self.rank)
        seen = task if self.whiten else None
        found = look_up(ground.source, seen, ground.layers, self.examples, asked, keep)
        weights = [1.0] * len(found)
        if seen is not None and self.rank is None and self.amount != "energy":
            nodes = [[site.node for site in layer.uses] for layer in ground.layers]
            weights = sensitivities(ground.source, seen, nodes)
        return Ranks(tuple(tuple(each) for each in found), saving, tuple(weights))

    def _choice(self, ranks: Ranks, ground: Ground) -> dict[int, Option]:
        owed = ground.owed(ranks.saving)
        if ranks.most <= owed:
            limit = f" within {self.ratio:g} of its energy" if self.amount == "energy" else ""
            raise UserError(
                f"LowRank: changed nothing; no layer is smaller{limit} as factors"
                f"{_reasons(ground.whole, len(ground.layers))}."
            )
        if self.rank is not None or self.amount == "energy":
            return {place: made[0] for place, made in enumerate(ranks.fronts) if made}
        total = ground.costs.macs if self.amount == "macs" else ground.costs.parameters
        if ranks.most - owed < self.ratio * total:
            most = math.floor((ranks.most - owed) / total * 1e4) / 1e4
            raise UserError(
                f"ratio: a share of {self.ratio:.4g} of the {self.amount} was asked; with these "
                f"settings at most {most:.4g} can be removed. Lower the ratio, or allow more by "
                f"{LOOSER}."
            )
        return ranks.choice(self.ratio * total + owed)


@dataclass(frozen=True)
class Ground:
    """A model with its weights whole, and which of them may be factored."""

    source: Model  # earlier factors joined
    layers: list[FactorLayer]
    whole: Counter[str]  # why how many others may not
    joined: dict[str, Joined]
    costs: Costs  # as the model was given

    @staticmethod
    def of(step: LowRank, model: Model) -> Ground:
        """What the settings let the step factor.

        Raises:
            UserError: the model is quantized, a weight pruned, a name fits nothing, or nothing is
                left.
        """
        if quantizers(model.graph):
            raise UserError(
                "LowRank: the model is quantized, and factors would need scales of their own; "
                "factor before Quantize."
            )
        source = model.copy().eval()
        fold_computed_weights(source)
        lookups = step.amount in ("parameters", "energy")  # which have no multiply-adds to save
        joined = rejoin(source, step.include, step.exclude, lookups)
        names = {site.weight for each in (model, source) for site in sites(each.graph)}
        known = [name for weight in names for name in with_layer(weight)]
        check_exclude(step.exclude, known, "layer or weight")
        check_exclude(step.include, known, "layer or weight", "include")
        layers, whole = factor_layers(source, step.include, step.exclude)
        check_free(source, [layer.name for layer in layers])
        if not layers:
            raise UserError(
                "LowRank: changed nothing; the model has no layer that can be factored"
                f"{_reasons(whole, 0)}."
            )
        return Ground(source, layers, whole, joined, analyze(model).costs())

    def owed(self, saving: Callable[[Option], float]) -> float:
        """What earlier factors save already."""
        return sum(
            saving(self.joined[layer.name].option(layer))
            for layer in self.layers
            if layer.name in self.joined
        )


def replaced(ground: Ground, choice: dict[int, Option]) -> Model:
    """A copy with the layers at these places factored so."""
    made = ground.source.copy()
    nodes = {node.name: node for node in made.graph.graph.nodes}
    for place, option in choice.items():
        layer = ground.layers[place]
        factors, shift = option.make()
        uses = [replace(site, node=nodes[site.node.name]) for site in layer.uses]
        bias = uses[0].bias
        if bias is not None and shift is not None:
            old = tensor_of(made.graph, bias)
            old.data = (old.data.double() + shift.to(old.device)).to(old.dtype)
        factor(made, uses, layer.laid_out(factors), layer.carried(option.method))
    made.graph.graph.lint()
    give_values(made)
    return made


def _check_rank(rank: int, method: str, ground: Ground) -> None:
    for layer in ground.layers:
        chosen = layer.methods(method)[0]
        full = layer.full(chosen)
        if rank > full:
            raise UserError(
                f"rank: expected from 1 to {full}, the full rank of {layer.name!r}, got {rank}."
            )
        was = ground.joined.get(layer.name)
        least = was.option(layer).parameters if was else 0
        paying = [r for r in range(1, full + 1) if _saved(layer, chosen, r) > least]
        if rank not in paying:
            usual = f"at most {max(paying)} pays" if paying else "no rank pays; exclude it"
            raise UserError(f"rank: {rank} makes {layer.name!r} no smaller or quicker; {usual}.")


def _saved(layer: FactorLayer, method: str, rank: int) -> int:
    """The parameters that a rank saves, none where it does not pay."""
    outputs, inputs = layer.weight.shape[1:3]
    ranks = (min(rank, inputs), min(rank, outputs)) if method == "tucker" else (rank,)
    saved = layer.weight.numel() - layer.cost(method, ranks)[0]
    return saved if layer.pays(method, ranks) else 0


def _reasons(whole: Counter[str], narrow: int) -> str:
    """Why layers stay whole, behind a colon.

    Example:
        >>> _reasons(Counter({"depthwise": 3}), 1), _reasons(Counter(), 0)
        (': 1 too narrow, 3 depthwise', '')
    """
    counts = ({"too narrow": narrow} if narrow else {}) | dict(whole)
    return ": " * bool(counts) + ", ".join(f"{n} {why}" for why, n in counts.items())


def _told(ground: Ground, made: Model, choice: dict[int, Option]) -> str:
    old, new = ground.costs, analyze(made).costs()
    kinds = Counter(option.method for option in choice.values())
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    count = len(ground.layers) + sum(ground.whole.values())
    left = _reasons(ground.whole, len(ground.layers) - len(choice))
    return (
        f"  {len(choice)} of {count} layers in factors ({told}); "
        f"{human('count', old.parameters)} to {human('count', new.parameters)} parameters, "
        f"{human('count', old.macs)} to {human('count', new.macs)} multiply-adds"
        + (f"; the others{left.replace('too narrow', 'better whole')}" if left else "")
    )
