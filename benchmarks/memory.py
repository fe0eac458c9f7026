"""Peak memory of compressing large models, phase by phase, over the bytes of their floats.

A plain decoder of linear layers and attention is built, captured, rounded and exported in a fresh
process for each size and recipe. Each phase's peak is of the whole process, less what it held once
the libraries were imported and a tiny model had gone the same way.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tables
import torch
from tables import Bar, Result
from torch import Tensor, nn
from torch.nn import functional as F

import paredown
from paredown.core.memory import WORTH_BYTES, release
from paredown.core.task import Task
from paredown.targets.devices.probe import peak_bytes, reset_peak

BOUND = 1.6  # times the floats, of 4 bits by rounding
SIZES = {"30 M": (512, 6), "100 M": (896, 8), "300 M": (1024, 22)}  # -> width, blocks
QUICK = ("30 M", "100 M")
VOCABULARY, LENGTH, HEAD = 12288, 16, 64
STEPS: dict[str, Callable[[], Any]] = {
    "QuantizeWeights(4)": lambda: paredown.QuantizeWeights(4, method="rtn"),
    'Cast("fp16")': lambda: paredown.Cast("fp16"),
    'Quantize("int8-dynamic")': lambda: paredown.Quantize("int8-dynamic"),
}


class Block(nn.Module):
    """Causal attention and a feed-forward of 4 x the width, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.read, self.write = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        parts = self.read(self.before(x)).chunk(3, -1)
        q, k, v = (each.unflatten(-1, (-1, HEAD)).transpose(1, 2) for each in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.write(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Decoder(nn.Module):
    """Tokens (B, T) -> logits (B, T, vocabulary)."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(tokens))))


def run(quick: bool) -> list[Result]:
    found = [
        _in_child(size, step)
        for size in (QUICK if quick else SIZES)
        for step in STEPS
        if step == next(iter(STEPS)) or size in QUICK
    ]
    result = Result(
        "peak memory over the floats: a decoder, built, captured, changed, exported to ONNX",
        f"{tables.cores()} cores; each in a fresh process, above what it held after the imports "
        "and a tiny model; parity with ONNX Runtime's file included",
        found,
        _bars(found),
    )
    tables.show(result, COLUMNS)
    return [result]


def _in_child(size: str, step: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *map(str, SIZES[size]), step], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{step} of {size} failed:\n{done.stderr[-2000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    print(f"{size}, {step}: {row['peak']:.2f} x", flush=True)
    return {"size": size, "step": step, **row}


def child(width: int, blocks: int, step: str) -> dict[str, Any]:
    """Each phase's peak in this process, and that of all, over the bytes of the parameters."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        made = STEPS[step]()
        _through(64, 1, made, Path(folder), {})
        release(WORTH_BYTES)  # what the tiny model freed
        before, peaks = _resident_bytes(), {}
        floats = _through(width, blocks, made, Path(folder), peaks)
    shares = {name: (peak - before) / floats for name, peak in peaks.items()}
    return {"parameters": floats // 4, "phases": shares, "peak": max(shares.values())}


def _through(width: int, blocks: int, step: Any, folder: Path, peaks: dict[str, int]) -> int:
    """From module to file, all of them held on to; fills in each phase's peak, and returns the
    bytes of the floats."""
    example = (torch.zeros(1, LENGTH, dtype=torch.long),)
    with _phase("module", peaks):
        torch.manual_seed(0)
        module = Decoder(width, blocks).eval()
    with _phase("capture", peaks):
        model = paredown.capture(module, example)
    with _phase("step", peaks):
        small = paredown.apply(model, [step], Task(example, paredown.accuracy))
    with _phase("export and parity", peaks):
        paredown.export(small, paredown.Target(), folder / "model.onnx")
    return sum(parameter.nbytes for parameter in module.parameters())


@contextmanager
def _phase(name: str, peaks: dict[str, int]) -> Iterator[None]:
    gc.collect()
    reset_peak()
    yield
    peak = peak_bytes()
    assert peak is not None, "this system does not tell a process's peak memory"
    peaks[name] = peak


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _bars(found: list[dict[str, Any]]) -> list[Bar]:
    step = next(iter(STEPS))
    return [
        Bar(
            f"{step} of {row['size']}: at most {BOUND} x its floats",
            row["peak"] <= BOUND,
            True,
            f"{row['peak']:.2f} x",
        )
        for row in found
        if row["step"] == step
    ]


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "parameters": lambda row: f"{row['parameters'] / 1e6:.0f} M",
    "step": lambda row: row["step"],
    "module": lambda row: f"{row['phases']['module']:.2f}",
    "capture": lambda row: f"{row['phases']['capture']:.2f}",
    "the step": lambda row: f"{row['phases']['step']:.2f}",
    "export and parity": lambda row: f"{row['phases']['export and parity']:.2f}",
    "peak over the floats": lambda row: f"{row['peak']:.2f}",
}

if __name__ == "__main__":
    print(json.dumps(child(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
