"""Integers that need no data at all, for a task that has none to calibrate with."""

from __future__ import annotations

from collections.abc import Sequence

from paredown.core.units import human
from paredown.graph.quantized.forms import WEIGHT_FORMS
from paredown.graph.sites import sites
from paredown.search.offers import tables
from paredown.search.pieces import make
from paredown.search.proposal import Attempt, Proposal
from paredown.search.situation import Situation, expected_integer_bytes
from paredown.steps.step import Step

OPENS = "Task(calibration=), inputs without labels, would open int8"


def dynamic(situation: Situation) -> Sequence[Proposal]:
    """Where there are layers whose kernels round by themselves what comes to them."""
    kinds = {site.kind for site in sites(situation.model.graph)}
    if not kinds & {"linear", "matmul", "recurrent"}:
        return []
    return _offered(
        situation,
        make("quantize", scheme="int8-dynamic"),
        "8-bit integers with ranges found at each inference",
        "linear and recurrent layers compute on bytes; convolutions stay in float",
    )


def eight_bit_weights(situation: Situation) -> Sequence[Proposal]:
    """Wherever the file holds them; weights alone, rounded to nearest."""
    return _offered(
        situation,
        make("quantize_weights", bits=8, method="rtn"),
        "8-bit weights, rounded to nearest",
        "weights in a byte instead of four; activations stay in float",
    )


def four_bit_weights(situation: Situation) -> Sequence[Proposal]:
    """Where no offer for tables says the same; the smallest that needs no training either."""
    if tables.four_bit_weights(situation):
        return []
    return _offered(
        situation,
        make("quantize_weights", bits=4, method="rtn"),
        "4-bit weights, rounded to nearest, 8-bit tables",
        "two weights to a byte and a scale for each 32; activations stay in float",
    )


def _offered(situation: Situation, step: Step, title: str, reason: str) -> list[Proposal]:
    """Of a step, where the file holds its form and there is no data for more."""
    integers, form = situation.runtime.INT8_BYTES, WEIGHT_FORMS[str(step.form)]
    able = form.name in situation.runtime.FORMS and integers is not None
    if situation.calibrates or not able or not sites(situation.model.graph):
        return []
    assert integers is not None
    whole = situation.baseline.size_bytes
    size = expected_integer_bytes(situation.model, whole, integers, form.bits)
    expected = f"about {human('size', size)} ({size / whole:.2f}x)"
    attempt = Attempt((step,), title, reason, expected)
    return [Proposal(title, f"there is no calibration data; {OPENS}", (attempt,))]
