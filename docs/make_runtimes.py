"""Lower every form to every runtime and write the table of docs/runtimes.md.

python docs/make_runtimes.py     # about two minutes
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import paredown  # noqa: E402
from paredown.core.task import Task  # noqa: E402
from paredown.graph.quantized.forms import WEIGHT_FORMS  # noqa: E402
from paredown.steps.step import Step  # noqa: E402
from paredown.targets.artifact import size_bytes  # noqa: E402
from paredown.targets.runtimes import RUNTIMES, ready  # noqa: E402

PAGE = Path(__file__).parent / "runtimes.md"
BEGIN, END = "<!-- table of forms: begin -->\n", "<!-- table of forms: end -->\n"


class Net(nn.Module):
    """One of each layer that a form can take, each large enough for its kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
        self.stem, self.body = nn.Conv1d(64, 64, 3, padding=1), nn.Conv1d(64, 128, 3, padding=1)
        self.head = nn.Linear(128, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)  # (B, L, 64)
        x = (x + self.down(self.up(x).relu())).transpose(1, 2)
        return self.head(self.body(self.stem(x).relu()).relu().mean(2))  # type: ignore[no-any-return]


def steps() -> dict[str, Step]:
    """Form -> the step that its record names."""
    names = {name: getattr(paredown, name) for name in paredown.__all__}
    return {form.name: eval(form.made_by, names) for form in WEIGHT_FORMS.values()}


def cell(model: paredown.Model, name: str, form: str, whole: int, folder: Path) -> str:
    """What a runtime makes of a form: the file's share of float32's, and the integer ops."""
    chosen = ready(name)
    if form not in chosen.FORMS:
        return "refused"
    path = chosen.lower(model, folder / f"model{chosen.SUFFIX}")
    census = chosen.census(path)
    integers = sum(census.integer_ops.values())
    kernels = f"{integers} on integers" if integers else "float kernels"
    if chosen.INT8_BYTES is None and form not in ("fp16", "bf16"):
        kernels = "simulated"
    return f"{size_bytes(path) / whole:.2f}x, {kernels}"


def table() -> str:
    torch.manual_seed(0)
    ids = torch.randint(200, (64, 16))
    task = Task(example=(ids[:1],), score=None, calibration=TensorDataset(ids, torch.zeros(64)))
    model = paredown.capture(Net().eval(), task.example)
    made = {form: step.apply(model, task) for form, step in steps().items()}
    rows = [f"| step | {' | '.join(RUNTIMES)} |", "|---" * (len(RUNTIMES) + 1) + "|"]
    cells: dict[str, list[str]] = {form: [] for form in WEIGHT_FORMS}
    for name in RUNTIMES:
        with tempfile.TemporaryDirectory() as folder:
            whole = size_bytes(
                ready(name).lower(model, Path(folder) / f"whole{ready(name).SUFFIX}")
            )
            for form in WEIGHT_FORMS:
                cells[form].append(cell(made[form], name, form, whole, Path(folder)))
    rows += [
        f"| `{WEIGHT_FORMS[form].made_by}` | {' | '.join(found)} |" for form, found in cells.items()
    ]
    return "\n".join(rows) + "\n"


def main() -> None:
    warnings.filterwarnings("ignore")
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{after}")


if __name__ == "__main__":
    main()
