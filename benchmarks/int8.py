"""Latency, error, size and cost of the same network in int8, made by each tool, by runtime."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import peers
import shapes
import tables
import torch
from tables import Bar, Result
from torch import nn
from torch.utils.data import TensorDataset

from paredown.core.measurement import Census
from paredown.measure import speedups, stats
from paredown.targets.artifact import size_bytes
from paredown.targets.devices import device, local
from paredown.targets.devices.probe import peak_bytes, reset_peak
from paredown.targets.runtimes import runtime

SETTLING = 64  # images
THREADS = 1


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    calibration: int = 100  # examples
    held_out: int = 64  # examples
    making: int = 3  # times each file is made
    rounds: int = 12
    turn_ms: float = 400.0  # timed inferences of one file, twice a round


QUICK = Effort(calibration=32, held_out=24, making=1, rounds=4, turn_ms=100.0)


@dataclass(frozen=True)
class Rival:
    """One of the files, as it was measured."""

    name: str
    rounds: list[np.ndarray]  # ms, one array a round
    snr_db: float
    snr_db_per_example: np.ndarray
    size_bytes: int
    ops: Census | None  # None where a peer's file cannot be counted
    made: list[dict[str, float]]  # seconds and bytes, one each time it was made


def run(quick: bool, runtime_name: str, name: str) -> list[Result]:
    """The files of one runtime, of the net called ``name`` in ``shapes.SHAPES``."""
    effort = QUICK if quick else Effort()
    torch.set_num_threads(tables.cores())
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        folder = Path(made)
        module = _prepared(name)
        torch.save(module.state_dict(), folder / "weights.pt")
        held_out = shapes.inputs(name, effort.held_out, seed=2)
        costs, failures = _made(runtime_name, name, effort, folder)
        files = {tool: _file(folder, runtime_name, tool) for tool in costs}
        noise = {tool: _snr(module, file, runtime_name, held_out) for tool, file in files.items()}
        rounds = latencies(
            files, runtime_name, [[each[None]] for each in held_out[:8].numpy()], effort
        )
        rivals = [
            Rival(
                _versioned(tool),
                rounds[tool],
                *noise[tool],
                size_bytes(file),
                _census(runtime_name, file),
                costs[tool],
            )
            for tool, file in files.items()
        ]
    parameters = sum(p.numel() for p in module.parameters())
    what = f"{shapes.LENGTH} tokens" if name in shapes.TEXT else f"{shapes.IMAGE_SIZE} px"
    missing = "".join(f"; {tool} made no file: {why}" for tool, why in failures.items())
    result = Result(
        f"int8 in {runtime_name}: {name}, {parameters / 1e6:.1f} M parameters, {what}, batch 1",
        f"{runtime(runtime_name).version()}, {THREADS} thread; calibrated on "
        f"{effort.calibration} examples, error on {effort.held_out} others; median "
        f"(lowest-highest median of {effort.rounds} interleaved rounds, each in fresh processes)"
        + missing,
        [_row(rival, rivals) for rival in rivals],
        _bars(rivals),
    )
    tables.show(result, COLUMNS)
    return [result]


def _prepared(name: str) -> nn.Module:
    images = None if name in shapes.TRANSFORMERS else shapes.inputs(name, SETTLING, seed=3)
    return shapes.build(name, images)


# --- making the files ------------------------------------------------------------------------


def _file(folder: Path, runtime_name: str, tool: str) -> Path:
    return folder / f"{tool.replace(', ', '-').replace(' ', '-')}{runtime(runtime_name).SUFFIX}"


def _made(
    runtime_name: str, name: str, effort: Effort, folder: Path
) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """Seconds and bytes of every tool, and why a peer made no file."""
    costs: dict[str, list[dict[str, float]]] = {tool: [] for tool in peers.TOOLS[runtime_name]}
    failures: dict[str, str] = {}
    for _ in range(effort.making):
        for tool in [tool for tool in costs if tool not in failures]:
            done = subprocess.run(
                [
                    sys.executable,
                    __file__,
                    runtime_name,
                    tool,
                    name,
                    str(effort.calibration),
                    folder,
                ],
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                costs[tool].append(json.loads(done.stdout.splitlines()[-1]))
            elif tool in (peers.OURS, peers.FLOAT):
                raise RuntimeError(f"{runtime_name}, {name}, {tool} failed:\n{done.stderr[-2000:]}")
            else:
                failures[tool] = (done.stderr.strip().splitlines() or ["killed"])[-1][:200]
    return {tool: found for tool, found in costs.items() if tool not in failures}, failures


def child(runtime_name: str, tool: str, name: str, count: int, folder: Path) -> dict[str, float]:
    """Seconds and bytes of making one file in this process, libraries and their caches warm."""
    torch.set_num_threads(tables.cores())
    make = peers.TOOLS[runtime_name][tool]
    suffix = runtime(runtime_name).SUFFIX
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        few = TensorDataset(shapes.photographs(4, 16, seed=0), torch.zeros(4))
        make(tiny.eval(), few, Path(scratch) / f"tiny{suffix}", False)
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    module = shapes.SHAPES[name]().eval()
    module.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    calibration = TensorDataset(shapes.inputs(name, count, seed=1), torch.zeros(count))
    reset_peak()
    before = peak_bytes()
    start = perf_counter()
    make(module, calibration, _file(folder, runtime_name, tool), name in shapes.TRANSFORMERS)
    seconds, after = perf_counter() - start, peak_bytes()
    assert before is not None and after is not None, "this system does not tell peak memory"
    return {"seconds": seconds, "bytes": after - before}


# --- measuring them --------------------------------------------------------------------------


def _snr(
    module: nn.Module, file: Path, runtime_name: str, examples: torch.Tensor
) -> tuple[float, np.ndarray]:
    """Decibels of the float model's output over the difference to it: over all, per example."""
    predict = peers.opened(runtime_name, file, THREADS)
    with torch.no_grad():
        expected = torch.cat([module(part) for part in examples.split(8)]).numpy()
    expected = expected.astype(np.float64)
    got = np.concatenate([predict(each[None].numpy())[0] for each in examples])
    signal, error = (expected**2).sum(1), np.maximum(((got - expected) ** 2).sum(1), 1e-30)  # (N,)
    return 10 * float(np.log10(signal.sum() / error.sum())), 10 * np.log10(signal / error)


def _census(runtime_name: str, file: Path) -> Census | None:
    try:
        return runtime(runtime_name).census(file)  # type: ignore[no-any-return]
    except Exception:  # a peer's file may hold what ours never do
        return None


def latencies(
    files: dict[str, Path], runtime_name: str, batches: list[list[np.ndarray]], effort: Effort
) -> dict[str, list[np.ndarray]]:
    """Milliseconds of one inference, one array a round; a round is a fresh process of each file.

    In a round the files are timed in turn, forth and back, after warming up.
    """
    runtime_file = Path(runtime(runtime_name).__file__)
    found: dict[str, list[np.ndarray]] = {name: [] for name in files}
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        inputs = Path(made) / "inputs.npz"
        device.write_batches(inputs, batches)
        for number in range(effort.rounds):
            order = list(files)[number % len(files) :] + list(files)[: number % len(files)]
            with ExitStack() as stack:
                opened = {
                    name: stack.enter_context(local.Probe(files[name], runtime_file, THREADS))
                    for name in order
                }
                counts = {
                    name: _count(probe, inputs, effort.turn_ms) for name, probe in opened.items()
                }
                turns = [
                    (name, opened[name].time(inputs, counts[name], warmup=2)[0])
                    for name in [*order, *order[::-1]]
                ]
            for name in files:
                found[name].append(np.concatenate([ms for key, ms in turns if key == name]))
    return found


def _count(probe: local.Probe, inputs: Path, turn_ms: float) -> int:
    """Inferences that fill a turn, from those of the warm-up."""
    warm, _ = probe.time(inputs, 10)
    return max(3, int(turn_ms / np.median(warm[2:])))


# --- telling ---------------------------------------------------------------------------------


def _versioned(tool: str) -> str:
    package, comma, rest = tool.partition(",")
    return f"{package} {tables.versions().get(package, '')}".strip() + comma + rest


def _row(rival: Rival, rivals: list[Rival]) -> dict[str, Any]:
    ours = _ours(rivals)
    return {
        "name": rival.name,
        "rounds_ms": [np.median(each) for each in rival.rounds],
        "latency": tables.spread(rival.rounds),
        "speedup_of_ours": asdict(speedups.median_ratio(rival.rounds, ours.rounds)),
        "snr_db": rival.snr_db,
        "snr_db_ours_minus_this": asdict(
            stats.paired_difference(rival.snr_db_per_example, ours.snr_db_per_example)
        ),
        "snr_db_per_example": rival.snr_db_per_example,
        "size_bytes": rival.size_bytes,
        "seconds": [each["seconds"] for each in rival.made],
        "bytes": [each["bytes"] for each in rival.made],
        "integer_ops": rival.ops.integer_ops if rival.ops else None,
        "float_ops": rival.ops.float_ops if rival.ops else None,
        "unfused": rival.ops.unfused if rival.ops else None,
    }


def _ours(rivals: list[Rival]) -> Rival:
    return next(rival for rival in rivals if rival.name.startswith(peers.OURS))


def _bars(rivals: list[Rival]) -> list[Bar]:
    ours = _ours(rivals)
    others = [r for r in rivals if r is not ours and r.name != peers.FLOAT]
    if not others:
        return []
    fastest = min(others, key=lambda rival: float(np.median(np.concatenate(rival.rounds))))
    cleanest = max(others, key=lambda rival: rival.snr_db)
    return [
        tables.at_most(
            f"latency at most 1.0 x the fastest peer's ({fastest.name})",
            speedups.median_ratio(ours.rounds, fastest.rounds),
            1.0,
        ),
        tables.at_least(
            f"signal to noise at least the cleanest peer's ({cleanest.name}); dB above it",
            stats.paired_difference(cleanest.snr_db_per_example, ours.snr_db_per_example),
            0.0,
        ),
        _cheapest("wall time", "seconds", ours, others),
        _cheapest("peak memory", "bytes", ours, others),
    ]


def _cheapest(what: str, key: str, ours: Rival, others: list[Rival]) -> Bar:
    """The cost of making the file, against the peer that needs least of it."""
    cost = {rival.name: [each[key] for each in rival.made] for rival in [ours, *others]}
    least = min(others, key=lambda rival: float(np.median(cost[rival.name]))).name
    ratio = float(np.median(cost[ours.name]) / max(1e-9, np.median(cost[least])))
    apart = max(cost[ours.name]) <= min(cost[least]) or min(cost[ours.name]) > max(cost[least])
    return Bar(
        f"{what} of making the file at most the cheapest peer's ({least})",
        ratio <= 1,
        apart and len(cost[least]) > 1,
        f"{ratio:.2f} of it",
    )


def _kinds(row: dict[str, Any]) -> str:
    """Integer ops, quantize and dequantize ops, other float ops of what the runtime runs."""
    if row["float_ops"] is None:
        return "unknown"
    conversions = sum(n for op, n in row["float_ops"].items() if "quantize" in op.lower())
    others = sum(row["float_ops"].values()) - conversions
    return f"{sum(row['integer_ops'].values())} / {conversions} / {others}"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "file": lambda row: row["name"],
    "latency, ms": lambda row: row["latency"],
    "its latency / ours": lambda row: tables.spell(stats.Interval(**row["speedup_of_ours"])),
    "SNR, dB": lambda row: f"{row['snr_db']:.2f}",
    "ours above it, dB": lambda row: _signed(row["snr_db_ours_minus_this"]),
    "MB": lambda row: f"{row['size_bytes'] / 1e6:.2f}",
    "made in, s": lambda row: f"{np.median(row['seconds']):.1f}",
    "with, MB": lambda row: f"{np.median(row['bytes']) / 1e6:.0f}",
    "ops: int / q+dq / float": _kinds,
}


def _signed(interval: dict[str, float]) -> str:
    if abs(interval["estimate"]) > 60:
        return ""
    return f"{interval['estimate']:+.2f} ({interval['low']:+.2f} to {interval['high']:+.2f})"


if __name__ == "__main__":
    runtime_, tool_, name_, count_, folder_ = sys.argv[1:]
    print(json.dumps(child(runtime_, tool_, name_, int(count_), Path(folder_))))
