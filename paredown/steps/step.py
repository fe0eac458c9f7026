"""What every technique promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from paredown.core.task import Task

if TYPE_CHECKING:
    from paredown.graph.model import Model


# What weights and activations can be besides float32, and the step that makes it.
FORMS = {
    "int8": 'Quantize("int8")',
    "int4": 'Quantize("int4")',
    "int8-dynamic": 'Quantize("int8-dynamic")',
    "int8-weights": "QuantizeWeights(8)",
    "int4-weights": "QuantizeWeights(4)",
    "binary": 'Binarize("binary")',
    "ternary": 'Binarize("ternary")',
    "fp16": 'Cast("fp16")',
    "bf16": 'Cast("bf16")',
}


@runtime_checkable
class Step(Protocol):
    """A technique: a frozen dataclass whose fields are its settings.

    ``needs`` names the Task fields it cannot work without. ``apply`` leaves its input untouched,
    returns a changed copy, and raises `UserError` when there is nothing to change.

    A step after which weights or activations are no longer float32 says so in a property ``form``,
    one of the keys of `FORMS`; a runtime names in its own ``FORMS`` those that it can write. One
    that reads files names them in ``files()``, and says in ``problems()`` what stops it.
    """

    needs: ClassVar[frozenset[str]]

    def apply(self, model: Model, task: Task) -> Model: ...
