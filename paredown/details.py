"""A run's results: what a report shows beyond the figures, and the files of the run folder."""

from __future__ import annotations

import base64
import dataclasses
import shlex
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from paredown import data, progress, recipe
from paredown.files import write_atomically, write_together
from paredown.graph import structure
from paredown.graph.model import Model
from paredown.graph.quantized import quantized_weights, rounded, stored_bits
from paredown.graph.sites import sites, tensor_of
from paredown.measure import Measured, size_bytes
from paredown.offers import Recipe
from paredown.runtimes import digest, parts, runtime
from paredown.types import Artifact, GoalCheck, Run, Step, Target, Task, UserError

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
    return {
        "layers": _layers(original.graph, compressed.graph),
        "histograms": _histograms(original.graph, compressed.graph),
        "census": dataclasses.asdict(runtime(target.runtime).census(file)),
        "notes": list(dict.fromkeys([*original.notes, *compressed.notes])),
        "latency_samples_ms": {name: _sampled(m) for name, m in measured.items()},
        **_examples(task, before, after),
    }


def write(run: Run, folder: Path, artifact: Path, original: Path) -> None:
    """The folder's results: artifact and original, recipe, run.json; each whole or not there."""
    assert run.artifact is not None and run.original is not None
    progress.say(f"Results in {folder}")
    run.details["folder"] = str(folder)
    run.details["reproduce"] = [
        run.command or "paredown.compress(...)",
        f"paredown replay {shlex.quote(str(folder))}",
    ]
    for name, file in ((run.artifact.path, artifact), (run.original.path, original)):
        given = [part.read_bytes() for part in parts(file)]
        write_together(dict(zip(parts(folder / name), given, strict=True)))
    write_atomically(folder / "recipe.toml", run.artifact.recipe.encode())
    write_atomically(folder / "run.json", run.to_json().encode())


def load_run(folder: str | Path) -> Run:
    """The Run of a run folder.

    Raises:
        UserError: no finished run there.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise UserError(f"{folder}: holds no finished run (no run.json).")
    try:
        return Run.from_json(path.read_text())
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: is damaged: {error}.") from error


def changed_task(run: Run, task: Task) -> Iterator[str]:
    """What of a task is not as it was in the run."""
    if task.batch_size != run.details["batch_size"]:
        yield "the task's batch_size"
    for name, facts in run.data.items():
        found = getattr(task, name)
        if found is None or data.fingerprint(found) != facts["fingerprint"]:
            yield f"the {name} split"


def artifact(name: str, file: Path, steps: Sequence[Step], target: Target) -> Artifact:
    """An exported file under the name it gets in the run folder."""
    return Artifact(
        path=f"{name}{file.suffix}",
        runtime=target.runtime,
        sha256=digest(file),
        size_bytes=size_bytes(file),
        recipe=recipe.to_toml(steps),
    )


def plan_row(item: Recipe) -> dict[str, Any]:
    return {
        "title": item.title,
        "reason": item.reason,
        "expected": "; ".join(a.expected for a in item.attempts if a.expected),
        "steps": [recipe.line(step) for step in item.steps],
    }


def verdict(checks: Sequence[GoalCheck], changed: bool, tried: bool) -> str:
    """The outcome in a sentence or two; every missed goal is named."""
    missed = [check.sentence for check in checks if not check.met]
    kept = "The best file is kept." if changed else "No step paid; the original is kept."
    if missed:
        return f"Goals missed. {' '.join(missed)} {kept}"
    if not tried:
        return "The original meets every goal already; nothing was changed."
    if not checks:
        return f"No goal was set. {kept}"
    return "Every goal is met by the exported file." + ("" if changed else f" {kept}")


def _layers(before: fx.GraphModule, after: fx.GraphModule) -> list[dict[str, Any]]:
    sizes = {site.weight: site for site in sites(after)}
    bits = {name: stored_bits(node) for name, node in quantized_weights(after).items()}
    rows = []
    for site in {s.weight: s for s in sites(before)}.values():
        weight = tensor_of(before, site.weight)
        left = [name for name in _now(site.weight) if name in sizes]
        held = [(tensor_of(after, name), bits.get(name)) for name in left]
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


def _bytes(weight: Tensor, bits: int | None) -> int:
    return weight.nbytes if bits is None else -(-weight.numel() * bits // 8)


def _dtype(tensor: Tensor, bits: int | None = None) -> str:
    low = {1: "binary", 2: "ternary"}
    return str(tensor.dtype).removeprefix("torch.") if bits is None else low.get(bits, f"int{bits}")


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
    for _, target in data.batches(data.split(task, "test"), task.batch_size):
        if not isinstance(target, Tensor) or target.dim() != 1 or target.is_floating_point():
            return None
        found += target.tolist()
    return found


def _class_name(task: Task, label: int) -> str:
    return task.classes[label] if 0 <= label < len(task.classes) else str(label)


def _classes(task: Task, labels: list[int], old: Tensor, new: Tensor) -> list[dict[str, Any]]:
    rows = []
    for label in sorted(set(labels)):
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


def _flip(
    task: Task, index: int, labels: list[int], before: list[int], after: list[int]
) -> dict[str, Any]:
    inputs = data.split(task, "test")[index][0]
    leaves = structure.flatten(inputs)[0]
    return {
        "index": index,
        "target": _class_name(task, labels[index]),
        "before": _class_name(task, before[index]),
        "after": _class_name(task, after[index]),
        "picture": picture(leaves[0]) if leaves else None,
    }


def picture(image: Tensor) -> str | None:
    """A (C, H, W) or (H, W) tensor as a PNG data URI, stretched to full contrast; else None.

    Example:
        >>> picture(torch.rand(1, 8, 8))[:22], picture(torch.rand(5))
        ('data:image/png;base64,', None)
    """
    if image.dim() == 2:
        image = image[None]
    if image.dim() != 3 or image.shape[0] not in (1, 3) or not 4 <= min(image.shape[1:]) <= 512:
        return None
    values = image.detach().float()
    span = (values.max() - values.min()).clamp(min=1e-12)
    pixels = (
        ((values - values.min()) / span * 255).round().byte().permute(1, 2, 0).numpy()
    )  # (H, W, C)
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    kind = 0 if channels == 1 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(name, body)
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    )
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
