"""A finished run -> a folder as Hugging Face has them: file, settings, and its card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError
from paredown.core.files import read_parts, write_atomically, write_together
from paredown.core.results import Artifact, Run
from paredown.core.units import GOALS
from paredown.graph.doors.opened import Opened
from paredown.report.card import card
from paredown.ship.open import open as open_file
from paredown.targets.artifact import check_kept, parts

CONFIG = "config.json"
WEIGHTS = ".safetensors"  # under their usual name transformers would take them for its own


def write_folder(run: Run, opened: Opened, out: str | Path) -> Path:
    """Write the run's artifact with what belongs to it into a folder, each file whole or not there.

    The folder holds the artifact, the files that travel with it (those of a tokenizer or an image
    processor), ``config.json`` with an entry ``paredown`` that says what was done, and a model card
    ``README.md``.

    Args:
        opened: what the run's model came from; its files and its card are taken.

    Raises:
        UserError: the run has no artifact, or that has changed since; a file cannot be read or
            written.
    """
    if run.artifact is None:
        raise UserError(f"{run.name}: its run has no artifact, so there is nothing to ship.")
    file, out = check_kept(run.artifact), Path(out)
    name = shipped_name(file)
    if file.suffix == WEIGHTS:
        written = {out / name: read_parts(file)}
    else:
        written = {out / each.name: read_parts(each) for each in parts(file)}
    for each in opened.files:
        if not each.is_file():
            raise UserError(
                f"{each}: cannot be read: it is gone; it belongs to the file that is made of it."
            )
    write_together(written)
    for each in opened.files:
        if each.name != CONFIG:
            write_atomically(out / each.name, read_parts(each))
    text = json.dumps(_config(opened) | {"paredown": done(run, name)}, indent=2, sort_keys=True)
    write_atomically(out / CONFIG, text.encode() + b"\n")
    taken = as_taken(opened, open_file(out / name).input_names)
    write_atomically(out / "README.md", card(run, taken, name).encode())
    return out


def as_taken(opened: Opened, names: Sequence[str]) -> Opened:
    """The same with the inputs that a file takes, in its order; samples may have lacked others.

    Example:
        >>> import torch
        >>> from paredown.graph.doors.opened import Wanted
        >>> inputs = tuple(Wanted(name, "int64", (None,)) for name in ("ids", "mask", "types"))
        >>> opened = Opened(torch.nn.Identity(), inputs, usage="inputs = {}")
        >>> [each.name for each in as_taken(opened, ["mask", "ids"]).inputs]
        ['mask', 'ids']
    """
    known = {each.name: each for each in opened.inputs}
    if not set(names) <= set(known):
        return opened
    usage = opened.usage
    if usage and len(names) < len(known):
        usage += f"\ninputs = {{name: inputs[name] for name in {list(names)}}}"
    return replace(opened, inputs=tuple(known[name] for name in names), usage=usage)


def shipped_name(file: Path) -> str:
    """The name of an artifact in such a folder.

    Example:
        >>> shipped_name(Path("r/model.onnx")), shipped_name(Path("r/model.safetensors"))
        ('model.onnx', 'paredown.safetensors')
    """
    return f"paredown{WEIGHTS}" if file.suffix == WEIGHTS else file.name


def done(run: Run, name: str) -> dict[str, Any]:
    """What was done, for machines: recipe, figures, and the file's digest."""
    assert run.artifact is not None
    return {
        "file": name,
        "runtime": run.artifact.runtime,
        "sha256": run.artifact.sha256,
        "recipe": run.artifact.recipe,
        "goals": run.goals,
        "met": run.met,
        "verdict": run.verdict,
        "figures": {
            which: _figures(run, which, run.original if which == "original" else run.artifact)
            for which in ("original", "compressed")
        },
        "versions": run.versions,
    }


def _figures(run: Run, which: str, artifact: Artifact | None) -> dict[str, Any]:
    found = run.on_device.get(which)
    if found is None:
        return {"size": artifact.size_bytes} if artifact else {}
    figures: dict[str, Any] = {goal: found.quantity(goal) for goal in GOALS}
    figures |= {"score": found.score, "score_low": found.score_low, "score_high": found.score_high}
    figures |= {"examples": found.examples, "where": found.where or None}
    return {name: value for name, value in figures.items() if value is not None}


def _config(opened: Opened) -> dict[str, Any]:
    """The origin's own config, where it has one."""
    file = next((each for each in opened.files if each.name == CONFIG), None)
    if file is None:
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read any more: {error}.") from error
    return found
