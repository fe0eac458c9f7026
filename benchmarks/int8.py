"""Latency, error and size of the same network in int8, made by each tool, in ONNX Runtime."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peers
import shapes
import tables
import torch
from tables import Bar, Result
from torch import nn
from torch.utils.data import TensorDataset

from paredown import stats
from paredown.devices import local
from paredown.runtimes import onnxruntime as runtime
from paredown.types import Census

SIZE = 224  # px
SETTLING = 64  # images
FLOAT, OURS = "float", "paredown"
MODELS = ("resnet18", "mobilenetv2", "vit-s")
THREADS = 1


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    calibration: int = 100  # images
    held_out: int = 64  # images
    rounds: int = 12
    turn_ms: float = 400.0  # timed inferences of one file, twice a round


QUICK = Effort(calibration=32, held_out=24, rounds=4, turn_ms=100.0)


@dataclass(frozen=True)
class Rival:
    """One of the files, as it was measured."""

    name: str
    rounds: list[np.ndarray]  # ms, one array a round
    snr_db: float
    snr_db_per_image: np.ndarray
    size_bytes: int
    ops: Census


def run(quick: bool) -> list[Result]:
    effort = QUICK if quick else Effort()
    return [_compare(name, effort) for name in MODELS]


def _compare(name: str, effort: Effort) -> Result:
    calibration = shapes.photographs(effort.calibration, SIZE, seed=1)
    held_out = shapes.photographs(effort.held_out, SIZE, seed=2)
    module = shapes.build(name, shapes.photographs(SETTLING, SIZE, seed=3))
    torch.set_num_threads(tables.cores())
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        files = _files(
            name, module, TensorDataset(calibration, torch.zeros(len(calibration))), made
        )
        noise = {key: _snr(module, file, held_out) for key, file in files.items()}
        rounds = _latencies(files, held_out[:8].numpy(), effort)
        rivals = [
            Rival(
                key,
                rounds[key],
                *noise[key],
                file.stat().st_size,
                runtime.census(file),
            )
            for key, file in files.items()
        ]
    parameters = sum(p.numel() for p in module.parameters())
    result = Result(
        f"int8: {name}, {parameters / 1e6:.1f} M parameters, {SIZE} px, batch 1",
        f"ONNX Runtime {tables.versions()['onnxruntime']}, {THREADS} thread; calibrated on "
        f"{effort.calibration} images, error on {effort.held_out} others; median (lowest-highest "
        f"median of {effort.rounds} interleaved rounds, each in fresh processes)",
        [_row(rival, rivals) for rival in rivals],
        _bars(rivals),
    )
    tables.show(result, COLUMNS)
    return result


def _files(name: str, module: nn.Module, images: TensorDataset, folder: str) -> dict[str, Path]:
    """Every tool's file, the float one first."""
    at = {key: Path(folder) / f"{key}.onnx" for key in (FLOAT, OURS, "peer-float", "ort", "n", "m")}
    transformer = name.startswith("vit")
    model = peers.paredown_float(module, images, at[FLOAT])
    start = peers.export_float(module, images, at["peer-float"])
    found = tables.versions()
    return {
        FLOAT: at[FLOAT],
        f"{OURS} {found['paredown']}": peers.paredown_int8(model, images, at[OURS]),
        f"onnxruntime {found['onnxruntime']}": peers.onnxruntime_int8(start, images, at["ort"]),
        f"nncf {found['nncf']}": peers.nncf_int8(start, images, at["n"], None, transformer),
        f"nncf {found['nncf']} {'performance' if transformer else 'mixed'}": peers.nncf_int8(
            start, images, at["m"], "performance" if transformer else "mixed", transformer
        ),
    }


def _snr(module: nn.Module, file: Path, images: torch.Tensor) -> tuple[float, np.ndarray]:
    """Decibels of the float model's output over the difference to it: over all, and per image."""
    predict = runtime.open(file, THREADS)
    with torch.no_grad():
        expected = torch.cat([module(part) for part in images.split(8)]).numpy().astype(np.float64)
    got = np.concatenate([predict(image[None].numpy())[0] for image in images])
    signal, error = (expected**2).sum(1), np.maximum(((got - expected) ** 2).sum(1), 1e-30)  # (N,)
    return 10 * float(np.log10(signal.sum() / error.sum())), 10 * np.log10(signal / error)


def _latencies(
    files: dict[str, Path], images: np.ndarray, effort: Effort
) -> dict[str, list[np.ndarray]]:
    """Milliseconds of one inference, one array a round; a round is a fresh process of each file.

    In a round the files are timed in turn, forth and back, after warming up.
    """
    runtime_file = Path(runtime.__file__)
    found: dict[str, list[np.ndarray]] = {name: [] for name in files}
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        inputs = Path(made) / "inputs.npz"
        local.write_batches(inputs, [[image[None]] for image in images])
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


def _row(rival: Rival, rivals: list[Rival]) -> dict[str, Any]:
    ours = _ours(rivals)
    return {
        "name": rival.name,
        "rounds_ms": [np.median(each) for each in rival.rounds],
        "latency": tables.spread(rival.rounds),
        "speedup_of_ours": asdict(stats.median_ratio(rival.rounds, ours.rounds)),
        "snr_db": rival.snr_db,
        "snr_db_ours_minus_this": asdict(
            stats.paired_difference(rival.snr_db_per_image, ours.snr_db_per_image)
        ),
        "snr_db_per_image": rival.snr_db_per_image,
        "size_bytes": rival.size_bytes,
        "integer_ops": rival.ops.integer_ops,
        "float_ops": rival.ops.float_ops,
        "unfused": rival.ops.unfused,
    }


def _ours(rivals: list[Rival]) -> Rival:
    return next(rival for rival in rivals if rival.name.startswith(OURS))


def _bars(rivals: list[Rival]) -> list[Bar]:
    ours = _ours(rivals)
    others = [rival for rival in rivals if rival is not ours and rival.name != FLOAT]
    fastest = min(others, key=lambda rival: float(np.median(np.concatenate(rival.rounds))))
    cleanest = max(others, key=lambda rival: rival.snr_db)
    return [
        tables.at_most(
            f"latency at most 1.0 x the fastest peer's ({fastest.name})",
            stats.median_ratio(ours.rounds, fastest.rounds),
            1.0,
        ),
        tables.at_least(
            f"signal to noise at least the cleanest peer's ({cleanest.name}); dB above it",
            stats.paired_difference(cleanest.snr_db_per_image, ours.snr_db_per_image),
            0.0,
        ),
    ]


def _kinds(row: dict[str, Any]) -> str:
    """Integer ops, then quantize / dequantize ops, then other float ops of the optimised graph."""
    moving = ("QuantizeLinear", "DequantizeLinear")
    conversions = sum(row["float_ops"].get(op, 0) for op in moving)
    others = sum(row["float_ops"].values()) - conversions
    return f"{sum(row['integer_ops'].values())} / {conversions} / {others}"


COLUMNS = {
    "file": lambda row: row["name"],
    "latency, ms": lambda row: row["latency"],
    "its latency / ours": lambda row: tables.spell(stats.Interval(**row["speedup_of_ours"])),
    "SNR, dB": lambda row: f"{row['snr_db']:.2f}",
    "ours above it, dB": lambda row: _signed(row["snr_db_ours_minus_this"]),
    "MB": lambda row: f"{row['size_bytes'] / 1e6:.2f}",
    "ops: int / q+dq / float": _kinds,
}


def _signed(interval: dict[str, float]) -> str:
    if abs(interval["estimate"]) > 60:
        return ""
    return f"{interval['estimate']:+.2f} ({interval['low']:+.2f} to {interval['high']:+.2f})"
