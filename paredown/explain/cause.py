"""Causes of a loss by name, and what may help."""

from __future__ import annotations

from dataclasses import dataclass

from paredown.steps import recipe
from paredown.steps.step import Step

KINDS = {
    "outlier_channel": "outlier channel",
    "outlier_input": "outlier channel in the input",
    "clipped_range": "clipped range",
    "saturation": "values beyond calibration",
    "wide_range": "range too wide",
    "shared_scale": "values of different ranges joined",
    "outlying_weights": "outlying weights",
    "held_scale": "scale held up by a bias",
    "few_levels": "too few levels",
    "dead_channels": "dead channels",
}


@dataclass(frozen=True)
class Remedy:
    """A step for the recipe; ``settings`` names those that are new where it replaces another."""

    step: Step
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As a person would type it, with what is new about it."""
        if not self.settings:
            return recipe.line(self.step)
        inside = ", ".join(f"{name}={getattr(self.step, name)!r}" for name in self.settings)
        return f"{type(self.step).__name__}({inside})"


@dataclass(frozen=True)
class Cause:
    """Why layers lose what they lose, and the setting that mends it.

    Attributes:
        kind: one of `KINDS`.
        words: what was found, with its figures.
        remedy: a step of the recipe, or what else to do.
        gain_db: by how much the error of this rounding would fall without the cause.
    """

    kind: str
    layers: tuple[str, ...]
    words: str
    remedy: Remedy | str
    gain_db: float
