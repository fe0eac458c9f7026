"""What a benchmark hands back: rows, bars met or not, the machine; printed and kept as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from paredown.measure.stats import Interval
from paredown.targets.devices.probe import cpu_model

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    *("paredown", "torch", "torchao", "onnx", "onnxruntime", "nncf", "openvino", "executorch"),
    *("litert-torch", "ai-edge-litert", "ai-edge-quantizer", "numpy"),
)
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Bar:
    """A bound that this project set itself, and whether what was measured meets it.

    ``decided`` is False where the interval lies on both sides of the bound: another run may come
    out the other way.
    """

    text: str
    met: bool
    decided: bool
    found: str

    @property
    def verdict(self) -> str:
        return ("met" if self.met else "not met") + ("" if self.decided else ", within the noise")


def at_most(text: str, interval: Interval, bound: float) -> Bar:
    """A bar on a ratio or difference that should not lie above ``bound``."""
    decided = interval.high <= bound or interval.low > bound
    return Bar(text, interval.estimate <= bound, decided, spell(interval))


def at_least(text: str, interval: Interval, bound: float) -> Bar:
    """A bar on a ratio or difference that should not lie below ``bound``."""
    decided = interval.low >= bound or interval.high < bound
    return Bar(text, interval.estimate >= bound, decided, spell(interval))


@dataclass
class Result:
    """One table of a benchmark: rows of what was measured, as numbers, and its bars."""

    name: str
    conditions: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)


def show(result: Result, columns: dict[str, Callable[[dict[str, Any]], str]]) -> None:
    """Print a table, one column for each entry of ``columns``, then its bars."""
    table = Table(title=result.name, caption=result.conditions, title_justify="left")
    for number, heading in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    for row in result.rows:
        table.add_row(*[cell(row) for cell in columns.values()])
    console = Console(width=max(120, Console().width), markup=False, highlight=False)
    console.print(table)
    for bar in result.bars:
        console.print(f"  {bar.verdict}: {bar.text}; measured {bar.found}")
    console.print()


def spell(interval: Interval) -> str:
    return f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def spread(rounds: Sequence[Any], digits: int = 2) -> str:
    """The median of all samples, and the lowest and highest median of a round."""
    medians = [float(np.median(each)) for each in rounds]
    overall = float(np.median(np.concatenate([np.atleast_1d(each) for each in rounds])))
    return f"{overall:.{digits}f} ({min(medians):.{digits}f}-{max(medians):.{digits}f})"


def save(name: str, results: list[Result], quick: bool) -> Path:
    """Write the results of one benchmark; a quick run never replaces a full one's."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}{'-quick' if quick else ''}.json"
    content = {
        "benchmark": name,
        "quick": quick,
        "machine": machine(),
        "versions": versions(),
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [float(f"{x:.6g}") for x in value.reshape(-1)]
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def machine() -> dict[str, Any]:
    """What the numbers depend on; nothing that names this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": cores(),
        "int8_instructions": [name for name in INT8_INSTRUCTIONS if name in _flags()],
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_at_end": [round(load, 2) for load in os.getloadavg()],
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    found = [line for line in lines if line.split(":")[0].strip() in ("flags", "Features")]
    return set(found[0].partition(":")[2].split()) if found else set()


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
