"""Refit what a structural cut has changed, layer by layer, by least squares without labels.

The sequential, asymmetric form of He, Zhang & Sun, "Channel Pruning" (arXiv 1707.06168): a
layer's target is its output in the original model, its input what the cut model, refitted up to
there, really gives it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import lockstep
from paredown.data.lockstep import advance, run
from paredown.graph.model import Model, kept_since
from paredown.graph.ops import argument
from paredown.graph.patches import layer_inputs
from paredown.graph.quantized.quantizers import quantizers
from paredown.graph.sites import Site, readers, sites
from paredown.graph.state import tensor_of

ROWS = 20_000  # of a layer's inputs, at most, that are looked at: those fitted and those held out
FEATURES = 4_608  # 512 channels of 3 x 3; of a layer with more inputs only the bias is refitted
FACTORS = (1.0, 1e2, 1e4)  # times the ridge; the held-out rows choose
ROUNDING = 1e-10  # share of the target's energy below which an error is that of float32

Rows = tuple[Tensor, Tensor]  # inputs (N, F), outputs (N, O)


# --- mathematics -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Equations:
    """What the rows of a layer say: moments of its inputs x and of the residual y - x W0' - b0."""

    gram: Tensor  # (F, F)
    cross: Tensor  # (F, O)
    mean_x: Tensor  # (F,), zero where no bias is solved for
    mean_residual: Tensor  # (O,), likewise


def equations(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Equations:
    """The normal equations of the change that ``weight`` needs, in float64, some rows at a time.

    Shapes: x (N, F), y (N, O), weight (O, F), bias (O,).
    """
    features, outputs, count = x.shape[1], y.shape[1], max(1, len(x))
    gram = torch.zeros(features, features, dtype=torch.float64)
    cross, sum_r = gram.new_zeros(features, outputs), gram.new_zeros(outputs)
    mean_x = gram.new_zeros(features)
    if bias is not None:  # first of all, since constant inputs would leave rounding errors alone
        mean_x = x.sum(0, dtype=torch.float64) / count
    for rows, targets in zip(x.split(2048), y.split(2048), strict=True):
        residual = targets.double() - rows.double() @ weight.double().T  # (n, O)
        residual -= 0.0 if bias is None else bias.double()
        centred = rows.double() - mean_x  # (n, F)
        gram += centred.T @ centred
        cross += centred.T @ residual
        sum_r += residual.sum(0)
    return Equations(gram, cross, mean_x, sum_r / count if bias is not None else 0 * sum_r)


def solve(found: Equations, ridge: float) -> tuple[Tensor, Tensor]:
    """The change of the weight (O, F) and of the bias (O,) that the equations ask for."""
    level = float(found.gram.diagonal().mean())
    if level <= 0:
        return torch.zeros_like(found.cross.T), found.mean_residual
    damped = found.gram + ridge * level * torch.eye(len(found.gram), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:  # many inputs that depend on each other, and rounding above the ridge
        return solve(found, 100 * ridge)
    change = torch.cholesky_solve(found.cross, factor).T  # (O, F)
    return change, found.mean_residual - change @ found.mean_x


def refit(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """Least squares with ridge towards the weights that are there (arXiv 1707.06168, eq. 2).

    Minimises ``||y - x W' - b||^2 + lambda ||W - W0||^2``, lambda being ``ridge`` times the mean
    energy of an input. Without a bias none is solved for.

    Shapes: x (N, F), y (N, O), weight (O, F), bias (O,) -> weight (O, F), bias (O,), in float64.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> weight, bias = refit(x, 3 * x + 1, torch.zeros(1, 1), torch.zeros(1), 1e-9)
        >>> weight.round(decimals=4), bias.round(decimals=4)
        (tensor([[3.]], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    change, shift = solve(equations(x, y, weight, bias), ridge)
    return weight.double() + change, None if bias is None else bias.double() + shift


def squared_error(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """``||y - x W' - b||^2`` in float64; x (N, F), y (N, O), weight (O, F), bias (O,)."""
    error = y.double() - x.double() @ weight.double().T
    return float((error if bias is None else error - bias.double()).square().sum())


# --- one layer -------------------------------------------------------------------------------


def _outputs(site: Site, y: Tensor, kept: Tensor | None) -> Tensor:
    """The site's output as (*places, O), of the original's channels those that are kept."""
    y = y.movedim(1, -1) if site.kind == "conv" else y
    return y if kept is None else y[..., kept]


def _sample(inputs: Tensor, outputs: Tensor, most: int, seed: int) -> Rows:
    """At most ``most`` random places: (*places, ...), (*places, O) -> (N, F), (N, O)."""
    places = outputs.shape[:-1]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(math.prod(places), generator=generator)[:most]
    where = torch.unravel_index(chosen, places)
    return inputs[where].flatten(1), outputs[where]


def _split(rows: list[Rows]) -> tuple[Rows, Rows]:
    """The rows to fit and those held out: whole batches where there are several."""
    if len(rows) == 1:
        x, y = rows[0]
        count = max(1, len(x) // 10)
        return (x[count:], y[count:]), (x[:count], y[:count])
    count = max(1, len(rows) // 10)
    parts = rows[count:], rows[:count]
    fit, held = ((torch.cat([x for x, _ in p]), torch.cat([y for _, y in p])) for p in parts)
    return fit, held


def best(
    fit: Rows, held: Rows, weight: Tensor, bias: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """Of the present weight (O, F) and bias (O,) and the refitted ones, what errs least on the
    rows held out.
    """
    made: list[tuple[Tensor, Tensor | None]] = [(weight, bias)]
    if weight.shape[1] <= FEATURES:
        found = equations(*fit, weight, bias)
        for factor in FACTORS:
            change, shift = solve(found, ridge * factor)
            moved = None if bias is None else (bias + shift).to(bias.dtype)
            made.append(((weight + change).to(weight.dtype), moved))
    elif bias is not None:
        error = fit[1] - F.linear(fit[0], weight, bias)
        made.append((weight, (bias + error.double().mean(0)).to(bias.dtype)))
    return min(made, key=lambda pair: squared_error(*held, *pair))


def _refit_site(
    model: Model,
    site: Site,
    inputs: list[Tensor],
    goal: list[Tensor],
    got: list[Tensor],
    kept: Tensor | None,
    ridge: float,
) -> bool:
    """Refit one layer in place; whether it changed.

    ``inputs`` and ``got`` are what it reads and gives, ``goal`` what the original's gives, of
    whose channels those ``kept`` are left.
    """
    weight = tensor_of(model.graph, site.weight)
    bias = None if site.bias is None else tensor_of(model.graph, site.bias)
    if site.kind == "conv" and inputs[0].dim() != weight.dim():
        return False  # one image without a batch dimension
    goal = [_outputs(site, y, kept) for y in goal]
    got = [_outputs(site, y, None) for y in got]
    if goal[0].shape != got[0].shape or got[0].dim() < 2:
        return False  # the places themselves were cut: no row of one is a row of the other
    if not _differ(site, goal, got):
        return False
    triples = zip(itertools.count(), inputs, goal)
    most = max(1, ROWS // len(goal))
    rows = [_sample(layer_inputs(site, weight, x), y, most, seed) for seed, x, y in triples]
    matrix = weight.T if site.kind == "matmul" else weight.flatten(1)  # (O, F)
    new, new_bias = best(*_split(rows), matrix, bias, ridge)
    if new is matrix and new_bias is bias:
        return False
    weight.copy_(new.T if site.kind == "matmul" else new.reshape(weight.shape))
    if bias is not None and new_bias is not None:
        bias.copy_(new_bias)
    return True


def _differ(site: Site, goal: list[Tensor], got: list[Tensor]) -> bool:
    """Whether the layer's outputs are others than the original's, beyond rounding."""
    pairs = zip(goal, got, strict=True)
    error = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in pairs)
    energy = sum(float(a.square().sum(dtype=torch.float64)) for a in goal)
    if not math.isfinite(error + energy):
        raise UserError(
            f"calibration: outputs of the layer of {site.weight!r} are NaN or infinite; check the "
            "calibration data and the model's outputs on it."
        )
    return error > ROUNDING * energy


def _refittable(model: Model) -> dict[fx.Node, Site]:
    """The layers that may be refitted, by their op."""
    read = readers(model.graph)
    return {s.node: s for s in sites(model.graph) if _alone(model, s, read) and _plain(model, s)}


def _alone(model: Model, site: Site, read: dict[int, set[fx.Node]]) -> bool:
    """Whether no other op reads the parameters, and no mask holds weights at zero."""
    names = [name for name in (site.weight, site.bias) if name is not None]
    alone = (len(read[id(tensor_of(model.graph, name))]) == 1 for name in names)
    return all(alone) and not model.masks.keys() & set(names)


def _plain(model: Model, site: Site) -> bool:
    """Whether the op computes ``x W' + b`` with what the site names and nothing else."""
    weight, node = tensor_of(model.graph, site.weight), site.node
    if weight.dtype not in (torch.float32, torch.float64):
        return False
    if site.kind == "matmul":
        added = argument(node, "self") if site.node.target is torch.ops.aten.addmm.default else None
        scaled = {argument(node, "alpha"), argument(node, "beta")} - {None, 1}
        plain = weight.dim() == 2 and not scaled
    else:
        added = argument(node, "bias")
        once = site.kind == "conv" and argument(node, "groups") == 1
        plain = site.kind == "linear" or (once and not argument(node, "transposed"))
    if site.bias is None:
        return plain and added is None  # a computed bias is not ours to move
    return plain and tensor_of(model.graph, site.bias).dim() == 1


# --- the whole model -------------------------------------------------------------------------


def reconstruct(
    before: Model, after: Model, task: Task, ridge: float = 1e-4, examples: int = 512
) -> None:
    """Refit, in place, the convolutions and linear layers of a cut model to the original's outputs.

    Layer by layer in the order they run, each on the inputs that the refitted model gives it, with
    neither labels nor training. Left alone are layers whose outputs have not changed or whose
    places (tokens, pixels) were cut, tied and masked weights, grouped and transposed convolutions,
    and those that the examples held out, one in ten, show no better. Batch norms keep their
    statistics: the layers before them are fitted to what those were taken of. Both models are left
    in evaluation mode.

    It pays wherever later layers can make up for the channels removed: the digits example with
    half of each block's inner channels gone falls below 60 % accuracy, and comes back to within a
    point of the original. It pays less where depthwise convolutions, which it leaves alone, carry
    the error on.

    Args:
        before, after: the original and its cut copy, whose graphs have the same node names;
            ``after.kept`` says which channels are left.
        ridge: pull towards the weights that are there, as a share of the inputs' mean energy; 100
            and 10,000 times that are tried as well.
        examples: of the calibration split, at most; fewer where the values of both models would
            take more than 1 GiB.

    Raises:
        UserError: a setting is out of its range, there is no calibration data, the model is
            quantized, the graphs are not versions of one another, or a layer's outputs are NaN or
            infinite.

    Example:
        >>> import dataclasses, paredown
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> state, units = net.state_dict(), torch.tensor([0, 1])
        >>> _ = state["0.weight"][2].copy_(state["0.weight"][1])  # the third unit is the second
        >>> _ = state["0.bias"][2].copy_(state["0.bias"][1])
        >>> small = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(2, 2))
        >>> state |= {"0.weight": state["0.weight"][units], "0.bias": state["0.bias"][units]}
        >>> small.load_state_dict(state | {"1.weight": state["1.weight"][:, units]})
        <All keys matched successfully>
        >>> x = torch.randn(64, 4)
        >>> kept = {"0.weight": {0: units}, "0.bias": {0: units}, "1.weight": {1: units}}
        >>> before = paredown.capture(net, (x[:1],))
        >>> after = dataclasses.replace(paredown.capture(small, (x[:1],)), kept=kept)
        >>> data = torch.utils.data.TensorDataset(x)
        >>> task = Task((x[:1],), score=lambda out, y: out[:, 0], calibration=data)
        >>> reconstruct(before, after, task, ridge=1e-9)
        >>> torch.allclose(after(x), before(x), atol=1e-4)
        True
    """
    _check(before, after, ridge, examples)
    layers, kept = _refittable(after), kept_since(before, after)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        batches = lockstep.batches([before.eval(), after.eval()], task, examples)
        old = [lockstep.start(before, batch) for batch in batches]
        new = [lockstep.start(after, batch) for batch in batches]
        ahead = iter(before.graph.graph.nodes)
        shared = {node.name for node in before.graph.graph.nodes}
        count = len(after.graph.graph.nodes)
        for node in progress.track(after.graph.graph.nodes, "reconstruct", count):
            goal = advance(old, ahead, node.name) if node.name in shared else None
            got = run(new, node)
            site = layers.get(node)
            if site is not None and goal is not None:
                inputs = [lane.env[site.input] for lane in new]
                channels = kept.get(site.weight, {}).get(site.axis)
                if _refit_site(after, site, inputs, goal, got, channels, ridge):
                    run(new, node)
            for lane in new:
                lane.forget(node)


def _check(before: Model, after: Model, ridge: float, examples: int) -> None:
    if not 1e-9 <= ridge < math.inf:
        raise UserError(f"ridge: expected a number from 1e-9 up, got {ridge!r}.")
    if examples < 2:
        raise UserError(f"examples: expected a whole number from 2 up, got {examples!r}.")
    if quantizers(before.graph) or quantizers(after.graph):
        raise UserError("reconstruct: the model is quantized; cut and refit it before Quantize.")
    names = [[node.name for node in model.graph.graph.nodes] for model in (before, after)]
    shared = set(names[0]) & set(names[1])
    if [n for n in names[0] if n in shared] != [n for n in names[1] if n in shared]:
        raise UserError(
            "reconstruct: the ops of the two models come in different orders; `after` must be a "
            "cut copy of `before`."
        )
