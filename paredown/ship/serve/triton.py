"""What Triton's clients may ask besides the protocol: configuration, statistics, repository."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from paredown.ship.serve.metrics import Counters, labels
from paredown.ship.serve.signature import Signature

TYPES = {"FP32": "TYPE_FP32", "BYTES": "TYPE_STRING"}


def config(name: str, runtime: str, signature: Signature, most: int) -> dict[str, Any]:
    """A model's configuration; the batch is no part of its dimensions where it varies.

    Args:
        most: the most examples that are run together.

    Example:
        >>> item = {"name": "x", "dtype": "float32", "shape": [["batch", 1, None], 3]}
        >>> told = config("m", "onnxruntime", Signature((item,), (), True), 32)
        >>> told["max_batch_size"], told["input"]
        (32, [{'name': 'x', 'data_type': 'TYPE_FP32', 'dims': [3]}])
    """
    told = signature.metadata()
    first = 1 if signature.batched else 0
    return {
        "name": name,
        "platform": runtime,
        "backend": runtime,
        "max_batch_size": most if signature.batched else 0,
        "input": [_described(item, first) for item in told["inputs"]],
        "output": [_described(item, first) for item in told["outputs"]],
    }


def _described(item: Mapping[str, Any], first: int) -> dict[str, Any]:
    datatype = item["datatype"]
    kind = TYPES.get(datatype, f"TYPE_{datatype}")
    return {"name": item["name"], "data_type": kind, "dims": item["shape"][first:]}


def statistics(name: str, executions: Mapping[str, int], counters: Counters) -> dict[str, Any]:
    """What each version has done.

    Args:
        executions: by version, the batches that were run.

    Example:
        >>> found = statistics("m", {"1": 2}, Counters())["model_stats"]
        >>> found[0]["version"], found[0]["execution_count"]
        ('1', 2)
    """
    stats = []
    for version, count in executions.items():
        named = labels(model=name, version=version)

        def of(metric: str, named: tuple[tuple[str, str], ...] = named) -> int:
            return int(counters.values.get((f"nv_inference_{metric}", named), 0))

        answered = of("request_success")
        stats.append(
            {
                "name": name,
                "version": version,
                "inference_count": of("count"),
                "execution_count": count,
                "inference_stats": {
                    "success": _spent(answered, of("request_duration_us")),
                    "fail": _spent(of("request_failure"), 0),
                    "queue": _spent(answered, of("queue_duration_us")),
                    "compute_infer": _spent(answered, of("compute_infer_duration_us")),
                },
            }
        )
    return {"model_stats": stats}


def _spent(count: int, microseconds: int) -> dict[str, int]:
    return {"count": count, "ns": microseconds * 1000}


def index(name: str, ready: Mapping[str, str]) -> list[dict[str, str]]:
    """The repository: each version with why it is not ready, "" where it is.

    Example:
        >>> index("m", {"1": ""})
        [{'name': 'm', 'version': '1', 'state': 'READY', 'reason': ''}]
    """
    states: Iterable[tuple[str, str]] = ready.items()
    return [
        {
            "name": name,
            "version": version,
            "state": "UNAVAILABLE" if why else "READY",
            "reason": why,
        }
        for version, why in states
    ]
