"""What a door that takes files without source gives: a module, and what is known of its use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from paredown.graph.doors.example import Example


@dataclass(frozen=True)
class Wanted:
    """An input as the file tells of it.

    Attributes:
        name: as in the file.
        dtype: NumPy's name of it, such as "float32" or "int64".
        shape: with the batch first; None where the size is not fixed by the file, and a name where
            the file gives that size one.
        optional: whether samples may lack it, since there is a value for it by default.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    optional: bool = False


@dataclass(frozen=True)
class Opened:
    """A model that came without its source.

    Attributes:
        module: runs and trains; called by keyword, by the names of ``inputs``.
        inputs: what it wants, in the file's order.
        example: inputs as deployed, where the file can tell them without samples.
        dynamic: dimensions besides the batch that vary, for each input ``{dim: "name"}`` or None.
        outputs: their names; the module gives a tensor where there is one, else a dict.
        preprocess: from one raw example, a dict of column -> value (text as str, a picture as a
            uint8 array (H, W, C)), to the module's inputs without a batch dimension, by name.
        columns: the columns that ``preprocess`` reads.
        kind: of `paredown.core.task.KINDS`, where the file tells it.
        classes: names of the classes, where the file tells them.
        files: that travel with the artifact, such as those of a tokenizer.
        card: what is known of the origin, for a model card: title -> text.
        notes: sentences on what was done with the file.
        usage: Python that makes ``inputs``, arrays by name, of a sample, for a model card; the
            files that travel lie in the folder that it runs in.
    """

    module: nn.Module
    inputs: tuple[Wanted, ...]
    example: Example | None = None
    dynamic: Any = None
    outputs: tuple[str, ...] = ()
    preprocess: Callable[[dict[str, Any]], dict[str, Tensor]] | None = None
    columns: tuple[str, ...] = ()
    kind: str | None = None
    classes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    card: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    usage: str = ""
