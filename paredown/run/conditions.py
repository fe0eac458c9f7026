"""What a run works under from its first call to its last, so that its bytes stay the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from paredown.core import progress
from paredown.graph import machine
from paredown.run.ledger import Ledger, stage_key


@contextlib.contextmanager
def same_conditions(ledger: Ledger, seed: int) -> Iterator[int]:
    """The seed, and the threads that the run began with, which round sums; gives their number."""
    key = stage_key({"threads": "of the run"})
    record = ledger.done(key)
    if record is None:
        record = {"stage": "", "suffix": "", "threads": torch.get_num_threads()}
        ledger.finish(key, record)
    threads = record["threads"]
    if threads != torch.get_num_threads():
        progress.say(f"The run goes on with as many threads as it began with: {threads}.")
    with machine.same_numbers(seed), machine.threads(threads):
        yield threads
