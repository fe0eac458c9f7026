"""Low rank: accuracy against parameters of digits' ResNet-8 and of the code model, beside plain SVD
and tensorly's Tucker decomposition at no fewer parameters, as they are and after fine-tuning.
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tables
import torch
from tables import Result
from torch import Tensor, nn
from torch.utils.data import Subset

import paredown
from paredown.data import splits
from paredown.graph.model import Model
from paredown.measure import stats, timing

OURS, SVD, TUCKER = "paredown", "plain SVD", "tensorly's Tucker"
PLAIN = "paredown, without data"


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    left: dict[str, tuple[float, ...]]  # shares of the parameters
    examples: dict[str, int]  # of the test split
    epochs: dict[str, float]  # of fine-tuning
    rates: dict[str, float] = field(default_factory=lambda: {"digits": 1e-3, "code_lm": 1e-3})
    rounds: int = 6  # of the latency


FULL = Effort(
    {"digits": (1 / 2, 0.3, 0.15), "code_lm": (0.7, 1 / 2, 0.35)},
    {"digits": 400, "code_lm": 2000},
    {"digits": 5, "code_lm": 1},
)
QUICK = Effort(
    {"digits": (0.3, 0.15), "code_lm": (1 / 2, 0.35)},
    {"digits": 400, "code_lm": 64},
    {"digits": 2, "code_lm": 0.06},
    {"digits": 1e-3, "code_lm": 2e-4},  # so few steps are better short ones
    rounds=2,
)


def run(quick: bool) -> list[Result]:
    torch.set_num_threads(1)
    sys.path[:0] = [str(tables.ROOT / "examples")]
    return [_table(name, QUICK if quick else FULL) for name in ("digits", "code_lm")]


def _table(name: str, effort: Effort) -> Result:
    example = importlib.import_module(name)
    task, net = example.task(), example.model().eval()
    whole = paredown.capture(net, task.example, task.dynamic)
    test = Subset(task.test, range(min(effort.examples[name], splits.size(task.test))))
    seen = replace(task, test=test)
    before = _scores(whole, seen)
    rows = [_row("whole", 1.0, whole, whole, seen, before, None)]
    for left in effort.left[name]:
        for tool, made in _made(name, left, net, whole, task):
            tune = paredown.FineTune(epochs=effort.epochs[name], lr=effort.rates[name]).apply(
                made, task
            )
            rows.append(_row(tool, left, whole, made, seen, before, tune))
            if tool == OURS:
                faster = timing.speedup(whole, made, paredown.Target(), rounds=effort.rounds)
                rows[-1]["faster"] = [faster.estimate, faster.low, faster.high]
    result = Result(
        f"low rank: {name}, {len(before)} test examples",
        f"score before training and after {effort.epochs[name]:g} epochs; in brackets the 95 % "
        "interval of its difference to the whole model's; peers have the same share of ranks in "
        f"every layer, as much as the parameters allow; {_versions()}",
        rows,
    )
    tables.show(result, COLUMNS)
    return result


def _versions() -> str:
    import tensorly

    return f"tensorly {tensorly.__version__}"


def _made(
    name: str, left: float, net: nn.Module, whole: Model, task: paredown.Task
) -> list[tuple[str, Model]]:
    """The model with that share of its parameters, by each way."""
    ours = paredown.LowRank(1 - left).apply(whole, task)
    plain = paredown.LowRank(1 - left, whiten=False, reconstruct=False).apply(whole, task)
    budget = _size(ours)
    peers = {SVD: svd_layer} | ({TUCKER: tucker_layer} if name == "digits" else {})
    found = [(OURS, ours), (PLAIN, plain)]
    for tool, decompose in peers.items():
        module = at_most(net, decompose, budget)
        found.append((tool, paredown.capture(module, task.example, task.dynamic)))
    return found


def _row(
    tool: str,
    left: float,
    whole: Model,
    made: Model,
    task: paredown.Task,
    before: np.ndarray,
    tuned: Model | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {"tool": tool, "left": left, "parameters": _size(made)}
    for key, model in (("score", made), ("tuned", tuned)):
        if model is not None:
            scores = _scores(model, task)
            off = stats.paired_difference(before, scores) if model is not whole else None
            row[key] = float(scores.mean())
            row[f"{key} change"] = [off.low, off.high] if off else None
    return row


def _scores(model: Model, task: paredown.Task) -> np.ndarray:
    batches = splits.batches(task.test, task.batch_size)
    with torch.no_grad():
        return torch.cat([task.score(model(x), y) for x, y in batches]).double().numpy()


def _size(model: Model | nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- the peers -------------------------------------------------------------------------------

Decompose = Callable[[nn.Module, float], nn.Module | None]


def at_most(net: nn.Module, decompose: Decompose, budget: int) -> nn.Module:
    """The module with the largest share of all ranks that fits the budget."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        fits = _size(_decomposed(net, decompose, middle)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return _decomposed(net, decompose, low)


def _decomposed(net: nn.Module, decompose: Decompose, share: float) -> nn.Module:
    made = copy.deepcopy(net)
    for parent in list(made.modules()):
        for key, layer in list(parent.named_children()):
            small = decompose(layer, share)
            if small is not None and _size(small) < _size(layer):
                setattr(parent, key, small)
    return made.eval()


def svd_layer(layer: nn.Module, share: float) -> nn.Module | None:
    """The truncated SVD of a linear layer, an embedding or, with 1x1 behind it, a convolution."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.Embedding)):
        return None
    weight = layer.weight.detach()
    matrix = weight.T if isinstance(layer, nn.Embedding) else weight.flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = max(1, round(share * len(values)))
    up, down = left[:, :rank] * values[:rank], right[:rank]
    if isinstance(layer, nn.Embedding):
        table, last = nn.Embedding(len(weight), rank), nn.Linear(rank, len(up), bias=False)
        return _filled([table, last], [down.T, up])
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False)
        last = nn.Linear(rank, layer.out_features, bias=layer.bias is not None)
        return _filled([first, last], [down, up], layer.bias)
    first = nn.Conv2d(
        layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False
    )
    point = nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None)
    return _filled(
        [first, point], [down.reshape(first.weight.shape), up[..., None, None]], layer.bias
    )


def tucker_layer(layer: nn.Module, share: float) -> nn.Module | None:
    """tensorly's `partial_tucker` of a convolution's channels; elsewhere the SVD."""
    if not isinstance(layer, nn.Conv2d) or max(layer.kernel_size) == 1:
        return svd_layer(layer, share)
    import tensorly
    from tensorly.decomposition import partial_tucker

    tensorly.set_backend("numpy")
    outputs, inputs, *kernel = layer.weight.shape
    full = [min(outputs, inputs * math.prod(kernel)), min(inputs, outputs * math.prod(kernel))]
    ranks = [max(1, round(share * size)) for size in full]
    weight = layer.weight.detach().double().numpy()
    (core, (left, right)), _ = partial_tucker(weight, ranks, modes=[0, 1])
    down = nn.Conv2d(layer.in_channels, ranks[1], 1, bias=False)
    middle = nn.Conv2d(
        ranks[1], ranks[0], layer.kernel_size, layer.stride, layer.padding, bias=False
    )
    up = nn.Conv2d(ranks[0], layer.out_channels, 1, bias=layer.bias is not None)
    filled = [right.T[..., None, None], core, left[..., None, None]]
    values = [torch.from_numpy(np.ascontiguousarray(each)) for each in filled]
    return _filled([down, middle, up], values, layer.bias)


def _filled(layers: list[Any], weights: list[Tensor], bias: Tensor | None = None) -> nn.Module:
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
        if bias is not None:
            layers[-1].bias.copy_(bias)
    return nn.Sequential(*layers)


# --- the table -------------------------------------------------------------------------------


def _told(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ""
    change = row[f"{key} change"]
    interval = f" ({change[0] * 100:+.1f} to {change[1] * 100:+.1f})" if change else ""
    return f"{row[key]:.2%}{interval}"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "by": lambda row: row["tool"],
    "asked": lambda row: f"{row['left']:.2f}",
    "parameters": lambda row: f"{row['parameters']:,}",
    "score": lambda row: _told(row, "score"),
    "fine-tuned": lambda row: _told(row, "tuned"),
    "file faster": lambda row: (
        "{:.2f}x ({:.2f} to {:.2f})".format(*row["faster"]) if "faster" in row else ""
    ),
}
