"""How small and how fast artifacts are packed, beside zstandard, xz and, where it is, zipnn."""

from __future__ import annotations

import importlib.util
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import shapes
import tables
import torch
import zstandard
from tables import Bar, Result
from torch.utils.data import TensorDataset

import paredown
from paredown.ship.pack.container import pack, unpack
from paredown.targets.runtimes import onnxruntime

SLOWEST_MB_S, AIM_MB_S = 25, 100


def run(quick: bool) -> list[Result]:
    name = "mobilenetv2" if quick else "resnet18"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        rows = [_row(kind, path) for kind, path in _files(name, Path(made)).items()]
    peers = [key for key in ("zstd", "xz", "zipnn") if all(row.get(key) for row in rows)]
    result = Result(
        f"packing: {name} after each kind of compression",
        "one core, processor time; sizes with all that it takes to unpack; "
        f"zstandard {zstandard.__version__} -19, xz -9e"
        + ("" if "zipnn" in peers else "; zipnn is not installed"),
        rows,
        _bars(rows, peers),
    )
    tables.show(result, COLUMNS)
    return [result]


def _files(name: str, folder: Path) -> dict[str, Path]:
    """A file of the same network for each kind of compression."""
    images = None if name in shapes.TRANSFORMERS else shapes.inputs(name, 32, seed=3)
    model = paredown.capture(shapes.build(name, images), (shapes.inputs(name, 1, seed=1),))
    calibration = TensorDataset(shapes.inputs(name, 16, seed=1), torch.zeros(16))
    task = paredown.Task(example=(calibration[0][0][None],), score=None, calibration=calibration)
    half = folder / "bfloat16.safetensors"
    paredown.apply(model, [paredown.Cast("bf16")], task).save(half)
    steps: dict[str, list[Any]] = {
        "float32": [],
        "float16": [paredown.Cast("fp16")],
        "pruned to 10 %": [paredown.PruneWeights(0.9)],
        "pruned 2:4": [paredown.PruneWeights(pattern="2:4")],
        "int8": [paredown.Quantize("int8")],
        "pruned 2:4, int8": [paredown.PruneWeights(pattern="2:4"), paredown.Quantize("int8")],
        "4-bit weights": [paredown.Quantize("int4")],
    }
    made = {"bfloat16": half}
    for number, (kind, recipe) in enumerate(steps.items()):
        small = paredown.apply(model, recipe, task)
        made[kind] = onnxruntime.lower(small, folder / f"{number}.onnx")
    return made


def _row(kind: str, path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    packed, seconds = _timed(lambda: pack(path))
    back, undone = _timed(lambda: unpack(packed, path.parent / "back"))
    assert back.read_bytes() == raw
    return {
        "name": kind,
        "bytes": len(raw),
        "packed": packed.stat().st_size,
        "encode_mb_s": len(raw) / 1e6 / seconds,
        "decode_mb_s": len(raw) / 1e6 / undone,
        "zstd": len(zstandard.compress(raw, 19)),
        "xz": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
        "zipnn": _zipnn(raw, kind),
    }


def _zipnn(raw: bytes, kind: str) -> int | None:
    """The bytes that zipnn makes of the file, told which floats are in it."""
    if importlib.util.find_spec("zipnn") is None:
        return None
    import zipnn

    dtypes = {"float16": "float16", "bfloat16": "bfloat16"}
    coder = zipnn.ZipNN(input_format="byte", bytearray_dtype=dtypes.get(kind, "float32"))
    return len(coder.compress(bytes(raw)))


def _timed(work: Callable[[], Path]) -> tuple[Path, float]:
    start = process_time()
    return work(), process_time() - start


def _bars(rows: list[dict[str, Any]], peers: list[str]) -> list[Bar]:
    bars = []
    for peer in peers:
        worst = max(rows, key=lambda row: row["packed"] / row[peer])
        ratio = worst["packed"] / worst[peer]
        text = f"never larger than {peer} makes it; nearest on {worst['name']}"
        bars.append(Bar(text, ratio <= 1, True, f"{ratio:.3f} of its size"))
    for key, what in (("encode_mb_s", "packing"), ("decode_mb_s", "unpacking")):
        speeds = [row[key] for row in rows]
        text = f"{what} at least {SLOWEST_MB_S} MB/s on one core, {AIM_MB_S} as the aim"
        found = f"{min(speeds):.0f} to {max(speeds):.0f} MB/s, median {np.median(speeds):.0f}"
        bars.append(Bar(text, min(speeds) >= SLOWEST_MB_S, True, found))
    return bars


def _smaller(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row['bytes'] / row[key]:.2f}x" if row[key] else ""


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "file": lambda row: row["name"],
    "MB": lambda row: f"{row['bytes'] / 1e6:.2f}",
    "packed, MB": lambda row: f"{row['packed'] / 1e6:.2f}",
    "smaller": _smaller("packed"),
    "zstd -19": _smaller("zstd"),
    "xz -9e": _smaller("xz"),
    "zipnn": _smaller("zipnn"),
    "pack, MB/s": lambda row: f"{row['encode_mb_s']:.0f}",
    "unpack, MB/s": lambda row: f"{row['decode_mb_s']:.0f}",
}
