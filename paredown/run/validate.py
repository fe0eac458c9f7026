"""Whether an artifact is where it is to run what it was where it was made."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.goals import GoalCheck
from paredown.core.measurement import Comparison, Measurement
from paredown.core.settings import check_arguments
from paredown.core.source import Source
from paredown.core.task import Target, Task
from paredown.data import splits
from paredown.measure import power, speedups, timing
from paredown.measure.measure import Measured, compare, measure
from paredown.measure.memory import peak_bytes
from paredown.measure.power import Power
from paredown.run.golden import Agreement, Arrays, Golden, compared
from paredown.run.validate_isa import Forced, Way, forced, ways
from paredown.run.validate_subject import COMPRESSED, ORIGINAL, Subject, of_file, of_run
from paredown.targets.artifact import size_bytes
from paredown.targets.devices.device import write_batches

LOCAL, SAMPLES_SHOWN = "local", 500
PASSED, MISSED, FAILED = "passed", "missed", "failed"


@dataclass(frozen=True)
class Validation:
    """What came of an artifact on one device, in one runtime.

    Attributes:
        problem: why there is nothing else, "" where there is.
        sha256: of the file, as it was checked where it arrived.
        golden: the outputs there beside the golden ones; None where there are none.
        measured: "compressed", and "original" beside it, as far as they were measured.
        checks: the run's goals against that.
        instruction_sets: the file under those that were forced; of this machine alone.
        declared: what the run says of instruction sets.
        notes: what else is to be said.
    """

    device: str
    runtime: str
    problem: str = ""
    sha256: str = ""
    golden: Agreement | None = None
    measured: dict[str, Measurement] = field(default_factory=dict)
    comparison: Comparison | None = None
    checks: list[GoalCheck] = field(default_factory=list)
    instruction_sets: list[Forced] = field(default_factory=list)
    declared: str = ""
    notes: list[str] = field(default_factory=list)
    latency_samples_ms: dict[str, list[float]] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """ "failed" where it could not be validated, "missed" where a goal is missed, or outputs
        are others than the golden ones, also under an instruction set; else "passed"."""
        if self.problem:
            return FAILED
        others = [each.agreement for each in self.instruction_sets] + [self.golden]
        agrees = all(each is None or each.agrees for each in others)
        return PASSED if agrees and all(check.met for check in self.checks) else MISSED

    def to_json(self) -> dict[str, Any]:
        """All of it, with the outcome."""
        return {"outcome": self.outcome, **dataclasses.asdict(self)}


def validate(
    what: str | Path,
    task: Task | None = None,
    targets: Sequence[Target] = (Target(),),
    isa: Sequence[str] | None = None,
    power_csv: Path | None = None,
    source: Source | None = None,
) -> tuple[Subject, list[Validation]]:
    """Open an artifact on each target, and hold it against its golden set, its original, its goals.

    Args:
        what: a run's folder, or a single file.
        task: of the run, whose test split is scored; None scores nothing.
        targets: where, and in which runtime.
        isa: instruction sets that are forced on this machine; None is all that can be, and
            ``["none"]`` is none. See `ways`.
        power_csv: a power meter's readings while this goes on; see `paredown.measure.power`.
        source: of a single file's original and task.

    Raises:
        UserError: nothing there can be validated. What goes wrong on one device is told in its
            `Validation`, and the others go on.
    """
    check_arguments(what=(what, str | Path), task=(task, Task | None))
    path = Path(what)
    if power_csv is not None:
        power.read(power_csv, least=0)  # its readings come while this goes on
    task = task and splits.prepared(task)
    subject = of_run(path, task) if path.is_dir() else of_file(path, source)
    chosen = {target.runtime: ways(target.runtime, isa) for target in targets}
    found = []
    for target in targets:
        progress.say(f"Validating {subject.name} on {target.device}, {target.runtime}")
        here = chosen[target.runtime] if target.device == LOCAL else []
        try:
            found.append(_on(subject, target, here, power_csv))
        except UserError as error:
            found.append(Validation(target.device, target.runtime, str(error)))
            progress.say(f"  failed: {error}")
    return subject, found


def _on(subject: Subject, target: Target, here: Sequence[Way], record: Path | None) -> Validation:
    """One device and runtime."""
    with (
        tempfile.TemporaryDirectory(prefix="paredown-") as folder,
        subject.lowered(target.runtime, Path(folder)) as files,
    ):
        own = target.runtime == subject.runtime
        outputs = subject.golden and _outputs(
            subject.golden, files[COMPRESSED], target, Path(folder)
        )
        measured = _measured(subject, files, target)
        notes = list(subject.notes)
        if record is not None:
            measured = _metered(measured, power.read(record), notes)
        there: list[Forced] = []
        if here and subject.golden is not None and outputs:
            # a file made anew is held against itself, as it is without being forced
            beside = subject.golden if own else Golden(subject.golden.inputs, outputs)
            there = forced(files[COMPRESSED], target.runtime, beside, here)
    if not own:
        notes.append(
            f"The files were made anew for {target.runtime}; the golden outputs are those of "
            f"{subject.runtime}, and under instruction sets the file is held against itself."
        )
    declared = (subject.run and subject.run.details.get("instruction_sets")) if own else ""
    return Validation(
        target.device,
        target.runtime,
        sha256=subject.sha256 if own else "",
        golden=compared(subject.golden.outputs, outputs) if subject.golden and outputs else None,
        **_judged(subject, measured),
        instruction_sets=there,
        declared=declared or "",
        notes=notes,
        latency_samples_ms={name: _sampled(each.rounds) for name, each in measured.items()},
    )


def _outputs(golden: Golden, file: Path, target: Target, folder: Path) -> Arrays:
    """What a file makes of the golden inputs on a device."""
    inputs = folder / "golden-inputs.npz"
    write_batches(inputs, golden.inputs)
    with timing.opened({COMPRESSED: file}, target) as probes:
        return probes[COMPRESSED].run(inputs, folder / "golden-outputs.npz")


def _measured(subject: Subject, files: dict[str, Path], target: Target) -> dict[str, Measured]:
    """Scored and timed where there is a task, else timed on the golden inputs."""
    if subject.model is not None and subject.task is not None:
        return measure(files, subject.model, subject.task, target, "test")
    assert subject.golden is not None
    batches = [b for b in subject.golden.inputs if _shapes(b) == _shapes(subject.golden.inputs[0])]
    timed = timing.interleaved(files, target, batches, target.rounds)
    with timing.opened({COMPRESSED: files[COMPRESSED]}, target) as probes:
        where = probes[COMPRESSED].describe()
    where["inputs"] = f"the {len(batches)} golden inputs"
    return {name: _timed(files[name], target, batches, timed[name], where) for name in files}


def _shapes(arrays: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
    return [array.shape for array in arrays]


def _timed(
    file: Path,
    target: Target,
    batches: list[list[np.ndarray]],
    timed: timing.Timing,
    where: dict[str, str],
) -> Measured:
    import torch

    latency = speedups.quantiles(np.concatenate(timed.rounds))
    batch = len(batches[0][0]) if batches[0][0].ndim else 1
    measurement = Measurement(
        size_bytes(file),
        latency_ms_p50=latency.p50,
        latency_ms_p90=latency.p90,
        latency_ms_p99=latency.p99,
        latency_samples=latency.n,
        throughput_per_s=1000 * batch / latency.p50,
        memory_bytes=peak_bytes(file, target, batches[0]),
        energy_mj=timed.energy_mj,
        energy_source="unavailable" if timed.energy_mj is None else "measured",
        where=where,
    )
    return Measured(measurement, torch.zeros(0), timed.rounds, None, None, tuple(timed.windows))


def _metered(measured: dict[str, Measured], record: Power, notes: list[str]) -> dict[str, Measured]:
    """With the energy by a power meter, of files whose whole timing it saw."""
    found = {}
    for name, each in measured.items():
        energy = record.energy_mj(each.windows)
        if energy is None:
            notes.append(
                f"The power meter's readings do not span the time in which the {name} was timed "
                "(its clock must be this machine's, its readings at most 2 s apart): energy is "
                "unavailable."
            )
        told = replace(
            each.measurement,
            energy_mj=energy,
            energy_source="unavailable" if energy is None else "measured",
        )
        found[name] = replace(each, measurement=told)
    return found


def _judged(subject: Subject, measured: dict[str, Measured]) -> dict[str, Any]:
    """The measurements, the two beside each other, and the goals."""
    figures = {name: each.measurement for name, each in measured.items()}
    after, before = measured[COMPRESSED], measured.get(ORIGINAL)
    if before is None:
        return {"measured": figures}
    beside = None
    if len(after.scores):
        allowed = subject.goals.allowed_drop(before.measurement)
        beside = compare(before, after, allowed, tails=True)
    baseline = before.measurement  # that of the run was measured elsewhere
    checks = subject.goals.check(after.measurement, before.measurement, baseline, beside)
    return {"measured": figures, "comparison": beside, "checks": checks}


def _sampled(rounds: Sequence[np.ndarray]) -> list[float]:
    samples = np.concatenate(rounds)
    return [round(float(v), 6) for v in samples[:: max(1, -(-len(samples) // SAMPLES_SHOWN))]]
