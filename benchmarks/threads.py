"""How long steps take by how often OpenMP's threads look before they sleep.

python benchmarks/threads.py           # about five minutes; the table's rows, in turn
python benchmarks/threads.py --busy    # with one core taken by an endless loop
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
SPINS = ("", "50000", "10000", "3000", "1000", "none")  # GOMP_SPINCOUNT; "" is OpenMP's own choice
TURNS = 3


def child() -> None:
    """Seconds of one epoch of FineTune, and of LowRank(0.5), on the digits' net."""
    sys.path.insert(0, str(EXAMPLES))
    import digits

    import paredown
    from paredown.core import threads

    threads.sleeps = lambda: True  # as many threads in every row
    model, task = digits.model(), digits.task()
    for step in (paredown.FineTune(epochs=1), paredown.LowRank(0.5)):
        began = time.perf_counter()
        paredown.apply(model, [step], task)
        print(time.perf_counter() - began)


def seconds(spins: str) -> list[float]:
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    given = {name: value for name, value in os.environ.items() if name not in unset}
    given |= {"OMP_WAIT_POLICY": "PASSIVE"} if spins == "none" else {}
    given |= {"GOMP_SPINCOUNT": spins} if spins.isdigit() else {}
    command = [sys.executable, __file__, "--child"]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()[-2:]]


def main() -> None:
    busy = "--busy" in sys.argv
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        found = [{spins: seconds(spins) for spins in SPINS} for _ in range(TURNS)]
    finally:
        if loop is not None:
            loop.kill()
    for spins in SPINS:
        medians = [statistics.median(turn[spins][n] for turn in found) for n in range(2)]
        print(f"{spins or 'own choice':>10}  " + "  ".join(f"{m:.1f} s" for m in medians))


if __name__ == "__main__":
    child() if "--child" in sys.argv else main()
