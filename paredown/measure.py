"""Exported files -> what they score, take and need, each in a fresh process, side by side."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from paredown import data, stats
from paredown.devices import local
from paredown.graph import structure
from paredown.graph.model import Model
from paredown.progress import track
from paredown.runtimes import runtime
from paredown.types import Comparison, Measurement, Target, Task, UserError

# A file is up to 2 % faster in one process than in the next, for as long as they live. Seen with
# one process each: a "speed-up" of a file over itself in 11 of 24 measurements; with a fresh one
# for each round: in 3 of 50, as a 95 % interval should. So a round is a fresh process of each file.
ROUNDS = 10
TURNS = 2  # in a round: one forth, one back
BUDGET_MS = 3000.0  # timed inferences of one file in total, where they are quick enough
WARMUP_MS = 100.0  # in each process
MAX_WARMUP = 50  # inferences
MAX_SAMPLES = 2000  # more would not narrow the interval between rounds
CYCLE = 8  # different inputs that the latency is measured on
CYCLE_BYTES = 2**28
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
class _Timing:
    """What was timed of one file so far."""

    rounds: list[np.ndarray] = field(default_factory=list)  # ms
    energies_mj: list[float | None] = field(default_factory=list)  # per inference, one a turn
    peaks_bytes: list[int | None] = field(default_factory=list)  # one a round
    samples: int = 0  # a turn
    warmup: int = 0  # inferences before each turn, to bring the caches back


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
    rounds: int = ROUNDS,
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
    examples, opened = data.split(task, split), local.device(target.device)
    runtime_file = Path(runtime(target.runtime).__file__)

    def start(name: str) -> local.Probe:
        return opened(files[name], runtime_file, target.threads, timeout_s)

    with tempfile.TemporaryDirectory(prefix="paredown-") as made:
        folder = Path(made)
        with _open(files, start) as probes:
            _check_signatures(probes, model)
            scorings = _score(probes, model, task, split, folder)
            places = {name: probe.describe() for name, probe in probes.items()}
        batches, inputs = _deployed(model, examples, split)
        where = {"batch": str(_batch(model)), "inputs": inputs}
        timings = _time(list(files), start, batches, folder, rounds)
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
            _batch(model),
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
    """Bytes on disk: the file with its external weights, or all files of a folder."""
    if file.is_dir():
        return sum(each.stat().st_size for each in file.rglob("*") if each.is_file())
    weights = file.with_name(file.name + ".data")
    return file.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)


@contextmanager
def _open(
    names: Iterable[str], start: Callable[[str], local.Probe]
) -> Iterator[dict[str, local.Probe]]:
    """A fresh process for each file, until the block ends."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(start(name)) for name in names}


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


# Inputs


def _batch(model: Model) -> int:
    """Examples per inference as deployed."""
    example = model.inputs[0].example
    return example.shape[0] if example.dim() else 1


def _leaves(model: Model, inputs: Any, padded_to: int) -> list[Tensor]:
    """The tensors of a batch in the model's order, the last example repeated up to ``padded_to``.

    Raises:
        UserError: the split's inputs have other shapes or dtypes than the captured ones.
    """
    tensors, nesting = structure.flatten(inputs)
    padded = [_padded(tensor, padded_to) for tensor in tensors]
    args, kwargs = data.arguments(structure.unflatten(padded, nesting))
    leaves = model.bind(args, kwargs)
    for item, leaf in zip(model.inputs, leaves, strict=True):
        if leaf.dtype != item.example.dtype:
            raise UserError(
                f"input {item.name!r}: expected {item.example.dtype} as in the example, the split "
                f"gives {leaf.dtype}; convert it in the dataset."
            )
    return leaves


def _padded(tensor: Tensor, length: int) -> Tensor:
    if len(tensor) == length:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(length - len(tensor), *tensor.shape[1:])])


def _arrays(model: Model, leaves: list[Tensor]) -> list[np.ndarray]:
    found = []
    for item, leaf in zip(model.inputs, leaves, strict=True):
        try:
            found.append(leaf.detach().cpu().contiguous().numpy())
        except TypeError as error:
            raise UserError(
                f"input {item.name!r}: {leaf.dtype} cannot be given to a runtime; take float32."
            ) from error
    return found


def _deployed(model: Model, examples: Any, split: str) -> tuple[list[list[np.ndarray]], str]:
    """Several inputs as deployed for the latency, and what they are."""
    batch, found, total = _batch(model), [], 0
    shapes = [item.example.shape for item in model.inputs]
    for inputs, _ in itertools.islice(data.batches(examples, batch), CYCLE):
        leaves = _leaves(model, inputs, batch)
        if [leaf.shape for leaf in leaves] == shapes:
            found.append(_arrays(model, leaves))
            total += sum(array.nbytes for array in found[-1])
        if total > CYCLE_BYTES and len(found) > 1:
            break
    if found:
        count = min(len(found) * batch, data.size(examples))
        return found, f"the first {count} examples of {split}, {batch} at a time"
    own = _arrays(model, [item.example for item in model.inputs])
    return [own], f"the deployed example, as {split} holds none of its shapes"


# Latency, memory and energy


def _time(
    names: list[str],
    start: Callable[[str], local.Probe],
    batches: list[list[np.ndarray]],
    folder: Path,
    rounds: int,
) -> dict[str, _Timing]:
    """Time the files in turn, in fresh processes every round; warm-up apart."""
    first, cycle = folder / "first.npz", folder / "cycle.npz"
    local.write_batches(first, batches[:1])
    local.write_batches(cycle, batches)
    timings = {name: _Timing() for name in names}
    for number in track(range(rounds), "timing"):
        order = names if number % 2 == 0 else names[::-1]
        with _open(order, start) as probes:
            for name in order:
                _warm(probes[name], timings[name], first, cycle, rounds * TURNS)
            turns: dict[str, list[np.ndarray]] = {name: [] for name in names}
            for turn in range(TURNS):
                for name in order if turn % 2 == 0 else order[::-1]:
                    timing = timings[name]
                    latencies, energy = probes[name].time(cycle, timing.samples, timing.warmup)
                    turns[name].append(latencies)
                    timing.energies_mj.append(energy)
        for name in names:
            timings[name].rounds.append(np.concatenate(turns[name]))
    return timings


def _warm(probe: local.Probe, timing: _Timing, first: Path, cycle: Path, turns: int) -> None:
    """The first inferences of a process: its peak memory, then until it is warm."""
    cold, _ = probe.time(first, 1)
    timing.peaks_bytes.append(probe.memory())
    warm, _ = probe.time(cycle, max(1, min(MAX_WARMUP, int(WARMUP_MS / cold[0]))))
    if not timing.samples:
        timing.samples, timing.warmup = _plan(float(np.median(warm)), turns)


def _plan(latency_ms: float, turns: int) -> tuple[int, int]:
    """Samples of a turn, and inferences before them that bring the caches back."""
    samples = min(MAX_SAMPLES, int(BUDGET_MS / latency_ms))
    if samples < stats.MIN_SAMPLES_P99:
        return max(1, samples // turns), int(latency_ms < BUDGET_MS / turns / 2)
    return -(-samples // turns), 2  # rounded up, so that the p99 keeps its samples


# Scores


def _score(
    probes: dict[str, local.Probe], model: Model, task: Task, split: str, folder: Path
) -> dict[str, _Scoring]:
    """Score every file on the whole split, one batch in memory at a time."""
    examples = data.split(task, split)
    count, fixed = data.size(examples), model.fixed_batch
    size = fixed or task.batch_size
    found = {
        name: _Scoring(predictions=[] if count <= MAX_PREDICTIONS else None) for name in probes
    }
    given = folder / "inputs.npz"
    total = -(-count // size)
    for inputs, target in track(data.batches(examples, size), f"scoring {split}", total):
        length = len(structure.flatten(inputs)[0][0])
        leaves = _leaves(model, inputs, fixed or length)
        local.write_batches(given, [_arrays(model, leaves)])
        for name, probe in probes.items():
            [arrays] = probe.run(given, folder / "outputs.npz")
            outputs = [_cut(torch.from_numpy(array), len(leaves[0]), length) for array in arrays]
            _add(found[name], outputs, model, task, target, length)
    for name, probe in probes.items():
        for output, bad in found[name].bad.items():
            raise UserError(
                f"{probe.file}: output {output!r} holds NaN or infinite values for {bad} of "
                f"{count} examples of {split}."
            )
    return found


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


def _measured(start: Measurement, timing: _Timing, scoring: _Scoring, batch: int) -> Measured:
    scores = torch.cat(scoring.scores)
    mean = stats.mean_interval(scores.numpy())
    latency = stats.quantiles(np.concatenate(timing.rounds))
    energy, source = _energy(timing)
    peaks = [peak for peak in timing.peaks_bytes if peak is not None]
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
        memory_bytes=int(np.median(peaks)) if peaks else None,
        energy_mj=energy,
        energy_source=source,
    )
    return Measured(measurement, scores, timing.rounds, scoring.predictions)


def _energy(timing: _Timing) -> tuple[float | None, Literal["measured", "unavailable"]]:
    """Millijoules per inference, where every turn has a reading."""
    known = [energy for energy in timing.energies_mj if energy is not None]
    if not known or len(known) < len(timing.energies_mj):
        return None, "unavailable"
    return float(np.mean(known)), "measured"  # every turn has as many samples
