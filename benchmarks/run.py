"""The benchmarks: python benchmarks/run.py [NAME] [--quick], NAME being one of BENCHMARKS."""

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
}
PEERS = ("nncf", "openvino", "torch_pruning", "torchao", "ai_edge_quantizer", "tensorly")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare paredown with its peers, side by side.")
    parser.add_argument("benchmark", nargs="?", choices=[*BENCHMARKS, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="few rounds and examples: a rough run")
    chosen = parser.parse_args()
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)}: not installed; pip install -e '.[bench]'")
    import tables

    load, cores = os.getloadavg()[0], tables.cores()
    if load > 0.5 * cores:
        print(f"note: {load:.1f} other processes want these {cores} cores; the numbers are rough")
    for name in BENCHMARKS if chosen.benchmark == "all" else [chosen.benchmark]:
        module, *given = BENCHMARKS[name]
        results = importlib.import_module(module).run(chosen.quick, *given)
        print(f"kept in {tables.save(name, results, chosen.quick).relative_to(tables.ROOT)}\n")


if __name__ == "__main__":
    main()
