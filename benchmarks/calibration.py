"""Time and peak memory of going from a module and images to an int8 ONNX file."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import peers
import shapes
import tables
import torch
from tables import Bar, Result
from torch import Tensor, fx, nn
from torch.utils.data import Dataset

import paredown
from paredown.graph.model import Model
from paredown.measure import speedups
from paredown.targets.devices.probe import peak_bytes, reset_peak

SIZE = 224  # px
FEW, MANY = 100, 300  # images
BATCH = 64  # paredown's default; the peers take one image at a time, as their guides show
ROUNDS, QUICK_ROUNDS = 6, 2
OURS, ORT, NNCF = "paredown", "onnxruntime", "nncf"
SAME = 0.05  # relative growth of the peak from FEW to MANY images that counts as none


def run(quick: bool) -> list[Result]:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        folder = Path(made)
        shapes.store(folder / "images", MANY, SIZE, seed=1)
        module = shapes.build("resnet18", shapes.photographs(64, SIZE, seed=3))
        torch.save(module.state_dict(), folder / "weights.pt")
        found: dict[tuple[str, int], list[dict[str, float]]] = {
            (tool, count): [] for tool in TOOLS for count in (FEW, MANY)
        }
        for number in range(rounds):
            keys = list(found)[:: -1 if number % 2 else 1]
            for tool, count in keys:
                found[tool, count].append(_in_child(tool, count, folder))
    result = Result(
        f"calibration: resnet18 at {SIZE} px, module -> int8 ONNX file",
        f"{tables.cores()} threads; median (lowest-highest of {rounds} interleaved fresh "
        "processes, after a warm-up on a tiny network); export to ONNX counted for all; peak "
        "memory above that of the imported libraries",
        [_row(tool, count, runs) for (tool, count), runs in found.items()],
        _bars(found, module),
    )
    tables.show(result, COLUMNS)
    return [result]


def _in_child(tool: str, count: int, folder: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, tool, str(count), str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"calibration with {tool} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def child(tool: str, count: int, folder: Path) -> dict[str, float]:
    """Seconds and bytes in this process, libraries and their caches warm."""
    torch.set_num_threads(tables.cores())
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as made:
        tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        few = shapes.store(Path(made) / "images", 4, 16, seed=0)
        TOOLS[tool](tiny.eval(), few, Path(made))
        del tiny
        gc.collect()
        _trim()
        before = _resident_bytes()
        reset_peak()
        module = shapes.build("resnet18")
        module.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        images = shapes.Stored(folder / "images", count, SIZE)
        start = perf_counter()
        file = TOOLS[tool](module, images, Path(made))
        seconds = perf_counter() - start
        peak = peak_bytes()
        assert peak is not None, "this system does not tell a process's peak memory"
        return {"seconds": seconds, "bytes": peak - before, "file": file.stat().st_size}


def _by(tool: str) -> Callable[[nn.Module, Dataset, Path], Path]:
    def make(module: nn.Module, images: Dataset, folder: Path) -> Path:
        return peers.TOOLS["onnxruntime"][tool](module, images, folder / "out.onnx", False)

    return make


TOOLS = {tool: _by(tool) for tool in (OURS, ORT, NNCF)}


def _trim() -> None:
    """Give what the warm-up freed back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def activation_bytes(model: Model, inputs: Tensor) -> int:
    """The most bytes of values that the graph holds at once: inputs and outputs of one op included.

    Weights are left out, and what shares memory counts once.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    most = 0

    class Meter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            nonlocal most
            result = super().run_node(n)
            alive = [v for v in [*self.env.values(), result] if isinstance(v, Tensor)]
            sizes = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in alive}
            most = max(most, sum(size for at, size in sizes.items() if at not in weights))
            return result

    with torch.no_grad():
        Meter(model.graph).run(inputs)
    return most


def _row(tool: str, count: int, runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "name": f"{tool} {tables.versions()[tool]}",
        "images": count,
        "seconds": [run["seconds"] for run in runs],
        "bytes": [run["bytes"] for run in runs],
        "file_bytes": runs[-1]["file"],
    }


def _bars(found: dict[tuple[str, int], list[dict[str, float]]], module: nn.Module) -> list[Bar]:
    def rounds(tool: str) -> list[np.ndarray]:
        return [np.array([run["seconds"]]) for run in found[tool, MANY]]

    def peak(tool: str, count: int) -> float:
        return float(np.median([run["bytes"] for run in found[tool, count]]))

    image = torch.zeros(1, 3, SIZE, SIZE)
    weights = sum(p.numel() * 4 for p in module.parameters())
    batch = BATCH * activation_bytes(paredown.capture(module, (image,)), image)
    bound, growth = 3 * weights + batch, peak(OURS, MANY) / peak(OURS, FEW) - 1
    return [
        tables.at_most(
            f"wall time with {MANY} images at most nncf's",
            speedups.median_ratio(rounds(OURS), rounds(NNCF)),
            1.0,
        ),
        Bar(
            f"peak memory at most 3 x the float model ({weights / 1e6:.0f} MB) plus the "
            f"activations of one batch of {BATCH} ({batch / 1e6:.0f} MB): {bound / 1e6:.0f} MB",
            peak(OURS, MANY) <= bound,
            True,
            f"{peak(OURS, MANY) / 1e6:.0f} MB",
        ),
        Bar(
            f"peak memory does not grow from {FEW} to {MANY} images",
            growth <= SAME,
            True,
            f"{growth:+.1%}",
        ),
    ]


COLUMNS = {
    "tool": lambda row: row["name"],
    "images": lambda row: str(row["images"]),
    "wall time, s": lambda row: tables.spread(row["seconds"]),
    "peak memory, MB": lambda row: tables.spread([x / 1e6 for x in row["bytes"]], 0),
    "file, MB": lambda row: f"{row['file_bytes'] / 1e6:.2f}",
}

if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
