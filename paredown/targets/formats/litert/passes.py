"""What is done to a .tflite file after LiteRT's converter: fewer ops, fewer roundings, fewer bytes.

Each pass edits a `File` in place. `finish` runs those that every file takes, in their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema

from paredown.graph.quantized.codes import to_bytes
from paredown.graph.quantized.forms import Rounded
from paredown.graph.rows import rows
from paredown.targets.formats.litert.edit import TYPES, File
from paredown.targets.formats.rowwise import fits

BARRIER = float(np.nextafter(np.float32(1), np.float32(2)))  # a factor that nothing else has
LEAST_HALF_BYTES = 64  # of a constant: below, the op that widens it takes more than is saved
WEIGHTED = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")
READING_GROUPS = {"FULLY_CONNECTED": 9, "EMBEDDING_LOOKUP": 4}  # op -> the version that does
# Integer ops that round to whatever scale their result has.
RESCALING = (*WEIGHTED, "ADD", "SUB", "MUL", "MEAN", "QUANTIZE")
# Ops that give on the values of their first input.
MOVING = (
    *("RESHAPE", "TRANSPOSE", "SLICE", "STRIDED_SLICE", "SQUEEZE", "EXPAND_DIMS", "GATHER"),
    *("MAX_POOL_2D", "RESIZE_NEAREST_NEIGHBOR", "SPACE_TO_DEPTH", "DEPTH_TO_SPACE"),
)


def finish(file: File, integers: bool) -> None:
    """The passes that every file takes; ``integers`` where more than weights may be rounded."""
    drop_barriers(file)
    join_integers(file)
    move_integers(file)
    rescale_directly(file)
    average_in_one_step(file)
    fold_rescales(file)
    leave_float(file)
    if integers:
        read_integer_weights(file)
    drop_dead_ops(file)


def drop_barriers(file: File) -> None:
    """Take out the products with `BARRIER`, which kept the converter from moving ops past them."""
    for op in list(file.graph.operators):
        if file.kind(op) != "MUL":
            continue
        for value, factor in (op.inputs, op.inputs[::-1]):
            held = file.constant(file.graph.tensors[factor])
            if held is not None and held.tobytes() == np.float32(BARRIER).tobytes():
                file.reroute(int(op.outputs[0]), int(value))
                file.erase(op)
                break


def join_integers(file: File) -> None:
    """A concatenation that is rounded afterwards joins parts that were rounded so before."""
    for op in list(file.graph.operators):
        if file.kind(op) != "CONCATENATION":
            continue
        after = file.readers().get(int(op.outputs[0]), [])
        rounded = [file.graph.tensors[user.outputs[0]] for user in after]
        if not after or {file.kind(user) for user in after} != {"QUANTIZE"}:
            continue
        if len({_scale(tensor) for tensor in rounded}) != 1:
            continue
        op.inputs = np.array([_rounded(file, op, int(i), rounded[0]) for i in op.inputs], np.int32)
        for user in after:
            file.reroute(int(user.outputs[0]), int(after[0].outputs[0]))
            file.erase(user)
        op.outputs = after[0].outputs


def _rounded(file: File, place: Any, index: int, like: Any) -> int:
    """A tensor as integers of another's scale, made before ``place`` where it is not there yet."""
    source = file.producers().get(index)
    if source is not None and file.kind(source) == "DEQUANTIZE":
        index = int(source.inputs[0])
        if _scale(file.graph.tensors[index]) == _scale(like):
            return index
    made = file.add_like(file.graph.tensors[index].shape, like)
    file.insert_before(place, file.op("QUANTIZE", 2, [index], [made]))
    return made


def move_integers(file: File) -> None:
    """An op that moves values, between a dequantize and a quantize op of one scale, moves integers.

    The converter leaves it in float where something else reads the dequantized value too.
    """
    for op in [op for op in file.graph.operators if file.kind(op) in MOVING]:
        if len(op.outputs) > 1:
            continue
        source = file.producers().get(int(op.inputs[0]))
        after = file.readers().get(int(op.outputs[0]), [])
        if source is None:
            continue
        if file.kind(source) != "DEQUANTIZE" or {file.kind(u) for u in after} != {"QUANTIZE"}:
            continue
        old = file.graph.tensors[source.inputs[0]]
        if any(_scale(old) != _scale(file.graph.tensors[u.outputs[0]]) for u in after):
            continue
        op.inputs = np.array([source.inputs[0], *op.inputs[1:]], np.int32)
        op.outputs = after[0].outputs
        for user in after:
            file.reroute(int(user.outputs[0]), int(after[0].outputs[0]))
            file.erase(user)


def rescale_directly(file: File) -> None:
    """A dequantize and a quantize op in a row become one that goes from integers to integers."""
    made_by = file.producers()
    for op in [op for op in file.graph.operators if file.kind(op) == "QUANTIZE"]:
        source = made_by.get(int(op.inputs[0]))
        if source is None or file.kind(source) != "DEQUANTIZE":
            continue
        old, new = int(source.inputs[0]), int(op.outputs[0])
        op.inputs = np.array([old], np.int32)
        if _scale(file.graph.tensors[old]) == _scale(file.graph.tensors[new]):
            file.reroute(new, old)
            file.erase(op)


def average_in_one_step(file: File) -> None:
    """An average over a whole image, followed by a change of scale, becomes one MEAN.

    LiteRT's AVERAGE_POOL_2D keeps its input's scale, which is coarse for an average: the value
    would be rounded to it and then again.
    """
    readers = file.readers()
    for op in list(file.graph.operators):
        if file.kind(op) != "AVERAGE_POOL_2D":
            continue
        after = readers.get(int(op.outputs[0]), [])
        image, pooled = file.graph.tensors[op.inputs[0]], file.graph.tensors[op.outputs[0]]
        window = [op.builtinOptions.filterHeight, op.builtinOptions.filterWidth]
        whole = list(pooled.shape[1:3]) == [1, 1] and list(image.shape[1:3]) == window
        if not whole or len(after) != 1 or file.kind(after[0]) != "QUANTIZE":
            continue
        if TYPES[image.type] != "int8" or op.builtinOptions.fusedActivationFunction:
            continue
        axes = file.add_constant(np.array([1, 2], np.int32))
        op.opcodeIndex = file.op_code("MEAN", 2)
        op.inputs, op.outputs = np.array([op.inputs[0], axes], np.int32), after[0].outputs
        op.builtinOptionsType = schema.BuiltinOptions.ReducerOptions
        op.builtinOptions = schema.ReducerOptionsT()
        op.builtinOptions.keepDims = True
        file.erase(after[0])


def fold_rescales(file: File) -> None:
    """An op whose integers are only rescaled gives them at that scale itself: one rounding less."""
    outputs = {int(index) for index in file.graph.outputs}
    for op in [op for op in file.graph.operators if file.kind(op) == "QUANTIZE"]:
        old = int(op.inputs[0])
        source = file.producers().get(old)
        if source is None or file.kind(source) not in RESCALING:
            continue
        alone = len(file.readers()[old]) == 1 and old not in outputs
        if alone and TYPES[file.graph.tensors[old].type] == "int8":
            source.outputs = op.outputs
            file.erase(op)


def leave_float(file: File) -> None:
    """Values rounded to integers that only float ops read are left as they were.

    What LiteRT computes with integer weights and a float result rounds its input by itself, finer
    than a scale fixed beforehand: two roundings would lose more than either.
    """
    for op in [op for op in file.graph.operators if file.kind(op) == "QUANTIZE"]:
        source = file.graph.tensors[op.inputs[0]]
        if TYPES[source.type] != "float32":
            continue
        movers, ends = _readers_behind(file, int(op.outputs[0]))
        if ends is None:
            continue
        file.reroute(int(op.outputs[0]), int(op.inputs[0]))
        for mover in movers:
            for tensor in file.tensors(mover.outputs):
                tensor.type, tensor.quantization = source.type, None
        for end in ends:
            file.reroute(int(end.outputs[0]), int(end.inputs[0]))
            file.erase(end)
        file.erase(op)


def _readers_behind(file: File, index: int) -> tuple[list[Any], list[Any] | None]:
    """The ops that give a tensor on, and the dequantize ops behind; None with any other reader."""
    movers: list[Any] = []
    ends: list[Any] = []
    left = [index]
    readers = file.readers()
    while left:
        here = left.pop()
        if here in file.graph.outputs:
            return [], None
        for user in readers.get(here, []):
            if file.kind(user) == "DEQUANTIZE":
                ends.append(user)
            elif file.kind(user) in MOVING and user.inputs[0] == here:
                movers.append(user)
                left += [int(output) for output in user.outputs]
            else:
                return [], None
    return movers, ends


def read_integer_weights(file: File) -> None:
    """Let float ops read their integer weights as they are: LiteRT then rounds the op's input on
    the fly and multiplies integers, where a dequantize op between would make it multiply floats.
    """
    made_by = file.producers()
    for op in file.graph.operators:
        source = made_by.get(int(op.inputs[1])) if file.kind(op) in WEIGHTED else None
        if source is None or file.kind(source) != "DEQUANTIZE":
            continue
        weight = file.graph.tensors[source.inputs[0]]
        if file.constant(weight) is None or TYPES[weight.type] != "int8":
            continue
        op.inputs = np.array([op.inputs[0], source.inputs[0], *op.inputs[2:]], np.int32)
        if file.kind(op) == "FULLY_CONNECTED":
            op.builtinOptions.asymmetricQuantizeInputs = True
            op.opcodeIndex = file.op_code("FULLY_CONNECTED", 9)


def drop_dead_ops(file: File) -> None:
    """Erase the ops whose results nothing reads."""
    read = {int(index) for index in file.graph.outputs}
    kept = []
    for op in reversed(file.graph.operators):
        if read & {int(index) for index in op.outputs}:
            kept.append(op)
            read |= {int(index) for index in op.inputs}
    file.graph.operators = kept[::-1]


def hold_groups(file: File, weights: list[Rounded]) -> None:
    """Let linear layers and lookups read weights that were rounded in groups as 4-bit integers with
    their scales; they are found by their values. LiteRT rounds a layer's input row by row."""
    known = {
        rows(each.values(), each.axis).contiguous().numpy().tobytes(): each
        for each in weights
        if fits(each)
    }
    held: dict[str, int] = {}
    for op in [op for op in file.graph.operators if file.kind(op) in READING_GROUPS]:
        data = file.constant(file.graph.tensors[op.inputs[1]])
        weight = None if data is None else known.get(data.tobytes())
        if weight is None:
            continue
        if weight.name not in held:
            held[weight.name] = _grouped(file, weight)
        op.inputs = np.array([op.inputs[0], held[weight.name], *op.inputs[2:]], np.int32)
        if file.kind(op) == "FULLY_CONNECTED":
            op.builtinOptions.asymmetricQuantizeInputs = True
        op.opcodeIndex = file.op_code(file.kind(op), READING_GROUPS[file.kind(op)])


def _grouped(file: File, weight: Rounded) -> int:
    """The index of a new tensor (O, I) of 4-bit integers with a scale for each row or group."""
    integers, scales = weight.integers.numpy(), weight.scales.numpy()
    index = file.add_constant(integers)
    tensor = file.graph.tensors[index]
    file.replace_constant(tensor, _nibbles(integers.reshape(-1)), "int4")
    tensor.quantization = grid = schema.QuantizationParametersT()
    if weight.group:
        grid.detailsType = schema.QuantizationDetails.BlockwiseQuantization
        grid.details = schema.BlockwiseQuantizationT()
        grid.details.scales = file.add_constant(scales.astype(np.float16))
        grid.details.zeroPoints, grid.details.blockSize = -1, weight.group
    else:
        grid.scale, grid.quantizedDimension = scales[:, 0], 0
        grid.zeroPoint = np.zeros(len(scales), np.int64)
    return index


def pack_four_bits(file: File) -> None:
    """Store two 4-bit weights in a byte, where a kernel reads them so.

    Depthwise convolutions have none that is quick, and few weights: theirs stay one to a byte.
    """
    readers = file.readers()
    for index, tensor in enumerate(file.graph.tensors):
        data = file.constant(tensor)
        users = {file.kind(op) for op in readers.get(index, [])}
        if data is None or TYPES[tensor.type] != "int8" or "DEPTHWISE_CONV_2D" in users:
            continue
        values = data.view(np.int8)
        if values.min() >= -8 and values.max() <= 7:
            file.replace_constant(tensor, _nibbles(values), "int4")


def _nibbles(values: np.ndarray) -> np.ndarray:
    """Two integers to a byte, as two's complements."""
    packed: np.ndarray = to_bytes(torch.from_numpy(values & 15), 4).numpy()
    return packed


def store_half(file: File) -> None:
    """Store float constants in 16 bits, and widen them before use: weights that lie in their range,
    others where 16 bits hold them exactly."""
    readers, widened = file.readers(), []
    for index, tensor in enumerate(list(file.graph.tensors)):
        data = file.constant(tensor)
        if data is None or TYPES[tensor.type] != "float32" or len(data) < LEAST_HALF_BYTES:
            continue
        values = data.view(np.float32)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        weight = {file.kind(op) for op in readers.get(index, [])} <= set(WEIGHTED)
        exact = np.array_equal(half.astype(np.float32), values)
        if index not in readers or not (exact or (weight and np.isfinite(half).all())):
            continue
        stored = file.add_constant(half.reshape(tensor.shape))
        tensor.buffer = 0
        widened.append(file.op("DEQUANTIZE", 3, [stored], [index]))
    file.graph.operators = [*widened, *file.graph.operators]


def _scale(tensor: Any) -> tuple[float, int]:
    """Scale and zero point of a tensor of integers that has one of each."""
    return float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0])
