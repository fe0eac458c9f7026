"""Keras on its torch backend, and the model that it reads of a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError

BACKEND, WANTED = "KERAS_BACKEND", "torch"
EXTRA = "install it with: pip install 'paredown[keras]'"


def library() -> Any:
    """The package keras, on the torch backend.

    Raises:
        UserError: it is not installed, or was imported with another backend.
    """
    given = os.environ.get(BACKEND)
    if "keras" not in sys.modules:
        os.environ[BACKEND] = WANTED
    try:
        import h5py  # noqa: F401  # what the weights are in
        import keras
    except ImportError as error:
        raise UserError(
            f"a Keras file is read by keras and h5py, and {error.name} is not installed; {EXTRA}."
        ) from error
    finally:
        os.environ.pop(BACKEND, None)
        if given is not None:
            os.environ[BACKEND] = given
    if keras.config.backend() != WANTED:
        raise UserError(
            f"keras was imported with its {keras.config.backend()} backend; expected torch: set "
            f"{BACKEND}=torch before keras is imported."
        )
    return keras


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
