"""Counters and gauges in the text form that Prometheus reads, under Triton's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

HELP = {
    "nv_inference_request_success": "Requests answered",
    "nv_inference_request_failure": "Requests refused or failed",
    "nv_inference_count": "Examples answered",
    "nv_inference_exec_count": "Batches run by the model",
    "nv_inference_pending_request_count": "Requests that wait for the model",
    "nv_inference_request_duration_us": "Time of requests, with their wait",
    "nv_inference_queue_duration_us": "Time that requests waited",
    "nv_inference_compute_infer_duration_us": "Time that the model took",
    "paredown_preprocess_duration_us": "Time of the task's preprocessing",
    "paredown_postprocess_duration_us": "Time of the task's postprocessing",
    "paredown_fallback": "Requests that the original answered in the candidate's place",
    "paredown_model_memory_bytes": "Resident memory of the model's process",
    "paredown_model_starts": "Processes started for the model",
    "paredown_rollout_weight": "Share of requests that the candidate answers",
    "paredown_rollout_stage": "1 for the stage that the rollout is in",
    "paredown_rollout_guard": "1 where the guard passes, 0 without evidence, -1 where it fails",
    "paredown_shadow_dropped": "Shadowed requests dropped for want of room",
}
GAUGES = frozenset(
    {
        *("nv_inference_pending_request_count", "paredown_model_memory_bytes"),
        *("paredown_rollout_weight", "paredown_rollout_stage", "paredown_rollout_guard"),
    }
)
Labels = tuple[tuple[str, str], ...]


@dataclass
class Counters:
    """What has been counted, by name and labels.

    Example:
        >>> counters = Counters()
        >>> counters.add("nv_inference_count", (("model", "m"),), 3)
        >>> print(text(counters.values.items()), end="")
        # HELP nv_inference_count Examples answered
        # TYPE nv_inference_count counter
        nv_inference_count{model="m"} 3
    """

    values: dict[tuple[str, Labels], float] = field(default_factory=dict)

    def add(self, name: str, labels: Labels, value: float = 1) -> None:
        key = (name, labels)
        self.values[key] = self.values.get(key, 0) + value


def labels(**given: str) -> Labels:
    """Labels in a form that a dict takes."""
    return tuple(given.items())


def text(samples: Iterable[tuple[tuple[str, Labels], float]]) -> str:
    """All samples, those of one name together."""
    grouped: dict[str, list[str]] = {}
    for (name, named), value in samples:
        told = ",".join(f'{key}="{_escaped(word)}"' for key, word in named)
        grouped.setdefault(name, []).append(f"{name}{{{told}}} {value:.10g}")
    lines: list[str] = []
    for name, found in grouped.items():
        kind = "gauge" if name in GAUGES else "counter"
        lines += [f"# HELP {name} {HELP[name]}", f"# TYPE {name} {kind}", *found]
    return "".join(f"{line}\n" for line in lines)


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def of_rollout(status: Mapping[str, object], stages: Iterable[str], named: Labels) -> Counters:
    """A rollout's status as gauges."""
    found = Counters()
    weight, stage, guards = status.get("weight"), status.get("stage"), status.get("guards")
    found.add(
        "paredown_rollout_weight", named, float(weight) / 1e4 if isinstance(weight, int) else 0
    )
    for each in stages:
        found.add("paredown_rollout_stage", (*named, ("stage", each)), float(each == stage))
    worth = {"pass": 1.0, "fail": -1.0}
    for guard in guards if isinstance(guards, list) else ():
        value = worth.get(guard["state"], 0.0)
        found.add("paredown_rollout_guard", (*named, ("guard", guard["name"])), value)
    return found
