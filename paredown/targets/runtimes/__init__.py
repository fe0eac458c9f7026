"""Runtimes by name, and what each promises; each is a module that is a `Runtime`."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from paredown.core.errors import UserError
from paredown.core.named import named

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from paredown.core.measurement import Census
    from paredown.graph.model import Model

RUNTIMES = {
    "onnxruntime": "paredown.targets.runtimes.onnxruntime",
    "openvino": "paredown.targets.runtimes.openvino",
    "pytorch": "paredown.targets.runtimes.pytorch",
    "executorch": "paredown.targets.runtimes.executorch",
    "litert": "paredown.targets.runtimes.litert",
}
OTHERWISE = {  # what people call them: letters and digits alone
    **dict.fromkeys(("ort", "onnx", "onnxrt"), "onnxruntime"),
    **dict.fromkeys(("ov", "ir"), "openvino"),
    **dict.fromkeys(("torch", "pt", "libtorch"), "pytorch"),
    **dict.fromkeys(("et", "pte", "xnnpack", "pytorchmobile"), "executorch"),
    **dict.fromkeys(("tflite", "tensorflowlite", "tfl", "litertorch"), "litert"),
}
Batches = Sequence[Sequence["Tensor"]]  # one tensor per input each
CORE = ("onnxruntime", "pytorch")  # installed with paredown; each other one has its extra


class Predictor(Protocol):
    """An open file, which takes what fits it; `paredown.open` checks that, and says what does not.

    Attributes:
        signature: of each input ``name``, ``dtype`` and ``shape``, a list of sizes; one that varies
            is ``[name, least, most]``, most being None where there is no end. "" and None where the
            file does not say. Sizes of one name are the same, but for "?".
    """

    input_names: list[str]
    output_names: list[str]
    signature: list[dict[str, Any]]

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """One array per input, the batch first -> one per output."""


class Inside(Protocol):
    """An open file that shows its inner values."""

    def __call__(self, leaves: Sequence[Tensor], /) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The inputs' tensors -> the outputs, and the inner values by the name of their node."""


class Runtime(Protocol):
    """A module that writes files and opens them, loaded by its path where only numpy is.

    The names in capitals are constants of the module.
    """

    @property
    def SUFFIX(self) -> str:
        """Of the file that is opened."""

    @property
    def COMPANIONS(self) -> tuple[str, ...]:
        """The suffixes of the files beside it."""

    @property
    def FORMS(self) -> frozenset[str]:
        """What it can write besides float32, by the names in `paredown.graph.quantized.forms`."""

    @property
    def SYMMETRIC(self) -> frozenset[int]:
        """Bits of weights alone that may have no zero points."""

    @property
    def PAIRS(self) -> str | None:
        """Which products its kernels for x86 without VNNI add in 16 bits, as in
        `paredown.graph.quantized.saturation`; None where they never do."""

    @property
    def INT8_BYTES(self) -> tuple[int, int] | None:
        """What integers add to a file for each channel and for each layer, in bytes; None where
        they are only simulated."""

    @property
    def PACKAGES(self) -> tuple[str, ...]:
        """The distributions that it needs; the extra that installs them has the runtime's name."""

    @property
    def IMPORTS(self) -> tuple[str, ...]:
        """The modules that `open` imports, for a process that is forked before it opens a file;
        to import them starts no thread that computes."""

    def lower(self, model: Model, path: Path | str, data: Batches = ()) -> Path:
        """Write the model as a file, and check it against the model.

        Args:
            data: real inputs to check it on besides the example, of the example's shapes.

        Raises:
            UserError: the runtime cannot take the model, or the file differs from it.
        """

    def open(self, path: Path | str, threads: int = 1) -> Predictor:
        """Open a file on the CPU with that many threads of one inference."""

    def open_inside(self, model: Model, path: Path | str, names: Collection[str]) -> Inside | None:
        """A file made of the model, open to show the values of those nodes; None: it cannot."""

    def census(self, path: Path | str) -> Census:
        """What the runtime really runs for a file, and in which precision."""

    def version(self) -> str:
        """Its name and version."""


def runtime(name: str) -> Runtime:
    """The runtime's module.

    Raises:
        UserError: no such runtime.
    """
    return cast(Runtime, _module(name))


def source(name: str) -> Path:
    """The runtime's own file, for a process that loads it by its path.

    Raises:
        UserError: no such runtime.
    """
    return Path(str(_module(name).__file__))


def _module(name: str) -> ModuleType:
    if name not in RUNTIMES:
        raise UserError(f"runtime: {name!r} is not one of {', '.join(RUNTIMES)}{_meant(name)}")
    module: ModuleType = named(RUNTIMES[name])
    return module


def _meant(name: str) -> str:
    """The runtime that a user may have meant, as the end of a sentence."""
    called = OTHERWISE.get(name.lower().replace("-", "").replace("_", "").replace(" ", ""))
    near = [called] if called else difflib.get_close_matches(name.lower(), RUNTIMES, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def ready(name: str) -> Runtime:
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
