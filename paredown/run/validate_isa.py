"""The same file under other instruction sets of this machine, beside its golden outputs.

Two ways lead there: oneDNN, in OpenVINO and PyTorch, keeps to the instruction set that
``ONEDNN_MAX_CPU_ISA`` names; and qemu-user, where it is installed, runs a whole process as another
processor does.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.run.golden import Agreement, Golden, compared
from paredown.targets.devices import probe
from paredown.targets.devices.device import write_batches
from paredown.targets.devices.local import Probe, Under
from paredown.targets.runtimes import source

ONEDNN = {  # of its names, what the processor must have; the least first
    "SSE41": "sse4_1",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx_vnni",
    "AVX512_CORE": "avx512bw",
    "AVX512_CORE_VNNI": "avx512_vnni",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_AMX": "amx_int8",
}
USERS = ("openvino", "pytorch")  # runtimes whose kernels are oneDNN's
QEMU = "qemu-x86_64"
PROCESSORS = {"Nehalem": "SSE4.2", "Haswell": "AVX2, no VNNI"}  # of qemu's, and what they have
TIMEOUT_S = 300.0  # of opening the file, or of running it once
NONE = "none"  # asks for no instruction set


@dataclass(frozen=True)
class Way:
    """An instruction set that can be forced here, and how."""

    name: str
    how: str
    under: Under


@dataclass(frozen=True)
class Forced:
    """What came of a file under an instruction set: how it agrees, or why it did not run."""

    name: str
    how: str
    agreement: Agreement | None
    problem: str = ""


def ways(runtime: str, asked: Sequence[str] | None = None) -> list[Way]:
    """What can be forced here for a runtime.

    Args:
        asked: names of them; None is all, and "none" is none.

    Raises:
        UserError: one that was asked for cannot be forced here.

    Example:
        >>> ways("onnxruntime", ["none"])
        []
    """
    flags, found = _flags(), []
    if runtime in USERS:
        for name, flag in ONEDNN.items():
            if flag in flags:
                how = f"ONEDNN_MAX_CPU_ISA={name}"
                found.append(Way(name, how, Under(variables=(("ONEDNN_MAX_CPU_ISA", name),))))
    if shutil.which(QEMU) and "sse4_1" in flags:  # as this Python is one for x86
        for name, has in PROCESSORS.items():
            launcher = (QEMU, "-cpu", name)
            found.append(Way(name, f"{QEMU} -cpu {name} ({has})", Under(launcher)))
    if asked is None:
        return found
    wanted, known = {each.lower() for each in asked}, {each.name.lower(): each for each in found}
    for name in wanted - set(known) - {NONE}:
        there = ", ".join(each.name for each in found) or "nothing"
        raise UserError(
            f"isa: {name!r} cannot be forced here for {runtime}; expected {there} or {NONE}. More "
            f"can be where {QEMU} is installed (apt-get install qemu-user)."
        )
    return [each for name, each in known.items() if name in wanted]


def forced(file: Path, runtime: str, golden: Golden, chosen: Sequence[Way]) -> list[Forced]:
    """Run a file on the golden inputs under each instruction set."""
    found = []
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        inputs = Path(folder) / "inputs.npz"
        write_batches(inputs, golden.inputs)
        for way in chosen:
            progress.say(f"  under {way.name} ({way.how})")
            try:
                with Probe(file, source(runtime), timeout_s=TIMEOUT_S, under=way.under) as opened:
                    outputs = opened.run(inputs, Path(folder) / "outputs.npz")
            except UserError as error:
                found.append(Forced(way.name, way.how, None, str(error)))
                continue
            found.append(Forced(way.name, way.how, compared(golden.outputs, outputs)))
    return found


def _flags() -> set[str]:
    """What the processor has, as the system names it."""
    text = probe.text_of(Path("/proc/cpuinfo"))
    return {
        name
        for line in text.splitlines()
        if line.partition(":")[0].strip() in ("flags", "Features")
        for name in line.partition(":")[2].split()
    }
