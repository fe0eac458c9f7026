"""The candidate beside the original on real examples, before any client's request: what the live
traffic is then held against."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from paredown.core.errors import UserError
from paredown.core.files import write_atomically
from paredown.core.results import Run
from paredown.ship.guard.bound import Bound
from paredown.ship.guard.profile import Profile
from paredown.ship.serve.compare import Agreement, Outputs, bad_numbers, distance, kind_of
from paredown.ship.serve.pair import Pair, numbers
from paredown.ship.serve.refused import Refused
from paredown.ship.serve.workers import Answer, Fault, Worker

CONFIDENCE = 0.95
SURE = 0.999  # that more differ than the run saw
AT_ONCE = 8  # examples that are run at the same time
FILE, PROFILE = "validation.json", "profile.json"


@dataclass(frozen=True)
class Validation:
    """What was found.

    Attributes:
        original, candidate: SHA-256 of the files.
        examples: how many were run.
        disagreed: of them.
        rate, upper: the share, and its upper bound at 95 % (Clopper and Pearson, one-sided).
        kind: how the models are compared, as an `Agreement` has it.
        bound: of that; the largest relative distance that was seen.
        why: what was found, in a sentence.
        profile: SHA-256 of the profile's file, by which another one is known; "" for none.
    """

    original: str
    candidate: str
    passed: bool
    examples: int
    disagreed: int
    rate: float
    upper: float
    kind: str
    bound: float
    why: str
    profile: str = ""

    @property
    def agreement(self) -> Agreement:
        return Agreement(self.kind, self.bound)

    def saved(self, folder: Path, profile: Profile | None) -> Validation:
        """It, kept for a restart with its profile.

        Raises:
            UserError: they cannot be written.
        """
        kept = self
        if profile is not None:
            profile.save(folder / PROFILE)
            kept = replace(self, profile=_digest(folder / PROFILE))
        write_atomically(folder / FILE, json.dumps(asdict(kept)).encode())
        return kept

    @staticmethod
    def kept(folder: Path, original: str, candidate: str) -> Validation | None:
        """That of these two files, None where there is none, or where its profile is gone or
        another's: without it nobody would look at drift."""
        try:
            told = json.loads((folder / FILE).read_bytes())
            found = Validation(**told)
            same = (found.original, found.candidate) == (original, candidate)
            whole = not found.profile or _digest(folder / PROFILE) == found.profile
            return found if same and whole and "profile" in told else None
        except (OSError, ValueError, TypeError):
            return None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def upper_bound(events: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The upper bound of a share, by Clopper and Pearson.

    Example:
        >>> round(upper_bound(0, 300), 4), upper_bound(3, 3) < 1
        (0.0099, True)
    """
    from scipy.special import betaincinv  # half a second, which a restart does without

    if events >= n:
        return float(np.nextafter(1, 0))
    return float(betaincinv(events + 1, n - events, confidence))


@dataclass(frozen=True)
class Known:
    """What the run saw of the two files on its test split: at most so many of the examples are
    named another class.

    Example:
        >>> Known(3, 400).beyond(40, 400), Known(3, 400).beyond(6, 400)
        (True, False)
    """

    differing: int
    examples: int

    @staticmethod
    def of(run: Run) -> Known | None:
        """None of a run that names no classes."""
        counts, after = run.details.get("flip_counts"), run.on_device.get("compressed")
        if not counts or after is None or after.score is None or not after.score_in_points:
            return None
        wrong = round(counts["examples"] * (1 - after.score))  # both may be, each in its own way
        return Known(counts["now_right"] + max(counts["now_wrong"], wrong), counts["examples"])

    def beyond(self, disagreed: int, count: int) -> bool:
        """Whether that many of other examples are more than chance makes of it."""
        least = 1 - upper_bound(count - disagreed, count, SURE)
        return least > upper_bound(self.differing, self.examples, SURE)


def bound_of(found: Validation, folder: Path) -> Bound:
    """The bound for a rollout, with the profile where one was made.

    Raises:
        UserError: it cannot be read.
    """
    profile = Profile.load(folder / PROFILE) if found.profile else None
    return Bound(found.rate, found.upper, profile)


async def validate(
    pair: Pair,
    examples: Sequence[list[np.ndarray]],
    digests: tuple[str, str],
    known: Known | None = None,
) -> tuple[Validation, Profile | None]:
    """Run both models on the examples.

    A candidate that differs from the original more often than the run saw does not pass. Examples
    for which the original gives NaN or infinity say nothing, and are left out.

    Raises:
        UserError: there are no examples, or the original does not answer them.
    """
    if not examples:
        raise UserError("validation: there are no examples.")
    originals = await _all(pair.original, examples)
    if not all(isinstance(each, Answer) for each in originals):
        said = next(each for each in originals if not isinstance(each, Answer))
        raise UserError(f"validation: the original does not answer the examples: {said}")
    answered = [each.outputs for each in originals if isinstance(each, Answer)]
    whole = [n for n, outputs in enumerate(answered) if not bad_numbers(outputs)]
    if not whole:
        raise UserError("validation: the original gives NaN or infinity for all of the examples.")
    left_out = len(examples) - len(whole)
    examples, ours = [examples[n] for n in whole], [answered[n] for n in whole]
    assert pair.candidate is not None
    theirs = await _all(pair.candidate, examples)
    faults = [_fault(pair, *each) for each in zip(ours, theirs, examples, strict=True)]
    told = [fault for fault in faults if fault]
    others = [each.outputs for each in theirs if isinstance(each, Answer)]
    if told:
        why = f"{len(told)} of {len(examples)} examples failed: {told[0]}"
        return Validation(*digests, False, len(examples), 0, 1.0, 1.0, "exact", 0.0, why), None
    named = [pair.named(arrays) for arrays in examples]
    found = _compared(ours, others, digests)
    if known and found.kind == "classes" and known.beyond(found.disagreed, found.examples):
        seen = f"and the run saw at most {known.differing} of {known.examples}"
        found = replace(found, passed=False, why=f"{found.why}, {seen}")
    if left_out:
        beside = f"{left_out} more are left out, as the original gives NaN or infinity for them"
        found = replace(found, why=f"{found.why}; {beside}")
    return found, _profile(named, others)


async def _all(
    worker: Worker, examples: Sequence[list[np.ndarray]]
) -> list[Answer | BaseException]:
    found: list[Answer | BaseException] = []
    for start in range(0, len(examples), AT_ONCE):
        asked = (worker.infer(arrays) for arrays in examples[start : start + AT_ONCE])
        found += await asyncio.gather(*asked, return_exceptions=True)
    return found


def _profile(inputs: Sequence[Outputs], outputs: Sequence[Outputs]) -> Profile | None:
    """Of what holds numbers; None where nothing does."""
    try:
        return Profile.of(map(numbers, inputs), map(numbers, outputs))
    except UserError:
        return None


def _fault(
    pair: Pair, original: Outputs, candidate: Answer | BaseException, arrays: list[np.ndarray]
) -> str:
    if isinstance(candidate, (Fault, Refused)):
        return str(candidate)
    if isinstance(candidate, BaseException):
        raise candidate
    return pair.fault(original, candidate.outputs, arrays)[1]


def _compared(
    originals: Sequence[Outputs], candidates: Sequence[Outputs], digests: tuple[str, str]
) -> Validation:
    kind, count = kind_of(originals[0]), len(originals)
    bound = max(map(distance, originals, candidates))
    agreement = Agreement(kind, bound)
    disagreed = sum(not agreement.agree(*each) for each in zip(originals, candidates, strict=True))
    upper = upper_bound(disagreed, count)
    what = "name another class than the original" if kind == "classes" else "differ"
    beside = f"at most {upper:.2%} with {CONFIDENCE:.0%} confidence"
    why = f"{disagreed} of {count} examples {what}, {beside}"
    passed = bool(np.isfinite(bound)) and 2 * disagreed < count
    return Validation(
        *digests, passed, count, disagreed, disagreed / count, upper, kind, bound, why
    )
