"""Keras on its torch backend, and the model that it reads of a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError

WANTED = {"KERAS_BACKEND": "torch", "KERAS_TORCH_DEVICE": "cpu"}  # read when Keras is imported
EXTRA = "install it with: pip install 'paredown[keras]'"


def library() -> Any:
    """The package keras, on the torch backend and the processor, where paredown's models are.

    Raises:
        UserError: it is not installed, or was imported with another backend or for another device.
    """
    try:
        with _environment():
            import h5py  # noqa: F401  # what the weights are in
            import keras
    except ImportError as error:
        raise UserError(
            f"a Keras file is read by keras and h5py, and {error.name} is not installed; {EXTRA}."
        ) from error
    found = {"KERAS_BACKEND": keras.config.backend()}
    if found["KERAS_BACKEND"] == WANTED["KERAS_BACKEND"]:
        from keras.src.backend.torch import core

        found["KERAS_TORCH_DEVICE"] = core.get_device()
    for name, value in found.items():
        if value != WANTED[name]:
            raise UserError(
                f"keras was imported with {name}={value}; expected {WANTED[name]}: set "
                f"{name}={WANTED[name]} before keras is imported."
            )
    return keras


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Within it Keras is imported as is wanted here; the environment comes back."""
    given = {name: os.environ.get(name) for name in WANTED}
    os.environ.update(WANTED)
    try:
        yield
    finally:
        for name, value in given.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def load(path: Path) -> Any:
    """The Keras model in a file whose config was looked at.

    Raises:
        UserError: Keras cannot read it; says what it said.
    """
    keras = library()
    try:
        with keras.device("cpu"):
            model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = (lines or [type(error).__name__])[0].rstrip(".:")
        raise UserError(
            f"{path}: keras {keras.__version__} cannot read it: {said:.400}."
        ) from error
    if not getattr(model, "inputs", None) or not getattr(model, "outputs", None):
        raise UserError(
            f"{path}: is of a model whose inputs the file does not tell; build it with "
            "keras.Input and save it again."
        )
    return model
