"""Writes the README's table of techniques, from what each step says of itself.

python docs/make_techniques.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from paredown.steps import STEPS, step_class  # noqa: E402

PAGE = ROOT / "README.md"
HEAD = "| step | what it does | pays | does not pay |\n|---|---|---|---|\n"


def table() -> str:
    """The rows of all steps, in the order of `STEPS`."""
    rows = [row for name in STEPS for row in step_class(name).table]
    cells = [(f"`{row.call}`", row.does, row.pays, row.does_not) for row in rows]
    return HEAD + "".join(f"| {' | '.join(each)} |\n" for each in cells)


def renewed(text: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = text.partition(HEAD)
    lines = rest.splitlines(keepends=True)
    count = next(n for n, line in enumerate(lines) if not line.startswith("|"))
    return before + table() + "".join(lines[count:])


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
