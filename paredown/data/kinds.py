"""Which kind of task outputs and labels are of, and which outputs are the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from paredown.core.errors import UserError
from paredown.core.task import KINDS
from paredown.data.answer import Answer

EMBEDDED = ("embed", "hidden", "pool", "feature", "representation")  # in an output's name
LOGITS = ("logit", "score", "prob", "class")
WIDTHS = (128, 192, 256, 312, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 2560, 3072, 4096)
NEAR = 1e-3
SAY = f"say with --task which it is: {', '.join(KINDS)}"


@dataclass(frozen=True)
class Seen:
    """Outputs of some examples, and what they came from.

    Attributes:
        names: of the outputs; "" of one that has none.
        outputs: a tensor each, batch first.
        inputs: a tensor each, batch first.
        labels: of the same examples; None where there are none.
    """

    names: tuple[str, ...]
    outputs: tuple[Tensor, ...]
    inputs: Mapping[str, Tensor]
    labels: np.ndarray | None = None

    def floats(self, *dims: int) -> list[int]:
        """The places of the outputs of floats with so many dimensions."""
        found = enumerate(self.outputs)
        return [n for n, t in found if t.is_floating_point() and t.dim() in dims]

    def told(self) -> str:
        """The outputs in words."""
        pairs = zip(self.names, self.outputs, strict=True)
        return ", ".join(f"{name or 'output'} {tuple(t.shape)}" for name, t in pairs)


def answer_of(seen: Seen, kind: str | None, why: str = "") -> tuple[Answer, str]:
    """The answer of a model, and a sentence on what it was taken for.

    Args:
        kind: where it is known.
        why: how it is known.

    Raises:
        UserError: the kind is unknown and cannot be guessed, or outputs or labels are not of it.

    Example:
        >>> import torch
        >>> seen = Seen(("",), (torch.tensor([[2.0, -1.0, 0.5]]),), {})
        >>> answer_of(seen, None)[0].kind
        'classification'
    """
    if kind is None:
        kind, why = guessed(seen)
    if kind not in KINDS:
        raise UserError(f"task: expected one of {', '.join(KINDS)}, got {kind!r}.")
    answer = MADE[kind](seen)
    counted = ", ".join(repr(seen.names[place] or "output") for place in answer.places)
    others = " and the other outputs do not count" if _left(seen, answer) else ""
    note = f"the task is taken for {kind} ({why}); {counted} is the answer{others}"
    return answer, note


def _left(seen: Seen, answer: Answer) -> bool:
    return len(seen.outputs) > len(answer.places)


# --- to guess ------------------------------------------------------------------------------------


def guessed(seen: Seen) -> tuple[str, str]:
    """The kind that labels, names and shapes tell of, and by what.

    Raises:
        UserError: they tell nothing.
    """
    if seen.labels is not None:
        return _by_labels(seen, seen.labels)
    names = " ".join(seen.names).lower()
    if _boxes(seen):
        return "detection", "the outputs have boxes"
    hidden = any(word in names for word in EMBEDDED)
    logits = any(word in names for word in LOGITS)
    if hidden and not logits:
        return "embedding", "by the output's name"
    flat, places, maps = seen.floats(2), seen.floats(3), seen.floats(4, 5)
    whole = any(not t.is_floating_point() and t.dim() == 2 for t in seen.inputs.values())
    if flat:
        return _of_flat(seen.outputs[flat[0]], logits)
    if places and whole:
        width = seen.outputs[places[0]].shape[2]
        if width in WIDTHS and not logits:
            return "embedding", f"a vector of {width} numbers for each token"
        return "tokens", "classes for each token"
    if maps:
        return _of_maps(seen.outputs[maps[0]], seen.inputs)
    if places or seen.floats(1):
        return "regression", "the outputs are numbers"
    raise UserError(f"task: the outputs ({seen.told()}) do not tell of which kind it is; {SAY}.")


def _of_flat(output: Tensor, logits: bool) -> tuple[str, str]:
    width = output.shape[1]
    if width == 1:
        return "regression", "the output is one number"
    if _are_probabilities(output, 1):
        return "classification", f"the output is the probabilities of {width} classes"
    unit = bool(((output.float().norm(dim=1) - 1).abs() < NEAR).all())
    if unit:
        return "embedding", "the output has length 1"
    if width in WIDTHS and not logits:
        return "embedding", f"the output is {width} numbers without a name for classes"
    return "classification", f"the output is {width} numbers"


def _of_maps(output: Tensor, inputs: Mapping[str, Tensor]) -> tuple[str, str]:
    pictures = [t for t in inputs.values() if t.dim() == output.dim()]
    if output.shape[1] == 1 or any(t.shape == output.shape for t in pictures):
        return "regression", "the output is as a picture"
    if output.dim() == 4 and output.shape[2:] == (1, 1):
        return "classification", f"the output is {output.shape[1]} numbers"
    return "segmentation", "the output has classes for each pixel"


def _by_labels(seen: Seen, labels: np.ndarray) -> tuple[str, str]:
    if labels.dtype.kind == "f":
        return "regression", "labels are numbers"
    for kind, dims in (("classification", (2, 4)), ("tokens", (3,)), ("segmentation", (4, 5))):
        for place in seen.floats(*dims):
            one = labels[0].size == 1
            fits = _class_dim(seen.outputs[place], labels.shape) is not None
            if fits and one == (kind == "classification"):
                return kind, f"labels are classes, {tuple(labels.shape[1:]) or 'one'} each"
    raise UserError(
        f"task: labels of shape {labels.shape[1:]} do not go with outputs ({seen.told()}, the "
        f"batch first); {SAY}."
    )


def _class_dim(output: Tensor, shape: tuple[int, ...]) -> int | None:
    """The dimension of an output along which labels of a shape choose; of both the batch is first,
    and may be another."""
    wanted = [size for size in shape[1:] if size != 1]
    for dim in range(1, output.dim()):
        rest = [size for n, size in enumerate(output.shape) if n not in (0, dim) and size != 1]
        if rest == wanted:
            return dim
    return None


# --- to take apart -------------------------------------------------------------------------------


def _are_probabilities(output: Tensor, dim: int) -> bool:
    values = output.float()
    inside = bool(((values >= -NEAR) & (values <= 1 + NEAR)).all())
    return inside and (
        values.shape[dim] == 1 or bool(((values.sum(dim) - 1).abs() < NEAR * 10).all())
    )


def _chosen(seen: Seen, places: Sequence[int], kind: str, words: Sequence[str]) -> int:
    """The output that is the answer: by its name, else the first.

    Raises:
        UserError: there is none.
    """
    if not places:
        raise UserError(f"task: {kind} has no output to go by among {seen.told()}; {SAY}.")
    named = [n for n in places if any(word in seen.names[n].lower() for word in words)]
    return named[0] if named else places[0]


def _classes(seen: Seen, kind: str, dims: tuple[int, ...], usual: int) -> Answer:
    place = _chosen(seen, seen.floats(*dims), kind, LOGITS)
    output, dim = seen.outputs[place], usual
    if seen.labels is not None:
        found = _class_dim(output, seen.labels.shape)
        if found is None:
            raise UserError(
                f"task: {kind}: labels of shape {seen.labels.shape[1:]} do not go with the output "
                f"of shape {tuple(output.shape[1:])}."
            )
        dim = found
        _check_labels(seen.labels, max(2, output.shape[dim]), kind)
    return Answer(kind, (place,), dim, _are_probabilities(output, dim))


def _check_labels(labels: np.ndarray, classes: int, kind: str) -> None:
    if labels.dtype.kind not in "iu":
        raise UserError(f"task: {kind}: expected class numbers as labels, got {labels.dtype}.")
    if kind == "classification" and (labels.min() < 0 or labels.max() >= classes):
        raise UserError(
            f"task: labels go from {labels.min()} to {labels.max()}, and the output has {classes} "
            f"classes, 0 to {classes - 1}."
        )


def _classification(seen: Seen) -> Answer:
    return _classes(seen, "classification", (2, 4), 1)


def _segmentation(seen: Seen) -> Answer:
    answer = _classes(seen, "segmentation", (4, 5), 1)
    output = seen.outputs[answer.places[0]]
    sizes = {tuple(t.shape[1:3]) for t in seen.inputs.values() if t.dim() == 4}
    last = tuple(output.shape[1:3]) in sizes and tuple(output.shape[2:4]) not in sizes
    if seen.labels is None and last:  # pixels first, as TensorFlow has them
        dim = output.dim() - 1
        return replace(answer, dim=dim, probabilities=_are_probabilities(output, dim))
    return answer


def _tokens(seen: Seen) -> Answer:
    answer = _classes(seen, "tokens", (3,), 2)
    output = seen.outputs[answer.places[0]]
    dim = 2 if seen.labels is None else answer.dim
    answer = replace(answer, dim=dim, probabilities=_are_probabilities(output, dim))
    return replace(answer, mask=_mask(seen, output))


def _mask(seen: Seen, output: Tensor) -> str:
    """The input that says which tokens are no padding."""
    fits = (
        name
        for name, tensor in seen.inputs.items()
        if "mask" in name.lower() and tensor.shape == output.shape[:2] and seen.labels is None
    )
    return next(fits, "")


def _embedding(seen: Seen) -> Answer:
    words = ("pool", "embed", "feature", "representation")
    place = _chosen(seen, seen.floats(2, 3), "embedding", words)
    output = seen.outputs[place]
    scale = float(output.float().square().mean().sqrt()) or 1.0
    mask = _mask(seen, output) if output.dim() == 3 else ""
    return Answer("embedding", (place,), scales=(scale,), mask=mask)


def _regression(seen: Seen) -> Answer:
    places = [n for n, t in enumerate(seen.outputs) if t.is_floating_point()]
    if seen.labels is not None:
        size = seen.labels[0].size
        fitting = [n for n in places if seen.outputs[n][0].numel() == size]
        places = [_chosen(seen, fitting, "regression with such labels", ())]
    if not places:
        raise UserError(f"task: regression has no output of floats among {seen.told()}.")
    scales = tuple(float(seen.outputs[n].float().square().mean().sqrt()) or 1.0 for n in places)
    return Answer("regression", tuple(places), scales=scales)


def _boxes(seen: Seen) -> tuple[int, ...]:
    """The places of boxes (B, N, 4), scores (B, N) or (B, N, C), and classes (B, N) if any."""
    boxes = [n for n in seen.floats(3) if seen.outputs[n].shape[2] == 4]
    boxes.sort(key=lambda n: not _is_boxes(seen, n))  # four classes have that shape too
    for box in boxes:
        like = seen.outputs[box].shape[:2]
        rest = [n for n in range(len(seen.outputs)) if n != box]
        same = [n for n in rest if seen.outputs[n].shape[:2] == like]
        scores = [n for n in same if seen.outputs[n].is_floating_point()]
        rated = [n for n in scores if seen.outputs[n].dim() == 3] or scores
        classes = [n for n in same if seen.outputs[n].dim() == 2 and n not in scores]
        if rated:
            flat = seen.outputs[rated[0]].dim() == 2
            return (box, rated[0], *(classes[:1] if flat else ()))
    return ()


def _is_boxes(seen: Seen, place: int) -> bool:
    """Whether an output is called so, or is corners in their order."""
    named = [n for n, name in enumerate(seen.names) if "box" in name.lower()]
    values = seen.outputs[place]
    return place in named if named else bool((values[..., 2:] >= values[..., :2]).all())


def _detection(seen: Seen) -> Answer:
    places = _boxes(seen)
    if not places:
        raise UserError(
            "task: detection is read from boxes (B, N, 4) with scores (B, N) or (B, N, C), and "
            f"classes (B, N); the outputs are {seen.told()}. Say --task regression to compare all "
            "numbers."
        )
    boxes, rated = (seen.outputs[n].float() for n in places[:2])
    corners = bool((boxes[..., 2:] >= boxes[..., :2]).all()) and "pred_boxes" not in seen.names
    plain = bool(((rated >= 0) & (rated <= 1)).all())
    answer = Answer("detection", places, probabilities=plain, corners=corners)
    if rated.dim() == 2 and not plain:
        raise UserError("task: detection: the scores of boxes are not from 0 to 1.")
    found = answer.boxes([seen.outputs[n] for n in places])
    if not any(bool((scores >= 0.5).any()) for _, scores, _ in found):
        raise UserError(
            "task: detection: the original finds no box with a score of 0.5 in any sample, so "
            "there is nothing to agree on; say --task regression to compare all numbers."
        )
    sizes = [float(seen.outputs[n].float().square().mean().sqrt()) or 1.0 for n in places]
    return replace(answer, scales=tuple(sizes))


MADE: dict[str, Callable[[Seen], Answer]] = {
    "classification": _classification,
    "regression": _regression,
    "embedding": _embedding,
    "segmentation": _segmentation,
    "tokens": _tokens,
    "detection": _detection,
}
