"""What a run hands back: artifact, trials, and everything that a report says."""

from __future__ import annotations

import dataclasses
import html
import json
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from paredown.core.decode import decoded
from paredown.core.errors import UserError
from paredown.core.goals import GoalCheck
from paredown.core.measurement import Comparison, Measurement
from paredown.core.settings import check_arguments
from paredown.core.task import Target
from paredown.core.units import GOALS, human

FILES = ("artifact", "original")  # of a run
GOLDEN = "golden.npz"  # in its folder: frozen inputs and outputs of the artifact


@dataclass(frozen=True)
class Artifact:
    """An exported file: what to ship.

    Attributes:
        path: where it lies; in ``run.json`` its name in the run's folder.
        recipe: what made it, as TOML.
    """

    path: str
    runtime: str
    sha256: str
    size_bytes: int
    recipe: str


@dataclass(frozen=True)
class Trial:
    """One attempt: the steps it added, what was expected of them, what came, and the decision."""

    steps: list[str]  # one line of TOML each
    title: str
    reason: str
    expected: str
    kept: bool
    decision: str  # why it was kept or undone, one sentence
    measurement: Measurement | None  # None where the step could not be applied
    comparison: Comparison | None
    seconds: float
    stage: str  # SHA-256 of the stage it produced, "" where it could not be applied
    findings: list[dict[str, Any]] = field(default_factory=list)  # what its steps tell the report
    recipe: str = ""  # the title of the recipe that it is part of
    after: int = 0  # the number of the trial that it was made from, from 1 up; 0 is the original
    shipped: bool = False  # whether its steps are in the artifact


class _Details(TypedDict, total=False):
    """What a run's details are, each there or not."""

    batch_size: int
    census: dict[str, Any]
    classes: list[dict[str, Any]]
    classes_by: str
    explanation: dict[str, Any]
    fidelity: dict[str, Any]
    files: dict[str, str]
    finished: str
    flip_counts: dict[str, int]
    flips: list[dict[str, Any]]
    folder: str
    golden: dict[str, Any]
    histograms: list[dict[str, Any]]
    ignore: list[int]
    in_reach: str
    instruction_sets: str
    latency_samples_ms: dict[str, list[float]]
    layers: list[dict[str, Any]]
    model_sha256: str
    notes: list[str]
    packed_bytes: dict[str, int]
    reproduce: list[str]
    score: str
    source: dict[str, Any]
    stage_sha256: str
    threads: int
    useless: str


@dataclass(frozen=True)
class Run:
    """Everything a report says; `run.json` holds exactly this."""

    name: str
    created: str
    command: str
    goals: dict[str, Any]
    target: dict[str, Any]
    versions: dict[str, str]
    data: dict[str, Any]  # split -> {"examples": n, "fingerprint": sha256}
    seed: int
    plan: list[dict[str, Any]]  # ranked proposals: {"title", "reason", "expected", "steps"}
    baseline: Measurement  # on validation, as every trial
    trials: list[Trial]
    artifact: Artifact | None
    original: Artifact | None
    on_device: dict[str, Measurement]  # "original" and "compressed", on the test split
    comparison: Comparison | None  # of those two
    checks: list[GoalCheck]  # the goals against on_device
    met: bool
    verdict: str
    details: dict[str, Any]  # layers, histograms, per-class scores, flips, latency samples, notes

    @property
    def outcome(self) -> str:
        """ "missed", "not proven" where that was asked for and is all that is missing, "open" where
        the goals are met and something is to be said against that, or "met"."""
        if not all(check.within for check in self.checks):
            return "missed"
        if not self.met:
            return "not proven"
        unsure = any(check.unproven for check in self.checks) or self.details.get("useless")
        return "open" if unsure else "met"

    def detail(self, name: str) -> Any:
        """One of the details that a run always has.

        Raises:
            UserError: it is missing, as where the file was edited.
        """
        if self.details.get(name) is None:
            raise UserError(
                f"run.json: field 'details.{name}' is missing; the same paredown run command "
                "writes it again."
            )
        return self.details[name]

    def __repr__(self) -> str:
        """Verdict, figures and artifact, in lines of at most 60 columns but for the last."""
        rows = [("", "original", "compressed"), *self._figures()]
        lines = [f"Run {self.name!r}", *textwrap.wrap(self.verdict, 58)]
        lines += [f"{name:12} {before:>14} {after:>14}" for name, before, after in rows]
        return "\n  ".join([*lines, *([self.artifact.path] if self.artifact else [])])

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        row = "<tr><th>{}</th><td>{}</td><td>{}</td></tr>"
        cells = [row.format(*each) for each in self._figures()]
        where = html.escape(self.artifact.path) if self.artifact else ""
        return (
            f"<p><b>{html.escape(self.name)}</b>: {html.escape(self.verdict)}</p><table>"
            f"<tr><th></th><th>original</th><th>compressed</th></tr>{''.join(cells)}</table>"
            f"<p><code>{where}</code></p>"
        )

    def _figures(self) -> list[tuple[str, str, str]]:
        """What was measured of both files on the test split, in words."""
        both = [self.on_device.get(name) for name in ("original", "compressed")]
        found = [("score", _score(both[0]), _score(both[1]))]
        for goal in GOALS:
            values = [m.quantity(goal) if m else None for m in both]
            before, after = ("" if v is None else human(goal, v) for v in values)
            found.append((goal, before, after))
        return [row for row in found if any(row[1:])]

    def to_json(self) -> str:
        """The text of ``run.json``, which may be moved with its folder."""
        raw = dataclasses.asdict(self)
        for name in FILES:
            if raw[name]:
                raw[name]["path"] = Path(raw[name]["path"]).name
        return json.dumps(raw, indent=1, sort_keys=True, allow_nan=False)

    @staticmethod
    def load(folder: str | Path) -> Run:
        """The finished run of a folder, its files by where they lie.

        Raises:
            UserError: no finished run there, or a damaged one.
        """
        check_arguments(folder=(folder, str | Path))
        path = Path(folder) / "run.json"
        if not path.is_file():
            raise UserError(f"{folder}: {_no_run(Path(folder))}.")
        try:
            return Run.from_json(path.read_text(encoding="utf-8")).within(path.parent)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
        except (ValueError, RecursionError, UserError) as error:
            said = str(error).rstrip(".")
            again = "the same paredown run command writes it again"
            raise UserError(f"{path}: is damaged: {said}; {again}.") from error

    def within(self, folder: Path) -> Run:
        """This run with the paths of its files in a folder, whatever the current one may become."""
        found = {name: getattr(self, name) for name in FILES if getattr(self, name)}
        there = folder.absolute()
        moved = {n: replace(a, path=str(there / Path(a.path).name)) for n, a in found.items()}
        return replace(self, **moved)

    @staticmethod
    def from_json(text: str) -> Run:
        """The run that a text holds.

        Raises:
            ValueError: it is no JSON, or a field is missing, unknown or of a wrong type; names it.
        """
        run: Run = decoded(Run, json.loads(text))
        decoded(Target, run.target, "target")
        decoded(_Details, run.details, "details")
        return run


def _no_run(path: Path) -> str:
    """Why a path is no finished run's folder."""
    lacking = "holds no finished run (no run.json)"
    if path.is_dir():
        return lacking
    if not path.exists():
        return f"no such folder, so it {lacking}"
    if path.name == "run.json":
        return f"is a file, so it {lacking}; name its folder, {path.parent}"
    return f"is a file, so it {lacking}; expected the folder of a run, which paredown run makes"


def _score(m: Measurement | None) -> str:
    if m is None or m.score is None:
        return ""
    return f"{m.score:.2%}" if m.score_in_points else f"{m.score:.4g}"
