"""A run that began with a folder goes out as one."""

from __future__ import annotations

from pathlib import Path

from paredown.core import progress
from paredown.core.results import Run
from paredown.core.source import Source
from paredown.graph.doors.files import open_file
from paredown.report.folder import write_folder

FOLDER = "model"  # within the run's


def as_folder(run: Run, source: Source) -> Path | None:
    """Where the artifact was written with its tokenizer, settings and card; None where the run did
    not begin with a folder.

    Raises:
        UserError: a file cannot be read any more, or not be written.
    """
    if run.artifact is None or not Path(source.file).is_dir():
        return None
    out = Path(run.artifact.path).parent / FOLDER
    write_folder(run, open_file(Path(source.file)), out)
    progress.say(f"To be passed on, with its files and card: {out}")
    return out
