"""What a layer can be factored into, and what each way loses of its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.steps.low_rank import factors as math_of
from paredown.steps.low_rank.factor_layers import FactorLayer
from paredown.steps.low_rank.factors import Factors
from paredown.steps.low_rank.ranks import Make, Option, neat

POINTS = 6  # ranks of a spatial or Tucker decomposition that are tried


@dataclass(frozen=True)
class Rows:
    """What a layer reads and gives, without its bias, at some places, about their means.

    Shapes: x (N, P, C, *kernel), or None where only the outputs are looked at; y (N, P, O). The
    first ``fitted`` places are for the factors, the others tell what is lost.
    """

    x: Tensor | None
    y: Tensor
    fitted: int
    mean_x: Tensor | None  # (N, 1, C, *kernel), where a bias can take what the means lose
    mean_y: Tensor | None  # (N, 1, O)

    @property
    def held(self) -> slice:
        return slice(self.fitted, None) if self.fitted < self.y.shape[1] else slice(None)


def identity_rows(layer: FactorLayer, wants_inputs: bool) -> Rows:
    """Every input once by itself: then what is lost of the outputs is what the weight loses."""
    flat = layer.weight.flatten(2)  # (N, O, F)
    x = None
    if wants_inputs:
        eye = torch.eye(flat.shape[2]).reshape(1, -1, *layer.weight.shape[2:])
        x = eye.expand(layer.groups, *eye.shape[1:])
    return Rows(x, flat.mT.float(), flat.shape[2], None, None)


@dataclass(frozen=True)
class Search:
    """How options are looked for; see `paredown.LowRank`."""

    method: str
    round_to: int | None
    rank: int | None = None


def wants_inputs(layer: FactorLayer, method: str) -> bool:
    return layer.methods(method) != ["channel"]


def options(layer: FactorLayer, rows: Rows, search: Search) -> list[Option]:
    """All ways to factor the layer that pay, with what each loses on the rows held out.

    It is a share of what the outputs vary: a mean that is the same everywhere tells nothing, and
    beside a large one all losses would look small.
    """
    y = rows.y[:, rows.held].double()
    total = float((y - y.mean(1, keepdim=True)).square().sum())
    found: list[Option] = []
    for method in layer.methods(search.method):
        made = {"channel": _channel, "spatial": _spatial, "tucker": _tucker}[method]
        found += made(layer, rows, search, max(total, 1e-300), found)
    return found


def _allowed(layer: FactorLayer, method: str, search: Search) -> list[int]:
    """The ranks of a group that are looked at, from the least."""
    full = layer.full(method)
    if search.rank is not None:
        return [search.rank]
    pair = method == "tucker"
    paying = [r for r in range(1, full) if pair or layer.pays(method, (r,))]
    return neat(paying, layer.groups, search.round_to)


def least(layer: FactorLayer) -> dict[str, tuple[int, ...]]:
    """By method the smallest ranks that `options` may come to where none are asked for; a method of
    which no rank pays is left out."""
    asked, found = Search("auto", None), dict[str, tuple[int, ...]]()
    outputs, inputs = layer.weight.shape[1:3]
    for method in layer.methods("auto"):
        if method == "tucker":
            sizes = (inputs, outputs)
            found[method] = tuple(neat(range(1, n + 1), layer.groups, None)[0] for n in sizes)
        elif ranks := _allowed(layer, method, asked):
            found[method] = (ranks[0],)
    return found


def _few(ranks: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of them, evenly spread, the largest among them.

    Example:
        >>> _few(range(1, 13), 4)
        [3, 6, 9, 12]
    """
    count = min(count, len(ranks))
    return [ranks[(n + 1) * len(ranks) // count - 1] for n in range(count)]


def _option(
    layer: FactorLayer, method: str, ranks: tuple[int, ...], loss: float, make: Make
) -> Option:
    parameters, macs = layer.cost(method, ranks)
    saved = layer.weight.numel() - parameters
    return Option(method, ranks, saved, layer.macs - macs, loss, make)


def _channel(
    layer: FactorLayer, rows: Rows, search: Search, total: float, others: Sequence[Option]
) -> list[Option]:
    ranks = _allowed(layer, "channel", search)
    if not ranks:
        return []
    directions = math_of.output_directions(layer.weight, rows.y[:, : rows.fitted])
    losses = math_of.channel_losses(directions, rows.y[:, rows.held])

    mean = None if rows.mean_y is None else rows.mean_y.double()

    def maker(rank: int) -> Make:
        def make() -> tuple[Factors, Tensor | None]:
            made = math_of.channel_factors(layer.weight, directions, rank)
            if mean is None:
                return math_of.balanced(made), None
            kept = directions[..., :rank]
            shift = mean - mean @ kept @ kept.mT  # (N, 1, O)
            return math_of.balanced(made), shift.flatten()

        return make

    return [
        _option(layer, "channel", (rank,), float(losses[rank]) / total, maker(rank))
        for rank in ranks
    ]


def _spatial(
    layer: FactorLayer, rows: Rows, search: Search, total: float, others: Sequence[Option]
) -> list[Option]:
    """The ranks are nested: what the largest reads holds what the smaller ones do."""
    ranks = _few(_allowed(layer, "spatial", search), POINTS)
    if not ranks:
        return []
    assert rows.x is not None
    first, last = math_of.spatial_directions(layer.weight, rows.x[:, : rows.fitted])
    first, last = math_of.spatial_factors(first, last, ranks[-1])
    seen = math_of.seen_by_last([first], last, rows.x)  # (N, P, R * width)
    fitted = math_of.fitted_last(last, seen[:, : rows.fitted], rows.y[:, : rows.fitted], ranks)
    found = []
    for rank, each in zip(ranks, fitted, strict=True):
        made, read = (first[:, :rank], each), seen[:, :, : rank * layer.kernel[1]]
        found.append(_tried(layer, rows, total, "spatial", (rank,), made, read))
    return found


def _tucker(
    layer: FactorLayer, rows: Rows, search: Search, total: float, others: Sequence[Option]
) -> list[Option]:
    """Every other pair of ranks first, and those between where one beside them is worth it."""
    assert rows.x is not None
    modes = math_of.Modes.of(layer.weight, math_of.channel_root(rows.x[:, : rows.fitted]))
    pairs = _pairs(layer, modes, search)
    found: dict[int, Option] = {}

    def look(place: int) -> None:
        assert rows.x is not None
        pair = pairs[place]
        *before, last = math_of.tucker_factors(layer.weight, modes, pair[1], pair[0])
        seen = math_of.seen_by_last(before, last, rows.x)  # (N, P, R)
        fit = seen[:, : rows.fitted], rows.y[:, : rows.fitted]
        made = *before, *math_of.fitted_last(last, *fit, [pair[1]])
        found[place] = _tried(layer, rows, total, "tucker", pair, made, seen)

    coarse = range(len(pairs) - 1, -1, -2)
    for place in coarse:
        look(place)
    worth = {place for place in coarse if not beaten(found[place], others)}
    for place in set(range(len(pairs))) - set(coarse):
        if worth & {place - 1, place + 1}:
            look(place)
    return [found[place] for place in sorted(found)]


def beaten(option: Option, others: Sequence[Option]) -> bool:
    """Whether another saves as much and loses no more.

    Example:
        >>> one, other = (Option("channel", (r,), 9, 9, loss, None) for r, loss in ((1, 0), (2, 1)))
        >>> beaten(one, [other]), beaten(other, [one])
        (False, True)
    """
    return any(
        other.parameters >= option.parameters
        and other.macs >= option.macs
        and other.loss <= option.loss
        for other in others
    )


def _pairs(layer: FactorLayer, modes: math_of.Modes, search: Search) -> list[tuple[int, int]]:
    """Ranks of the inputs and of the outputs that lose alike, by the losses of the modes."""
    outputs, inputs = layer.weight.shape[1:3]
    if search.rank is not None:
        return [(min(search.rank, inputs), min(search.rank, outputs))]
    of_outputs, of_inputs = modes.losses
    allowed_in = neat(range(1, inputs + 1), layer.groups, search.round_to)
    pairs = []
    for rank in neat(range(1, outputs + 1), layer.groups, search.round_to):
        wide = [r for r in allowed_in if of_inputs[r] <= of_outputs[rank]]
        pair = (wide[0] if wide else allowed_in[-1], rank)
        if layer.pays("tucker", pair):
            pairs.append(pair)
    return [pairs[place] for place in _few(range(len(pairs)), POINTS)]


def _tried(
    layer: FactorLayer,
    rows: Rows,
    total: float,
    method: str,
    ranks: tuple[int, ...],
    made: Factors,
    seen: Tensor,
) -> Option:
    """The option with what it loses on the rows held out, of which ``seen`` is what the last factor
    reads."""
    loss = math_of.missed(made[-1], seen[:, rows.held], rows.y[:, rows.held]) / total
    made = math_of.balanced(made)
    shift = None
    if rows.mean_x is not None:
        change = layer.weight.double() - math_of.product([factor.double() for factor in made])
        shift = (rows.mean_x.double().flatten(2) @ change.flatten(2).mT).flatten()
    kept = tuple(factor.float() for factor in made)
    return _option(layer, method, ranks, loss, lambda: (kept, shift))
