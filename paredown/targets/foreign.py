"""Files that others made: looked at, and opened in a process of their own, before they are here.

A runtime trusts what it opens: a damaged file crashes it, or takes all memory; an ONNX file names
others to read, which may be any of this machine's. So the first time that a file is opened, a child
process with bounds on memory and time opens it, and may crash.
"""

from __future__ import annotations

from pathlib import Path

from paredown.core import cache
from paredown.core.errors import UserError
from paredown.graph.doors.onnx.beside import weights_of
from paredown.targets.artifact import digest
from paredown.targets.devices.local import Probe, physical_memory
from paredown.targets.runtimes import runtime, source

OPENED_S, EACH_S = 60.0, 5e-8  # the longest that opening may take, and more for each byte
LEAST_BYTES, TIMES = 2 * 2**30, 12  # of memory that it may take: so many, and so often the file's


def check(path: Path, name: str) -> None:
    """Refuse a file that its runtime cannot open, or that would have it read others than its own.

    What was found holds for the same bytes in the same version of the runtime, and is kept.

    Args:
        name: of the runtime.

    Raises:
        UserError: says what is wrong with the file.
    """
    chosen = runtime(name)
    weights = weights_of(path) if chosen.SUFFIX == ".onnx" else []
    try:
        held = sum(each.stat().st_size for each in (path, *weights))
        key = {"file": digest(path), "beside": [digest(each) for each in weights]}
    except OSError as error:
        what = error.filename or path
        raise UserError(f"{what}: cannot be read: {error.strerror or error}.") from error
    memory = min(physical_memory(), LEAST_BYTES + TIMES * held)

    def opened() -> dict[str, bool]:
        timeout_s = OPENED_S + EACH_S * held
        code = source(name)
        with Probe(path, code, timeout_s=timeout_s, fresh=False, memory_bytes=memory):
            return {"opens": True}

    cache.kept("opens", key | {"runtime": chosen.version()}, opened, lambda found: found)
