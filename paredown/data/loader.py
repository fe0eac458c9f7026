"""Examples of a split in batches, read here or by several processes ahead of their use."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data._utils import signal_handling

from paredown.core.errors import UserError
from paredown.core.processes import ended
from paredown.data import reading
from paredown.data.reading import Split
from paredown.graph import machine

FORK = "fork"  # how processes start that can be given any dataset, where the system has it
POLL = 0.5  # seconds between looks whether the processes that are waited for live


def batches(
    data: Dataset[Any], chosen: Sequence[Sequence[int]], seed: int, again: bool = False
) -> Iterator[Any]:
    """The examples of each group of indices as one batch, in their order.

    What is given is the same however many processes read: each example is seeded for itself.

    Args:
        again: read every example, whatever was kept of it.

    Raises:
        UserError: an example cannot be read, or some have no common shape; names it. Or the
            processes that read cannot be started, or ended.
    """
    there = [not again and _kept(data, indices, seed) for indices in chosen]
    wanted = [list(indices) for indices, kept in zip(chosen, there, strict=True) if not kept]
    workers = min(_workers(data), len(wanted))
    ahead = _ahead(data, wanted, seed, workers) if workers else iter(())
    for indices, kept in zip(chosen, there, strict=True):
        if workers and not kept:
            yield _received(data, indices, seed, next(ahead), again)
        else:
            with machine.same_numbers():
                rows = reading.examples(data, indices, seed, again=again)
            yield reading.collated(rows, reading.named(data), indices)


def _workers(data: Any) -> int:
    while isinstance(data, Subset):
        data = data.dataset
    return data.workers if isinstance(data, Split) else 0


def _place(data: Any, index: int) -> tuple[Split | None, int]:
    """The split that an example stands in, and its index there."""
    while isinstance(data, Subset):
        data, index = data.dataset, data.indices[index]
    return (data if isinstance(data, Split) else None), index


def _kept(data: Any, indices: Sequence[int], seed: int) -> bool:
    """Whether all of them were read before, and would be the same."""
    for index in indices:
        split, inner = _place(data, index)
        if split is None or split.kept(inner, seed, index) is None:
            return False
    return True


# --- by other processes ----------------------------------------------------------------------


class _Asked(Dataset[Any]):
    """What a process is asked for: batches, each with who drew numbers; or what went wrong."""

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitems__(self, indices: list[int]) -> list[Any]:
        try:
            return [self._read(indices)]
        except UserError as error:  # raised there it would come with its traceback as text
            return [str(error)]

    def _read(self, indices: list[int]) -> tuple[Any, list[bool]]:
        rows, drew = [], []
        alone = reading.one_by_one(_inner(self.data))
        for each in [[index] for index in indices] if alone else [indices]:
            rows += reading.examples(self.data, each, self.seed, again=True)
            drew.append(machine.drawn(reading.seed_of(self.seed, each[0])))
        return reading.collated(rows, reading.named(self.data), indices), drew


def _inner(data: Any) -> Any:
    while isinstance(data, (Subset, Split)):
        data = data.dataset if isinstance(data, Subset) else data.data
    return data


def _only(answers: list[Any]) -> Any:
    return answers[0]


def _ahead(data: Dataset[Any], wanted: list[list[int]], seed: int, workers: int) -> Iterator[Any]:
    """The answers of the processes, in the order of what is wanted."""
    able = multiprocessing.get_all_start_methods()
    name = reading.named(data)
    loader: DataLoader[Any] = DataLoader(
        _Asked(data, seed),
        batch_sampler=wanted,
        num_workers=workers,
        collate_fn=_only,
        multiprocessing_context=FORK if FORK in able else able[0],
        generator=torch.Generator(),
    )
    try:
        with _no_handler():
            found = iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"{name}: its dataset cannot be given to other processes: {error}; define it and its "
            "functions at the top of a file, or leave Task(workers=) at 0."
        ) from error
    # How often it looks whether they live, while it waits.
    found._try_get_data = functools.partial(found._try_get_data, POLL)  # type: ignore[attr-defined]
    try:
        yield from _told(found, name)
    finally:
        # Now: where a traceback holds it until it is collected, its queues are closed before it can
        # tell the processes to end, and it waits ten seconds for them.
        found._shutdown_workers()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _no_handler() -> Iterator[None]:
    """PyTorch's loader sets no handler of the signal that a child has ended.

    A signal's handler runs in the midst of whatever this process does, and processes in which
    runtimes had run ended now and then while it was set; the loader sees without it who ended.
    """
    before = signal_handling._SIGCHLD_handler_set
    signal_handling._SIGCHLD_handler_set = True
    try:
        yield
    finally:
        signal_handling._SIGCHLD_handler_set = before


def _told(found: Iterator[Any], name: str) -> Iterator[Any]:
    """The answers, or a sentence where one says what went wrong."""
    while True:
        try:
            answer = next(found)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:  # it may end while it hands a batch over
            raise UserError(
                f"{name}: a process that reads it {_how_ended(found, error)}; use fewer "
                "Task(workers=), or 0, which reads it here."
            ) from error
        if isinstance(answer, str):
            raise UserError(answer)
        yield answer


def _how_ended(found: Iterator[Any], error: Exception) -> str:
    """What became of the processes that ended, or where none did, what the loader says."""
    workers = found._workers  # type: ignore[attr-defined]
    gone = multiprocessing.connection.wait([each.sentinel for each in workers], timeout=1)
    for each in workers:
        if each.sentinel in gone:
            each.join()  # its exit code comes a moment later
    codes = [code for each in workers if (code := each.exitcode) is not None]
    if codes:
        return ended(codes[0])
    return "failed: " + (str(error) or type(error).__name__).split("\n")[0].rstrip(".")


def _received(
    data: Any, indices: Sequence[int], seed: int, answer: tuple[Any, list[bool]], again: bool
) -> Any:
    """A batch that came from another process, its examples kept here where they may be."""
    batch, drew = answer
    tensors = all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(batch))
    if again or not tensors or len(drew) != len(indices):
        return batch
    batch = pytree.tree_map(torch.clone, batch)  # out of the memory that processes share
    for number, (index, drawn) in enumerate(zip(indices, drew, strict=True)):
        split, inner = _place(data, index)
        if split is not None:
            row = pytree.tree_map(lambda leaf, n=number: leaf[n], batch)
            split.keep(inner, row, seed, index, drawn)
    return batch
