"""Runtimes by name. Each is a module with

- ``SUFFIX`` of the file that is opened, and ``COMPANIONS``, the suffixes of those beside it;
- ``FORMS``, names of what it can write besides float32 (see `paredown.graph.quantized.forms`), and
  ``INT8_BYTES``, what integers add to a file for each channel and for each layer: None where they
  are only simulated;
- ``SYMMETRIC``, where there are such: bits of weights alone that may have no zero points;
- ``PACKAGES``, the distributions it needs; the extra that installs them has the runtime's name;
- ``lower(model, path)``, ``open(path, threads)``, ``census(path)`` and ``version()``.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from paredown.core.errors import UserError

RUNTIMES = {
    "onnxruntime": "paredown.targets.runtimes.onnxruntime",
    "openvino": "paredown.targets.runtimes.openvino",
    "pytorch": "paredown.targets.runtimes.pytorch",
    "executorch": "paredown.targets.runtimes.executorch",
    "litert": "paredown.targets.runtimes.litert",
}
CORE = ("onnxruntime", "pytorch")  # installed with paredown; each other one has its extra


def runtime(name: str) -> Any:
    """The runtime's module.

    Raises:
        UserError: no such runtime.
    """
    if name not in RUNTIMES:
        raise UserError(f"runtime: {name!r} is not one of {', '.join(RUNTIMES)}.")
    return importlib.import_module(RUNTIMES[name])


def ready(name: str) -> Any:
    """The runtime's module, all that it needs being installed.

    Raises:
        UserError: no such runtime, or one of its packages is not installed.
    """
    chosen = runtime(name)
    missing = [package for package in chosen.PACKAGES if not _installed(package)]
    if missing:
        raise UserError(
            f"runtime: {name} needs {' and '.join(missing)}, not installed here; run "
            f"pip install {'paredown' if name in CORE else repr(f'paredown[{name}]')}."
        )
    return chosen


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
