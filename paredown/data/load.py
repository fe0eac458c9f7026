"""Any file that holds a model, with the samples beside it, -> the model and its task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.settings import check_arguments, check_choice, check_seed
from paredown.core.source import Source
from paredown.core.task import KINDS, Task
from paredown.data import batches, feed, parting, splits
from paredown.data.answer import (
    LABELLED,
    Answer,
    Fidelity,
    FidelityLoss,
    LabelLoss,
    LabelScore,
    notes_of,
)
from paredown.data.brought import Brought, brought, check_door, dynamic_of, example_of
from paredown.data.files.read import read_splits
from paredown.data.files.table import Table
from paredown.data.fitting import fit
from paredown.data.kinds import Seen, answer_of
from paredown.data.originals import taught
from paredown.data.reading import Split
from paredown.data.samples import LOOKED_AT, Labels, Samples, labels_of
from paredown.graph import structure
from paredown.graph.doors import python_file
from paredown.graph.doors.other_files import NEEDS_SAMPLES
from paredown.graph.model import Model

BATCH = 64
UNTRAINED = "rounding in the model lets no gradient reach its weights"


def load(
    file: str | Path, data: str | Path | None = None, task: str | None = None, seed: int = 0
) -> tuple[nn.Module | Model, Task]:
    """The model of a file, and its task: of a Python file what it makes, of any other file one made
    from samples.

    Samples with a column of labels (``label``, ``labels``, ``y``, ``target`` or ``targets``) are
    scored by these; without one the score is fidelity to the original, whose outputs are computed
    once and are the targets.

    Args:
        file: a Python file with ``model()`` and ``task()``, or a model without its source.
        data: the samples of such a model: ``.npz``, ``.npy``, ``.jsonl``, a folder of ``.npy``
            files or of pictures, or a dataset saved by Hugging Face.
        task: the kind: "classification", "regression", "embedding", "segmentation", "tokens" or
            "detection"; None finds it out, and a note says what was found.
        seed: by which the samples are put into splits, where they have none of their own.

    Raises:
        UserError: the file or the samples cannot be read, or they do not fit each other; says what
            was expected, and what was found.

    Example:
        >>> import tempfile, numpy, paredown
        >>> model = paredown.capture(torch.nn.Linear(4, 3), (torch.zeros(1, 4),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save(f"{folder}/net.safetensors")
        ...     numpy.save(f"{folder}/x.npy", numpy.random.rand(20, 4).astype("float32"))
        ...     _, task = load(f"{folder}/net.safetensors", f"{folder}/x.npy")
        >>> len(task.train), len(task.validation), len(task.test), task.score.answer.kind
        (6, 6, 8, 'classification')
    """
    check_arguments(file=(file, str | Path), data=(data, str | Path | None))
    check_arguments(task=(task, str | None))
    check_seed("seed", seed)
    path = Path(file)
    if task is not None:
        check_choice("task", task, KINDS)
    if path.suffix == ".py":
        if data is not None or task is not None:
            raise UserError(
                f"{path}: a Python file brings samples and score in its task(); leave --data and "
                "--task out."
            )
        return python_file.load(path)
    check_door(path)
    if data is None:
        raise UserError(f"{path}: {NEEDS_SAMPLES}")
    found = brought(path)
    return _made(found, _sources(found, Path(data), seed), task)


def load_source(source: Source) -> tuple[nn.Module | Model, Task]:
    """`load` of what a run was started from."""
    return load(source.file, source.data or None, source.task or None, source.seed)


def load_told(source: Source) -> tuple[nn.Module | Model, Task]:
    """The same, saying how the task was made of samples."""
    made = load_source(source)
    for note in notes_of(made[1]):
        progress.say(f"  note: {note}")
    return made


def task_of(source: Source) -> Task:
    """Its task; of a Python file alone without making the model."""
    if source.is_python:
        return python_file.load_task(Path(source.file))
    return load_source(source)[1]


# --- samples -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sources:
    """The samples of each split, and what was done to have them.

    Attributes:
        inputs: of the first examples, as a model takes them and by name: makes a batch of so many.
    """

    splits: dict[str, Samples]
    preprocess: Callable[[Any], Any] | None
    inputs: Callable[[int], dict[str, Tensor]]
    labels: Labels | None
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def _sources(found: Brought, data: Path, seed: int) -> _Sources:
    tables = read_splits(data)
    rows, said = _rows(tables, seed)
    classes, said_of_classes = _classes(found, tables)
    inputs = [each.name for each in found.wanted]
    given: dict[str, Callable[[int], Any]] = {}
    named: dict[str, Callable[[int], dict[str, Tensor]]] = {}
    labels: dict[str, Labels | None] = {}
    notes = [each for each in (said, said_of_classes) if each]
    preprocess = None
    for name, table in tables.items():
        labels[name], told = labels_of(table, inputs, classes)
        given[name], named[name], preprocess, more = _inputs(found, table)
        notes += [*told, *more]
    if len({each is None for each in labels.values()}) > 1:
        lacking = ", ".join(name for name, each in labels.items() if each is None)
        raise UserError(f"data: {data}: {lacking} has no labels, and other splits have some.")
    made = {name: Samples(chosen, given[own], labels[own]) for name, (own, chosen) in rows.items()}
    first = next(iter(tables))

    def some(count: int) -> dict[str, Tensor]:
        examples = [named[first](n % len(tables[first])) for n in range(count)]
        return {name: torch.stack([each[name] for each in examples]) for name in examples[0]}

    names = classes or tables[first].classes
    return _Sources(made, preprocess, some, labels[first], names, tuple(dict.fromkeys(notes)))


def _classes(found: Brought, tables: dict[str, Table]) -> tuple[tuple[str, ...], str]:
    """Names of the model's classes, as its file tells them; else where the splits have others of
    each other, those of all, in order, and that in a sentence."""
    known = found.opened.classes if found.opened else ()
    named = {table.classes for table in tables.values() if table.classes}
    every = sorted({name for names in named for name in names})
    if len(named) < 2 or set(every) <= set(known):
        return known, ""
    counted = f"0 is {every[0]!r}, {len(every) - 1} is {every[-1]!r}"
    return tuple(every), f"classes of all splits are counted in the order of their names: {counted}"


def _rows(tables: dict[str, Table], seed: int) -> tuple[dict[str, tuple[str, Any]], str]:
    if "" in tables:
        rows = parting.parted(len(tables[""]), seed)
        return {name: ("", each) for name, each in rows.items()}, ""
    return parting.completed({name: len(table) for name, table in tables.items()}, seed)


def _inputs(found: Brought, table: Table) -> tuple[Any, Any, Any, list[str]]:
    """What makes the inputs of a row as a split gives them, and as the model takes them; the task's
    preprocessing between the two; and notes."""
    opened = found.opened
    there = [name for name in opened.columns if name in table.columns] if opened else []
    prepare = opened.preprocess if opened else None
    if prepare is None or not there:
        try:
            made = fit(table, found.wanted)
        except UserError as error:
            raw = opened.columns[0] if opened and opened.columns else ""
            also = f" Or bring raw samples, in a column such as {raw!r}." if raw else ""
            raise UserError(f"{error}{also}") from error
        return lambda row: found.nest(made.inputs(row)), made.inputs, None, list(made.notes)

    def given(row: int) -> dict[str, Any]:
        return {name: table.columns[name][row] for name in there}

    def prepared(row: int) -> dict[str, Tensor]:
        try:
            return prepare(given(row))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{table.source}: example {row}: the model's own preprocessing failed: "
                f"{type(error).__name__}: {error}"
            ) from error

    return given, prepared, prepare, []


# --- the task ------------------------------------------------------------------------------------


def _made(found: Brought, sources: _Sources, asked: str | None) -> tuple[Model, Task]:
    model = found.captured(sources.inputs(found.batch)).eval()
    kind, why = asked, "as asked"
    if kind is None and found.opened is not None and found.opened.kind is not None:
        kind, why = found.opened.kind, "as the file says"
    labels, notes = sources.labels, list(sources.notes)
    if kind is not None and kind not in LABELLED and labels is not None:
        notes.append(f"the labels are not read: of {kind} the score is fidelity to the original")
        labels = None
        sources = replace(sources, splits=_unlabelled(sources.splits))
    told = found.opened.outputs if found.opened else ()
    answer, note = answer_of(_seen(model, sources, labels, told), kind, why)
    notes = [note, *notes]
    given: dict[str, Dataset[Any]] = dict(sources.splits)
    loss: Any = LabelLoss(answer)
    if labels is None:
        given = {
            name: taught(model, each, Split(each, name, sources.preprocess), answer, BATCH)
            for name, each in sources.splits.items()
        }
        loss = FidelityLoss(answer)
    if not _trains(model, answer):
        notes.append(f"{UNTRAINED}, so train serves as calibration, and nothing is trained")
        loss, train = None, given.pop("train", None)
        if train is not None:
            given.setdefault("calibration", train)
    score = (Fidelity if labels is None else LabelScore)(answer, tuple(notes))
    return model, _task(model, sources, given, score, loss)


def _trains(model: Model, answer: Answer) -> bool:
    """Whether a gradient of the answer reaches the model's weights."""
    with torch.enable_grad():
        leaves = model.graph(*[item.example for item in model.inputs])
    return any(leaves[place].requires_grad for place in answer.places)


def _unlabelled(given: dict[str, Samples]) -> dict[str, Samples]:
    return {name: Samples(each.rows, each.inputs) for name, each in given.items()}


def _task(model: Model, sources: _Sources, given: dict[str, Any], score: Any, loss: Any) -> Task:
    return Task(
        example=example_of(model),
        score=score,
        loss=loss,
        preprocess=sources.preprocess,
        dynamic=dynamic_of(model),
        classes=sources.classes,
        batch_size=BATCH,
        **given,
    )


def _seen(model: Model, sources: _Sources, labels: Labels | None, outputs: Sequence[str]) -> Seen:
    """The model's outputs for the first examples of one of its splits.

    Args:
        outputs: their names in the file.
    """
    names = tuple(structure.names(model.outputs))
    names = tuple(outputs) if names == ("",) and len(outputs) == 1 else names
    name = "train" if "train" in sources.splits else "validation"
    split = Split(sources.splits[name], name, sources.preprocess)
    size = min(LOOKED_AT, splits.size(split))
    with torch.no_grad():
        batch = next(iter(feed.every(model, split, feed.size(model, size), 1)))
        made = structure.flatten(batches.call(model, batch.inputs))[0]
        leaves = model.bind(*splits.arguments(batch.inputs))
    inputs = {
        item.name: leaf[: batch.count] for item, leaf in zip(model.inputs, leaves, strict=True)
    }
    return Seen(
        names,
        tuple(batch.cut(made)),
        inputs,
        None if labels is None else labels.some(),
    )
