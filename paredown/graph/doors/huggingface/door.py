"""A Hugging Face folder -> its model, and what comes before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from paredown.core.errors import UserError
from paredown.graph.doors.huggingface import called, folder, kinds, loaded, sentences
from paredown.graph.doors.huggingface.before import Before, before, varying, wanted
from paredown.graph.doors.opened import Opened


def open_folder(path: Path) -> Opened:
    """The model in a folder as Hugging Face has them, from its local files alone.

    Nothing of the folder's own code is run, nothing is unpickled and nothing fetched.

    Raises:
        UserError: something is missing, damaged, or not taken; says what.
    """
    config = folder.config(path)
    model, notes = loaded.load(path, config)
    read: Any = model.config
    name = type(model).__name__
    made = before(path, model)
    pool = sentences.pool_of(path)
    outputs = _outputs(path, model, made)
    if pool is not None and "last_hidden_state" not in outputs:
        raise UserError(f"{path}: {sentences.MODULES} stands behind a model without tokens.")
    kind = kinds.kind_of(name, read)
    return Opened(
        module=called.plainly(model, pool),
        inputs=tuple(wanted(each, value) for each, value in made.example.items()),
        example=made.example,
        dynamic={each: varying(each) for each in made.example},
        outputs=(called.SENTENCE,) if pool else outputs,
        preprocess=made.preprocess,
        columns=made.columns,
        kind=kind,
        classes=kinds.classes(kind, read),
        files=folder.travelling(path),
        card=folder.card(path, config) | {"architecture": name},
        notes=(*notes, *made.notes, *kinds.notes(read)),
        usage=made.usage,
    )


def _outputs(path: Path, model: nn.Module, made: Before) -> tuple[str, ...]:
    """The names of what the model gives, on the example."""
    try:
        with torch.no_grad():
            found = called.outputs(model(**made.example))
    except Exception as error:
        raise UserError(
            f"{path}: {type(model).__name__} fails on {', '.join(made.example)}: "
            f"{loaded.reason(error)}; load it in model() of a Python file, with an example of its "
            "inputs in task()."
        ) from error
    if not found:
        raise UserError(f"{path}: {type(model).__name__} gives no tensor by a name of its own.")
    return tuple(found)
