"""Scores from labels that come late: by the class that is named, or by the task's own function."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paredown.core.source import Source
from paredown.ship.serve.child import Child, Died, Opening
from paredown.ship.serve.compare import Outputs, guess
from paredown.ship.serve.refused import Refused

Scorer = Callable[[Outputs, Any], Awaitable[float]]
SCORE_S = 30.0  # the longest that the user's function, and at first its file, may take


async def by_class(outputs: Outputs, target: Any) -> float:
    """`exact`, as a scorer is awaited."""
    return exact(outputs, target)


def exact(outputs: Outputs, target: Any) -> float:
    """The share of rows whose class, or whose whole number, is the target.

    Raises:
        Refused: there are no classes, or the target is none for these rows.

    Example:
        >>> exact({"y": np.array([[0.1, 0.9]])}, 1), exact({"y": np.array([[0.1, 0.9]])}, [0])
        (1.0, 0.0)
    """
    first = next(iter(outputs.values()))
    whole = first.dtype.kind in "iu"
    if not whole and (first.dtype.kind != "f" or first.ndim == 0 or first.shape[-1] < 2):
        raise Refused(501, "feedback: these outputs name no class; start with --file FILE.")
    found = first if whole else guess(first)
    wanted = target_of(target, "iu")
    if wanted.size != found.size:
        expected = f"{found.size} whole number{'s' * (found.size != 1)}"
        raise Refused(400, f"target: expected {expected}, one for each row, got {wanted.size}.")
    return float(np.mean(found.ravel() == wanted.ravel()))


def target_of(target: Any, kinds: str) -> np.ndarray:
    """A label as an array of such kinds of numbers.

    Raises:
        Refused: it is none.
    """
    try:
        wanted = np.asarray(target)
    except ValueError:  # lists of several lengths
        wanted = np.empty(0, object)
    if wanted.dtype.kind not in kinds:
        what = "whole numbers" if kinds == "iu" else "numbers"
        raise Refused(400, f"target: expected {what}, alone or in lists.")
    return wanted


class ByTask:
    """The task's score, computed in a process of its own that begins with the first label.

    Args:
        source: of the task.
        names: of the outputs.
        outputs: their nesting; None reads it off the names.
    """

    def __init__(self, source: Source, names: Sequence[str], outputs: Any) -> None:
        maker = str(Path(__file__).with_name("score_worker.py"))
        beside = {"source": source.to_json(), "names": list(names), "outputs": outputs}
        file = Path(source.file)
        self._opening = Opening(file, file, maker=maker, beside=beside)
        self._child: Child | None = None
        self._turn = asyncio.Lock()

    async def __call__(self, outputs: Outputs, target: Any) -> float:
        """The mean score of the rows.

        Raises:
            Refused: the task's function fails on this label, or does not answer.
        """
        wanted = np.atleast_1d(target_of(target, "biuf"))
        wanted = wanted.astype(np.float32) if wanted.dtype.kind == "f" else wanted
        async with self._turn:
            try:
                work = self._ask([*outputs.values(), wanted])
                head, found = await asyncio.wait_for(work, SCORE_S)
            except (Died, TimeoutError) as error:
                await self.end()
                said = str(error) or f"took more than {SCORE_S:g} s"
                raise Refused(503, f"feedback: the task's process {said}") from error
        if "error" in head:
            raise Refused(400, f"feedback: the task does not score it: {head['error']}")
        return float(found[0][0])

    async def _ask(self, arrays: list[np.ndarray]) -> tuple[dict[str, Any], list[np.ndarray]]:
        if self._child is None:
            self._child = await Child.started(self._opening)
            await self._child.open(self._opening)
        plain = [np.require(array, requirements=("C",)) for array in arrays]
        return await self._child.ask({"command": "run"}, plain)

    async def end(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is not None:
            await child.end()
