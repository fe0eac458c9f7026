"""The guards that judge by evidence; one class each. What they have seen is kept over restarts."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from paredown.core.units import amount
from paredown.ship.guard.betting import MeanBounds, MeanTest, RateTest, RatioTest, rate_bounds
from paredown.ship.guard.finding import Finding, State, wealth
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.stages import Stage
from paredown.ship.guard.tally import Tally

P99_NEEDS = 459  # samples: with fewer, the largest may well lie below the true p99
ENOUGH = 200  # of the original's latencies, before a threshold is drawn from them
LEAST_PAIRS = 20  # before disagreement may fail: a few may be one and the same request
HELD = 2000  # of the original's latest latencies


def judged(log_evidence: float, alpha: float, enough: bool, inside: bool) -> State:
    """A guard's state: refused by the test, or shown to be inside, or neither yet."""
    if log_evidence >= math.log(1 / alpha):
        return "fail"
    return "pass" if enough and inside else "no evidence"


class Errors:
    """Error rate. Hypothesis: the candidate's faults come at most at twice the original's rate in
    the same second, plus 0.1 %; it holds wherever the rate is at most the larger of the two."""

    name = "error rate"

    def __init__(self, policy: Policy):
        self._policy = policy
        self._test = RatioTest(policy.error_ratio, policy.error_floor)
        self.entered()

    def entered(self) -> None:
        """A new stage: its counts start anew, the test goes on."""
        self._answers = self._seen = self._faults = self._others = self._other_faults = 0

    def update(self, tally: Tally) -> None:
        """Take in what came since the last look."""
        ours, theirs = tally.candidate, tally.original
        self._test.add(ours.faulty, ours.seen, theirs.faulty, theirs.seen)
        self._answers += ours.answers
        self._seen += ours.seen
        self._faults += ours.faulty
        self._others += theirs.seen
        self._other_faults += theirs.faulty

    def finding(self, where: Stage) -> Finding:
        """What it says at a stage."""
        policy, shadow = self._policy, where is Stage.SHADOW
        n, needed = (self._seen, policy.min_pairs) if shadow else (self._answers, policy.min_canary)
        rate = self._faults / max(1, self._seen)
        theirs = self._other_faults / max(1, self._others)
        limit = max(policy.error_ratio * theirs, policy.error_floor)
        upper = rate_bounds(self._faults, self._seen, policy.confidence)[1]
        evidence = self._test.log_evidence()
        inside = upper <= limit + policy.margin
        state = judged(evidence, policy.alpha_error, n >= needed, inside)
        says = (
            f"{rate:.2%} of {amount(self._seen, 'answers')} failed (at most {upper:.2%}), the "
            f"original's {theirs:.2%}; {limit:.2%} are allowed"
        )
        says += _missing(n, needed, inside, f"an upper bound of {limit + policy.margin:.2%}")
        limit_of = 1 / policy.alpha_error
        return Finding(self.name, state, True, wealth(evidence), limit_of, n, needed, says)

    def to_json(self) -> dict[str, Any]:
        """What a restart goes on from."""
        return self._test.wealth.to_json()

    def restore(self, told: dict[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self._test.wealth.restore(told)


class Disagreement:
    """Disagreement of shadowed pairs. Hypothesis: its rate is at most the bound that validation
    measured. A loss of accuracy cannot be larger than it, so no label is needed."""

    name = "disagreement"

    def __init__(self, policy: Policy, upper: float):
        self._policy, self._upper = policy, upper
        self._test = RateTest(upper)
        self.entered()

    def entered(self) -> None:
        """A new stage: its counts start anew, the test goes on."""
        self._pairs = self._apart = 0

    def update(self, tally: Tally) -> None:
        """Take in what came since the last look."""
        if tally.pairs:
            self._test.add(tally.disagreements, tally.pairs)
        self._pairs += tally.pairs
        self._apart += tally.disagreements

    def finding(self, where: Stage) -> Finding:
        """What it says at a stage."""
        policy, n = self._policy, self._pairs
        rate, upper = self._apart / max(1, n), rate_bounds(self._apart, n, policy.confidence)[1]
        most = self._upper + policy.margin
        evidence, needed = self._test.log_evidence(), policy.min_pairs
        inside = upper <= most
        state = judged(evidence, policy.alpha_disagreement, n >= needed > 0, inside)
        if self._test.wealth.samples < LEAST_PAIRS:
            state = "no evidence"
        says = (
            f"{rate:.2%} of {amount(n, 'pairs')} disagree (at most {upper:.2%}); validation allows "
            f"{self._upper:.2%}" + _missing(n, needed, inside, f"an upper bound of {most:.2%}")
        )
        limit = 1 / policy.alpha_disagreement
        return Finding(self.name, state, needed > 0, wealth(evidence), limit, n, needed, says)

    def to_json(self) -> dict[str, Any]:
        """What a restart goes on from."""
        return self._test.wealth.to_json()

    def restore(self, told: dict[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self._test.wealth.restore(told)


class Latency:
    """p99 latency beside the original's in the same seconds.

    A threshold is drawn from the original's earlier answers, near their p99. Hypothesis: the
    candidate exceeds 1.10 times that threshold no more often than the original exceeds the
    threshold in the same second. Where the original exceeds it in 1 % of its answers, this is that
    the ratio of the two p99 is at most 1.10; where load shifts both, the share is another one, and
    the comparison is of another high quantile, still of the same second. Of each model one latency
    in 50 ms counts, as neighbours share their fate, and only those without shadows beside.
    It is asked at the canary's steps, where both answer clients.
    """

    name = "latency"

    def __init__(self, policy: Policy):
        self._policy = policy
        self._test = RatioTest(1.0)
        self._recent: deque[float] = deque(maxlen=HELD)  # the original's, in ms
        self.entered()

    def entered(self) -> None:
        """A new stage: its latencies start anew, the test goes on."""
        self._ours: deque[float] = deque(maxlen=10 * HELD)
        self._theirs: deque[float] = deque(maxlen=10 * HELD)

    def update(self, tally: Tally) -> None:
        """Take in what came since the last look."""
        ours, theirs = np.array(tally.candidate.quiet), np.array(tally.original.quiet)
        if len(self._recent) >= ENOUGH and len(ours):
            threshold = float(np.quantile(np.array(self._recent), 0.99))
            slow = int((ours > self._policy.latency_ratio * threshold).sum())
            self._test.add(slow, len(ours), int((theirs > threshold).sum()), len(theirs))
        self._recent.extend(theirs)
        self._ours.extend(ours)
        self._theirs.extend(theirs)

    def finding(self, where: Stage) -> Finding:
        """What it says at a stage."""
        policy, asked = self._policy, where is Stage.CANARY
        n, needed = min(len(self._ours), len(self._theirs)), min(policy.min_canary, P99_NEEDS)
        evidence = self._test.log_evidence()
        ratio = self._ratio() if n >= needed else None
        inside = ratio is not None and ratio <= policy.latency_ratio
        state = judged(evidence, policy.alpha_latency, n >= needed, inside)
        if ratio is None:
            says = f"{n:,} {'latency' if n == 1 else 'latencies'} of both" + _missing(
                n, needed, True, ""
            )
        else:
            says = f"p99 is {ratio:.2f} x the original's; {policy.latency_ratio:.2f} x is allowed"
        limit = 1 / policy.alpha_latency
        return Finding(self.name, state, asked, wealth(evidence), limit, n, needed, says)

    def _ratio(self) -> float:
        """Of the p99 of this stage; 0 / 0 is 1."""
        ours, theirs = (float(np.quantile(each, 0.99)) for each in (self._ours, self._theirs))
        return ours / theirs if theirs else 1.0 if not ours else math.inf

    def to_json(self) -> dict[str, Any]:
        """What a restart goes on from."""
        return self._test.wealth.to_json()

    def restore(self, told: dict[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self._test.wealth.restore(told)


class Score:
    """Score from labels that come late, of both models on the same examples, from 0 to 1.
    Hypothesis: the mean falls by at most the allowed drop."""

    name = "score"

    def __init__(self, policy: Policy):
        self._policy = policy
        self._test = MeanTest(policy.max_drop, low=-1.0)
        self.entered()

    def entered(self) -> None:
        """A new stage: its labels are counted anew, the test goes on."""
        self._bounds = MeanBounds(self._policy.confidence)
        self._alone = 0  # labels for which the other model's answer is not known

    def update(self, tally: Tally) -> None:
        """Take in what came since the last look."""
        self._test.add(tally.drops)
        self._alone += tally.original.labels + tally.candidate.labels - 2 * tally.labels_of_both
        self._bounds.add([(1 + drop) / 2 for drop in tally.drops])

    def finding(self, where: Stage) -> Finding:
        """What it says at a stage."""
        policy, n = self._policy, self._bounds.samples
        low, high = (2 * each - 1 for each in self._bounds.bounds())
        most = policy.max_drop + policy.margin
        evidence = self._test.log_evidence()
        state = judged(evidence, policy.alpha_score, n >= max(1, policy.min_labels), high <= most)
        says = "no label has come"
        if self._alone:
            says = f"0 pairs of labels; {self._alone:,} labels of one model alone"
        if n:
            mean = 2 * self._bounds.total / n - 1
            says = (
                f"the score fell by {mean:+.4f} ({low:+.4f} to {high:+.4f}) over "
                f"{amount(n, 'pairs')} of labels; {policy.max_drop:.4f} is allowed"
            )
            says += _missing(n, policy.min_labels, high <= most, f"an upper bound of {most:.4f}")
        limit, needed = 1 / policy.alpha_score, policy.min_labels
        return Finding(self.name, state, needed > 0, wealth(evidence), limit, n, needed, says)

    def to_json(self) -> dict[str, Any]:
        """What a restart goes on from."""
        return self._test.wealth.to_json()

    def restore(self, told: dict[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self._test.wealth.restore(told)


def _missing(n: int, needed: int, inside: bool, bound: str) -> str:
    if n < needed:
        return f"; {needed - n:,} more {'is' if needed - n == 1 else 'are'} needed"
    return "" if inside else f"; going on needs {bound}"
