"""GPTQ over a whole model: layer after layer, on what the layers before, rounded, give it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import lockstep
from paredown.data.layer_inputs import sampled_inputs
from paredown.data.lockstep import run
from paredown.data.moments import moment_sum
from paredown.graph.interpret import Pass
from paredown.graph.model import Model
from paredown.graph.ops import argument
from paredown.graph.patches import groups_of
from paredown.graph.quantized.group_scales import Grid, choose_grid
from paredown.graph.quantized.grouped import spread
from paredown.graph.rows import from_rows, rows
from paredown.steps.quantization.gptq import gptq
from paredown.steps.quantization.weight_layers import WeightLayer

PLACES = 16_384  # of a layer's inputs that are looked at, at most
TOGETHER = 2048  # places whose moments are summed at once
FLOOR = 0.01  # of the mean importance: inputs that calibration never saw count a little too


def solvable(layer: WeightLayer) -> bool:
    """Whether the layer's inputs are there to be seen: one op uses the weight, and multiplies it
    with the rows of an activation. Lookups, recurrent layers and shared weights are not."""
    if len(layer.uses) > 1 or sum(len(node.users) for node in layer.nodes) > 1:
        return False
    site = layer.uses[0]
    if site.kind in ("conv", "conv_transpose"):
        return not argument(site.node, "transposed") and isinstance(groups_of(site), int)
    return site.kind in ("linear", "matmul") and layer.weight.dim() == 2


def to_parts(layer: WeightLayer, values: Tensor) -> Tensor:
    """What has the weight's shape -> (N, R, F), see `paredown.steps.quantization.gptq`."""
    groups = groups_of(layer.uses[0])
    if layer.kind == "matmul":
        return values.T[None]
    if layer.kind == "conv_transpose":  # (inputs, outputs of a group, *kernel)
        return values.reshape(groups, values.shape[0] // groups, -1).mT
    return values.reshape(groups, values.shape[0] // groups, -1)


def from_parts(layer: WeightLayer, made: Tensor) -> Tensor:
    """(N, R, F) -> the weight's shape; undoes `to_parts`."""
    if layer.kind == "matmul":
        return made[0].T
    return (made.mT if layer.kind == "conv_transpose" else made).reshape(layer.weight.shape)


def hessian_of(layer: WeightLayer, inputs: Sequence[Tensor]) -> Tensor:
    """The second moment (N, F, F) of the layer's inputs, some batches at a time."""
    most = max(1, PLACES // len(inputs))
    total, count, waiting = torch.zeros(()), 0, list[Tensor]()
    for seed, x in enumerate(inputs):
        waiting.append(sampled_inputs(layer.uses[0], layer.weight, x.float(), most, seed))
        places = sum(part.shape[1] for part in waiting)
        if places >= TOGETHER or seed == len(inputs) - 1:
            total = moment_sum(torch.cat(waiting, 1)).add_(total)
            count += places
            waiting.clear()
    if not bool(total.isfinite().all()):
        raise UserError(
            f"calibration: inputs of the layer of {layer.name!r} are NaN or infinite; check the "
            "calibration data and the model's outputs on it."
        )
    return total.div_(count)


def importance(layer: WeightLayer, hessian: Tensor) -> Tensor:
    """How much the error of each weight counts, as rows (R, F): the moment of its input."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)  # (N, F)
    diagonal = diagonal + (FLOOR * diagonal.mean()).clamp(min=1e-30)
    parts = to_parts(layer, layer.weight)
    spread_out = diagonal[:, None].expand(-1, parts.shape[1], -1)
    return rows(from_parts(layer, spread_out), layer.axis)


def round_layer(layer: WeightLayer, hessian: Tensor) -> Grid:
    """Round one weight, in place; the grid that it is on now."""
    rounding = layer.rounding
    weight, low, high = layer.weight.detach(), rounding.low, rounding.high
    flat, group = rows(weight, layer.axis), layer.group
    counts = importance(layer, hessian)
    grid = choose_grid(flat, group, low, high, counts, rounding.zero_point)
    scale, zero = (
        to_parts(layer, from_rows(spread(values, group, flat.shape[1]), weight, layer.axis))
        for values in (grid[0], torch.zeros_like(grid[0]) if grid[1] is None else grid[1])
    )
    made = gptq(
        *(to_parts(layer, weight), hessian, scale, zero, low, high),
        rounding.damping,
        rounding.order,
    )
    weight.copy_(from_parts(layer, made))
    return grid


def round_in_order(
    model: Model,
    task: Task,
    chosen: Sequence[WeightLayer],
    grids: dict[str, Grid],
    examples: int,
) -> dict[str, Grid]:
    """Run the calibration data through the model and round each weight right before it is used.

    ``grids`` are those of the weights that are rounded to nearest, without looking at data; the
    rest is rounded in place. Returns the grids of all, by name.

    Raises:
        UserError: no calibration data, or inputs of a layer that are NaN or infinite.
    """
    made = dict(grids)
    solved = {each.uses[0].node: each for each in chosen if each.name not in grids}
    nearest = {node: each for each in chosen if each.name in grids for node in each.nodes}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        batches = lockstep.batches([model.eval()], task, examples)
        lanes = [lockstep.start(model, batch) for batch in batches]
        nodes = list(model.graph.graph.nodes)
        for node in progress.track(nodes, "round weights", len(nodes)):
            for source in [s for s in node.all_input_nodes if s in nearest]:
                layer = nearest.pop(source)
                _share(lanes, source, layer.rounded(grids[layer.name]))
            if node in solved:
                layer = solved[node]
                hessian = hessian_of(layer, [lane.env[layer.uses[0].input] for lane in lanes])
                made[layer.name] = round_layer(layer, hessian)
                del hessian
            run(lanes, node)
            for lane in lanes:
                lane.forget(node)
    return made


def _share(lanes: list[Pass], node: fx.Node, value: Tensor) -> None:
    for lane in lanes:
        lane.env[node] = value
