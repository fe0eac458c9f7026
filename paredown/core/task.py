"""What a user brings besides the model: data, score, loss, and where it is to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paredown.core.settings import MOST_THREADS, check_arguments, check_count, check_fields, require

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

KINDS = ("classification", "regression", "embedding", "segmentation", "tokens", "detection")
SPLITS = ("train", "calibration", "validation", "test")


@dataclass(frozen=True)
class Task:
    """What a step may look at besides the model.

    A split is a map-style ``torch.utils.data.Dataset`` of ``(inputs, target)`` pairs without a
    batch dimension, as ``TensorDataset(x, y)`` gives; ``inputs`` is one tensor, a tuple or a dict.
    Each example is what its ``__getitem__`` gives, wherever it is read; what that draws at random
    from ``torch``, ``numpy.random`` or ``random`` is seeded for each example and epoch.

    ``preprocess`` and ``postprocess`` are what surrounds the model as deployed: where there is a
    ``preprocess``, the splits give inputs as they come in, and every reader of them, training
    included, runs it on each example; ``score`` gets what ``postprocess`` makes of an output, and
    ``loss`` the output itself. A run times both beside the model.

    Args:
        example: inputs as deployed, batch dimension first: a tuple of positional inputs, or a
            dict of keyword inputs. Latency is measured on exactly these shapes.
        score: ``score(output, target) -> (B,)``, one number per example, higher is better.
        loss: ``loss(output, target) -> ()``, needed by the steps that train.
        train, calibration, validation, test: the splits. Steps learn from ``train``, gather
            ranges from ``calibration`` (default: the start of ``train``), decisions are made on
            ``validation`` and the final claim on ``test``, which no decision has seen.
        preprocess: ``preprocess(inputs) -> inputs``, from those of one example of a split to those
            of the model, without a batch dimension; ``example`` is given as it leaves them.
        postprocess: ``postprocess(output) -> anything``, of a batch, before ``score``.
        dynamic: dimensions besides the batch that vary, in the shape of ``example``: for each
            input ``{dim: "name"}`` or None.
        classes: names of the classes, for the report.
        batch_size: examples per batch wherever the data is run.
        student: a small model for the plan to put in the original's place, taught by it: what
            `Distill` takes as its ``student``.
        workers: processes that read and preprocess the splits; 0 is the program's own.
        ignore: the label, or labels, that ``loss`` and ``score`` do not count, such as 255 or -1,
            so that a teacher's outputs are not compared there either. None finds it out: the one
            value outside the classes in all of a split, or -100.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> images, labels = torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.long)
        >>> data = TensorDataset(images, labels)
        >>> task = Task(example=(images[:1],), score=lambda out, y: (out.argmax(1) == y).float(),
        ...             validation=data, test=data)
        >>> task.missing({"validation", "loss"})
        ['loss']
    """

    example: tuple[Any, ...] | dict[str, Any]
    score: Callable[[Any, Any], Tensor]
    loss: Callable[[Any, Any], Tensor] | None = None
    train: Dataset[Any] | None = None
    calibration: Dataset[Any] | None = None
    validation: Dataset[Any] | None = None
    test: Dataset[Any] | None = None
    preprocess: Callable[[Any], Any] | None = None
    postprocess: Callable[[Any], Any] | None = None
    dynamic: tuple[Any, ...] | dict[str, Any] | None = None
    classes: tuple[str, ...] = ()
    batch_size: int = 64
    ignore: int | tuple[int, ...] | None = None
    student: str | nn.Module | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        check_arguments(
            example=(self.example, tuple | dict),
            dynamic=(self.dynamic, tuple | dict | None),
            ignore=(self.ignore, int | tuple | list | None),
        )
        check_count("batch_size", self.batch_size)
        check_count("workers", self.workers, 0)
        for name in ("score", "loss", "preprocess", "postprocess"):
            given = getattr(self, name)
            require(name, given, given is None or callable(given), "a function")
        told = isinstance(self.classes, str)
        require("classes", self.classes, not told, 'a tuple of names, such as ("cat", "dog")')

    def missing(self, needs: set[str] | frozenset[str]) -> list[str]:
        """The fields among ``needs`` that this task does not provide, sorted."""
        return sorted(need for need in needs if not self._provides(need))

    def _provides(self, need: str) -> bool:
        if need == "calibration":
            return self.calibration is not None or self.train is not None
        return getattr(self, need) is not None


@dataclass(frozen=True)
class Target:
    """Where the artifact runs: a runtime of ``RUNTIMES``, a device, and its threads.

    ``rounds`` is how often a file is opened and timed there, in turn with the others; decisions
    that are clear earlier take fewer, and fewer than 10 tell small differences less surely.

    Example:
        >>> Target().runtime, Target(threads=2).threads
        ('onnxruntime', 2)
    """

    runtime: str = "onnxruntime"
    device: str = "local"
    threads: int = 1
    rounds: int = 10

    def __post_init__(self) -> None:
        check_fields(self)
        check_count("threads", self.threads, most=MOST_THREADS)
        check_count("rounds", self.rounds, 2)
