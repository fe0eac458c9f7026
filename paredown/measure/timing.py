"""How long exported files take: fresh processes, in turn, on inputs as deployed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Target
from paredown.graph.model import Model
from paredown.measure import disturbed, looks, speedups, stats
from paredown.measure.inputs import arrays, deployed_example, leaves
from paredown.targets.devices.device import TIMEOUT_S, Opened, device, write_batches
from paredown.targets.runtimes import ready, source

# A file is up to 2 % faster in one process than in the next, for as long as they live. Seen with
# one process each: a "speed-up" of a file over itself in 11 of 24 measurements; with another one
# for each round: in 2 of 120, and in 1 of 120 where they are forks, so a 95 % interval keeps its
# word. So a round is a process of each file (benchmarks/forks.py).
TURNS = 2  # in a round: one forth, one back
BUDGET_MS = 3000.0  # timed inferences of one file in total, where they are quick enough
DECISION_ROUNDS = 4  # of `speedup`, each with as much time as one of ten of a final measurement
WARMUP_MS = 100.0  # in each process
MAX_WARMUP = 50  # inferences
AGAIN = 5  # of so many rounds one may be timed again
LONG_S = 20.0  # of all rounds, from which on it is said before
MAX_SAMPLES = 2000  # more would not narrow the interval between rounds


@dataclass
class Timing:
    """What was timed of one file.

    Attributes:
        rounds: latencies in ms, one array for each interleaved round, which is one process.
        energies_mj: millijoules per inference, one a turn; None where unknown.
        samples: inferences timed in each turn.
        warmup: inferences before each turn, to bring the caches back.
        disturbances: of each round what disturbed it, "" where nothing did.
        windows: of each turn when its inferences began and ended, in seconds since 1970 by this
            machine's clock, and how many they were.
    """

    rounds: list[np.ndarray] = field(default_factory=list)
    energies_mj: list[float | None] = field(default_factory=list)
    samples: int = 0
    warmup: int = 0
    disturbances: list[str] = field(default_factory=list)
    windows: list[tuple[float, float, int]] = field(default_factory=list)

    @property
    def energy_mj(self) -> float | None:
        """Millijoules per inference, where every turn has a reading.

        Example:
            >>> Timing(energies_mj=[2.0, 4.0]).energy_mj, Timing(energies_mj=[2.0, None]).energy_mj
            (3.0, None)
        """
        known = [energy for energy in self.energies_mj if energy is not None]
        if not known or len(known) < len(self.energies_mj):
            return None
        return float(np.mean(known))  # every turn has as many samples


def speedup(
    before: Model,
    after: Model,
    target: Target,
    inputs: Sequence[Any] | None = None,
    rounds: int = DECISION_ROUNDS,
) -> stats.Interval:
    """How many times faster ``after`` runs than ``before``, as files exported for the target.

    Median latency before / after with its 95 % interval, both files in turn, each round in other
    processes; above 1 where ``after`` is faster. Both are exported to a temporary folder that is
    gone afterwards. Four rounds tell a change of a tenth on a quiet machine; `paredown.measure`
    takes more than twice as many for the final claim.

    Args:
        before, after: models with the same inputs; what they do inside may differ.
        target: the runtime, the device and the threads of one inference.
        inputs: what is timed, each as a split gives its inputs, in the shapes of the example;
            the example itself by default.
        rounds: interleaved rounds, at least 2, each in other processes.

    Raises:
        UserError: no such runtime or device, a model that the runtime cannot take, a file that
            crashes or hangs, inputs in other shapes or dtypes, or fewer than 2 rounds.

    Example:
        >>> import paredown, torch
        >>> layers = [torch.nn.Linear(256, 256) for _ in range(6)]
        >>> example = (torch.zeros(8, 256),)
        >>> deep = paredown.capture(torch.nn.Sequential(*layers), example)
        >>> flat = paredown.capture(layers[0], example)
        >>> speedup(deep, flat, Target(), rounds=2).estimate > 1
        True
    """
    chosen, _ = ready(target.runtime), device(target.device)
    if rounds < 2:
        raise UserError(f"rounds: expected a whole number from 2 up, got {rounds}.")
    _check_same_inputs(before, after)
    batches = _given(before, inputs)
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        files = {
            name: chosen.lower(model, Path(folder) / f"{name}{chosen.SUFFIX}")
            for name, model in (("before", before), ("after", after))
        }
        timings = interleaved(files, target, batches, rounds, BUDGET_MS * rounds / Target().rounds)
    return speedups.median_ratio(timings["before"].rounds, timings["after"].rounds)


def _check_same_inputs(before: Model, after: Model) -> None:
    wanted, found = (
        [(item.example.dtype, tuple(item.example.shape)) for item in model.inputs]
        for model in (before, after)
    )
    if wanted != found:
        raise UserError(
            f"after: expected the inputs of before, {_described(before)}, got {_described(after)}; "
            "only models with the same inputs can be timed beside each other."
        )


def _described(model: Model) -> str:
    return ", ".join(
        f"{item.name} {item.example.dtype} {tuple(item.example.shape)}" for item in model.inputs
    )


def _given(model: Model, inputs: Sequence[Any] | None) -> list[list[np.ndarray]]:
    """The inputs of `speedup` as arrays, every one as deployed."""
    if inputs is None:
        return [deployed_example(model)]
    if not inputs:
        raise UserError("inputs: is empty; give at least one, or None for the model's example.")
    found = [leaves(model, each, f"inputs[{n}]") for n, each in enumerate(inputs)]
    for number, tensors in enumerate(found):
        for item, tensor in zip(model.inputs, tensors, strict=True):
            if tensor.shape != item.example.shape:
                raise UserError(
                    f"inputs[{number}]: expected {item.name!r} as deployed, of shape "
                    f"{tuple(item.example.shape)}, got {tuple(tensor.shape)}; cut it to that."
                )
    return [arrays(model, tensors) for tensors in found]


# Processes


@contextmanager
def opened(
    files: dict[str, Path], target: Target, timeout_s: float = TIMEOUT_S, fresh: bool = True
) -> Iterator[dict[str, Opened]]:
    """Every file open in a process of its own on the target, until the block ends.

    Raises:
        UserError: no such device or runtime, or a file that cannot be opened.
    """
    start, code = device(target.device), source(target.runtime)
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(start(file, code, target.threads, timeout_s, fresh))
            for name, file in files.items()
        }


def interleaved(
    files: dict[str, Path],
    target: Target,
    batches: list[list[np.ndarray]],
    rounds: int,
    budget_ms: float = BUDGET_MS,
    timeout_s: float = TIMEOUT_S,
    fresh: bool = False,
    questions: Sequence[looks.Question] | None = None,
) -> dict[str, Timing]:
    """Time the files in turn, in other processes every round; warm-up apart.

    A round that something disturbed is timed again, one of five at most; see `disturbed`.

    Args:
        files: name -> exported file.
        batches: one array per input of the files, for each inference in turn.
        rounds: each opens every file anew and times it twice, from file to file and back; where
            these are those of a target or more, and scatter, there are up to twice as many.
        budget_ms: timed inferences of one file in total, where they are quick enough.
        timeout_s: the longest that opening a file or a turn may take, in seconds.
        fresh: in processes that have done nothing yet, not in forks.
        questions: where given, the rounds end as soon as all of them are answered; see `looks`.
    """
    timings, again = {name: Timing() for name in files}, rounds // AGAIN
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        first, cycle = Path(folder) / "first.npz", Path(folder) / "cycle.npz"
        write_batches(first, batches[:1])
        write_batches(cycle, batches)
        for number in _numbers(rounds, timings, questions):
            began = time.monotonic()
            order = list(files) if number % 2 == 0 else list(files)[::-1]
            these = {name: files[name] for name in order}
            while True:
                with opened(these, target, timeout_s, fresh) as probes:
                    for name in order:
                        warm_ms = _warm(probes[name], first, cycle)
                        if number == 0:
                            plan = _plan(warm_ms, rounds * TURNS, budget_ms)
                            timings[name].samples, timings[name].warmup = plan
                    disturbance = _round(probes, timings, cycle)
                if not disturbance or not again:
                    break
                again -= 1
                _undo(timings)
            if number == 0:
                _tell(time.monotonic() - began, rounds, len(files))
    return timings


def _numbers(
    rounds: int, timings: dict[str, Timing], questions: Sequence[looks.Question] | None
) -> Iterator[int]:
    """Numbers of rounds until the questions are answered; up to as many again where the machine was
    disturbed, and nobody asked for few."""

    def done(number: int) -> bool:
        timed = {name: each.rounds for name, each in timings.items()}
        if questions is not None and looks.look(number) and looks.answered(questions, timed):
            return True
        return number >= rounds and (rounds < Target().rounds or looks.sharp(timed))

    for number in progress.track(range(rounds), "timing"):
        if done(number):
            return
        yield number
    if not done(rounds):
        progress.say("  the machine is disturbed: its timings scatter, so there are more of them")
        for number in progress.track(range(rounds, 2 * rounds), "timing on"):
            if done(number):
                return
            yield number


def _tell(round_s: float, rounds: int, files: int) -> None:
    if round_s * rounds >= LONG_S:
        progress.say(
            f"  timing {files} file{'s' if files > 1 else ''}: {rounds} rounds of {round_s:.1f} s, "
            f"{round_s * rounds:.0f} s at most (--rounds makes them fewer)"
        )


def _warm(probe: Opened, first: Path, cycle: Path) -> float:
    """The first inferences of a process, until it is warm; ms of a warm one."""
    cold, _ = probe.time(first, 1)
    warm, _ = probe.time(cycle, max(1, min(MAX_WARMUP, int(WARMUP_MS / cold[0]))))
    return float(np.median(warm))


def _round(probes: dict[str, Opened], timings: dict[str, Timing], cycle: Path) -> str:
    """Time every file once in each turn, from file to file and back; what disturbed that."""
    order = list(probes)
    turns: dict[str, list[np.ndarray]] = {name: [] for name in order}
    conditions = []
    for turn in range(TURNS):
        for name in order if turn % 2 == 0 else order[::-1]:
            timing = timings[name]
            latencies, energy = probes[name].time(cycle, timing.samples, timing.warmup)
            ended = time.time()
            turns[name].append(latencies)
            timing.energies_mj.append(energy)
            timing.windows.append((ended - latencies.sum() / 1000, ended, len(latencies)))
            conditions.append(probes[name].conditions)
    disturbance = disturbed.disturbed(conditions)
    for name in order:
        timings[name].rounds.append(np.concatenate(turns[name]))
        timings[name].disturbances.append(disturbance)
    return disturbance


def _undo(timings: dict[str, Timing]) -> None:
    """Forget the last round."""
    for timing in timings.values():
        timing.rounds.pop()
        said = timing.disturbances.pop()
        del timing.energies_mj[-TURNS:], timing.windows[-TURNS:]
    progress.say(f"  a round is timed again: {said}")


def _plan(latency_ms: float, turns: int, budget_ms: float = BUDGET_MS) -> tuple[int, int]:
    """Samples of a turn, and inferences before them that bring the caches back.

    Example:
        >>> _plan(2.0, turns=20), _plan(4000.0, turns=20)
        ((75, 2), (1, 0))
    """
    samples = min(MAX_SAMPLES, int(budget_ms / latency_ms))
    if samples < speedups.MIN_SAMPLES_P99:
        return max(1, samples // turns), int(latency_ms < budget_ms / turns / 2)
    return -(-samples // turns), 2  # rounded up, so that the p99 keeps its samples
