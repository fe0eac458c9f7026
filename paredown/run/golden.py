"""Frozen inputs and outputs of an artifact, which tell whether it answers elsewhere as it did here.

``golden.npz`` in a run's folder holds up to 32 examples of the test split, as deployed, under
``inputs.BATCH.POSITION``, and what the artifact made of them on the machine of the run under
``outputs.BATCH.POSITION``.
"""

from __future__ import annotations

import io
import itertools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paredown.core.errors import UserError
from paredown.core.files import read_parts, sha256
from paredown.core.task import Target, Task
from paredown.data import batches, feed, splits
from paredown.graph.model import Model
from paredown.measure import inputs
from paredown.run.ledger import Ledger
from paredown.targets import parity
from paredown.targets.devices import first
from paredown.targets.runtimes import source

SUFFIX = ".npz"
EXAMPLES, MOST_BYTES = 32, 16_000_000
AGREES_DB = 30.0  # an error of 3 % of the outputs' size; kernels of one file differ by far less

Arrays = list[list[np.ndarray]]  # batch -> input or output


@dataclass(frozen=True)
class Golden:
    """What `keep` kept."""

    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True)
class Agreement:
    """How outputs agree with golden ones.

    Attributes:
        examples: that were compared.
        values: numbers in their outputs.
        differing: those that are not the same, bit for bit.
        max_error: the largest difference; None where NaN or infinity came, or another shape.
        db: signal over error in decibels; None where nothing differs, or nothing can be compared.
        flips: examples whose class, the largest first output, is another; None where there is none.
    """

    examples: int
    values: int
    differing: int
    max_error: float | None
    db: float | None
    flips: int | None

    @property
    def agrees(self) -> bool:
        """Whether the outputs are the same but for rounding."""
        return not self.differing or (self.db is not None and self.db >= AGREES_DB)


def keep(
    ledger: Ledger, model: Model, task: Task, file: Path, target: Target
) -> dict[str, Any] | None:
    """Freeze examples and what the file makes of them as a stage; what the run's details say of it.

    None where one example takes too much.
    """
    given = _examples(model, task)
    arrays: dict[str, np.ndarray] = {}
    with first.opened(file, source(target.runtime)) as predict:
        for number, leaves in enumerate(given):
            made = predict(*leaves)
            these = {f"inputs.{number}.{n}": leaf for n, leaf in enumerate(leaves)}
            these |= {f"outputs.{number}.{n}": output for n, output in enumerate(made)}
            size = sum(array.nbytes for array in (*arrays.values(), *these.values()))
            if size > MOST_BYTES:
                break
            arrays |= these
    if not arrays:
        return None
    written = io.BytesIO()
    np.savez(written, **arrays)  # type: ignore[arg-type]
    digest = ledger.put(written.getvalue(), SUFFIX)
    count = len({name.split(".")[1] for name in arrays}) * inputs.deployed_batch(model)
    return {"sha256": digest, "examples": count, "bytes": len(written.getvalue())}


def _examples(model: Model, task: Task) -> Arrays:
    """The first examples of the test split, as deployed."""
    batch, found = inputs.deployed_batch(model), []
    given = feed.every(model, splits.split(task, "test"), batch, max(1, EXAMPLES // batch))
    for each in given:
        padded = batches.padded(each.inputs, batch)
        found.append(inputs.arrays(model, inputs.leaves(model, padded, inputs.of_split("test"))))
    return found


def read(path: Path, digest: str = "") -> Golden:
    """The golden set in a file.

    Args:
        digest: the SHA-256 that it must have; "" asks for none.

    Raises:
        UserError: it cannot be read, is damaged, or is another one.
    """
    try:
        found = sha256(read_parts(path)) if digest else ""
        if found != digest:
            raise UserError(
                f"{path}: is damaged, or not the golden set of the run: its SHA-256 is {found}, "
                f"and run.json records {digest}. The same paredown run command writes it again."
            )
        with np.load(path, allow_pickle=False) as stored:
            golden = Golden(_arrays(stored, "inputs"), _arrays(stored, "outputs"))
    except OSError as error:
        again = " The same paredown run command writes it again." if digest else ""
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.{again}") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is no golden set: {error}.") from error
    if not golden.inputs or len(golden.inputs) != len(golden.outputs):
        raise UserError(f"{path}: is no golden set: expected inputs.0.0 and outputs.0.0 in it.")
    return golden


def _arrays(stored: Any, kind: str) -> Arrays:
    found: Arrays = []
    for batch in itertools.count():
        names = (f"{kind}.{batch}.{position}" for position in itertools.count())
        arrays = [stored[name] for name in itertools.takewhile(stored.files.__contains__, names)]
        if not arrays:
            return found
        found.append(arrays)
    return found


def compared(golden: Sequence[Sequence[np.ndarray]], got: Sequence[Sequence[Any]]) -> Agreement:
    """Outputs beside golden ones, batch by batch.

    Example:
        >>> golden, got = [[np.float32([[0, 1]])]], [[np.float32([[0, 0.5]])]]
        >>> compared(golden, got)
        Agreement(examples=1, values=2, differing=1, max_error=0.5, db=6.0, flips=0)
    """
    pairs = [
        (a, np.asarray(b))
        for before, after in zip(golden, got, strict=True)
        for a, b in zip(before, after, strict=True)
    ]
    firsts = [(before[0], np.asarray(after[0])) for before, after in zip(golden, got, strict=True)]
    values = sum(a.size for a, _ in pairs)
    examples = sum(len(a) if a.ndim else 1 for a, _ in firsts)
    if any(a.shape != b.shape for a, b in pairs):
        return Agreement(examples, values, values, None, None, None)
    differing = sum(int(np.sum(~_same(a, b))) for a, b in pairs)
    error = max((float(np.max(np.abs(_float(a) - _float(b)), initial=0.0)) for a, b in pairs))
    flat = [np.concatenate([_float(each[n]).ravel() for each in pairs]) for n in range(2)]
    db = parity.agreement_db(*flat)
    finite = bool(np.isfinite(error))
    return Agreement(
        examples,
        values,
        differing,
        error if finite else None,
        round(db, 1) if differing and np.isfinite(db) else None,
        _flips(firsts),
    )


def _float(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two arrays hold the same, NaN being the same as NaN."""
    same: np.ndarray = (a == b) | ((a != a) & (b != b))
    return same


def _flips(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> int | None:
    if not all(a.ndim == 2 and a.shape[1] > 1 and a.dtype.kind == "f" for a, _ in pairs):
        return None
    return sum(int(np.sum(a.argmax(1) != b.argmax(1))) for a, b in pairs)
