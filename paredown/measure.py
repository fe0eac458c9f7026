"""Exported files -> what they score, take and need, each in a fresh process, side by side."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paredown import data, stats, timing
from paredown.devices import local
from paredown.graph import structure
from paredown.graph.model import Model
from paredown.progress import track
from paredown.runtimes import parts
from paredown.types import Comparison, Measurement, Target, Task, UserError

MAX_PREDICTIONS = 20_000


@dataclass(frozen=True)
class Measured:
    """A measurement with what it was made of.

    Attributes:
        scores: one per example (N,), float64.
        rounds: latencies in ms, one array for each interleaved round, which is one process.
        predictions: the class with the largest first output of each example, where that output
            is (N, C) floats and N is at most 20,000.
    """

    measurement: Measurement
    scores: Tensor
    rounds: list[np.ndarray]
    predictions: list[int] | None


@dataclass
class _Scoring:
    """What was scored of one file so far."""

    scores: list[Tensor] = field(default_factory=list)  # (B,) each
    predictions: list[int] | None = None
    bad: dict[str, int] = field(default_factory=dict)  # output -> examples with NaN or infinity


def measure(
    files: dict[str, Path],
    model: Model,
    task: Task,
    target: Target,
    split: str = "validation",
    rounds: int = timing.ROUNDS,
    timeout_s: float = local.TIMEOUT_S,
) -> dict[str, Measured]:
    """Measure exported files beside each other: all open at once, each in a fresh process.

    Latency is that of one inference at the deployed shapes on real inputs. Every round opens every
    file anew and times it twice, going from file to file and back; at least 20 samples, and 459
    or more where they fit into 3 s. Memory is the median of the rounds' peaks.

    Args:
        files: name -> exported file, all made from models with the inputs and outputs of ``model``.
        split: the split that is scored and whose first examples are timed.
        rounds: interleaved latency rounds, at least 2, each in fresh processes.
        timeout_s: the longest that opening a file, a batch or a round may take, in seconds.

    Raises:
        UserError: a file cannot be opened, crashes, hangs or gives NaN or infinite outputs; the
            data does not fit the model; or ``task.score`` does not give one finite number per
            example.
    """
    examples = data.split(task, split)
    with timing.opened(files, target, timeout_s) as probes:
        _check_signatures(probes, model)
        scorings = _score(probes, model, task, split)
        places = {name: probe.describe() for name, probe in probes.items()}
    batches, inputs = timing.deployed(model, examples, split)
    batch = timing.deployed_batch(model)
    where = {"batch": str(batch), "inputs": inputs}
    timings = timing.interleaved(files, target, batches, rounds, timeout_s=timeout_s)
    in_points = all(
        bool(((scores >= 0) & (scores <= 1)).all())
        for each in scorings.values()
        for scores in each.scores
    )
    return {
        name: _measured(
            Measurement(
                size_bytes(file), score_in_points=in_points, split=split, where=places[name] | where
            ),
            timings[name],
            scorings[name],
            batch,
        )
        for name, file in files.items()
    }


def compare(original: Measured, candidate: Measured, max_drop: float | None) -> Comparison:
    """A candidate beside the original, from one call of `measure`.

    ``max_drop`` is in the score's own unit; None where no drop was bounded.
    """
    in_points = original.measurement.score_in_points and candidate.measurement.score_in_points
    before, after = original.scores.numpy(), candidate.scores.numpy()
    difference = stats.paired_difference(before, after)
    speedup = stats.median_ratio(original.rounds, candidate.rounds)
    if max_drop is None:
        verdict = _unbounded(difference, len(before), in_points)
    else:
        unit = None if in_points else ""
        verdict = stats.non_inferior(before, after, max_drop, name="score", unit=unit).sentence
    return Comparison(
        difference.estimate,
        difference.low,
        difference.high,
        speedup.estimate,
        speedup.low,
        speedup.high,
        verdict,
        stats.speedup_sentence(speedup),
    )


def _unbounded(difference: stats.Interval, examples: int, in_points: bool) -> str:
    scale, unit = (100.0, " points") if in_points else (1.0, "")
    estimate, low, high = (
        scale * x for x in (difference.estimate, difference.low, difference.high)
    )
    moved = f"{'fell' if estimate < 0 else 'rose'} by {abs(estimate):.3g}{unit}"
    return (
        f"score {moved if estimate else 'did not change'} (95 % interval {low:+.3g} to "
        f"{high:+.3g} over {examples:,} examples); no bound was set for it"
    )


def size_bytes(file: Path) -> int:
    """Bytes on disk: the file with its companions, or all files of a folder."""
    if file.is_dir():
        return sum(each.stat().st_size for each in file.rglob("*") if each.is_file())
    weights = file.with_name(file.name + ".data")  # of an ONNX file that others made
    return sum(part.stat().st_size for part in [*parts(file), weights] if part.is_file())


def _check_signatures(probes: dict[str, local.Probe], model: Model) -> None:
    for probe in probes.values():
        for kind, found, expected in (
            ("inputs", probe.input_names, len(model.inputs)),
            ("outputs", probe.output_names, len(structure.names(model.outputs))),
        ):
            if len(found) != expected:
                raise UserError(
                    f"{probe.file}: its {kind} are ({', '.join(found)}); the model was captured "
                    f"with {expected}."
                )


# Scores


def _score(
    probes: dict[str, local.Probe], model: Model, task: Task, split: str
) -> dict[str, _Scoring]:
    """Score every file on the whole split, one batch in memory at a time."""
    examples = data.split(task, split)
    count, fixed = data.size(examples), model.fixed_batch
    size = fixed or task.batch_size
    found = {
        name: _Scoring(predictions=[] if count <= MAX_PREDICTIONS else None) for name in probes
    }
    total = -(-count // size)
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        given, made = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        for inputs, target in track(data.batches(examples, size), f"scoring {split}", total):
            length = len(structure.flatten(inputs)[0][0])
            leaves = timing.leaves(model, inputs, f"task: its {split} split", fixed)
            local.write_batches(given, [timing.arrays(model, leaves)])
            for name, probe in probes.items():
                [arrays] = probe.run(given, made)
                outputs = [
                    _cut(torch.from_numpy(array), len(leaves[0]), length) for array in arrays
                ]
                _add(found[name], outputs, model, task, target, length)
    _check_finite(found, probes, count, split)
    return found


def _check_finite(
    found: dict[str, _Scoring], probes: dict[str, local.Probe], count: int, split: str
) -> None:
    for name, probe in probes.items():
        for output, bad in found[name].bad.items():
            raise UserError(
                f"{probe.file}: output {output!r} holds NaN or infinite values for {bad} of "
                f"{count} examples of {split}."
            )


def _cut(output: Tensor, padded: int, length: int) -> Tensor:
    """The output without what padding added to its batch."""
    return output[:length] if output.dim() and len(output) == padded else output


def _add(
    found: _Scoring, outputs: list[Tensor], model: Model, task: Task, target: Any, length: int
) -> None:
    """Score one batch; batches with bad outputs are counted only."""
    names = structure.names(model.outputs)
    bad = {
        name or "output": rows
        for name, output in zip(names, outputs, strict=True)
        if (rows := _bad_examples(output, length))
    }
    for name, rows in bad.items():
        found.bad[name] = found.bad.get(name, 0) + rows
    if bad:
        return
    with torch.no_grad():
        found.scores.append(
            _checked(task, structure.unflatten(outputs, model.outputs), target, length)
        )
    first = outputs[0]
    if found.predictions is not None:
        classes = first.dim() == 2 and first.shape[1] > 1 and first.is_floating_point()
        if classes:
            found.predictions += first.argmax(1).tolist()
        else:
            found.predictions = None


def _bad_examples(output: Tensor, length: int) -> int:
    if not (output.is_floating_point() or output.is_complex()):
        return 0
    finite = torch.isfinite(output)
    if output.dim() and len(output) == length:
        return int((~finite.reshape(length, -1).all(1)).sum())
    return 0 if bool(finite.all()) else length


def _checked(task: Task, output: Any, target: Any, length: int) -> Tensor:
    """The scores of a batch (B,), float64.

    Raises:
        UserError: `task.score` failed or did not give one finite number per example.
    """
    try:
        scores = torch.as_tensor(task.score(output, target))
    except Exception as error:
        raise UserError(f"score: failed on a batch: {type(error).__name__}: {error}") from error
    if scores.shape != (length,) or scores.is_complex():
        raise UserError(
            f"score: expected one number per example, shape ({length},), got {scores.dtype} of "
            f"shape {tuple(scores.shape)}; return for example (output.argmax(1) == target).float()."
        )
    scores = scores.detach().cpu().to(torch.float64)
    if not bool(torch.isfinite(scores).all()):
        bad = int((~torch.isfinite(scores)).sum())
        raise UserError(f"score: {bad} of {length} numbers of a batch are NaN or infinite.")
    return scores


# Together


def _measured(start: Measurement, timed: timing.Timing, scoring: _Scoring, batch: int) -> Measured:
    scores = torch.cat(scoring.scores)
    mean = stats.mean_interval(scores.numpy())
    latency = stats.quantiles(np.concatenate(timed.rounds))
    measurement = dataclasses.replace(
        start,
        score=mean.estimate,
        score_low=mean.low,
        score_high=mean.high,
        examples=len(scores),
        latency_ms_p50=latency.p50,
        latency_ms_p90=latency.p90,
        latency_ms_p99=latency.p99,
        latency_samples=latency.n,
        throughput_per_s=1000 * batch / latency.p50,
        memory_bytes=timed.peak_bytes,
        energy_mj=timed.energy_mj,
        energy_source="unavailable" if timed.energy_mj is None else "measured",
    )
    return Measured(measurement, scores, timed.rounds, scoring.predictions)
