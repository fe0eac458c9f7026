"""Reference values for the guard's tests, from the MIT package confseq 0.0.11 (arXiv 2010.09686).

    python benchmarks/guard_confseq.py FOLDER > tests/guard_confseq.json

FOLDER holds confseq's Python modules (`confseq/betting.py`, ...). Its C++ part does not build with
Python 3.11 and is not needed here; what its modules import for plots and for several processes is
not touched by the functions called, so empty modules stand in for it.
"""

from __future__ import annotations

import json
import sys
import types

import numpy as np

from paredown.ship.guard.betting import FACTORS, STAKES

SEED, SAMPLES = 7, 2000
AT = (9, 99, 499, 1999)  # which of the samples' values are kept


def stands_in(*names: str) -> None:
    """Empty modules for what confseq imports and these functions do not use."""
    for name in names:
        sys.modules[name] = types.ModuleType(name)


def main() -> None:
    """Print the JSON."""
    stands_in("matplotlib", "matplotlib.pyplot", "multiprocess")
    np.float_ = np.float64  # type: ignore[attr-defined]  # its name before NumPy 2
    sys.path.insert(0, sys.argv[1])
    from confseq import betting, predmix

    draws = np.random.default_rng(SEED)
    rates = (draws.random(SAMPLES) < 0.03).astype(float)
    means = draws.beta(2, 3, SAMPLES)

    def capital(x: np.ndarray, m: float, stake: float) -> list[float]:
        made = betting.betting_mart(
            x, m, lambdas_fn_positive=lambda x, m: np.full(len(x), stake), theta=1, trunc_scale=1
        )
        return [float(made[at]) for at in AT]

    def rate_stake(limit: float, factor: float) -> float:
        odds = factor * limit / (1 - limit)
        return (odds / (1 + odds) - limit) / (limit * (1 - limit))

    told = {
        "confseq": "0.0.11",
        "seed": SEED,
        "at": [at + 1 for at in AT],
        "rate": {m: [capital(rates, m, rate_stake(m, f)) for f in FACTORS] for m in (0.02, 0.03)},
        "mean": {m: [capital(means, m, share / m) for share in STAKES] for m in (0.35, 0.4)},
        "lower": [float(predmix.predmix_empbern_lower_cs(means, 0.05)[at]) for at in AT],
        "upper": [1 - float(predmix.predmix_empbern_lower_cs(1 - means, 0.05)[at]) for at in AT],
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
