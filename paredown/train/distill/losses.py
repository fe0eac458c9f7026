"""How far a student is from its teacher, as pure functions of tensors: outputs and inner values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-12


# --- outputs ---------------------------------------------------------------------------------


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) in nats over the last dimension; (..., C) twice -> (...).

    A class that q gives no probability counts nothing, also where p gives it none.

    Example:
        >>> half = torch.tensor([0.5, 0.5]).log()
        >>> divergence(torch.tensor([1.0, 0.0]).log(), half).exp()
        tensor(2.)
    """
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)


def softened(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 4.0
) -> Tensor:
    """KL of the outputs at a temperature, times its square (Hinton et al., arXiv 1503.02531).

    Logits (N, C) twice -> (). The square keeps gradients as large as those of a loss on labels.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> float(softened(logits + 5, logits)), bool(softened(-logits, logits) > 0)
        (0.0, True)
    """
    log_q = F.log_softmax(teacher / temperature, -1)  # (N, C)
    log_p = F.log_softmax(student / temperature, -1)  # (N, C)
    return divergence(log_q, log_p).mean() * temperature**2


def decoupled(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: float = 4.0,
    others: float = 8.0,
) -> Tensor:
    """KL of "the target or not", plus ``others`` times KL among the rest (arXiv 2203.08679).

    Logits (N, C) twice, target (N,) -> (). Without a target it is what the teacher says. In
    `softened` the second part is weighted by how unsure the teacher is, so a sure teacher
    teaches little.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 9.0]])
        >>> flat = torch.tensor([[2.0, 1.0, 9.0]])
        >>> float(decoupled(logits, logits)), bool(decoupled(flat, logits) > softened(flat, logits))
        (0.0, True)
    """
    chosen = teacher.argmax(-1) if target is None else target  # (N,)
    whether_q, rest_q = _decouple(teacher / temperature, chosen)
    whether_p, rest_p = _decouple(student / temperature, chosen)
    found = divergence(whether_q, whether_p) + others * divergence(rest_q, rest_p)  # (N,)
    return found.mean() * temperature**2


def _decouple(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the target and of not the target (N, 2), and among the rest (N, C)."""
    every = F.log_softmax(logits, -1)
    of_target = every.gather(-1, target[:, None])  # (N, 1)
    rest = every.scatter(-1, target[:, None], -torch.inf)  # (N, C)
    none = rest.isneginf().all(-1, keepdim=True)  # every other class is masked out
    total = rest.masked_fill(none, 0.0).logsumexp(-1, keepdim=True)  # (N, 1); finite slopes
    of_rest = total.masked_fill(none, -torch.inf)
    return torch.cat([of_target, of_rest], -1), rest - total


def squared(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Mean squared error (arXiv 1312.6184), over what is finite; any shape twice -> ().

    Example:
        >>> squared(torch.tensor([1.0, -torch.inf]), torch.tensor([3.0, -torch.inf]))
        tensor(4.)
    """
    finite = teacher.isfinite() & student.isfinite()
    error = torch.where(finite, student - teacher, 0.0)
    return error.square().sum() / finite.sum().clamp(min=1)


# --- inner values, channels second: (B, C, *places) ------------------------------------------


def hints(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error beside the teacher's energy (FitNets, arXiv 1412.6550); (B, C, *places) -> ().

    0 is the same, 1 is as far off as zeros are.

    Example:
        >>> values = torch.tensor([[1.0, 2.0]])
        >>> hints(values, values), hints(0 * values, values)
        (tensor(0.), tensor(1.))
    """
    return (student - teacher).square().mean() / teacher.square().mean().clamp(min=TINY)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """How differently the energy of the channels lies over the places (arXiv 1612.03928).

    (B, C, *places) and (B, D, *places) -> (); 0 is the same, 2 is no place in common.

    Example:
        >>> left, right = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 3.0], [0.0, 3.0]]])
        >>> attention_transfer(left, 5 * left), attention_transfer(left, right)
        (tensor(0.), tensor(2.))
    """
    ours, theirs = (F.normalize(x.square().mean(1).flatten(1)) for x in (student, teacher))
    return (ours - theirs).square().sum(1).mean()


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """How differently the examples of the batch resemble each other (arXiv 1907.09682).

    (B, C, *places) and (B, D, *others) -> (). B times the paper's, so that it does not shrink with
    the batch.

    Example:
        >>> x = torch.eye(2)
        >>> similarity(x, 3 * x), bool(similarity(x, torch.ones(2, 5)) > 0)
        (tensor(0.), True)
    """
    rows = (x.flatten(1) for x in (student, teacher))
    ours, theirs = (F.normalize(x @ x.T) for x in rows)  # (B, B)
    return (ours - theirs).square().sum(1).mean()


def attention_maps(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of where the teacher's heads look from where the student's do, in nats.

    Probabilities (B, heads, queries, keys) twice -> (). Where the numbers of heads differ, their
    means are compared. (MiniLM, arXiv 2002.10957; TinyBERT, arXiv 1909.10351, on scores.)

    Example:
        >>> maps = torch.tensor([[[[0.5, 0.5]], [[1.0, 0.0]]]])
        >>> attention_maps(maps, maps), attention_maps(maps.mean(1, keepdim=True), maps)
        (tensor(0.), tensor(0.))
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1), teacher.mean(1)
    log_q, log_p = (x.clamp(min=TINY).log() for x in (teacher, student))
    return (teacher * (log_q - log_p)).sum(-1).mean()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "softened": softened,
    "decoupled": decoupled,
    "squared": squared,
    "hints": hints,
    "attention_transfer": attention_transfer,
    "similarity": similarity,
    "attention_maps": attention_maps,
}
OUTPUTS = ("softened", "decoupled", "squared")  # the rest compare inner values
INTERNAL = tuple(name for name in LOSSES if name not in OUTPUTS)


# --- values of different shapes --------------------------------------------------------------

_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both at the smaller resolution of the two, by adaptive pooling; channels stay as they are.

    (B, C, *places) and (B, D, *places); where the places have another number of dimensions, such
    as tokens beside pixels, both become means over them: (B, C) and (B, D).

    Example:
        >>> a, b = alike(torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, 4, 16))
        >>> a.shape, b.shape
        (torch.Size([2, 3, 4, 8]), torch.Size([2, 5, 4, 8]))
    """
    ours, theirs = student.shape[2:], teacher.shape[2:]
    if ours == theirs:
        return student, teacher
    if len(ours) != len(theirs) or len(ours) not in _POOLS:
        return (student.flatten(2).mean(2) if len(ours) else student), (
            teacher.flatten(2).mean(2) if len(theirs) else teacher
        )
    size = [min(pair) for pair in zip(ours, theirs, strict=True)]
    pool = _POOLS[len(ours)]
    return pool(student, size), pool(teacher, size)  # type: ignore[arg-type]


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two representations of N examples (arXiv 1905.00414).

    (N, C) and (N, D) -> 0 (nothing in common) to 1 (the same but for rotation and size).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> round(linear_cka(x, 3 * x.flip(1) + 7), 4)
        1.0
    """
    grams = [rows @ rows.T for rows in (a.double() - a.double().mean(0) for a in (x, y))]  # (N, N)
    norms = grams[0].norm() * grams[1].norm()
    return float((grams[0] * grams[1]).sum() / norms.clamp(min=TINY))
