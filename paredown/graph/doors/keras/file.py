"""What is in a Keras file before Keras opens it: code and pointers elsewhere are refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError

ZIP, HDF5 = ".keras", (".h5", ".hdf5")
CONFIG, WEIGHTS = "config.json", "model.weights.h5"
LARGEST = 64 << 20  # bytes of a config
LAMBDAS = ("Lambda", "TFOpLambda", "SlicingOpLambda", "__lambda__")
OWN = ("keras", "builtins")  # packages whose classes a file may name
WRITE_AGAIN = "download it again, or save it again with model.save(path)"


def config(path: Path) -> dict[str, Any]:
    """The architecture in a Keras file, none of which is code.

    Raises:
        UserError: it is damaged, has weights alone, a lambda, a class of one's own, or points into
            other files.
    """
    found = _of_zip(path) if path.suffix == ZIP else _of_hdf5(path)
    for entry in _entries(found):
        _refuse_code(path, entry)
    return found


def _of_zip(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            if CONFIG not in archive.namelist():
                raise UserError(
                    f"{path}: has no {CONFIG}, so it is no Keras file; expected what "
                    'model.save("model.keras") writes.'
                )
            if archive.getinfo(CONFIG).file_size > LARGEST:
                raise UserError(f"{path}: its {CONFIG} is too large for a model's.")
            text = archive.read(CONFIG)
            if WEIGHTS in archive.namelist():
                with archive.open(WEIGHTS) as weights:
                    _refuse_pointers(path, weights)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise UserError(f"{path}: is truncated or damaged ({error}); {WRITE_AGAIN}.") from error
    return _parsed(path, text)


def _of_hdf5(path: Path) -> dict[str, Any]:
    import h5py

    try:
        with path.open("rb") as file:
            _refuse_pointers(path, file)
        with h5py.File(path, "r") as file:
            text = file.attrs.get("model_config")
    except OSError as error:
        raise UserError(f"{path}: is truncated or damaged ({error}); {WRITE_AGAIN}.") from error
    if text is None:
        raise UserError(
            f"{path}: holds weights without their model; build it in Python, load_weights, and "
            'model.save("model.keras").'
        )
    return _parsed(path, text)


def _parsed(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its config is no JSON: {error}; {WRITE_AGAIN}.") from error
    if not isinstance(found, dict) or "class_name" not in found:
        raise UserError(f"{path}: its config is of no model; {WRITE_AGAIN}.")
    return found


def _refuse_pointers(path: Path, weights: Any) -> None:
    """Refuse weights that lie in other files, which whoever wrote this one need not own."""
    import h5py

    with h5py.File(weights, "r") as file:
        groups: list[Any] = [file]
        while groups:
            group = groups.pop()
            for name in group:
                if isinstance(group.get(name, getlink=True), (h5py.ExternalLink, h5py.SoftLink)):
                    raise UserError(f"{path}: {name} points elsewhere; {WRITE_AGAIN}.")
                member = group[name]
                if isinstance(member, h5py.Group):
                    groups.append(member)
                elif member.external or member.is_virtual:
                    raise UserError(f"{path}: {name} lies in another file; {WRITE_AGAIN}.")


def _entries(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Each object that a config tells of."""
    if depth > 200:
        return
    if isinstance(value, dict):
        if "class_name" in value:
            yield value
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _entries(inner, depth + 1)


def _refuse_code(path: Path, entry: dict[str, Any]) -> None:
    name, module = entry["class_name"], entry.get("module")
    settings = entry.get("config")
    called = settings.get("name", name) if isinstance(settings, dict) else name
    if name in LAMBDAS:
        raise UserError(
            f"{path}: {called!r} is a lambda, Python code that the file would have run; write it "
            "with layers of Keras and save it again, or load the model in model() of a Python "
            "file, which is code of yours."
        )
    registered = str(entry.get("registered_name") or "")
    foreign = module is not None and str(module).partition(".")[0] not in OWN
    if foreign or (module is None and ">" in registered) or ">" in str(name):
        raise UserError(
            f"{path}: {called!r} is of a class of one's own, {registered or name}, whose code is "
            "not in the file; load the model in model() of a Python file that defines it."
        )
