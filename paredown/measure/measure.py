"""Exported files -> what they score, take and need, each in its own process, side by side."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.core.measurement import Comparison, Measurement
from paredown.core.settings import check_above_zero, check_arguments, check_choice
from paredown.core.task import SPLITS, Target, Task
from paredown.data import splits
from paredown.graph import structure
from paredown.graph.model import Model
from paredown.measure import around, disturbed, speedups, stats, timing
from paredown.measure.inputs import deployed, deployed_batch
from paredown.measure.looks import Question
from paredown.measure.memory import floor, peak_bytes
from paredown.measure.scoring import Scoring, score_files
from paredown.targets.artifact import size_bytes
from paredown.targets.devices.device import TIMEOUT_S, Opened, write_batches


@dataclass(frozen=True)
class Measured:
    """A measurement with what it was made of.

    Attributes:
        scores: one per example (N,), float64.
        rounds: latencies in ms, one array for each interleaved round, which is one process.
        predictions: the class with the largest first output of each example, where that output
            is (N, C) floats and N is at most 20,000.
        overlaps: of a class for each place, (4, C) int64, as `scoring.overlaps` counts them.
        windows: when it was timed, as `Timing` has them.
    """

    measurement: Measurement
    scores: Tensor
    rounds: list[np.ndarray]
    predictions: list[int] | None
    overlaps: Tensor | None = None
    windows: tuple[tuple[float, float, int], ...] = ()


def measure(
    files: Mapping[str, str | Path],
    model: Model,
    task: Task,
    target: Target,
    split: str = "validation",
    timeout_s: float = TIMEOUT_S,
    questions: Sequence[Question] | None = None,
) -> dict[str, Measured]:
    """Measure exported files beside each other: all open at once, each in a process of its own.

    Latency is that of one inference at the deployed shapes on real inputs. Every round opens every
    file anew and times it twice, going from file to file and back; at least 20 samples, and 459
    or more where they fit into 3 s. Memory is the peak of a fresh process that runs it once, and
    the model's share of it what lies above a model of one op.

    Args:
        files: name -> exported file, all made from models with the inputs and outputs of ``model``.
        split: the split that is scored and whose first examples are timed.
        timeout_s: the longest that opening a file, a batch or a round may take, in seconds.
        questions: what is asked of the speed, by names of files: there are fewer rounds than the
            target's where these answer it surely. By default every round is made.

    Raises:
        UserError: a file cannot be opened, crashes, hangs or gives NaN or infinite outputs; the
            data does not fit the model; or ``task.score`` does not give one finite number per
            example.
    """
    files = _checked(files, model, task, target)
    check_choice("split", split, SPLITS)
    check_above_zero("timeout_s", timeout_s)
    check_arguments(questions=(questions, tuple | list | None))
    task = splits.prepared(task)
    examples = splits.split(task, split)
    with timing.opened(files, target, timeout_s, fresh=False) as probes:
        _check_signatures(probes, model)
        scorings = score_files(probes, model, task, split)
        place = next(iter(probes.values())).describe()  # one for all, whatever changes meanwhile
        batches, inputs = deployed(model, examples, split)
        surrounded = _around(probes, model, task, split, batches)
    batch = deployed_batch(model)
    where = {"batch": str(batch), "inputs": inputs}
    memory = {name: _memory(file, target, batches[0], timeout_s) for name, file in files.items()}
    timings = timing.interleaved(
        files, target, batches, target.rounds, timeout_s=timeout_s, questions=questions
    )
    kept = next(iter(timings.values())).disturbances
    where = place | where | {"conditions": disturbed.told(kept, len(kept))}
    in_points = _in_points(scorings.values())
    found = {}
    for name, file in files.items():
        before, behind = surrounded[name]
        start = Measurement(
            size_bytes(file),
            score_in_points=in_points,
            split=split,
            where=where,
            preprocess_ms=before,
            postprocess_ms=behind,
            **memory[name],
        )
        found[name] = _measured(start, timings[name], scorings[name], batch)
    return found


def _in_points(scorings: Iterable[Scoring]) -> bool:
    """Whether every score is a share, so that a change of it is one of points."""
    scores = itertools.chain.from_iterable(each.scores for each in scorings)
    return all(bool(((each >= 0) & (each <= 1)).all()) for each in scores)


def _checked(
    files: Mapping[str, str | Path], model: Model, task: Task, target: Target
) -> dict[str, Path]:
    check_arguments(files=(files, dict), model=(model, Model), task=(task, Task))
    check_arguments(target=(target, Target))
    for name, file in files.items():
        check_arguments(**{f"files[{name!r}]": (file, str | Path)})
    return {name: Path(file) for name, file in files.items()}


def _around(
    probes: dict[str, Opened],
    model: Model,
    task: Task,
    split: str,
    batches: list[list[np.ndarray]],
) -> dict[str, tuple[float | None, float | None]]:
    """What the task does before and behind each file, in ms, on what the latency is measured on."""
    before = around.preprocess_ms(task, model, split)
    found = {}
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        given, made = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        if task.postprocess is not None:
            write_batches(given, batches)
        for name, probe in probes.items():
            outputs = probe.run(given, made) if task.postprocess is not None else []
            behind = around.postprocess_ms(task, model, outputs)
            found[name] = before, behind
    return found


def compare(
    original: Measured, candidate: Measured, max_drop: float | None, tails: bool = False
) -> Comparison:
    """A candidate beside the original, from one call of `measure`.

    Args:
        max_drop: in the score's own unit; None where no drop was bounded.
        tails: whether the ratios of 90th and 99th percentiles get their intervals, which take as
            long as that of the medians each.
    """
    in_points = original.measurement.score_in_points and candidate.measurement.score_in_points
    before, after = original.scores.numpy(), candidate.scores.numpy()
    difference = stats.paired_difference(before, after)
    speedup = speedups.median_ratio(original.rounds, candidate.rounds)
    if max_drop is None:
        verdict, claim = _unbounded(difference, len(before), in_points), ""
    else:
        unit = None if in_points else ""
        found = stats.non_inferior(before, after, max_drop, name="score", unit=unit)
        verdict, claim = found.sentence, found.status
    median = speedups.median_interval(candidate.rounds)
    tenth = _tail(original, candidate, 0.9) if tails else None
    both = (original.measurement.latency_ms_p99, candidate.measurement.latency_ms_p99)
    rare = _tail(original, candidate, 0.99) if tails and None not in both else None
    return Comparison(
        score_difference=difference.estimate,
        score_difference_low=difference.low,
        score_difference_high=difference.high,
        speedup=speedup.estimate,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        speedup_p90_low=tenth.low if tenth else None,
        speedup_p90_high=tenth.high if tenth else None,
        speedup_p99_low=rare.low if rare else None,
        speedup_p99_high=rare.high if rare else None,
        latency_ms_low=median.low,
        latency_ms_high=median.high,
        verdict=verdict,
        speed=speedups.speedup_sentence(speedup),
        score_claim=claim,
    )


def _tail(original: Measured, candidate: Measured, quantile: float) -> stats.Interval:
    return speedups.median_ratio(original.rounds, candidate.rounds, quantile=quantile)


def _unbounded(difference: stats.Interval, examples: int, in_points: bool) -> str:
    scale, unit = (100.0, " points") if in_points else (1.0, "")
    estimate, low, high = (
        scale * x for x in (difference.estimate, difference.low, difference.high)
    )
    moved = stats.moved(difference, f"{abs(estimate):.3g}{unit}")
    return (
        f"score {moved} (95 % interval {low:+.3g} to {high:+.3g} over {examples:,} examples); "
        "no bound was set for it"
    )


def _check_signatures(probes: dict[str, Opened], model: Model) -> None:
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


def _memory(
    file: Path, target: Target, arrays: list[np.ndarray], timeout_s: float
) -> dict[str, Any]:
    """The process's peak, the runtime's floor, and the model's own share."""
    peak, lowest = peak_bytes(file, target, arrays, timeout_s), floor(target).memory_bytes
    share = None if peak is None or lowest is None else max(0, peak - lowest)
    return {"memory_bytes": peak, "memory_floor_bytes": lowest, "memory_model_bytes": share}


# Together


def _measured(start: Measurement, timed: timing.Timing, scoring: Scoring, batch: int) -> Measured:
    scores = torch.cat(scoring.scores)
    mean = stats.mean_interval(scores.numpy())
    latency = speedups.quantiles(np.concatenate(timed.rounds))
    own = [ms for ms in (start.preprocess_ms, start.postprocess_ms) if ms is not None]
    measurement = dataclasses.replace(
        start,
        end_to_end_ms=sum(own, latency.p50) if own else None,
        score=mean.estimate,
        score_low=mean.low,
        score_high=mean.high,
        examples=len(scores),
        latency_ms_p50=latency.p50,
        latency_ms_p90=latency.p90,
        latency_ms_p99=latency.p99,
        latency_samples=latency.n,
        throughput_per_s=1000 * batch / latency.p50,
        energy_mj=timed.energy_mj,
        energy_source="unavailable" if timed.energy_mj is None else "measured",
    )
    return Measured(
        measurement,
        scores,
        timed.rounds,
        scoring.predictions,
        scoring.overlaps,
        tuple(timed.windows),
    )
