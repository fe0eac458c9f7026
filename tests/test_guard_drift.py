"""Drift: of floats, tokens, pictures and outputs; what chance gives; NaN; profiles on disk."""

import json
import time
import tracemalloc

import numpy as np
import pytest

from paredown.core.errors import UserError
from paredown.ship.guard.drift import distance
from paredown.ship.guard.features import features
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.profile import HELD, Profile
from paredown.ship.guard.stages import Stage
from paredown.ship.guard.watch import Drift


def floats(draws, n):
    return draws.normal(size=(n, 16)).astype(np.float32)


def moved(draws, n):
    return floats(draws, n) + 1.0


def tokens(draws, n):
    return np.minimum(draws.zipf(1.3, (n, 40)), 30_000).astype(np.int64)


def other_tokens(draws, n):
    return tokens(draws, n) + 11


def pictures(draws, n):
    base = draws.random((n, 1, 1, 1)) * 0.5
    return (base + 0.5 * draws.random((n, 3, 12, 12))).astype(np.float32)


def no_blue(draws, n):
    made = pictures(draws, n)
    made[:, 2] *= 0.3
    return made


def bytes_of(draws, n):
    return (pictures(draws, n) * 255).astype(np.uint8)


def darker(draws, n):
    return (pictures(draws, n) * 130).astype(np.uint8)


def logits(draws, n):
    return draws.normal(size=(n, 10)).astype(np.float32)


def one_class(draws, n):
    made = logits(draws, n)
    made[:, 3] += 1.5
    return made


def constant(draws, n):
    return np.full((n, 4), 2.5)


def another_constant(draws, n):
    return np.full((n, 4), 2.0)


def with_nan(draws, n):
    made = floats(draws, n)
    made[draws.random(n) < 0.2, 3] = np.nan
    return made


PAIRS = {
    "floats": (floats, moved),
    "tokens": (tokens, other_tokens),
    "pictures": (pictures, no_blue),
    "bytes": (bytes_of, darker),
    "constant": (constant, another_constant),
    "NaN": (floats, with_nan),
}


def watched(usual, live, kind="input", windows=2, n=500, seed=0):
    """What a guard says of so many windows of live data."""
    draws = np.random.default_rng(seed)
    reference = [{"x": usual(draws, 100)} for _ in range(20)]
    profile = Profile.of(reference) if kind == "input" else Profile.of([], reference)
    drift = Drift(kind, profile, Policy(min_drift=n))
    for _ in range(windows):
        drift.update([{"x": live(draws, 50)} for _ in range(n // 50)])
        drift.window()
    return drift


@pytest.mark.parametrize("name", PAIRS)
def test_a_drift_is_seen_in_two_windows_and_the_usual_is_not(name):
    usual, other = PAIRS[name]
    once = watched(usual, other, windows=1).finding(Stage.CANARY)
    assert once.state == "no evidence" and once.evidence > 0.2
    twice = watched(usual, other).finding(Stage.CANARY)
    assert twice.state == "fail" and twice.action == "pause"
    same = watched(usual, usual, windows=4)
    assert same.finding(Stage.CANARY).state == "pass", same.to_json()


def test_outputs_are_watched_by_class():
    drift = watched(logits, one_class, kind="output")
    assert drift.finding(Stage.CANARY).state == "fail"
    assert drift.distances["output x: class"].beyond(0.2)
    assert watched(logits, logits, kind="output").finding(Stage.CANARY).state == "pass"


def test_a_blue_channel_is_found_by_its_channel():
    drift = watched(pictures, no_blue)
    index = {key: each.psi for key, each in drift.distances.items()}
    assert max(index, key=index.get) == "input x: channel 2"


def test_equal_distributions_are_not_far_at_any_count():
    """The plain index of 50 and 60 examples in ten bins is 0.33 on average."""
    draws = np.random.default_rng(0)
    for n, m in ((50, 60), (500, 500), (100, 20_000)):
        shares = [0.1] * 10
        pairs = [(draws.multinomial(n, shares), draws.multinomial(m, shares)) for _ in range(400)]
        found = [distance(*pair, n, m) for pair in pairs]
        assert np.mean([each.psi for each in found]) < 0.5 * 9 * (1 / n + 1 / m)
        assert np.mean([each.beyond(0.2) for each in found]) < 0.02
        assert np.mean([each.ks > each.ks_chance for each in found]) < 0.01


def test_psi_and_ks_are_their_formulas():
    found = distance([100, 300, 600], [300, 300, 400], 10**9, 10**9)
    p, q = np.array([0.1, 0.3, 0.6]), np.array([0.3, 0.3, 0.4])
    assert found.psi == pytest.approx(((q - p) * np.log(q / p)).sum(), abs=1e-6)
    assert found.ks == pytest.approx(0.2)


def test_nan_is_counted_apart_and_spoils_nothing_else():
    batch = np.array([[1.0, 2.0, np.nan], [np.inf, -np.inf, np.nan], [1.0, 1.0, 1.0]])
    found = features(batch)
    assert found["not finite"].tolist() == [1, 1, 0]
    assert sorted(found["values"]) == [1, 1, 1, 1, 2] and found["mean"].tolist() == [1.5, 1.0]
    assert all(np.isfinite(each).all() for each in found.values())
    assert features(np.array([["a"]])) == {} and features(np.zeros((0, 3))) == {}
    assert features(np.float32(3.0))["values"].tolist() == [3.0]
    assert np.isfinite(features(np.array([[1e308, -1e308]]))["spread"]).all()


def test_memory_and_time_are_bounded():
    big = np.broadcast_to(np.float32(0.5), (300, 3, 512, 512))  # 940 MB, were it copied
    started = time.process_time()
    tracemalloc.start()
    assert all(len(each) <= 256 * 64 for each in features(big).values())
    drift = Drift("input", Profile.of([{"x": big}]), Policy())
    drift.update([{"x": big}] * 64)
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()
    assert max(drift._examples.values()) < 10
    profile = Profile.of({"x": floats(np.random.default_rng(1), 500)} for _ in range(200))
    assert time.process_time() - started < 20
    held = {key: sum(each.counts) for key, each in profile.histograms.items()}
    assert all(count <= 2 * HELD for count in held.values()), held


def test_names_that_the_profile_has_not_are_told_not_judged():
    drift = Drift("input", Profile.of([{"x": np.zeros((10, 2))}]), Policy(min_drift=10))
    for number in range(1000):
        drift.update([{f"y{number}": np.ones((20, 2))}])
    drift.window()
    assert len(drift.unknown) == 100 and drift.finding(Stage.CANARY).state == "no evidence"
    drift.update([{"x": np.full((20, 2, 2, 2, 2), 7), "z": np.array(["a"])}])
    drift.window()


def test_a_profile_goes_round_through_its_file(tmp_path):
    path, draws = tmp_path / "profile.json", np.random.default_rng(0)
    batches = [{"x": pictures(draws, 50), "ids": tokens(draws, 50)}]
    profile = Profile.of(batches, [{"logits": logits(draws, 50)}])
    profile.save(path)
    assert Profile.load(path) == profile
    assert path.stat().st_size < 20_000
    told = json.loads(path.read_text())
    name = next(iter(told["histograms"]))
    for wrong in (
        {}, [], {"format": 2, "histograms": {}}, {"format": 1, "histograms": {"a": 1}},
        {"format": 1, "histograms": {name: {**told["histograms"][name], "counts": [1]}}},
        {"format": 1, "histograms": {name: {**told["histograms"][name], "edges": [1, 0]}}},
        {"format": 1, "histograms": {name: {**told["histograms"][name], "edges": [float("nan")]}}},
    ):  # fmt: skip
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="is no profile"):
            Profile.load(path)
    path.write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match="is no profile"):
        Profile.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        Profile.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="no example"):
        Profile.of([])
