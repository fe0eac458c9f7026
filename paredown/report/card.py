"""A model card in Markdown: what a file is, what was measured of it, and how it is run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from paredown.core.results import Artifact, Run
from paredown.graph.doors.opened import Opened, Wanted
from paredown.report.table import comparison

LICENCE = ("license", "license_name", "license_link", "language")  # as the hub's cards spell them
BARE = {  # ending -> how to run a file without paredown, NAME being the file's
    ".onnx": """import onnxruntime

session = onnxruntime.InferenceSession("NAME")
outputs = session.run(None, inputs)""",
}


def card(run: Run, opened: Opened | None = None, file: str | None = None) -> str:
    """The card of a finished run's artifact, from the run and what is known of its origin alone.

    Args:
        opened: the folder or file that the model came from, where it came without source.
        file: the artifact's name beside the card; by default as the run has it.
    """
    assert run.artifact is not None
    name = file or Path(run.artifact.path).name
    parts = [
        _front(run, opened),
        f"# {_title(run, opened)}\n\n{_plain(run.verdict)}",
        _figures(run),
        _done(run.artifact, name),
        _usage(name, opened),
        _limits(run, opened),
        _origin(opened),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(run: Run, opened: Opened | None) -> str:
    return f"{_plain((opened.card if opened else {}).get('name') or run.name)}, pared down"


def _front(run: Run, opened: Opened | None) -> str:
    """What the hub reads: licence and language of the origin, and tags."""
    origin = opened.card if opened else {}
    lines = [f"{key}: {json.dumps(_plain(origin[key]))}" for key in LICENCE if origin.get(key)]
    if "/" in origin.get("name", ""):
        lines.append(f"base_model: {json.dumps(_plain(origin['name']))}")
    tags = ["paredown", str(run.target.get("runtime", ""))]
    return "\n".join(["---", *lines, f"tags: {json.dumps([t for t in tags if t])}", "---"])


def _figures(run: Run) -> str:
    """Both files beside each other, as measured on the test split."""
    rows = comparison(run)
    if not rows:
        return ""
    lines = ["| | original | this file | change | goal |", "|---|---|---|---|---|"]
    for row in rows:
        both = [
            f"{figure} ({note})" if note else figure
            for figure, note in zip(row["figures"], row["notes"], strict=True)
        ]
        goal = f"{row['goal']}: {row['met']}" if row["goal"] else ""
        change = f"{row['change']} ({row['interval']})" if row["interval"] else row["change"]
        lines.append("| " + " | ".join(map(_plain, (row["name"], *both, change, goal))) + " |")
    return "\n".join(["## Figures", "", *lines, "", f"Measured on {_where(run)}."])


def _where(run: Run) -> str:
    """The machine and the runtime.

    Without them a figure says little: a file that is faster here may not be elsewhere.
    """
    found = run.on_device.get("compressed") or run.on_device.get("original") or run.baseline
    said = [
        _plain(found.where[name]) for name in ("device", "runtime", "system") if name in found.where
    ]
    threads = run.details.get("threads") or run.target.get("threads")
    count = [f"{threads} thread{'s' if threads != 1 else ''}"] if threads else []
    return ", ".join([*said, *count]) or "the machine of the run"


def _done(artifact: Artifact, name: str) -> str:
    recipe = artifact.recipe.strip() or "# nothing: the original is the best file"
    lines = [
        f"`{name}` is a file for {artifact.runtime}, {artifact.size_bytes:,} bytes, SHA-256",
        f"`{artifact.sha256}`. It was made of the original by these steps:",
        "",
        "```toml",
        recipe.replace("```", "'''"),
        "```",
    ]
    return "\n".join(["## What was done", "", *lines])


def _usage(name: str, opened: Opened | None) -> str:
    """How it is run: with paredown, and without where another package opens such a file."""
    inputs = opened.inputs if opened else ()
    before = (opened.usage if opened else "") or _zeros(inputs)
    if not before:
        return "\n".join(
            ["## How to run it", "", "```python", f'predict = paredown.open("{name}")', "```"]
        )
    names = ", ".join(f"inputs[{each.name!r}]" for each in inputs)
    left = ", ".join(_variable(each) for each in (opened.outputs if opened else ()) or ("output",))
    left = f"({left},)" if ", " not in left else left
    run = f"predict = paredown.open({name!r})\n{left} = predict({names})"
    lines = ["## How to run it", "", "```python", "import paredown", before, "", run, "```"]
    bare = BARE.get(Path(name).suffix)
    if bare:
        lines += ["", "Without paredown:", "", "```python", before, "", bare.replace("NAME", name)]
        lines += ["```"]
    return "\n".join([*lines, "", *_table(inputs)])


def _variable(name: str) -> str:
    """A name of Python's for an output.

    Example:
        >>> _variable("boxes.0")
        'boxes_0'
    """
    found = re.sub(r"\W", "_", name)
    return found if found.isidentifier() else f"output_{found}"


def _zeros(inputs: tuple[Wanted, ...]) -> str:
    """Inputs of nothing, to show their names, types and shapes."""
    lines = []
    for each in inputs:
        shape = tuple(size if isinstance(size, int) else 1 for size in each.shape)
        lines.append(f"    {each.name!r}: np.zeros({shape}, {each.dtype!r}),")
    return "\n".join(["import numpy as np", "", "inputs = {", *lines, "}"]) if lines else ""


def _table(inputs: tuple[Wanted, ...]) -> Iterator[str]:
    yield from ("| input | type | shape |", "|---|---|---|")
    for each in inputs:
        first = "batch" if each.shape[:1] == (None,) else ""
        sizes = [first or "any", *("any" if size is None else size for size in each.shape[1:])]
        shape = " x ".join(map(str, sizes if each.shape else ()))
        yield f"| `{_plain(each.name)}` | {_plain(each.dtype)} | {_plain(shape)} |"


def _limits(run: Run, opened: Opened | None) -> str:
    """What the figures do not say."""
    found = run.on_device.get("compressed")
    meaning = run.details.get("score")
    lines = []
    if found is not None and found.examples:
        what = f"The score is {_plain(meaning)}, " if meaning else "The score is "
        lines.append(
            f"{what}the mean over {found.examples:,} examples of the run's {found.split} split, "
            "which no decision has seen; it says nothing of data of another kind."
        )
    lines.append(
        "Latency and memory are those of the machine above, with its threads; on another they "
        "differ, and paredown validate measures them there."
    )
    lines.append(
        "What the original gets wrong this file gets wrong too: see the origin's own card for what "
        "it was trained on and where it should not be used."
    )
    notes = [*(opened.notes if opened else ()), *(run.details.get("notes") or ())]
    lines += [f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in dict.fromkeys(notes)]
    return "\n".join(["## Limits", "", *(f"- {_plain(line)}" for line in lines)])


def _origin(opened: Opened | None) -> str:
    if opened is None or not opened.card:
        return ""
    words = {"license": "licence", "license_name": "licence's name", "license_link": "licence at"}
    lines = [
        f"- {words.get(key, key.replace('_', ' '))}: {_plain(value)}"
        for key, value in opened.card.items()
        if value
    ]
    if not opened.card.get("license"):
        lines.append("- licence: not told by the origin; ask whoever made it before passing it on")
    if opened.classes:
        lines.append(f"- classes: {_plain(', '.join(opened.classes[:100]))}")
    return "\n".join(["## Origin", "", *lines])


def _plain(text: object) -> str:
    """A text that stays in its line and cell, and starts no markup of its own.

    Example:
        >>> _plain("a|b\\n<i>")
        'a/b &lt;i>'
    """
    return " ".join(str(text).split()).replace("|", "/").replace("<", "&lt;")
