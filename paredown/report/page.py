"""Run -> one self-contained HTML page: no network, no script, nothing outside the file."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from paredown.core.errors import UserError
from paredown.core.files import write_atomically
from paredown.core.results import Run
from paredown.core.settings import check_arguments
from paredown.report.sections import Section, sections
from paredown.report.words import quantity, short
from paredown.targets.artifact import parts


def report(run: Run, path: str | Path) -> Path:
    """Write the page of ``run`` at ``path``, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    check_arguments(run=(run, Run), path=(path, str | Path))
    path = Path(path)
    write_atomically(path, render(run).encode())
    return path


def render(run: Run) -> str:
    """The page as text; it depends on nothing but ``run``."""
    made = templates()
    texts = [text for each in sections() if (text := shown(each, made, run)) is not None]
    return made.get_template("page.html").render(run=run, sections=texts)


def templates() -> Environment:
    """What the pages are made of."""
    made = Environment(
        loader=PackageLoader("paredown.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"human": quantity, "short": short, "files": _files}
    return made


def shown(section: Section, made: Environment, run: Run) -> Markup | None:
    """A section of the page; None where it is left out.

    Raises:
        UserError: the run does not hold what the section shows.
    """
    try:
        facts = section.facts(run)
        if facts is None:
            return None
        template = made.get_template(f"sections/{section.template}")
        return Markup(template.render(facts, run=run))
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        name = section.template.removesuffix(".html")
        raise UserError(
            f"report: the run does not hold what its section {name!r} shows: "
            f"{type(error).__name__}: {error}. Where its run.json was edited, the same paredown "
            "run command writes it again."
        ) from error


def _files(path: str) -> str:
    """The names of an artifact's files."""
    return " and ".join(part.name for part in parts(Path(path)))
