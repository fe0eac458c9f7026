"""Bare ONNX files: python benchmarks/doors.py FILE[:INPUT=1x3x224x224,...] ...

For each file: is it taken, and how its int8 file stands beside those that ONNX Runtime's own
quantizers make of the same file and samples. Images are parts of photographs, other numbers are
drawn at random; sizes that a file leaves open stand behind its name.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import int8
import numpy as np
import onnxruntime as ort
import peers
import shapes
import tables
import torch

import paredown
from paredown.core.errors import UserError
from paredown.measure import speedups
from paredown.targets.artifact import size_bytes

CALIBRATION, HELD_OUT = 100, 100
EFFORT = int8.Effort(rounds=8, turn_ms=300.0)
OURS, FILE, STATIC, DYNAMIC = "paredown", "the file itself", "quantize_static", "quantize_dynamic"
Arrays = dict[str, np.ndarray]
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "file": lambda row: row["file"],
    "way": lambda row: row["way"],
    "KB": lambda row: f"{row['size_bytes'] / 1e3:,.0f}" if row.get("size_bytes") else "",
    "ms, median (rounds)": lambda row: row.get("ms", ""),
    "x as fast as the file": lambda row: row.get("speedup", ""),
    "dB": lambda row: f"{row['snr_db']:.1f}" if "snr_db" in row else "",
    "other top class": lambda row: f"{row['other']:.1%}" if row.get("other") is not None else "",
    "said": lambda row: row.get("said", "")[:90],
}


@dataclass(frozen=True)
class Bare:
    """A file, and the shapes of its inputs with a batch of one."""

    path: Path
    session: ort.InferenceSession
    shapes: dict[str, tuple[int, ...]]

    @staticmethod
    def of(given: str) -> Bare:
        name, _, told = given.partition(":")
        session = _session(Path(name))
        fixed = dict(each.split("=") for each in told.split(",")) if told else {}
        known = {
            item.name: tuple(int(n) for n in fixed[item.name].split("x"))
            if item.name in fixed
            else tuple(1 if n == 0 else d for n, d in enumerate(item.shape))
            for item in session.get_inputs()
        }
        return Bare(Path(name), session, known)

    def samples(self, count: int, seed: int) -> Arrays:
        """For each input (count, ...), the batch being its first dimension."""
        kinds = {item.name: item.type for item in self.session.get_inputs()}
        return {
            name: _drawn(kinds[name], shape, count, seed + n)
            for n, (name, shape) in enumerate(self.shapes.items())
        }

    def outputs(self, session: ort.InferenceSession, samples: Arrays) -> list[list[np.ndarray]]:
        """Of each example, run alone."""
        names = [item.name for item in session.get_inputs()]
        given = dict(zip(names, samples.values(), strict=True))
        count = len(next(iter(samples.values())))
        return [
            session.run(None, {k: v[n : n + 1] for k, v in given.items()}) for n in range(count)
        ]


def _drawn(kind: str, shape: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    full = (count, *shape[1:])
    if "int64" in kind:
        return generator.integers(1, 20, full)
    if "int32" in kind:
        return generator.integers(1, 20, full).astype(np.int32)
    if len(shape) == 4 and shape[1] in (1, 3):
        size = max(shape[2:])
        whole = shapes.photographs(count, size, seed=seed).numpy()[..., : shape[2], : shape[3]]
        return np.ascontiguousarray(whole[:, : shape[1]], np.float32)
    return generator.normal(size=full).astype(np.float32)


def main() -> None:
    given = sys.argv[1:]
    if not given:
        sys.exit(__doc__)
    rows = []
    for each in given:
        print(each, flush=True)
        rows += _compared(Bare.of(each))
    result = tables.Result(
        "bare ONNX files in int8, ONNX Runtime",
        f"one thread, batch 1; {CALIBRATION} samples to calibrate, {HELD_OUT} others to compare "
        f"with the file; median of {EFFORT.rounds} interleaved rounds, each in fresh processes",
        rows,
    )
    tables.show(result, COLUMNS)


def _compared(bare: Bare) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as made:
        folder, calibration = Path(made), bare.samples(CALIBRATION, seed=1)
        files, said = {FILE: bare.path}, {}
        for way, make in {OURS: _ours, STATIC: _static, DYNAMIC: _dynamic}.items():
            try:
                with _quiet():
                    files[way] = make(bare, calibration, folder)
                    _session(files[way])
            except UserError as error:
                files.pop(way, None)
                said[way] = str(error)
            except Exception as error:
                files.pop(way, None)
                said[way] = f"{type(error).__name__}: {error}".replace("\n", " ")
        held_out = bare.samples(HELD_OUT, seed=2)
        batches = [[v[n : n + 1] for v in held_out.values()] for n in range(8)]
        rounds = int8.latencies(files, "onnxruntime", batches, EFFORT)
        whole = bare.outputs(bare.session, held_out)
        rows = [{"file": bare.path.name, "way": way, "said": why} for way, why in said.items()]
        for way, path in files.items():
            found = bare.outputs(_session(path), held_out)
            ratio = speedups.median_ratio(rounds[FILE], rounds[way])
            rows.append(
                {
                    "file": bare.path.name,
                    "way": way,
                    "size_bytes": size_bytes(path),
                    "ms": tables.spread(rounds[way]),
                    "speedup": tables.spell(ratio),
                    "snr_db": _snr_db(whole, found),
                    "other": _other(whole, found),
                }
            )
        return rows


def _ours(bare: Bare, calibration: Arrays, folder: Path) -> Path:
    np.savez(folder / "samples.npz", **calibration)
    model, task = paredown.load(bare.path, folder / "samples.npz")
    small = paredown.apply(model, [paredown.Quantize("int8")], task)
    return Path(paredown.export(small, paredown.Target(), folder / "ours.onnx").path)


def _static(bare: Bare, calibration: Arrays, folder: Path) -> Path:
    feeds = ({k: v[n : n + 1] for k, v in calibration.items()} for n in range(CALIBRATION))
    return peers.quantized_static(bare.path, feeds, folder / "static.onnx")


def _dynamic(bare: Bare, calibration: Arrays, folder: Path) -> Path:
    from onnxruntime import quantization

    quantization.quantize_dynamic(bare.path, folder / "dynamic.onnx")
    return folder / "dynamic.onnx"


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _snr_db(whole: list[list[np.ndarray]], found: list[list[np.ndarray]]) -> float:
    """Decibels of the file's outputs over the difference to them."""
    pairs = [
        (a.astype(np.float64), b.astype(np.float64))
        for one, other in zip(whole, found, strict=True)
        for a, b in zip(one, other, strict=False)
        if a.dtype.kind == "f" and a.shape == b.shape
    ]
    signal = sum(float((a**2).sum()) for a, _ in pairs)
    noise = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    return 10 * float(np.log10(signal / max(noise, 1e-30)))


def _other(whole: list[list[np.ndarray]], found: list[list[np.ndarray]]) -> float | None:
    """The share of places whose largest value of the first output is another."""
    if whole[0][0].ndim < 2 or whole[0][0].shape[-1] < 2 or whole[0][0].dtype.kind != "f":
        return None
    differ = [
        (one[0].argmax(-1) != other[0].argmax(-1)).reshape(-1)
        for one, other in zip(whole, found, strict=True)
        if one[0].shape == other[0].shape
    ]
    return float(np.concatenate(differ).mean()) if differ else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


if __name__ == "__main__":
    torch.set_num_threads(tables.cores())
    main()
