"""What was measured, kept beside the stages: other goals are asked of it, and nothing made anew."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save

from paredown.core.measurement import Measurement
from paredown.measure.measure import Measured
from paredown.run.ledger import Ledger

MEASURED = ".measured"  # the suffix of such a stage


def keep(ledger: Ledger, measured: dict[str, Measured]) -> str:
    """Keep the files' measurements of one call of `measure` as a stage; its SHA-256."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, each in measured.items():
        arrays[f"{name}/scores"] = each.scores.numpy()
        arrays |= {f"{name}/round/{n}": times for n, times in enumerate(each.rounds)}
        if each.predictions is not None:
            arrays[f"{name}/predictions"] = np.array(each.predictions, np.int64)
        if each.overlaps is not None:
            arrays[f"{name}/overlaps"] = each.overlaps.numpy()
    told = {
        name: {"rounds": len(each.rounds), "measurement": dataclasses.asdict(each.measurement)}
        for name, each in measured.items()
    }
    return ledger.put(save(arrays, {"measured": json.dumps(told)}), MEASURED)


def kept(ledger: Ledger, sha256: str) -> dict[str, Measured] | None:
    """What `keep` kept; None where it is gone or damaged."""
    path = ledger.get(sha256, MEASURED)
    if path is None:
        return None
    with safe_open(str(path), "np") as file:
        there = set(file.keys())
        return {
            name: Measured(
                Measurement(**told["measurement"]),
                torch.from_numpy(file.get_tensor(f"{name}/scores")),
                [file.get_tensor(f"{name}/round/{n}") for n in range(told["rounds"])],
                file.get_tensor(f"{name}/predictions").tolist()
                if f"{name}/predictions" in there
                else None,
                torch.from_numpy(file.get_tensor(f"{name}/overlaps"))
                if f"{name}/overlaps" in there
                else None,
            )
            for name, told in json.loads(file.metadata()["measured"]).items()
        }
