"""Half precision: float32 weights and operations in 16 bits, but for those that need more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, fx

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.settings import check_fields
from paredown.core.task import Task
from paredown.data import observe
from paredown.graph.model import Model
from paredown.graph.names import classes, module_path, owner
from paredown.graph.quantized.forms import WEIGHT_FORMS, form_of
from paredown.steps.quantization.cast_plan import Facts, Plan, leaves_range
from paredown.steps.quantization.cast_rewrite import floats, rewrite
from paredown.steps.step import ALONE, Entry, Setting, Step

DTYPES = {form.name: form.dtype for form in WEIGHT_FORMS.values() if form.dtype is not None}
ROUNDS = 8  # in which what becomes NaN or infinite is found, each mending the first that does
PROVEN = 4  # batches of calibration data that the 16-bit model is run on
NAMED = 5  # layers that a note tells


@dataclass(frozen=True)
class Cast(Step):
    """Run the model in float16 or bfloat16; its inputs and outputs stay float32.

    It halves the file everywhere. It is faster on GPUs and on CPUs with 16-bit units (ARMv8.2,
    AMX); other CPUs convert back and forth and get slower. "bf16" keeps float32's range at 8
    bits of precision, "fp16" has 11 bits but ends at 65504. ONNX Runtime on a CPU has
    no bfloat16 kernels: there, "fp16" it is. Cast last: train before.

    A layer whose weights, inputs or outputs leave the range of the 16 bits stays float32: on the
    calibration data where the task has some, else on the example, with a factor of 2 to spare. The
    model's notes name those layers. What is computed from whole numbers alone, such as the angles
    of rotary positions, stays float32 up to where it meets a 16-bit tensor: position 1001 has no
    place in bfloat16.

    Raises:
        UserError: the dtype is unknown; the model is 16-bit or quantized to 8 or 4 bits already;
            nothing is left that 16 bits can hold.

    Example:
        >>> import paredown
        >>> model = paredown.capture(torch.nn.Linear(8, 4), (torch.zeros(1, 8),))
        >>> half = paredown.Cast("fp16").apply(model, None)
        >>> half.state_dict()["weight"].dtype, half(torch.zeros(1, 8)).dtype
        (torch.float16, torch.float32)
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    table: ClassVar[tuple[Entry, ...]] = (
        Entry(
            call='Cast("fp16")',
            does="16-bit floats with 32-bit inputs and outputs; layers whose values leave "
            "fp16's range on the calibration data stay 32-bit",
            pays="half the size at almost no loss",
            does_not="rarely faster on a CPU; ONNX Runtime's CPU has no bf16 kernels",
        ),
    )

    dtype: str = "fp16"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype not in DTYPES:
            raise UserError(f'dtype: expected "fp16" or "bf16", got {self.dtype!r}.')

    @property
    def form(self) -> str:
        return self.dtype

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        """A copy whose graph computes in 16 bits between float32 inputs and outputs."""
        dtype = DTYPES[self.dtype]
        _check(model)
        facts = Facts(model.copy().eval().graph)
        with torch.no_grad():
            seen = task if dtype is torch.float16 else None  # bfloat16 has float32's range
            for leaves in _seen(model, seen):
                facts.run(*leaves)
            half, kept = _narrowed(model, seen, facts, dtype)
        if not any(parameter.dtype == dtype for parameter in half.parameters()):
            raise UserError(
                f"Cast: changed nothing; in every layer values or weights leave {_range(dtype)}."
                f"{_advice(dtype)}"
            )
        told = _told(model.graph, kept, facts, dtype)
        if told:
            progress.say(f"  {told}")
        return replace(half, notes=(*half.notes, told)) if told else half


def _check(model: Model) -> None:
    rounding = [node for node in model.graph.graph.nodes if "quantize" in str(node.target)]
    forms = [form_of(node) for node in rounding]
    if any(form is None or not form.follows for form in forms):
        raise UserError("Cast: the model is quantized, so its weights are 8 bits already.")
    kinds = {parameter.dtype for parameter in model.parameters()}
    if torch.float32 not in kinds:
        found = ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds)) or "none at all"
        raise UserError(f"Cast: changed nothing; the model has no float32 weights ({found}).")


def _seen(model: Model, task: Task | None) -> Iterator[list[Tensor]]:
    """The example and, where there is one, the calibration split: copies, on the model's device."""
    device = next(floats(model.graph))[1].device
    yield [item.example.to(device, copy=True) for item in model.inputs]
    if task is not None and not task.missing({"calibration"}):
        for leaves in observe.inputs(model, task):
            yield [leaf.to(device, copy=True) for leaf in leaves]


def _narrowed(
    model: Model, task: Task | None, facts: Facts, dtype: torch.dtype
) -> tuple[Model, set[str]]:
    """The model in 16 bits, and the names of the values that are kept from them.

    What becomes NaN or infinite nevertheless, a quotient by what has become 0 for one, is found
    by running it, and kept too.
    """
    also: frozenset[str] = frozenset()
    for depth in range(1, ROUNDS + 1):
        half = model.copy()
        plan = Plan.of(half.graph, facts, dtype, also)
        rewrite(half, plan, dtype, next(_seen(model, None)))
        bad = _spoilt(half, islice(_seen(model, task), PROVEN), facts)
        if bad is None:
            return half, {node.name for node in plan.kept}
        also |= _made_of(bad, depth, facts)
    raise UserError(f"Cast: {bad} becomes NaN or infinite in {_name(dtype)}.{_advice(dtype)}")


def _spoilt(half: Model, batches: Iterator[list[Tensor]], before: Facts) -> fx.Node | None:
    """The first value that is not finite in 16 bits and was in 32."""
    facts = Facts(half.copy().eval().graph)
    for leaves in batches:
        facts.run(*leaves)
    nodes = [_origin(n, before) for n in half.graph.graph.nodes if n.name in facts.spoilt]
    return next((node for node in nodes if node.name not in before.spoilt), None)


def _origin(node: fx.Node, before: Facts) -> fx.Node:
    """The node of the original graph that a cast was put behind."""
    while node.name not in before.largest and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _made_of(node: fx.Node, depth: int, before: Facts) -> set[str]:
    """The value and those it was made of, that many ops back."""
    found = {node}
    for _ in range(depth):
        found |= {_origin(source, before) for one in found for source in one.all_input_nodes}
    return {one.name for one in found} & before.single


def _told(graph: fx.GraphModule, kept: set[str], facts: Facts, dtype: torch.dtype) -> str:
    """Which layers stay float32 for their values, and what those reach."""
    kinds = classes(graph)
    peaks: dict[str, float] = {}
    for node in graph.graph.nodes:
        peak = facts.largest.get(node.name, 0.0)
        if node.name in kept and leaves_range(peak, dtype):
            read = node.op == "get_attr"
            path = owner(str(node.target)) if read else module_path(node, kinds)
            path = path or str(node.target)
            peaks[path] = max(peaks.get(path, 0.0), peak)
    if not peaks:
        return ""
    named = [f"{path} (up to {peak:.3g})" for path, peak in peaks.items()]
    rest = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    layers = ", ".join(named[:NAMED])
    return f"Cast: stays float32, since values leave {_range(dtype)}: {layers}{rest}."


def _range(dtype: torch.dtype) -> str:
    info = torch.finfo(dtype)
    return f"the range of {_name(dtype)}, {info.tiny:.2g} to {info.max:.6g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _advice(dtype: torch.dtype) -> str:
    if dtype is torch.float16:
        return ' Use Cast("bf16"), which has the range of float32.'
    return " Leave this model in float32."
