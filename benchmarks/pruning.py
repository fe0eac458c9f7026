"""Structured pruning beside Torch-Pruning: what each can cut, how soon it knows, what is left.

Whatever is measured runs in a process of its own with a time limit, so that what one tool leaves
behind, a hang or a crash does not reach the next.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import connection
from time import perf_counter
from typing import Any

import numpy as np
import shapes
import tables
import torch
from tables import Result
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import paredown
from paredown.graph import structure
from paredown.graph.coupling.coupling import analyze
from paredown.graph.coupling.cut import cut
from paredown.graph.model import Model
from paredown.measure import speedups, stats

OURS, THEIRS = "paredown", "torch-pruning"
LONG_S = 900.0  # the time limit where an end is known
SIZE = 224  # px
PRELOADED = (  # the last five are what the first capture of a process would load
    *("paredown", "torch_pruning", "tests.architectures", "shapes", "sklearn.datasets"),
    *("torch._dynamo", "torch.export._trace", "torch._functorch.aot_autograd"),
    *("torch._export.non_strict_utils", "torch._inductor.sizevars"),
)
BATCH, RATE, DECAY = 64, 1e-3, 0.01  # of all training


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    architectures: int = 126  # at most, evenly from the list, which goes by family
    limit_s: float = 30.0  # of one architecture with one tool
    rounds: int = 5  # of the seconds of analysis
    left: tuple[float, ...] = (1 / 2, 1 / 3, 1 / 5)  # of the multiply-adds
    scopes: tuple[str, ...] = ("global",)  # or "uniform": the same share of every group
    seeds: int = 3
    epochs: int = 2  # of fine-tuning
    training: int = 12  # epochs, of the net that has no kept weights


QUICK = Effort(architectures=24, rounds=2, left=(1 / 3,), seeds=1, epochs=1, training=6)


def run(quick: bool) -> list[Result]:
    effort = QUICK if quick else Effort()
    _prepare()
    return [_coverage(effort), _analysis(effort), *_accuracies(effort)]


# --- a process of its own for each measurement -----------------------------------------------


def _prepare() -> None:
    """One thread each, and the imports once for all: the processes are forked off that one."""
    folders = [str(tables.ROOT), str(tables.ROOT / "benchmarks")]
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))


def limited(limit_s: float, function: Callable[..., dict], *arguments: Any) -> dict[str, Any]:
    """What the function returns, or ``{"why": ...}`` where it fails, crashes or takes too long."""
    return side_by_side([(function, *arguments)], limit_s, at_once=1)[0]


def side_by_side(jobs: Sequence[tuple[Any, ...]], limit_s: float, at_once: int) -> list[dict]:
    """The answers of several functions with their arguments, so many processes at a time."""
    waiting, found = list(enumerate(jobs)), dict[int, dict[str, Any]]()
    running: dict[Any, tuple[int, Any, float]] = {}  # receiver -> job, process, when it must end
    while waiting or running:
        while waiting and len(running) < at_once:
            place, (function, *arguments) = waiting.pop(0)
            receiver, process = _started(function, arguments)
            running[receiver] = (place, process, perf_counter() + limit_s)
        ready = connection.wait(list(running), timeout=0.2)
        for receiver, (place, process, until) in list(running.items()):
            if receiver in ready:
                found[place] = _received(receiver)
            elif perf_counter() > until:
                found[place] = {"why": f"took over {limit_s:.0f} s"}
            else:
                continue
            del running[receiver]
            receiver.close()
            process.join(1.0 if "why" not in found[place] else 0.0)
            process.kill()
            process.join()
    return [found[place] for place in range(len(jobs))]


def _started(function: Callable[..., dict], arguments: list[Any]) -> tuple[Any, Any]:
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    return receiver, process


def _received(receiver: Any) -> dict[str, Any]:
    try:
        return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        return {"why": "crashed"}


def _answer(sender: Any, function: Callable[..., dict], arguments: list[Any]) -> None:
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            answer = function(*arguments)
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            answer = {"why": f"{type(error).__name__}: {first[0][:160]}"}
    sender.send(answer)


def _needed(answer: dict[str, Any]) -> dict[str, Any]:
    if "why" in answer:
        raise RuntimeError(f"a measurement failed: {answer['why']}")
    return answer


# --- Torch-Pruning, as a user would call it who writes no code for an architecture ------------


def their_pruner(
    module: nn.Module, inputs: Any, ratio: float, scope: str, outputs: Sequence[nn.Module]
) -> Any:
    """Its pruner with the norm over the group; all else is its default. ``step()`` cuts."""
    import torch_pruning

    return torch_pruning.pruner.MetaPruner(
        module,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=scope == "global",
        ignored_layers=list(outputs),
    )


def output_layers(module: nn.Module, inputs: Any) -> list[nn.Module]:
    """The layers that make the outputs, which Torch-Pruning must be told: the first with weights
    that are met from the outputs back, on every way; those of a residual stream are several.
    """
    owners = {
        id(layer.weight): layer
        for layer in module.modules()
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
    }
    found, seen = [], set()
    todo = [t.grad_fn for t in _run(module, inputs, grad=True) if t.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        before = [each for each, _ in node.next_functions if each is not None]
        reached = [owners[id(w)] for w in map(_weight, before) if id(w) in owners]
        found += reached
        todo += [] if reached else before
    return list(dict.fromkeys(found))


def _weight(node: Any) -> Tensor | None:
    """The parameter that an autograd node gives, transposed or not."""
    if node.name() in ("TBackward0", "TransposeBackward0"):
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _run(module: Any, inputs: Any, grad: bool = False) -> list[Tensor]:
    with torch.set_grad_enabled(grad):
        output = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    return structure.flatten(output)[0]


# --- (a) what can be cut ----------------------------------------------------------------------


def cover(tool: str, name: str) -> dict[str, Any]:
    """Half of every group of an architecture; whether what is left runs, and how much it is."""
    from tests import architectures

    module, inputs = architectures.make(name)
    other = architectures.with_batch(inputs, 3)
    expected = [tuple(t.shape) for t in _run(module, other)]
    before = sum(p.numel() for p in module.parameters())
    made, found = (_halved if tool == OURS else _halved_by_theirs)(module, inputs)
    after = sum(p.numel() for p in made.parameters())
    found |= {"parameters_left": after / before}
    got = [tuple(t.shape) for t in _run(made, other)]
    if found["groups"] == 0 or after == before:
        found["why"] = "found nothing to cut"
    elif got != expected:
        found["why"] = f"outputs {got}, were {expected}"
    return found


def _halved(module: nn.Module, inputs: Any) -> tuple[Model, dict[str, Any]]:
    start = perf_counter()
    model = paredown.capture(module, inputs)
    captured = perf_counter()
    coupling = analyze(model)
    analyzed = perf_counter()
    rng = np.random.default_rng(0)
    choice = {g.name: rng.permutation(g.size) < (g.size + 1) // 2 for g in coupling.groups}
    made = cut(model, coupling, choice)
    return made, {
        "capture_s": captured - start,
        "analysis_s": analyzed - captured,
        "groups": len(coupling.groups),
        "halved": len(coupling.groups),  # `cut` raises where it cannot
    }


def _halved_by_theirs(module: nn.Module, inputs: Any) -> tuple[nn.Module, dict[str, Any]]:
    outputs = output_layers(module, inputs)
    start = perf_counter()
    pruner = their_pruner(module, inputs, 0.5, "uniform", outputs)
    seconds = perf_counter() - start
    graph = pruner.DG
    groups = graph.get_all_groups(pruner.ignored_layers, pruner.root_module_types)
    roots = [group[0][0].target.module for group in groups]
    sizes = [graph.get_out_channels(root) for root in roots]
    pruner.step()
    left = [graph.get_out_channels(root) for root in roots]
    halved = sum(2 * now <= size + 1 for now, size in zip(left, sizes, strict=True))
    return module, {"capture_s": 0.0, "analysis_s": seconds, "groups": len(roots), "halved": halved}


def _coverage(effort: Effort) -> Result:
    from tests.architectures import ARCHITECTURES

    count = min(effort.architectures, len(ARCHITECTURES))
    chosen = [list(ARCHITECTURES)[i * len(ARCHITECTURES) // count] for i in range(count)]
    jobs = [(cover, tool, name) for name in chosen for tool in (OURS, THEIRS)]
    answers = side_by_side(jobs, effort.limit_s, tables.cores())
    rows = [
        {"tool": tool, "name": name, "family": ARCHITECTURES[name].family} | answer
        for (_, tool, name), answer in zip(jobs, answers, strict=True)
    ]
    result = Result(
        f"pruning: half of every group of {count} architectures",
        f"{_versions()}; heads and per-architecture code not given, output layers ignored for "
        f"{THEIRS}; cut: smaller, and ran at another batch size with the same output shapes (not: "
        "that it is right); a group that the tool itself leaves whole is no failure; "
        f"{effort.limit_s:.0f} s each at most, {tables.cores()} at a time, 1 thread each; "
        "parameters and seconds: medians over the architectures that both cut",
        rows,
    )
    tables.show(Result(result.name, result.conditions, _summed(rows)), COVERAGE)
    return result


def _summed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = {
        tool: {r["name"] for r in rows if r["tool"] == tool and "why" not in r}
        for tool in (OURS, THEIRS)
    }
    both = done[OURS] & done[THEIRS]
    made = []
    for tool in (OURS, THEIRS):
        mine = [row for row in rows if row["tool"] == tool]
        shared = [row for row in mine if row["name"] in both]
        made.append(
            {
                "tool": tool,
                "cut": f"{len(done[tool])} of {len(mine)}",
                "alone": len(done[tool] - both),
                "all_halved": sum("why" not in r and r["halved"] == r["groups"] for r in mine),
                "left": _median(shared, "parameters_left"),
                "seconds": _median(shared, "capture_s") + _median(shared, "analysis_s"),
                "failures": Counter(_kind(row["why"]) for row in mine if "why" in row),
            }
        )
    return made


def _median(rows: list[dict[str, Any]], key: str) -> float:
    return float(np.median([row[key] for row in rows])) if rows else float("nan")


def _kind(why: str) -> str:
    """A reason without what is peculiar to one architecture."""
    return why.partition(":")[0].partition(" [")[0]


# --- (b) how soon it is known -----------------------------------------------------------------


class Dense(nn.Module):
    """Adds 32 channels to those it is given (Huang et al. 1608.06993)."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(128)
        self.narrow = nn.Conv2d(inner, 128, 1, bias=False)
        self.conv = nn.Conv2d(128, 32, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(functional.relu(self.norm(x)))
        return torch.cat([x, self.conv(functional.relu(self.norm2(y)))], 1)


def densenet121() -> nn.Module:
    """torchvision's DenseNet-121: 8.0 million parameters at 1,000 classes."""
    layers: list[nn.Module] = [*shapes.conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inner = 64
    for blocks in (6, 12, 24, 16):
        layers += [Dense(inner + 32 * number) for number in range(blocks)]
        inner += 32 * blocks
        layers += [nn.BatchNorm2d(inner), nn.ReLU()]
        if blocks != 16:
            layers += [nn.Conv2d(inner, inner // 2, 1, bias=False), nn.AvgPool2d(2)]
            inner //= 2
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, shapes.CLASSES)]
    return nn.Sequential(*layers, *head)


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "resnet50": shapes.ResNet50,
    "densenet121": densenet121,
    "vit-s": shapes.ViT,
}


def seconds(tool: str, name: str) -> dict[str, Any]:
    """From the module to its groups, after a small one has brought in what is loaded late."""
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    for module in (small, SHAPES[name]()):
        module.eval()
        inputs = (torch.zeros(1, 3, SIZE, SIZE),)
        captured = 0.0
        start = perf_counter()
        if tool == OURS:
            model = paredown.capture(module, inputs)
            captured = perf_counter() - start
            groups = len(analyze(model).groups)
        else:
            pruner = their_pruner(module, inputs, 0.5, "uniform", [[*module.modules()][-1]])
            found = pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types)
            took = perf_counter() - start  # its constructor has gone through the groups once
            groups = len(list(found))
        if tool == OURS:
            took = perf_counter() - start
    return {"seconds": took, "capture_s": captured, "groups": groups}


def _analysis(effort: Effort) -> Result:
    rows = [row for name in SHAPES for row in _timed(name, effort.rounds)]
    result = Result(
        f"pruning: seconds from the module to what must be cut together, {SIZE} px",
        f"{_versions()}; 1 thread; median (lowest-highest) of {effort.rounds} rounds in turn, each "
        "in a fresh process after a small model; ours includes the capture, theirs is the pruner",
        rows,
    )
    tables.show(result, ANALYSIS)
    return result


def _timed(name: str, rounds: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
    for number in range(rounds):
        for tool in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
            found[tool].append(_needed(limited(LONG_S, seconds, tool, name)))
    took = {tool: [np.array([a["seconds"]]) for a in found[tool]] for tool in found}
    alone = [np.array([a["seconds"] - a["capture_s"]]) for a in found[OURS]]
    ratio = speedups.median_ratio(took[OURS], took[THEIRS])
    bare = speedups.median_ratio(alone, took[THEIRS])
    return [
        {
            "name": name,
            "tool": tool,
            "groups": found[tool][0]["groups"],
            "seconds": [answer["seconds"] for answer in found[tool]],
            "capture_s": [answer["capture_s"] for answer in found[tool]],
            "ratio": tables.spell(ratio) if tool == OURS else "1",
            "ratio_without_capture": tables.spell(bare) if tool == OURS else "1",
        }
        for tool in (OURS, THEIRS)
    ]


# --- (c) what is left of the accuracy ---------------------------------------------------------


class SmallMobileNet(nn.Module):
    """MobileNetV2's blocks (arXiv 1801.04381) at a size for digits: (B, 1, 32, 32) -> (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        rows = ((16, 16, 1, 1), (16, 24, 2, 4), (24, 24, 1, 4), (24, 48, 2, 4), (48, 48, 1, 4))
        blocks = [shapes.Inverted(*row) for row in rows]
        first = [*shapes.conv_norm(1, 16, 3, 2), nn.ReLU6()]
        last = [*shapes.conv_norm(48, 96, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.layers = nn.Sequential(*first, *blocks, *last, nn.Linear(96, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


NETS = ("resnet8", "small mobilenet")
WAYS = (OURS, f"{OURS}, reconstruct", THEIRS)


def accuracy(net: str, seed: int, effort: Effort) -> dict[str, Any]:
    """Every way to every size, before and after the same fine-tuning."""
    from examples import digits

    task, splits = digits.task(), digits.splits()
    train = splits["train"].tensors
    held = [torch.cat(pair) for pair in zip(*(splits[s].tensors for s in ("validation", "test")),
                                            strict=True)]  # fmt: skip
    module = digits.model() if net == "resnet8" else _trained(effort, train, seed)
    module.eval()
    model = paredown.capture(module, task.example)
    rows = []
    for left in effort.left:
        for scope in effort.scopes:
            for way in WAYS:
                made = _to_size(way, module, model, task, left, scope)
                row = {"left": left, "scope": scope, "way": way} | _shares(made, model, task)
                row["before"] = _score(made, *held)
                fit(made, *train, effort.epochs, seed)
                rows.append(row | {"after": _score(made, *held)})
    return {"rows": rows, "original": _score(module, *held)}


def _trained(effort: Effort, train: tuple[Tensor, ...], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = SmallMobileNet()
    fit(module, *train, effort.training, seed, rate=3 * RATE)
    return module


def fit(model: Any, x: Tensor, y: Tensor, epochs: int, seed: int, rate: float = RATE) -> None:
    """The same plain loop for a module and a captured graph: AdamW, the rate a half cosine."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=DECAY)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=order).split(BATCH)[: len(x) // BATCH]:
            optimizer.zero_grad()
            functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def _score(model: Any, x: Tensor, y: Tensor) -> float:
    """The share of right answers."""
    with torch.no_grad():
        right = [(model(a).argmax(1) == b) for a, b in zip(x.split(100), y.split(100), strict=True)]
    return float(torch.cat(right).float().mean())


def _to_size(
    way: str, module: nn.Module, model: Model, task: paredown.Task, left: float, scope: str
) -> Any:
    """A copy with so much of the multiply-adds or just less, by the same criterion."""
    if way == THEIRS:
        return _to_size_by_theirs(module, task.example, left, scope)
    return paredown.PruneChannels(
        1 - left,
        amount="macs",
        criterion="l2",
        scope=scope,
        round_to=1,
        reconstruct=way != OURS,
    ).apply(model, task)


def _to_size_by_theirs(module: nn.Module, example: Any, left: float, scope: str) -> nn.Module:
    """Its pruner takes a share of channels: the least that leaves few enough multiply-adds."""
    outputs = [place for place, layer in enumerate(module.modules()) if layer in
               output_layers(module, example)]  # fmt: skip
    budget, low, high = left * _flops(module, example), 0.0, 1.0
    best = None
    for _ in range(10):
        ratio = (low + high) / 2
        made = deepcopy(module)
        layers = [*made.modules()]
        their_pruner(made, example, ratio, scope, [layers[place] for place in outputs]).step()
        if _flops(made, example) <= budget:
            best, high = made, ratio
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"{THEIRS}: no ratio leaves {left:.2f} of the multiply-adds")
    return best


def _flops(module: Any, example: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        _run(module, example)
    return int(counter.get_total_flops())


def _shares(made: Any, model: Model, task: paredown.Task) -> dict[str, float]:
    """What is left, counted the same way for both: on the captured graph.

    Raises:
        RuntimeError: PyTorch's own counter, which runs both, finds something else.
    """
    after = analyze(paredown.capture(made, task.example)).costs()
    before = analyze(model).costs()
    if abs(2 * after.macs - _flops(made, task.example)) > 0.02 * after.macs:
        raise RuntimeError(f"two counts: {2 * after.macs} and {_flops(made, task.example)} flops")
    return {
        "macs": after.macs / before.macs,
        "parameters": after.parameters / before.parameters,
    }


def _accuracies(effort: Effort) -> list[Result]:
    jobs = [(accuracy, net, seed, effort) for net in NETS for seed in range(effort.seeds)]
    answers = [_needed(answer) for answer in side_by_side(jobs, LONG_S, tables.cores())]
    return [_compared(net, answers[i * effort.seeds :][: effort.seeds], effort)
            for i, net in enumerate(NETS)]  # fmt: skip


def _compared(net: str, answers: list[dict[str, Any]], effort: Effort) -> Result:
    """One row for each size and way, with a figure for each seed."""
    rows = []
    for runs in zip(*(answer["rows"] for answer in answers), strict=True):
        numbers = {key: [run[key] for run in runs] for key in SEEDED}
        rows.append({key: runs[0][key] for key in ("left", "scope", "way")} | numbers)
    held = "what the seed changes: " + ("fine-tuning" if net == "resnet8" else "all training")
    original = ", ".join(f"{answer['original']:.4f}" for answer in answers)
    result = Result(
        f"pruning: accuracy on digits, {net} (whole: {original})",
        f"{_versions()}; L2 norm over the group; 800 images that no training has seen; "
        f"epochs of one loop for both: {effort.epochs} (AdamW, {RATE}, batch {BATCH}, cosine); "
        f"mean (lowest-highest) over seeds: {effort.seeds}; {held}",
        rows,
        _bars(rows),
    )
    tables.show(result, ACCURACY)
    return result


SEEDED = ("macs", "parameters", "before", "after")


def _bars(rows: list[dict[str, Any]]) -> list[tables.Bar]:
    """Each way of ours against theirs: pairs of the same size, scope and seed."""

    def all_of(way: str, key: str) -> np.ndarray:
        return np.array([100 * x for row in rows if row["way"] == way for x in row[key]])

    return [
        tables.at_least(
            f"{way} at least {THEIRS}'s accuracy {when}; points above it",
            stats.paired_difference(all_of(THEIRS, key), all_of(way, key)),
            0.0,
        )
        for when, key in (("before fine-tuning", "before"), ("after it", "after"))
        for way in WAYS[:2]
        if len(all_of(way, key)) > 1
    ]


# --- the tables -------------------------------------------------------------------------------


def _versions() -> str:
    found = tables.versions()
    return f"{OURS} {found[OURS]}, {THEIRS} {version(THEIRS)}, torch {found['torch']}"


def _seeds(values: list[float], digits: int = 3) -> str:
    low, mean, high = min(values), float(np.mean(values)), max(values)
    return f"{mean:.{digits}f}" + (f" ({low:.{digits}f}-{high:.{digits}f})" if high > low else "")


COVERAGE = {
    "tool": lambda row: row["tool"],
    "cut": lambda row: row["cut"],
    "only by it": lambda row: str(row["alone"]),
    "every group halved": lambda row: str(row["all_halved"]),
    "parameters left": lambda row: f"{row['left']:.3f}",
    "seconds": lambda row: f"{row['seconds']:.2f}",
    "failures": lambda row: ", ".join(f"{n} {why}" for why, n in row["failures"].most_common(6)),
}
ANALYSIS = {
    "model": lambda row: row["name"],
    "tool": lambda row: row["tool"],
    "groups": lambda row: str(row["groups"]),
    "seconds": lambda row: tables.spread(row["seconds"]),
    "of it capture": lambda row: f"{np.median(row['capture_s']):.2f}",
    "its time / theirs": lambda row: row["ratio"],
    "without capture": lambda row: row["ratio_without_capture"],
}
ACCURACY = {
    "tool": lambda row: row["way"],
    "left": lambda row: f"1/{1 / row['left']:.0f}",
    "scope": lambda row: row["scope"],
    "multiply-adds": lambda row: _seeds(row["macs"]),
    "parameters": lambda row: _seeds(row["parameters"]),
    "before": lambda row: _seeds(row["before"]),
    "fine-tuned": lambda row: _seeds(row["after"]),
}
