"""A run's results: what a report shows beyond the figures, and the files of the run folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from paredown.core.task import Target, Task
from paredown.data import splits
from paredown.data.answer import notes_of
from paredown.graph import structure
from paredown.graph.model import Model, made_from
from paredown.graph.quantized.forms import Form
from paredown.graph.quantized.quantizers import quantized_weights, rounded, weight_forms
from paredown.graph.sites import sites
from paredown.graph.state import tensor_of
from paredown.measure.measure import Measured
from paredown.report.png import picture
from paredown.steps.quantization.saturation import instruction_sets
from paredown.targets.runtimes import runtime

HISTOGRAM_LAYERS, HISTOGRAM_BINS = 12, 48
FLIPS_SHOWN, LATENCIES_SHOWN = 24, 500


def collect(
    original: Model,
    compressed: Model,
    task: Task,
    measured: dict[str, Measured],
    file: Path,
    target: Target,
) -> dict[str, Any]:
    """The ``details`` of a Run, as JSON."""
    before, after = measured["original"], measured["compressed"]
    same = made_from(compressed, original)  # else a student's, whose layers are others
    return {
        "layers": _layers(original.graph, compressed.graph) if same else [],
        "histograms": _histograms(original.graph, compressed.graph) if same else [],
        "census": dataclasses.asdict(runtime(target.runtime).census(file)),
        "instruction_sets": instruction_sets(compressed, task, target.runtime),
        "score": _meaning(task),
        "notes": list(dict.fromkeys([*notes_of(task), *original.notes, *compressed.notes])),
        "latency_samples_ms": {name: _sampled(m) for name, m in measured.items()},
        **_examples(task, before, after),
    }


MEANINGS = {
    "accuracy": "accuracy",
    "squared_error": "minus the mean squared error",
    "multilabel_accuracy": "the share of labels that are right",
    "token_accuracy": "the share of tokens that are right",
}


def _meaning(task: Task) -> str:
    """What the task's score is, in words; the name of the user's own function, where that says
    more than that it is a score."""
    told = getattr(task.score, "meaning", "")
    if isinstance(told, str) and told:
        return told
    name = getattr(task.score, "__name__", "")
    known = getattr(task.score, "__module__", "").startswith("paredown.")
    if known:
        return MEANINGS.get(name, "")
    return "" if name.startswith("<") or name == "score" else name.replace("_", " ")


def _layers(before: fx.GraphModule, after: fx.GraphModule) -> list[dict[str, Any]]:
    sizes = {site.weight: site for site in sites(after)}
    forms = weight_forms(after)
    rows = []
    for site in {s.weight: s for s in sites(before)}.values():
        weight = tensor_of(before, site.weight)
        left = [name for name in _now(site.weight) if name in sizes]
        held = [(tensor_of(after, name), forms.get(name)) for name in left]
        rows.append(
            {
                "name": site.weight,
                "op": site.kind,
                "shape": list(weight.shape),
                "bytes_before": weight.nbytes,
                "bytes_after": sum(_bytes(*each) for each in held),
                "dtype_before": _dtype(weight),
                "dtype_after": " and ".join(dict.fromkeys(_dtype(*each) for each in held)),
            }
        )
    return rows


def _now(name: str) -> tuple[str, ...]:
    """What a weight may be called in the compressed model: its factors have names of their own."""
    return (name, *(f"{name}_{part}" for part in ("down", "core", "up")))


def _bytes(weight: Tensor, form: Form | None) -> int:
    return weight.nbytes if form is None else form.stored_bytes(weight.numel())


def _dtype(weight: Tensor, form: Form | None = None) -> str:
    return str(weight.dtype).removeprefix("torch.") if form is None else form.word


def _histograms(before: fx.GraphModule, after: fx.GraphModule) -> list[dict[str, Any]]:
    """The largest layers' weights, before and after, over common bins."""
    quantizers = quantized_weights(after)
    common = [s.weight for s in sites(before) if s.weight in {t.weight for t in sites(after)}]
    names = sorted(set(common), key=lambda n: -tensor_of(before, n).numel())[:HISTOGRAM_LAYERS]
    rows = []
    for name in sorted(names, key=common.index):
        old = tensor_of(before, name).detach().float().reshape(-1)
        node = quantizers.get(name)
        new = tensor_of(after, name).detach() if node is None else rounded(after, node)
        new = new.float().reshape(-1)
        low = float(torch.minimum(old.min(), new.min()))
        high = float(torch.maximum(old.max(), new.max()))
        edges = np.linspace(low, high if high > low else low + 1e-6, HISTOGRAM_BINS + 1)
        counts = [np.histogram(values.numpy(), edges)[0].tolist() for values in (old, new)]
        rows.append(
            {"name": name, "edges": edges.tolist(), "before": counts[0], "after": counts[1]}
        )
    return rows


def _sampled(measured: Measured) -> list[float]:
    samples = np.concatenate(measured.rounds)
    return [round(float(v), 6) for v in samples[:: max(1, -(-len(samples) // LATENCIES_SHOWN))]]


def _examples(task: Task, before: Measured, after: Measured) -> dict[str, Any]:
    """Per-class scores, and the examples whose score changed."""
    if before.overlaps is not None and after.overlaps is not None:
        rows = _overlaps(task, before.overlaps, after.overlaps)
        classes = {"classes": rows, "classes_by": "intersection over union"}
        return classes | {"flips": [], "flip_counts": {}}
    labels = _labels(task)
    if before.predictions is None or after.predictions is None or labels is None:
        return {"classes": [], "flips": [], "flip_counts": {}}
    old, new = before.scores, after.scores
    changed = [n for n in range(len(old)) if bool(old[n] != new[n])]
    wrong = [n for n in changed if new[n] < old[n]]
    right = [n for n in changed if new[n] > old[n]]
    shown = [*wrong[:FLIPS_SHOWN], *right[: FLIPS_SHOWN // 2]]
    flips = [_flip(task, n, labels, before.predictions, after.predictions) for n in shown]
    counts = {"now_wrong": len(wrong), "now_right": len(right), "examples": len(old)}
    return {"classes": _classes(task, labels, old, new), "flips": flips, "flip_counts": counts}


def _labels(task: Task) -> list[int] | None:
    """The test split's targets where each is one whole number."""
    found: list[int] = []
    for _, target in splits.batches(splits.split(task, "test"), task.batch_size):
        if not isinstance(target, Tensor) or target.dim() != 1 or target.is_floating_point():
            return None
        found += target.tolist()
    return found


def _class_name(task: Task, label: int) -> str:
    return task.classes[label] if 0 <= label < len(task.classes) else str(label)


def _classes(task: Task, labels: list[int], old: Tensor, new: Tensor) -> list[dict[str, Any]]:
    """Rows of the classes; labels that do not count, such as -100, are none."""
    rows, skipped = [], splits.ignored(task)
    for label in sorted(set(labels)):
        if label in skipped if skipped is not None else label < 0:
            continue
        chosen = torch.tensor([n for n, found in enumerate(labels) if found == label])
        rows.append(
            {
                "name": _class_name(task, label),
                "examples": len(chosen),
                "before": float(old[chosen].mean()),
                "after": float(new[chosen].mean()),
            }
        )
    return rows


def _overlaps(task: Task, old: Tensor, new: Tensor) -> list[dict[str, Any]]:
    """Rows of the classes of a segmentation, each with its intersection over union over all places
    of the split; classes that the targets do not have are none."""
    rows = []
    for label in [n for n, places in enumerate(old[2].tolist()) if places]:
        agreed, given, wanted = (torch.stack([old, new])[:, n, label].double() for n in range(3))
        before, after = (agreed / (given + wanted - agreed)).tolist()
        rows.append(
            {
                "name": _class_name(task, label),
                "examples": int(old[3, label]),
                "before": before,
                "after": after,
            }
        )
    return rows


def _flip(
    task: Task, index: int, labels: list[int], before: list[int], after: list[int]
) -> dict[str, Any]:
    inputs = splits.example(splits.split(task, "test"), index)[0]
    leaves = structure.flatten(inputs)[0]
    return {
        "index": index,
        "target": _class_name(task, labels[index]),
        "before": _class_name(task, before[index]),
        "after": _class_name(task, after[index]),
        "picture": picture(leaves[0]) if leaves else None,
    }
