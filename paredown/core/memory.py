"""Memory that is not used any more, given back to the system."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable

WORTH_BYTES = 2**26  # of a model: below, to look for what is not used takes longer than it helps


def release(model_bytes: int) -> None:
    """Free what a step or an export of a model so large has left behind.

    Graphs are cycles, which Python frees when it has made enough objects, however large the tensors
    are that hang on them; and the C library keeps what was freed between what was not.
    """
    if model_bytes >= WORTH_BYTES:
        gc.collect()
        _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    """The C library's, where it has one."""
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):
        return lambda kept: None
