"""Measure every architecture of the test list and write docs/architectures.md.

python docs/make_architectures.py            # all of them, about ten minutes
python docs/make_architectures.py lstm vit   # these alone, to the terminal
"""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from paredown.core.errors import UserError  # noqa: E402
from paredown.core.task import Task  # noqa: E402
from paredown.graph.capture import capture  # noqa: E402
from paredown.graph.doors.module import ONLY_EVALUATION  # noqa: E402
from paredown.graph.model import Model  # noqa: E402
from paredown.steps.quantization.quantize import Quantize  # noqa: E402
from paredown.targets.runtimes import onnxruntime  # noqa: E402
from tests.architectures import (  # noqa: E402
    ARCHITECTURES,
    FAILING,
    KNOWN_FAILURES,
    Architecture,
    make,
)

PAGE = Path(__file__).parent / "architectures.md"
COLUMNS = (
    *("name", "family", "parameters", "captured", "notes"),
    *("int8 SNR dB", "integer ops", "file size ratio"),
)
SEEDS = (1, 2, 3, 4)  # two calibration examples each
NO_INTEGERS = "no convolution, linear or recurrent layer is left to run on integers"
HEAD = """# Architectures

Every model that the tests run paredown over: small, randomly weighted, one of each design. The
table is written by `python docs/make_architectures.py`.

- **captured**: "training" where training behaves as in the original (dropout, drop-path, batch
  norm), "evaluation" where only evaluation could be captured.
- **notes**: what the capture told, the known failures among them.
- **int8 SNR dB**: power of the outputs over the power of their change through `Quantize("int8")`,
  on the 8 random examples that it was calibrated on. Random weights say that the arithmetic is
  right, not what a trained model would lose; a deep random net can multiply any noise.
- **integer ops**: how many ops ONNX Runtime runs on integers, of all that compute with weights
  or could run on integers.
- **file size ratio**: the int8 ONNX file over the float one. These files are so small that
  the graph itself weighs in; a real model ends nearer to 0.25.

"""


@dataclass(frozen=True)
class Row:
    """One line of the table; the figures are None where there is nothing to quantize."""

    name: str
    family: str
    parameters: int
    captured: str
    notes: str = ""
    snr_db: float | None = None
    integer_ops: int | None = None
    all_ops: int | None = None
    size_ratio: float | None = None

    def cells(self) -> list[str]:
        ops = None if self.integer_ops is None else f"{self.integer_ops} of {self.all_ops}"
        snr = None if self.snr_db is None else f"{self.snr_db:.1f}"
        ratio = None if self.size_ratio is None else f"{self.size_ratio:.2f}"
        figures = [item or "—" for item in (snr, ops, ratio)]
        notes = self.notes.replace("|", r"\|")
        return [self.name, self.family, f"{self.parameters:,}", self.captured, notes, *figures]


def table(names: list[str] | None = None) -> str:
    """The whole page, or the table of some architectures."""
    lines = [_line(COLUMNS), _line(["---"] * 2 + ["--:"] + ["---"] * 2 + ["--:"] * 3)]
    for name in names or [*ARCHITECTURES, *FAILING]:
        lines.append(_line(row(name).cells()))
    return "\n".join(lines) + "\n"


def _line(cells: object) -> str:
    return "| " + " | ".join(cells) + " |"  # type: ignore[arg-type]


def row(name: str) -> Row:
    """What became of one architecture."""
    entry = ARCHITECTURES.get(name) or FAILING[name]
    module, example = make(name)
    parameters = sum(p.numel() for p in module.parameters())
    why = KNOWN_FAILURES.get(name, "")
    try:
        model = capture(module, example, entry.dynamic)
    except UserError:
        return Row(name, entry.family, parameters, "no", why)
    mode = "evaluation" if ONLY_EVALUATION in model.notes else "training"
    notes = "; ".join([note for note in model.notes if note != ONLY_EVALUATION] + [why] * bool(why))
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = _figures(name, model, entry, example, Path(folder))
    except UserError as error:
        figures = ()
        if NO_INTEGERS in str(error):
            notes = "; ".join(filter(None, [notes, "nothing that runs on integers"]))
        elif not why:
            raise
    return Row(name, entry.family, parameters, mode, notes, *figures)


def _figures(
    name: str, model: Model, entry: Architecture, example: object, folder: Path
) -> tuple[float, int, int, float]:
    original = onnxruntime.lower(model, folder / "float.onnx")
    quantized = Quantize("int8").apply(model, calibration_task(entry, example))
    path = onnxruntime.lower(quantized, folder / "int8.onnx")
    census = onnxruntime.census(path)
    computing = onnxruntime.FUSABLE_OPS - {"MaxPool"}
    integer = sum(census.integer_ops.values())
    rest = sum(count for kind, count in census.float_ops.items() if kind in computing)
    ratio = path.stat().st_size / original.stat().st_size
    seen = [draw(entry, seed) for seed in SEEDS]
    return snr_db(model, quantized, seen), integer, integer + rest, ratio


def calibration_task(entry: Architecture, example: object) -> Task:
    """A task with 8 random calibration examples."""
    examples = [item for seed in SEEDS for item in apart(draw(entry, seed))]
    pairs = [(item, 0) for item in examples]
    return Task(example=example, score=None, calibration=pairs, batch_size=4)  # type: ignore[arg-type]


def draw(entry: Architecture, seed: int) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Example inputs from that seed; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return entry.example()


def apart(inputs: tuple[Tensor, ...] | dict[str, Tensor]) -> list[object]:
    """A batch as single examples without a batch dimension."""
    if isinstance(inputs, dict):
        size = len(next(iter(inputs.values())))
        return [{name: value[n] for name, value in inputs.items()} for n in range(size)]
    return [tuple(value[n] for value in inputs) for n in range(len(inputs[0]))]


def snr_db(before: Model, after: Model, batches: list[object]) -> float:
    """Power of the float outputs over the power of their change, in decibels."""
    signal = noise = 0.0
    with torch.no_grad():
        for inputs in batches:
            leaves = list(inputs.values() if isinstance(inputs, dict) else inputs)  # type: ignore[call-overload]
            pairs = zip(_outputs(before, leaves), _outputs(after, leaves), strict=True)
            for old, new in pairs:
                if old.is_floating_point():
                    seen = old.isfinite() & new.isfinite()
                    signal += float(old[seen].double().square().sum())
                    noise += float((old[seen] - new[seen]).double().square().sum())
    return 10 * math.log10(signal / noise) if noise else math.inf


def _outputs(model: Model, leaves: list[Tensor]) -> list[Tensor]:
    return list(model.graph(*[leaf.clone() for leaf in leaves]))


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:]:
        print(table(sys.argv[1:]))
    else:
        PAGE.write_text(HEAD + table())


if __name__ == "__main__":
    main()
