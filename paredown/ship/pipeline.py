"""An open artifact between a task's preprocessing and postprocessing."""

from __future__ import annotations

from typing import Any

import torch

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import evaluate, reading
from paredown.graph import structure
from paredown.ship.predictor import Predictor


class Pipeline:
    """What comes in -> what goes out: examples as a task's splits give them, unbatched.

    Each is preprocessed, their batch is run, and its output postprocessed, nested as the model
    gives it; without a ``task.postprocess`` it is the output itself, in torch tensors.

    Args:
        outputs: the nesting of the model's outputs; None reads it off the names in the file.

    Example:
        >>> import tempfile, paredown
        >>> model = paredown.capture(torch.nn.Linear(2, 3), (torch.zeros(1, 2),))
        >>> task = Task((torch.zeros(1, 2),), score=paredown.accuracy,
        ...             preprocess=lambda text: torch.tensor([float(t) for t in text.split()]),
        ...             postprocess=lambda output: output.argmax(1).tolist())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = paredown.export(model, paredown.Target("pytorch"), f"{folder}/m.safetensors")
        ...     pipeline = paredown.open(path.path, task=task)
        >>> len(pipeline("1 2", "0.5 4", "3 3"))
        3
    """

    def __init__(self, predictor: Predictor, task: Task, outputs: structure.Structure) -> None:
        self.predictor, self.task = predictor, task
        self._outputs = outputs or _nesting(predictor.output_names)

    def __call__(self, *examples: Any, **named: Any) -> Any:
        """Of one or more examples' inputs, what the task makes of their batch.

        Raises:
            UserError: preprocessing or postprocessing fails, or what the first makes are no inputs
                of the file; or inputs are given by keyword.
        """
        if named:
            raise UserError(
                f"inputs: expected examples as the splits give them, got {next(iter(named))!r} by "
                "its name; give a dict whole."
            )
        if not examples:
            raise UserError("inputs: expected one example or more, got none.")
        rows = [(self._preprocessed(each),) for each in examples]
        [inputs] = reading.collated(rows, "inputs", range(len(rows)))
        many = isinstance(inputs, (tuple, list))
        found = self.predictor(*inputs) if many else self.predictor(inputs)
        output = structure.unflatten([torch.from_numpy(each) for each in found], self._outputs)
        return evaluate.postprocessed(self.task, output) if self.task.postprocess else output

    def __repr__(self) -> str:
        ends = (self.task.preprocess, self.task.postprocess)
        before, behind = (getattr(each, "__name__", each) for each in ends)
        return f"<paredown.Pipeline {before} -> {self.predictor.path} -> {behind}>"

    def _preprocessed(self, example: Any) -> Any:
        if self.task.preprocess is None:
            return example
        try:
            return self.task.preprocess(example)
        except Exception as error:
            listed = isinstance(example, list)
            hint = "; several examples are given one by one: predict(*examples)" if listed else ""
            said = f"task.preprocess failed: {type(error).__name__}: {error}{hint}"
            raise UserError(said) from error


def _nesting(names: list[str]) -> structure.Structure:
    """The nesting that outputs of such names have in a model: one tensor, a tuple or a dict.

    Example:
        >>> _nesting(["output"]), _nesting(["0", "1"]), _nesting(["logits"])
        ('*', {'tuple': ['*', '*']}, {'dict': {'logits': '*'}})
    """
    if names == ["output"]:
        return "*"
    if names == [str(place) for place in range(len(names))]:
        return {"tuple": ["*"] * len(names)}
    return {"dict": dict.fromkeys(names, "*")}
