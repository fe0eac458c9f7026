"""What may vary between machines: the device, its memory, and which kernels repeat their bits."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from paredown.core import progress
from paredown.core import threads as waiting
from paredown.core.errors import UserError
from paredown.graph.model import Model

_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one.

    Raises:
        UserError: "cuda" where there is none.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError('device: "cuda" was asked for, but torch sees no GPU; use "cpu" or "auto".')
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def device_of(model: Model) -> torch.device:
    return next((p.device for p in model.graph.parameters()), torch.device("cpu"))


def move(model: Model, target: torch.device) -> None:
    if device_of(model).type != target.type:
        model.to(target)


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


@contextlib.contextmanager
def same_numbers(number: int | None = None) -> Iterator[None]:
    """The callers' random numbers come back afterwards: torch's of the CPU, numpy's and Python's.

    ``number`` seeds all three, None leaves that to what runs inside.

    Example:
        >>> with same_numbers(1):
        ...     once = random.random()
        >>> with same_numbers(1):
        ...     print(random.random() == once)
        True
    """
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        if number is not None:
            seed(number)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seed_reading(number: int) -> None:
    """Seed what data are read with; the generators of GPUs, which dropout draws from, go on."""
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def drawn(number: int) -> bool:
    """Whether anything was drawn since `seed_reading` of that number."""

    def ahead() -> tuple[float, ...]:
        return float(torch.rand(())), random.random(), float(np.random.random())

    found = ahead()
    seed_reading(number)
    return found != ahead()


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """PyTorch works with so many threads, as many as it has for None; these come back afterwards.

    Example:
        >>> before = torch.get_num_threads()
        >>> with threads(1):
        ...     print(torch.get_num_threads())
        1
        >>> torch.get_num_threads() == before
        True
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def free_threads() -> Iterator[None]:
    """Where PyTorch's threads spin as they wait for each other: no more of them than cores are
    free, since with one that waits for a core all wait."""
    had = torch.get_num_threads()
    if had == 1 or waiting.sleeps():
        yield
        return
    number = max(1, min(had, waiting.free_cores()))
    if number < had:
        progress.say(
            f"Other programs use the cores: {number} of {had} threads work. With "
            f"{waiting.POLICY}=PASSIVE, set before torch is imported, all of them do."
        )
    with threads(number):
        yield


def free_bytes() -> int:
    """Memory that is free, as the system says; all there is where it does not."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(each for each in lines if "MemAvailable" in each).split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def random_state(used: torch.device) -> list[torch.Tensor]:
    """Where torch's generators stand, of the CPU and of the device that is used."""
    states = [torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state(used)] if used.type == "cuda" else [])


def set_random_state(states: list[torch.Tensor], used: torch.device) -> None:
    torch.set_rng_state(states[0])
    if used.type == "cuda":
        torch.cuda.set_rng_state(states[1], used)


@contextlib.contextmanager
def repeatable(used: torch.device) -> Iterator[None]:
    """Reproducible kernels; the caller's random states and settings come back afterwards."""
    kept = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if used.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(kept, warn_only=warn)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            random.setstate(states[0])
            np.random.set_state(states[1])


def no_memory(error: Exception) -> bool:
    """Whether it says that memory ran out.

    Example:
        >>> no_memory(RuntimeError("CUDA out of memory")), no_memory(ValueError("out of memory"))
        (True, False)
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(t in str(error).lower() for t in _NO_MEMORY)
    )


def free_memory() -> None:
    """Give back what a failed pass has left, once nothing holds it any more."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
