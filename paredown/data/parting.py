"""Samples in splits: by a seed, or as the data have them."""

from __future__ import annotations

import numpy as np

from paredown.core.errors import UserError

VALIDATION, MOST_VALIDATION = 0.3, 2_000  # of the samples, and at most
TEST, MOST_TEST = 0.4, 5_000
LEAST = 10  # samples, of which three splits can be made

Rows = dict[str, np.ndarray]  # split -> rows, in the order of the split


def parted(count: int, seed: int) -> Rows:
    """The rows of each split: of so many samples four tenths are for the final claim, three tenths
    for the decisions, and the rest to train on.

    What is claimed or decided needs examples: the drop that 80 of them can rule out is four times
    that which 320 can. Beyond 5,000 and 2,000 they add little, and all others are to train on.

    Raises:
        UserError: they are too few.

    Example:
        >>> {name: len(rows) for name, rows in parted(200, 0).items()}
        {'train': 60, 'validation': 60, 'test': 80}
        >>> {name: len(rows) for name, rows in parted(60_000, 0).items()}
        {'train': 53000, 'validation': 2000, 'test': 5000}
    """
    if count < LEAST:
        raise UserError(
            f"data: holds {count} sample{'s' * (count != 1)}; at least {LEAST} are needed, of "
            "which some decide, others prove, and the rest train."
        )
    order = np.random.default_rng(seed).permutation(count)
    test = min(MOST_TEST, round(TEST * count))
    validation = min(MOST_VALIDATION, round(VALIDATION * count))
    cut = np.split(order, [test, test + validation])
    return {"train": np.sort(cut[2]), "validation": np.sort(cut[1]), "test": np.sort(cut[0])}


def completed(sizes: dict[str, int], seed: int) -> tuple[dict[str, tuple[str, np.ndarray]], str]:
    """The splits of data that have some of their own: split -> (the data's own split, its rows).

    Where the data have no validation, it is cut out of train, or else is half of test; where they
    have no test, it is half of validation, or else is cut out of train.

    Args:
        sizes: of the data's own splits.

    Returns:
        them, and what was done, in a sentence; "" where nothing was.

    Raises:
        UserError: neither can be had.

    Example:
        >>> made, said = completed({"train": 100, "test": 50}, 0)
        >>> {name: (own, len(rows)) for name, (own, rows) in made.items()}
        {'train': ('train', 70), 'test': ('test', 50), 'validation': ('train', 30)}
        >>> said
        'the data have no validation split of their own; 30 examples of train are taken for it'
    """
    made = {name: (name, np.arange(size)) for name, size in sizes.items()}
    told = []
    for lacking, other in (("validation", "test"), ("test", "validation")):
        if lacking in made:
            continue
        own = "train" if "train" in made else other
        if own not in made:
            raise UserError(f"data: has the splits {', '.join(sizes)}, and none to decide on.")
        share = VALIDATION if own == "train" else 0.5
        rows = made[own][1]
        order = np.random.default_rng(seed).permutation(len(rows))
        taken = max(1, round(share * len(rows)))
        made[lacking] = own, np.sort(rows[order[:taken]])
        made[own] = own, np.sort(rows[order[taken:]])
        told.append(
            f"the data have no {lacking} split of their own; {taken} examples of {own} are taken "
            "for it"
        )
    return made, "; ".join(told)
