"""ONNX's own test cases of single nodes, through the door: taken, refused, or wrong.

    python -m benchmarks.onnx_nodes [--capture] [--wrong] [NAME ...]

Wrong must be none. A case whose shapes or axes are inputs is judged with these as constants where
the door wants them so, as files have them.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from paredown.core.errors import UserError
from paredown.graph import structure
from paredown.graph.doors.module import capture_module, check_parameters
from paredown.graph.doors.onnx.door import normalised
from paredown.graph.doors.onnx.module import Failed, OnnxModule
from paredown.graph.doors.onnx.read import Read, read_proto, with_known

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
WHERE = Path("case.onnx")


@dataclass(frozen=True)
class Judged:
    """One case: ``verdict`` is "taken", "taken, shapes constant", "refused" or "wrong"."""

    name: str
    ops: str
    opset: int
    floats: bool
    verdict: str
    why: str = ""


def cases() -> Iterator[Any]:
    """All that the installed onnx has."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from load_model_tests(kind="node")


def judge(case: Any, capture: bool = False) -> Judged:
    """The case through the door, and its outputs beside those that come with it."""
    graph = case.model.graph
    ops = " ".join(dict.fromkeys(node.op_type for node in graph.node))
    opset = max((each.version for each in case.model.opset_import if not each.domain), default=0)
    floats = _float(graph.input[:1]) and _float(graph.output[:1])

    def found(verdict: str, why: str = "") -> Judged:
        return Judged(case.name, ops, opset, floats, verdict, why)

    verdict, why = "refused", ""
    for number, constants in enumerate(_constants(graph)):
        try:
            problem = _run(case, constants, capture)
        except UserError as error:
            why = why or str(error)
            continue
        except Exception as error:  # a traceback is as bad as a wrong number
            return found("wrong", f"{type(error).__name__}: {error}")
        if problem:
            return found("wrong", problem)
        return found("taken, shapes constant" if number else "taken")
    return found(verdict, why)


def _float(values: Any) -> bool:
    return bool(values) and all(v.type.tensor_type.elem_type in FLOATS for v in values)


def _constants(graph: onnx.GraphProto) -> Iterator[set[str]]:
    """Which inputs are constants: none, then those that are no floats, then all but the first."""
    names = [value.name for value in graph.input]
    yield set()
    yield {value.name for value in graph.input if not _float([value])} - set(names[:1])
    yield set(names[1:])


def _run(case: Any, constants: set[str], capture: bool) -> str:
    """What is wrong, or nothing."""
    made = read_proto(case.model, WHERE)
    for inputs, wanted in case.data_sets:
        values = dict(zip([v.name for v in case.model.graph.input], inputs, strict=False))
        fixed = {name: values[name] for name in constants if name in values}
        module, tensors = _module(made, values, fixed)
        got = _outputs(module(**tensors))
        problem = _compared(case, got, wanted)
        if not problem and capture and tensors and _trains(module, tensors):
            problem = _captured(case, module, tensors, wanted)
        if problem:
            return problem
    return ""


def _trains(module: OnnxModule, tensors: dict[str, torch.Tensor]) -> bool:
    other = (torch.uint16, torch.uint32, torch.uint64)  # of which PyTorch picks none
    return all(each.dim() and each.dtype not in other for each in tensors.values())


def _module(
    made: Read, values: dict[str, Any], fixed: dict[str, Any]
) -> tuple[OnnxModule, dict[str, torch.Tensor]]:
    kept = {name: np.asarray(value) for name, value in fixed.items()}
    for name, value in kept.items():
        if value.dtype.kind == "f" or value.dtype.name == "bfloat16":
            kept[name] = value.astype(np.float32)
    read = with_known(made, kept) if kept else made
    module = OnnxModule(normalised(read.program))
    tensors = {each.name: _tensor(values[each.name]) for each in read.inputs}
    try:
        module.settle(**tensors)
    except Failed as error:
        raise UserError(str(error)) from error
    return module.eval(), tensors


def _tensor(value: Any) -> torch.Tensor:
    value = np.asarray(value) if isinstance(value, np.generic) else value
    if not isinstance(value, np.ndarray):
        raise UserError("an input is no tensor")
    if value.dtype.name == "bfloat16":
        value = value.astype(np.float32)
    if value.dtype.kind not in "fiub":
        raise UserError(f"an input is {value.dtype}")
    return torch.from_numpy(np.array(value))


def _outputs(value: Any) -> list[np.ndarray[Any, Any]]:
    found = list(value.values()) if isinstance(value, dict) else [value]
    return [each.detach().numpy() for each in found]


def _compared(case: Any, got: list[np.ndarray[Any, Any]], wanted: list[Any]) -> str:
    for number, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        if isinstance(theirs, TensorProto):
            theirs = onnx.numpy_helper.to_array(theirs)
        theirs = np.asarray(theirs)
        coarse = theirs.dtype.name in ("float16", "bfloat16")
        if theirs.dtype.kind == "f" or coarse:
            theirs = theirs.astype(np.float32)
        if ours.shape != theirs.shape:
            return f"output {number} has shape {ours.shape} and not {theirs.shape}"
        rtol = max(case.rtol, 1e-2 if coarse else 1e-4)
        scale = (
            float(np.abs(np.nan_to_num(theirs.astype(np.float64), posinf=0, neginf=0)).max())
            if theirs.size
            else 0
        )
        if not np.allclose(
            ours.astype(np.float64), theirs.astype(np.float64), rtol, 1e-5 * max(scale, 1e-2), True
        ):
            worst = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max()
            return f"output {number} is off by {worst:.3g}"
    return ""


def _captured(
    case: Any, module: OnnxModule, tensors: dict[str, torch.Tensor], wanted: list[Any]
) -> str:
    check_parameters(module)
    model = capture_module(module, tensors, None)
    with torch.no_grad():
        leaves = [item.example for item in model.inputs]
        got = [each.numpy() for each in model.graph(*structure.flatten(leaves)[0])]
    return _compared(case, got, wanted)


def table(judged: list[Judged]) -> str:
    """Counts by opset, for those with floats in and out, and for all."""
    verdicts = ("taken", "taken, shapes constant", "refused", "wrong")
    lines = ["| opset | cases | " + " | ".join(verdicts) + " |", "|---|---|---|---|---|---|"]
    groups = [
        (f"{n}", [j for j in judged if j.floats and j.opset == n])
        for n in sorted({j.opset for j in judged})
    ]
    groups += [("floats in and out", [j for j in judged if j.floats]), ("all", judged)]
    for label, group in groups:
        if group:
            counts = Counter(each.verdict for each in group)
            cells = [str(len(group)), *[str(counts[verdict]) for verdict in verdicts]]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def refusals(judged: list[Judged]) -> str:
    """Op -> how many cases of it are refused, and the reason of the first."""
    found: dict[str, list[Judged]] = {}
    for each in judged:
        if each.verdict == "refused":
            found.setdefault(each.ops, []).append(each)
    lines = ["| ops | refused | of | why, of the first |", "|---|---|---|---|"]
    for ops, group in sorted(found.items()):
        total = sum(each.ops == ops for each in judged)
        why = group[0].why.split("; what usually helps")[0].replace("|", "/")
        lines.append(f"| {ops} | {len(group)} | {total} | {why} |")
    return "\n".join(lines)


def main() -> None:
    names = {each for each in sys.argv[1:] if not each.startswith("--")}
    warnings.simplefilter("ignore")
    judged = []
    for case in cases():
        if not names or case.name in names:
            judged.append(judge(case, "--capture" in sys.argv))
            if judged[-1].verdict == "wrong" or names:
                print(judged[-1], flush=True)
    if "--wrong" not in sys.argv:
        print(table(judged))
        print()
        print(refusals(judged))


if __name__ == "__main__":
    main()
