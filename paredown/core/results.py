"""What a run hands back: artifact, trials, and everything that a report says."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from paredown.core.goals import GoalCheck
from paredown.core.measurement import Comparison, Measurement


@dataclass(frozen=True)
class Artifact:
    """An exported file: what to ship."""

    path: str
    runtime: str
    sha256: str
    size_bytes: int
    recipe: str  # the recipe that made it, as TOML


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

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Run:
        raw = json.loads(text)
        raw["baseline"] = Measurement(**raw["baseline"])
        raw["trials"] = [_trial(trial) for trial in raw["trials"]]
        for name in ("artifact", "original"):
            raw[name] = raw[name] and Artifact(**raw[name])
        raw["on_device"] = {name: Measurement(**m) for name, m in raw["on_device"].items()}
        raw["comparison"] = raw["comparison"] and Comparison(**raw["comparison"])
        raw["checks"] = [GoalCheck(**check) for check in raw["checks"]]
        return Run(**raw)


def _trial(raw: dict[str, Any]) -> Trial:
    raw = dict(raw)
    raw["measurement"] = raw["measurement"] and Measurement(**raw["measurement"])
    raw["comparison"] = raw["comparison"] and Comparison(**raw["comparison"])
    return Trial(**raw)
