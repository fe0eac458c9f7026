"""What a user gives the guard that makes no sense: each is told in a sentence, none is dropped."""

import numpy as np
import pytest

import paredown
from benchmarks.guard_simulation import BOUND
from paredown.core.errors import UserError
from paredown.ship.guard.observation import Observation


@pytest.mark.parametrize(
    "given, said",
    [
        ({"model": "x"}, "model: expected one of original, candidate, got 'x'"),
        ({"model": np.zeros(3)}, "model: expected one of"),
        ({"fault": "Crash"}, "fault: expected one of crash, nan"),
        ({"fault": ["crash"]}, "fault: expected one of"),
        ({"agreed": "no"}, "agreed: expected True, False or None, got 'no'"),
        ({"agreed": 1}, "agreed: expected True, False or None"),
        ({"shadow": "yes"}, "shadow: expected True or False"),
        ({"latency_ms": "x"}, "latency_ms: expected a number or None, got 'x'"),
        ({"score": True}, "score: expected a number or None"),
        ({"inputs": np.zeros(3)}, "inputs: expected arrays by name"),
        ({"outputs": {"y": [1.0]}}, "outputs: expected arrays by name"),
    ],
)
def test_an_observation_of_a_wrong_kind_is_refused(given, said):
    with pytest.raises(UserError) as told:
        Observation(**{"model": "candidate", **given})
    assert str(told.value).startswith(said)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"score": 2}, "score: expected a number from 0 to 1, got 2."),
        ({"score": -5}, "score: expected a number from 0 to 1, got -5."),
        ({"latency_ms": float("nan")}, "latency_ms: expected a number from 0 up, got nan."),
        ({"latency_ms": -1}, "latency_ms: expected a number from 0 up, got -1."),
    ],
)
def test_a_number_out_of_range_is_told_by_the_guard_and_counted_by_a_server(given, said):
    seen, guard = Observation("candidate", **given), paredown.Guard(BOUND)
    with pytest.raises(UserError) as told:
        guard.observe(seen)
    assert str(told.value) == said
    guard.rollout.observe(seen)  # as `paredown serve` does: it goes on
    guard.look()
    assert guard.status()["invalid"] == 1


def test_numbers_of_numpy_are_numbers_and_a_pair_without_a_distance_is_a_pair():
    guard = paredown.Guard(BOUND)
    given = {"latency_ms": np.float32(2.0), "agreed": np.bool_(False), "score": np.int64(1)}
    seen = Observation("candidate", distance=float("inf"), **given)
    guard.observe(seen)
    guard.look()
    window = guard.rollout._windows.open
    assert (window.pairs, window.disagreements, window.distances) == (1, 1, 0)


def test_keys_observations_and_gauges_are_checked():
    guard = paredown.Guard(BOUND)
    for key in (None, 5, ["x"]):
        with pytest.raises(UserError, match="key: expected bytes or a text, got"):
            guard.route(key)
    assert guard.route("\ud800").model == "original"  # a client may send anything as a text
    for wrong in ({"model": "candidate"}, None, Observation):
        with pytest.raises(UserError, match="observation: expected an Observation, got"):
            guard.observe(wrong)
    for wrong in ({"queue": "x"}, {"queue": float("nan")}, {"memory_bytes": -1}):
        with pytest.raises(UserError, match="expected a number from 0 up"):
            guard.gauge(**wrong)


def test_bounds_are_of_the_right_kinds():
    with pytest.raises(
        UserError, match=r"profile: expected a Profile or None, got 'profile\.json'"
    ):
        paredown.Bound.of(1, 100, "profile.json")
    with pytest.raises(UserError, match=r"upper: expected a number, got '0\.1'"):
        paredown.Bound(0.0, "0.1")
    with pytest.raises(UserError, match="disagreements: expected a whole number from 0 to 100"):
        paredown.Bound.of(101, 100)
