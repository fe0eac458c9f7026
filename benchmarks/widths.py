"""Which widths kernels like: the latency of 3x3 convolutions by their number of channels.

`PruneChannels` leaves multiples of 8 because of this table; run it on your device to see yours.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch
from torch import nn
from torch.utils.data import TensorDataset

from paredown import capture
from paredown.core.task import Target, Task
from paredown.measure import speedups, timing
from paredown.steps.quantization.quantize import Quantize
from paredown.targets.runtimes import onnxruntime

WIDTHS = (32, 36, 40, 44, 48, 56, 60, 61, 62, 63, 64, 65, 66, 68, 72)
QUICK = (40, 44, 48, 60, 62, 63, 64, 65, 68, 72)
SIZE, LAYERS = 28, 4
SECONDS = {False: 1.0, True: 0.25}  # timed inferences of one file


def run(quick: bool) -> list[tables.Result]:
    widths = QUICK if quick else WIDTHS
    with tempfile.TemporaryDirectory() as folder:
        files = {key: path for w in widths for key, path in _files(w, Path(folder)).items()}
        image = [np.zeros((1, 3, SIZE, SIZE), np.float32)]
        rounds = 3 if quick else 6
        timed = timing.interleaved(files, Target(), [image], rounds, SECONDS[quick] * 1e3)
    rows = [
        _row(width, {kind: timed[f"{kind} {width}"].rounds for kind in KINDS}) for width in widths
    ]
    for row in rows:
        for kind in KINDS:
            row[f"{kind} waste"] = _waste(row, rows, kind)
    result = tables.Result(
        f"widths: {LAYERS} convolutions of 3x3 on {SIZE}x{SIZE}, ONNX Runtime, 1 thread",
        "median ms of an inference (lowest-highest of rounds); waste: how much longer than a "
        "straight line between the multiples of 8 on either side would say",
        rows,
    )
    tables.show(
        result,
        {
            "channels": lambda row: str(row["width"]),
            **{kind: lambda row, k=kind: row[f"{k} shown"] for kind in KINDS},
            **{f"{kind}, waste": lambda row, k=kind: f"{row[f'{k} waste']:+.0%}" for kind in KINDS},
        },
    )
    return [result]


KINDS = ("fp32", "int8")


def _files(width: int, folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    inner = [
        part for _ in range(LAYERS - 1) for part in (nn.Conv2d(width, width, 3, 1, 1), nn.ReLU())
    ]
    net = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(), *inner).eval()
    images = torch.randn(8, 3, SIZE, SIZE)
    model = capture(net, (images[:1],))
    task = Task((images[:1],), lambda out, y: out[:, 0, 0, 0], calibration=TensorDataset(images))
    made = {"fp32": model, "int8": Quantize().apply(model, task)}
    return {
        f"{kind} {width}": onnxruntime.lower(each, folder / f"{kind}{width}.onnx")
        for kind, each in made.items()
    }


def _row(width: int, rounds: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    row: dict[str, Any] = {"width": width}
    for kind, each in rounds.items():
        row[kind] = speedups.quantiles(np.concatenate(each)).p50
        row[f"{kind} shown"] = tables.spread(each, 3)
    return row


def _waste(row: dict[str, Any], rows: list[dict[str, Any]], kind: str) -> float:
    """Share above the line, in multiply-adds, between the multiples of 8 around it."""
    known = [each for each in rows if each["width"] % 8 == 0]
    for low, high in pairwise(known):
        if low["width"] <= row["width"] <= high["width"]:
            share = (row["width"] ** 2 - low["width"] ** 2) / (
                high["width"] ** 2 - low["width"] ** 2
            )
            line = low[kind] + share * (high[kind] - low[kind])
            return float(row[kind] / line - 1)
    return 0.0
