"""Keep the sums of two products within the 16 bits in which some x86 kernels add them.

See `paredown.graph.quantized.saturation` for what these kernels add, and in which order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from paredown.core.task import Task
from paredown.data.observe import inputs
from paredown.graph.model import Model
from paredown.graph.quantized.forms import form_of
from paredown.graph.quantized.grouped import PER_GROUP
from paredown.graph.quantized.per_channel import PER_CHANNEL
from paredown.graph.quantized.quantizers import (
    ACTIVATION_QUANTIZERS,
    hold_biases,
    quantizers,
)
from paredown.graph.quantized.saturation import SAFE, Layer, Watch, layers, unseen
from paredown.graph.quantized.scales import channel_scales
from paredown.graph.state import set_buffer, tensor_of
from paredown.targets.runtimes import runtime

SHOWN = 12  # layers by name


def saturating(model: Model, task: Task) -> list[str]:
    """The weights of layers where the sum of a pair leaves 16 bits on the calibration data.

    Without such data (ranges that are found at each inference need none), and of recurrent layers,
    they are those where it does on any input.
    """
    hidden, possible = _weights(unseen(model.graph)), _weights(layers(model.graph))
    if not possible or task is None or task.missing({"calibration"}):
        return hidden + possible
    watch = Watch(model.graph)
    for leaves in inputs(model, task):
        watch.run(leaves)
        if watch.done:
            break
    return hidden + [name for name in possible if name in watch.found]


def _weights(found: Iterable[Layer]) -> list[str]:
    return list(dict.fromkeys(layer.site.weight for layer in found))


def keep_within(model: Model, task: Task, correct: Callable[[], None] | None) -> list[str]:
    """Hold the weights of such layers within 7 bits, in place, until no pair leaves 16; theirs.

    ``correct`` is called behind each change: what it makes of biases moves the values that come to
    the layers after.
    """
    found = _narrowed(model, task)
    if correct is not None:
        correct()
    if correct is not None or found:
        while more := _narrowed(model, task):
            found += more
            if correct is not None:
                correct()
    return found


def _narrowed(model: Model, task: Task) -> list[str]:
    found = saturating(model, task)
    if found:
        narrow(model.graph, found)
    return found


def narrow(graph: fx.GraphModule, names: Collection[str]) -> None:
    """Give these weights a grid of -63 to 63, in place, under whatever name they are read."""
    held = {id(tensor_of(graph, name)) for name in names}
    for node in quantizers(graph):
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            continue
        weight = tensor_of(graph, str(source.target))
        if id(weight) in held and node.target is PER_CHANNEL:
            _, scale, axis, *_ = node.args
            _set(graph, scale, channel_scales(weight.detach().float(), axis, SAFE))  # type: ignore[arg-type]
            node.args = (source, scale, axis, -SAFE, SAFE)
        elif id(weight) in held and _is_table_of_bytes(node):
            # a table of the same integers, so that a file holds them once
            _, scale, _, axis, *_ = node.args
            _set(graph, scale, channel_scales(weight.detach(), axis, SAFE)[:, None])  # type: ignore[arg-type]
    hold_biases(graph)
    graph.recompile()


def _is_table_of_bytes(node: fx.Node) -> bool:
    """Whether each row has one scale and no zero point, as a linear layer's channel has."""
    form = form_of(node)
    if node.target is not PER_GROUP or form is None or form.bits != 8:
        return False
    zero_point, _, group = node.args[2:5]
    return zero_point is None and not group


def _set(graph: fx.GraphModule, held: Any, scales: Tensor) -> None:
    set_buffer(graph, str(held.target), scales)


def note(found: Sequence[str], name: str, safe: bool) -> str:
    """What the model's notes say of these layers, for the runtime of that name."""
    if safe:
        return (
            f"The weights of {_count(found)} are held within 7 bits: on x86 without VNNI {name} "
            f"adds two products in 16 bits, which those of 8 bits left: {_names(found)}."
        )
    return (
        f"On x86 without VNNI {name} adds two products in 16 bits, which {_count(found)} leave on "
        f"the calibration data: there the file gives other results: {_names(found)}. "
        'Quantize(saturation="safe") holds their weights within 7 bits.'
    )


def instruction_sets(model: Model, task: Task, name: str) -> str | None:
    """On which instruction sets the runtime of that name gives the same results, one sentence;
    None of a model whose values are not rounded."""
    if not any(node.target in ACTIVATION_QUANTIZERS for node in quantizers(model.graph)):
        return None
    if runtime(name).PAIRS is None:
        return f"{name} adds products in 32 bits, so results are the same on every processor."
    found = saturating(model, task)
    if found:
        return (
            f"Results differ between instruction sets: on x86 without VNNI (AVX2, early AVX-512) "
            f"sums of two products leave 16 bits in {_count(found)}: {_names(found)}. x86 with "
            'VNNI and ARM are exact. Quantize(saturation="safe") makes all the same.'
        )
    where = (
        "on the calibration data " if any(True for _ in layers(model.graph)) else "whatever comes "
    )
    return (
        "Results are the same on x86 with AVX2, AVX-512 and VNNI and on ARM: "
        f"{where}no sum of two products leaves 16 bits."
    )


def _count(found: Sequence[str]) -> str:
    return f"{len(found)} layer{'s' if len(found) > 1 else ''}"


def _names(found: Sequence[str]) -> str:
    more = len(found) - SHOWN
    return ", ".join(found[:SHOWN]) + (f" and {more} more" if more > 0 else "")
