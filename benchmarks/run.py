"""The benchmarks: python benchmarks/run.py [NAME] [--quick] [--shapes SHAPE ...].

NAME is one of BENCHMARKS; the shapes are those of shapes.SHAPES, for the int8 benchmarks.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys

# name -> the module whose ``run(quick, ...)`` makes it, and what it is given besides
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "int8": ("int8", "onnxruntime"),
    "int8-openvino": ("int8", "openvino"),
    "int8-executorch": ("int8", "executorch"),
    "int8-litert": ("int8", "litert"),
    "calibration": ("calibration",),
    "finetune": ("finetune",),
    "pruning": ("pruning",),
    "widths": ("widths",),
    "packing": ("packing",),
    "qat": ("qat",),
    "weights": ("weights",),
    "distill": ("distill", "digits"),
    "distill-code": ("distill", "code_lm"),
    "sharing": ("sharing",),
    "low-rank": ("low_rank",),
    "forks": ("forks",),
    "steps-time": ("steps_time",),
    "memory": ("memory",),
}
PEERS = ("nncf", "openvino", "torch_pruning", "torchao", "ai_edge_quantizer", "tensorly")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare paredown with its peers, side by side.")
    parser.add_argument("benchmark", nargs="?", choices=[*BENCHMARKS, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="few rounds and examples: a rough run")
    parser.add_argument(
        "--shapes", nargs="+", default=[], help="of the int8 benchmarks: these alone"
    )
    chosen = parser.parse_args()
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)}: not installed; pip install -e '.[bench]'")
    import shapes
    import tables

    unknown = sorted(set(chosen.shapes) - set(shapes.SHAPES))
    if unknown:
        sys.exit(f"{', '.join(unknown)}: no such shape; there are {', '.join(shapes.SHAPES)}")
    if chosen.shapes and not chosen.benchmark.startswith("int8"):
        sys.exit("--shapes goes with the int8 benchmarks")
    load, cores = os.getloadavg()[0], tables.cores()
    if load > 0.5 * cores:
        print(f"note: {load:.1f} other processes want these {cores} cores; the numbers are rough")
    for name in BENCHMARKS if chosen.benchmark == "all" else [chosen.benchmark]:
        module, *given = BENCHMARKS[name]
        run = importlib.import_module(module).run
        # a file for each shape, so that what is measured stays when a long run is stopped
        parts = chosen.shapes or list(shapes.SHAPES) if module == "int8" else []
        for part in parts or [None]:
            results = run(chosen.quick, *given, *([part] if part else []))
            kept = tables.save(f"{name}-{part}" if part else name, results, chosen.quick)
            print(f"kept in {kept.relative_to(tables.ROOT)}\n", flush=True)


if __name__ == "__main__":
    main()
