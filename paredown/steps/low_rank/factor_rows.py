"""The options of all layers, on what they read and give on calibration data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import lockstep
from paredown.data.layer_inputs import sampled, sampled_inputs
from paredown.data.lockstep import run
from paredown.graph.interpret import Pass
from paredown.graph.model import Model
from paredown.graph.sites import Site, readers
from paredown.graph.state import tensor_of
from paredown.steps.low_rank.factor_layers import FactorLayer
from paredown.steps.low_rank.factor_options import (
    Rows,
    Search,
    identity_rows,
    options,
    wants_inputs,
)
from paredown.steps.low_rank.ranks import Option

ROWS = 8192  # of a layer's inputs that are looked at, at most
NUMBERS = 1 << 26  # in those rows
HELD = 5  # one row in so many is held out, to tell what is lost

Chunk = tuple[Tensor | None, Tensor]  # x and y of `Rows`, of one batch


def _rows(chunks: list[Chunk], centred: bool) -> Rows:
    y = torch.cat([y for _, y in chunks], 1)
    x = None
    if chunks[0][0] is not None:
        x = torch.cat([x for x, _ in chunks if x is not None], 1)
    places = y.shape[1]
    fitted = places - places // HELD if places >= 4 * HELD else places
    if not centred:
        return Rows(x, y, fitted, None, None)
    mean_y = y[:, :fitted].mean(1, keepdim=True)
    if x is None:
        return Rows(None, y - mean_y, fitted, None, mean_y)
    mean_x = x[:, :fitted].mean(1, keepdim=True)
    return Rows(x - mean_x, y - mean_y, fitted, mean_x, mean_y)


def _seen(
    model: Model, layer: FactorLayer, site: Site, lanes: list[Pass], wants_inputs: bool
) -> Iterator[Chunk]:
    """Rows of one use, from each batch."""
    width = layer.weight[0, 0].numel() if wants_inputs else layer.weight.shape[1]
    most = max(32, min(ROWS, NUMBERS // (width * layer.groups)) // (len(lanes) * len(layer.uses)))
    for seed, lane in enumerate(lanes):
        x = None
        if wants_inputs:  # at the same places as the outputs, since the seed is the same
            raw = tensor_of(model.graph, site.weight)
            x = sampled_inputs(site, raw, lane.env[site.input].float(), most, seed)  # (N, P, F)
            x = x.unflatten(2, layer.weight.shape[2:])
        yield x, _outputs(model, layer, site, lane.env[site.node].float(), most, seed)


def _outputs(
    model: Model, layer: FactorLayer, site: Site, y: Tensor, most: int, seed: int
) -> Tensor:
    if "conv" in site.kind:
        batched = y if y.dim() == len(layer.kernel) + 2 else y[None]
        y = batched.movedim(1, -1)
    rows = sampled(y.reshape(-1, y.shape[-1]), 1, most, seed)  # (P, N O)
    if site.bias is not None:
        rows = rows - tensor_of(model.graph, site.bias).detach().float()
    return rows.unflatten(1, (layer.groups, -1)).transpose(0, 1)


# --- over the whole model --------------------------------------------------------------------


def look_up(
    model: Model,
    task: Task | None,
    layers: Sequence[FactorLayer],
    examples: int,
    search: Search,
    keep: Callable[[FactorLayer, list[Option]], list[Option]],
) -> list[list[Option]]:
    """Each layer's options that ``keep`` leaves: on its weight alone where there is no task, else
    on the calibration data, of which the rows of one layer are in memory at a time.

    Raises:
        UserError: no calibration data, or inputs of a layer that are NaN or infinite.
    """
    if task is None:
        return [
            keep(
                each, options(each, identity_rows(each, wants_inputs(each, search.method)), search)
            )
            for each in progress.track(layers, "factor", len(layers))
        ]
    place = {site.node: (layer, site) for layer in layers for site in layer.uses}
    chunks: dict[str, list[Chunk]] = {layer.name: [] for layer in layers}
    left = Counter({layer.name: len(layer.uses) for layer in layers})
    made: dict[str, list[Option]] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        batches = lockstep.batches([model.eval()], task, examples)
        lanes = [lockstep.start(model, batch) for batch in batches]
        nodes = list(model.graph.graph.nodes)
        for node in progress.track(nodes, "factor", len(nodes)):
            run(lanes, node)
            if node in place:
                layer, site = place[node]
                asked = wants_inputs(layer, search.method)
                chunks[layer.name] += _seen(model, layer, site, lanes, asked)
                left[layer.name] -= 1
                if not left[layer.name]:
                    found = _options_on(model, layer, chunks.pop(layer.name), search)
                    made[layer.name] = keep(layer, found)
            for lane in lanes:
                lane.forget(node)
    return [made.get(layer.name, []) for layer in layers]


def _options_on(
    model: Model, layer: FactorLayer, chunks: list[Chunk], search: Search
) -> list[Option]:
    if not all(bool(y.isfinite().all()) for _, y in chunks):
        raise UserError(
            f"calibration: inputs of the layer of {layer.name!r} are NaN or infinite; check the "
            "calibration data and the model's outputs on it."
        )
    return options(layer, _rows(chunks, _own_bias(model, layer)), search)


def _own_bias(model: Model, layer: FactorLayer) -> bool:
    """Whether the layer has a bias that no other reads, which can take a shift."""
    biases = {site.bias for site in layer.uses}
    if biases == {None} or len(biases) > 1:
        return False
    (name,) = biases
    assert name is not None
    bias = tensor_of(model.graph, name)
    return bias.dim() == 1 and readers(model.graph)[id(bias)] == {site.node for site in layer.uses}
