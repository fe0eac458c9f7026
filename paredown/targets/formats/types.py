"""Types of numbers that some runtimes do not take."""

from __future__ import annotations

import torch

from paredown.core.errors import UserError
from paredown.graph.model import Model

INSTEAD = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def refuse_wide_unsigned(model: Model, runtime: str) -> None:
    """For runtimes whose unsigned numbers end at 8 bits.

    Raises:
        UserError: an input has wider ones; says what would do.

    Example:
        >>> from paredown import capture
        >>> x = torch.zeros(1, 4, dtype=torch.uint16)
        >>> refuse_wide_unsigned(capture(torch.nn.Flatten(), (x,)), "LiteRT")
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: model: its input 'input' is uint16, which LiteRT does not \
take; let it be int32 in the model and in the data.
    """
    for item in model.inputs:
        dtype = item.example.dtype
        if dtype in INSTEAD:
            raise UserError(
                f"model: its input {item.name!r} is {_name(dtype)}, which {runtime} does not take; "
                f"let it be {_name(INSTEAD[dtype])} in the model and in the data."
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
