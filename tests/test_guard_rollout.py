"""A rollout under simulated traffic: planted faults, hands, clocks, disks, and no false alarm."""

import dataclasses
import json
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from benchmarks.guard_faults import FAULTS, ends, hears_nothing_wrong
from benchmarks.guard_simulation import BOUND, Clock, Model, Simulation
from paredown.core.errors import UserError
from paredown.core.files import FAILPOINT
from paredown.ship.guard.journal import Journal
from paredown.ship.guard.observation import CANDIDATE, ORIGINAL, Observation
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.rollout import Bound, Rollout, Stage
from paredown.ship.guard.router import bucket

TINY = Policy(
    steps=(2500, 5000), dwell_s=20.0, soak_s=20.0, window_s=10.0, min_canary=50, min_pairs=50,
    margin=0.2, quiet_share=0.0,
)  # fmt: skip


def sent(rollout, fault, count=5, model=CANDIDATE):
    for _ in range(count):
        rollout.observe(Observation(model, latency_ms=2.0, fault=fault))


def small(journal=None, **given):
    """A simulated rollout that takes a minute and a half."""
    return Simulation(policy=TINY, journal=journal, **given).begin()


def test_a_good_candidate_goes_all_the_way():
    made = Simulation().begin()
    assert made.run(900, Stage.PROMOTED) is Stage.PROMOTED
    moves = [(event.kind, str(event.stage), event.weight) for event in made.events]
    assert moves == [
        ("begin", "validate", 0),
        ("validated", "shadow", 0),
        ("advance", "canary", 2500),
        ("advance", "canary", 5000),
        ("advance", "soak", 10000),
        ("promote", "promoted", 10000),
    ]
    assert made.run(150) is Stage.PROMOTED  # and stays guarded
    sent(made.rollout, "crash")
    assert made.rollout.stage is Stage.ROLLED_BACK and made.rollout.weight == 0


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    stage, second = ends(name, seed=0)
    assert stage is FAULTS[name][1]
    if "always" in name:
        assert second == 1
    if "from the canary on" in name or name == "hangs":
        assert second <= 60


def test_good_candidates_are_not_rolled_back():
    """A few here; `benchmarks/guard_soak.py` has a thousand."""
    for seed in range(1, 7):
        made = Simulation(Model("error", 0.0005), Model("error", 0.0005), seed=seed).begin()
        assert made.run(900, Stage.PROMOTED) is Stage.PROMOTED, made.events[-1]


def test_hard_faults_roll_back_before_the_next_tick():
    for fault, count in (("crash", 3), ("nan", 3), ("shape", 3), ("deadline", 3), ("error", 5)):
        made = Simulation().begin()
        sent(made.rollout, fault, count - 1)
        assert made.rollout.stage is Stage.SHADOW
        sent(made.rollout, fault, 1)
        assert made.rollout.stage is Stage.ROLLED_BACK, fault
        assert made.rollout.route(b"any") == made.rollout.route(b"other")
        assert [event.kind for event in made.rollout.tick()][-1] == "roll back"


def test_faults_apart_in_time_or_in_a_row_broken_are_left_to_the_statistics():
    made = Simulation().begin()
    for _ in range(6):
        sent(made.rollout, "nan", 2)
        sent(made.rollout, None, 1)
        made.clock.passes(11.0)
    assert made.rollout.stage is Stage.SHADOW


def test_where_the_original_fails_as_well_it_pauses():
    made = Simulation().begin()
    made.run(40, Stage.CANARY)
    sent(made.rollout, "crash", 60, ORIGINAL)
    sent(made.rollout, "crash", 5)
    assert made.rollout.stage is Stage.PAUSED
    assert "the original fails as well" in made.rollout.position.why


def test_no_evidence_is_never_a_pass_and_silence_pauses_then_rolls_back():
    made = Simulation(Model(answers=False)).begin()
    assert {guard["state"] for guard in made.rollout.status()["guards"]} == {"no evidence"}
    stages = [made.run(10) for _ in range(11)]
    assert stages == 2 * [Stage.SHADOW] + 7 * [Stage.PAUSED] + 2 * [Stage.ROLLED_BACK]
    nothing = [guard for guard in made.rollout.status()["guards"] if guard["state"] == "pass"]
    assert not nothing


def test_a_pause_for_silence_ends_with_it():
    silence = Simulation(lambda second: Model(answers=second >= 35)).begin()
    assert silence.run(34) is Stage.PAUSED
    assert silence.run(20, Stage.SHADOW) is Stage.SHADOW
    assert silence.run(900, Stage.PROMOTED) is Stage.PROMOTED


def test_a_resume_by_hand_counts_silence_anew():
    made = Simulation(Model(answers=False)).begin()
    assert made.run(90) is Stage.PAUSED  # the next silent window would roll back
    made.rollout.resume("the pipe is mended", by="me")
    assert [made.run(10) for _ in range(3)] == [Stage.SHADOW, Stage.SHADOW, Stage.PAUSED]
    assert "for 3 windows" in made.rollout.position.why
    assert made.run(60) is Stage.PAUSED and made.run(10) is Stage.ROLLED_BACK


def test_a_few_pairs_of_one_request_do_not_roll_back():
    made = Simulation().begin()
    for pairs in (5, 14):
        for _ in range(pairs):
            made.rollout.observe(Observation(CANDIDATE, shadow=True, agreed=False))
        made.rollout.tick()
        assert made.rollout.stage is Stage.SHADOW
    made.rollout.observe(Observation(CANDIDATE, shadow=True, agreed=False))
    made.rollout.tick()
    assert made.rollout.stage is Stage.ROLLED_BACK
    assert "100.00% of 20 pairs disagree" in made.rollout.position.why


@pytest.mark.parametrize("move", ["pause", "promote", "abort", "resume"])
def test_a_reason_stays_one_line(move):
    made = Simulation().begin()
    if move == "resume":
        made.rollout.pause("for a moment", by="me")
    getattr(made.rollout, move)("slow\nsince\x1b[31m noon \ud800", by="me")
    assert made.rollout.tick()[-1].reason == r"slow\nsince\x1b[31m noon \ud800"


def test_one_of_something_is_told_so():
    made = Simulation().begin()
    for model in (CANDIDATE, ORIGINAL):
        made.rollout.observe(Observation(model, latency_ms=1.0, agreed=True, score=1.0))
    made.rollout.observe(Observation(CANDIDATE, score=1.0, score_of_other=1.0))
    made.clock.passes(10.0)
    made.rollout.tick()
    says = {each["name"]: each["says"] for each in made.rollout.status()["guards"]}
    assert "of 1 answer failed" in says["error rate"]
    assert "over 1 pair of labels;" in says["score"]
    assert says["data"] == "data in 1 window"


def test_a_promoted_candidate_that_nobody_asks_stays():
    made = small()
    assert made.run(400, Stage.PROMOTED) is Stage.PROMOTED
    for _ in range(200):
        made.clock.passes(1.0)
        made.rollout.tick()
    assert made.rollout.stage is Stage.PROMOTED


def test_hands():
    made = small()
    rollout = made.rollout
    made.run(60, Stage.CANARY)
    for move in (rollout.promote, rollout.pause, rollout.resume):
        with pytest.raises(UserError, match="reason"):
            move("  ", "me")
    with pytest.raises(UserError, match="expected paused"):
        rollout.resume("why not", "me")
    rollout.pause("to look", "me")
    weight = rollout.weight
    assert made.run(100) is Stage.PAUSED and rollout.weight == weight == 2500
    with pytest.raises(UserError, match="already"):
        rollout.pause("again", "me")
    rollout.resume("looked", "me")
    assert rollout.stage is Stage.CANARY
    rollout.promote("sure", "me")
    assert rollout.weight == 10000
    rollout.abort("not sure", "me")
    assert rollout.stage is Stage.ROLLED_BACK
    for move in (rollout.promote, rollout.pause, rollout.resume):
        with pytest.raises(UserError):
            move("go on", "me")
    with pytest.raises(UserError, match="not tried again"):
        rollout.begin()
    made.events += rollout.tick()
    told = [(event.kind, event.by, event.reason) for event in made.events]
    assert told[-4:] == [
        ("pause", "me", "to look"), ("resume", "me", "looked"),
        ("promote", "me", "sure"), ("roll back", "me", "not sure"),
    ]  # fmt: skip


def test_a_candidate_that_failed_validation_is_refused():
    rollout = Rollout(TINY, BOUND, None, "ab12")
    with pytest.raises(UserError, match="expected validate"):
        rollout.validated(True, "early")
    rollout.begin()
    rollout.validated(False, "2 points lost")
    assert rollout.stage is Stage.ROLLED_BACK and "2 points" in rollout.position.why


@pytest.mark.parametrize("jump", [-86400.0, -3600.0, 3600.0, 86400.0 * 400])
def test_jumps_of_clocks_decide_nothing(jump):
    """Of the wall's, and of a monotonic one that is none: a step counts as one window at most."""
    made = small()
    made.run(60, Stage.CANARY)
    made.clock.wall_s += jump
    assert [made.run(1) for _ in range(3)] == [Stage.CANARY] * 3
    made.clock.now_s += jump
    made.rollout.tick()
    assert made.rollout.stage is Stage.CANARY and made.rollout.weight == 2500
    assert made.run(400, Stage.PROMOTED) is Stage.PROMOTED


def test_routes_are_sticky_and_rise():
    keys = [b"%d" % each for each in range(4000)]
    for weight in (100, 500, 2500, 5000):
        there = {key for key in keys if bucket(key) < weight}
        assert len(there) / len(keys) == pytest.approx(weight / 10000, abs=0.02)
    made = Simulation().begin()
    made.rollout.promote("now", "me")
    assert {made.rollout.route(key).model for key in keys} == {CANDIDATE}


def test_shadows_are_a_share_and_pause_while_latency_is_compared():
    made = Simulation().begin()
    made.run(40, Stage.CANARY)
    made.run(11)
    shadowed = []
    for _ in range(100):
        made.clock.passes(0.1)
        shadowed.append([made.rollout.route(b"%d" % each).shadow for each in range(20)])
        made.rollout.tick()
    share = np.array(shadowed).mean(1)
    quiet = (share == 0).mean()
    assert 0.3 < quiet < 0.7
    assert 0.15 < share[share > 0].mean() < 0.4


def test_odd_observations_are_counted_and_not_judged():
    made = Simulation().begin()
    assert hears_nothing_wrong(made)
    status = made.rollout.status()
    assert status["invalid"] == 4 and status["problem"].startswith("score: expected")


def test_status_is_json_and_says_what_is_missing():
    made = Simulation().begin()
    made.run(12)
    told = json.loads(json.dumps(made.rollout.status(), allow_nan=False))
    assert told["stage"] == "shadow" and told["weight"] == 0
    assert told["missing"][0].startswith("time: ")
    assert any(each.startswith("disagreement: ") for each in told["missing"])
    assert len(told["windows"]) == 1 and told["windows"][0]["candidate"]["p99_ms"] > 0


def test_labels_that_come_late_are_told_with_their_interval_and_judged():
    made = Simulation(Model(right=0.9), labels=0.5, policy=TINY).begin()
    made.run(45)
    status = made.rollout.status()
    score = next(each for each in status["guards"] if each["name"] == "score")
    assert score["state"] == "pass" and not score["asked"] and "0.0100 is allowed" in score["says"]
    told = status["windows"][-1]
    assert told["original"]["score"] == told["candidate"]["score"] == pytest.approx(0.9, abs=0.1)
    waits = dataclasses.replace(TINY, min_labels=10**6)
    made = Simulation(labels=0.5, policy=waits).begin()
    assert made.run(100) is Stage.SHADOW
    assert any(each.startswith("score: ") for each in made.rollout.status()["missing"])


def test_what_was_judged_survives_a_restart(tmp_path):
    with Journal.open(tmp_path / "state.db") as journal:
        made = small(journal)
        made.run(60, Stage.CANARY)
        made.run(10)
        before = made.rollout._panel.to_json()
    with Journal.open(tmp_path / "state.db") as journal:
        again = Simulation(policy=TINY, journal=journal)
        assert again.rollout.stage is Stage.CANARY and again.rollout.weight == 2500
        after = again.rollout._panel.to_json()
        assert after["disagreement"]["samples"] <= before["disagreement"]["samples"]
        assert after["disagreement"]["samples"] > 50
        sent(again.rollout, "crash")
        again.rollout.tick()
    with Journal.open(tmp_path / "state.db") as journal:
        latched = Rollout(TINY, BOUND, journal, "ab12")
        assert latched.stage is Stage.ROLLED_BACK
        with pytest.raises(UserError, match="not tried again"):
            latched.begin()
        anew = Rollout(TINY, BOUND, journal, "cd34")
        anew.begin()
        assert anew.stage is Stage.VALIDATE


@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_with_a_failing_disk_no_weight_rises_and_rollback_works(tmp_path, monkeypatch, action):
    with Journal.open(tmp_path / "state.db") as journal:
        made = small(journal)
        monkeypatch.setenv(FAILPOINT, f"journal-before-commit:{action}")
        assert made.run(60, Stage.CANARY) is Stage.PAUSED
        assert made.rollout.weight == 0 and "cannot be written" in made.rollout.position.why
        with pytest.raises(UserError, match="cannot be written"):
            made.rollout.promote("never mind", "me")
        assert made.rollout.weight == 0
        made.rollout.abort("enough", "me")
        assert made.rollout.stage is Stage.ROLLED_BACK
        assert made.rollout.status()["journal"]


def test_a_fault_during_the_commit_wins_over_the_raise(tmp_path, monkeypatch):
    with Journal.open(tmp_path / "state.db") as journal:
        made = small(journal)
        whole = Journal.append

        def slow(self, event, snapshot):
            whole(self, event, snapshot)
            if event.kind == "advance":
                sent(made.rollout, "crash")

        monkeypatch.setattr(Journal, "append", slow)
        assert made.run(60, Stage.CANARY) is Stage.ROLLED_BACK and made.rollout.weight == 0
    with Journal.open(tmp_path / "state.db") as journal:
        assert "crash" in journal.latched("ab12")


def test_a_disk_that_hangs_holds_neither_routes_nor_status_nor_an_abort(tmp_path, monkeypatch):
    hangs, goes_on, whole = threading.Event(), threading.Event(), Journal.append

    def append(self, event, snapshot):
        if event.kind == "advance":
            hangs.set()
            assert goes_on.wait(60)
        whole(self, event, snapshot)

    monkeypatch.setattr(Journal, "append", append)
    with Journal.open(tmp_path / "state.db") as journal:
        made = small(journal)
        runs = threading.Thread(target=made.run, args=(60, Stage.CANARY))
        runs.start()
        assert hangs.wait(60)
        assert made.rollout.route(b"x").model == ORIGINAL
        assert made.rollout.status()["guards"]
        made.rollout.abort("enough", "me")
        assert made.rollout.stage is Stage.ROLLED_BACK
        goes_on.set()
        runs.join(60)
        assert made.rollout.stage is Stage.ROLLED_BACK and journal.latched("ab12") == "enough"


def test_an_unreadable_state_leaves_the_original_alone():
    rollout = Rollout.alone("state.db: is damaged", TINY, "ab12")
    with pytest.raises(UserError, match=r"alone serves: state\.db: is damaged"):
        rollout.begin()
    assert rollout.weight == 0 and rollout.route(b"x").model == ORIGINAL


def test_bounds_and_policies_are_checked():
    with pytest.raises(UserError, match="upper"):
        Bound(0.02, 0.01)
    for wrong in (
        {"steps": (500, 100)}, {"steps": ()}, {"steps": (100, 10_000)}, {"dwell_s": 0},
        {"alpha_error": float("nan")}, {"min_pairs": -1}, {"psi": True}, {"window_s": "1"},
        {"no_data_rollback": 3}, {"quiet_share": 1.0}, {"soak_s": float("inf")},
    ):  # fmt: skip
        with pytest.raises(UserError):
            dataclasses.replace(TINY, **wrong)


LEGAL = {
    "idle": {"validate", "rolled back", "paused"},
    "validate": {"shadow", "rolled back", "paused"},
    "shadow": {"canary", "promoted", "paused", "rolled back"},
    "canary": {"canary", "soak", "promoted", "paused", "rolled back"},
    "soak": {"promoted", "paused", "rolled back"},
    "promoted": {"paused", "rolled back"},
    "paused": {"idle", "validate", "shadow", "canary", "soak", "promoted", "rolled back"},
    "rolled back": set(),
}


class Machine(RuleBasedStateMachine):
    """Anything in any order, on a disk that comes and goes, with restarts."""

    def __init__(self):
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.clock, self.draws = Clock(), np.random.default_rng(0)
        self.failing, self.served, self.seen = False, 0, "idle"
        self.journal = self.rollout = None
        self.open()

    def open(self):
        self.journal = Journal.open(self.folder.name + "/state.db")
        args = (TINY, BOUND, self.journal, "ab12", self.clock.wall, self.clock.monotonic)
        self.rollout = Rollout(*args)

    def tried(self, move, *args):
        try:
            move(*args)
        except UserError:
            return False
        return True

    @initialize(far=st.sampled_from([0, 1, 2, 2, 2, 2]))
    def is_on_its_way(self, far):
        if far > 0:
            self.rollout.begin()
        if far > 1:
            self.rollout.validated(True, "checked")

    @rule()
    def begins(self):
        self.tried(self.rollout.begin)

    @rule(passed=st.sampled_from([True, True, True, False]))
    def is_validated(self, passed):
        self.tried(self.rollout.validated, passed, "checked")

    @rule(seconds=st.integers(1, 40), fault=st.sampled_from([None] * 12 + ["nan", "error"]))
    def traffic(self, seconds, fault):
        for _ in range(seconds):
            for _ in range(20):
                self.clock.passes(0.05)
                route = self.rollout.route(self.draws.bytes(8))
                for model in {route.model} | ({ORIGINAL, CANDIDATE} if route.shadow else set()):
                    agreed = True if route.shadow and model == CANDIDATE else None
                    bad = fault if model == CANDIDATE and self.draws.random() < 0.05 else None
                    shadow = model != route.model
                    latency = 2.0 + self.draws.random()
                    self.rollout.observe(Observation(model, latency, bad, shadow, agreed))
            self.ticks()

    @rule(jump=st.sampled_from([-1e5, 1e5]))
    def clocks_jump(self, jump):
        weight = self.rollout.weight
        self.clock.wall_s += jump
        self.clock.now_s += jump
        self.ticks()
        assert self.rollout.weight in (weight, 0) or self.rollout.stage is Stage.CANARY

    @rule(move=st.sampled_from(["promote", "pause", "resume"]))
    def by_hand(self, move):
        weight, before = self.rollout.weight, self.journal.broken
        done = self.tried(getattr(self.rollout, move), "a reason", "me")
        assert not (done and before and move != "pause")
        assert done or self.rollout.weight == weight
        self.check()

    @rule(sure=st.integers(0, 4))
    def aborts(self, sure):
        if sure:
            return
        self.rollout.abort("enough", "me")
        assert self.rollout.stage is Stage.ROLLED_BACK and self.rollout.weight == 0

    @precondition(lambda self: not self.failing)
    @rule()
    def disk_fails(self):
        self.failing, self.journal.broken = True, "Input/output error"

    @rule()
    def restarts(self):
        """What was lowered while the disk failed may be lost; nothing else."""
        stage, unsaved = self.rollout.stage, self.failing
        self.rollout.flush()
        self.journal.close()
        self.failing = False
        self.open()
        if not unsaved:
            assert self.rollout.stage is stage
        self.seen = str(self.rollout.stage)

    def ticks(self):
        self.rollout.tick()
        self.check()

    @invariant()
    def check(self):
        stage, saved = str(self.rollout.stage), self.journal.snapshot()
        if stage != self.seen:
            reached, front = {self.seen}, {self.seen}
            while front:
                front = {new for old in front for new in LEGAL[old]} - reached
                reached |= front
            assert stage in reached, f"{self.seen} -> {stage}"
            self.seen = stage
        weight = self.rollout.weight
        if weight > self.served:  # raised: it must be on the disk already
            assert saved is not None
            kept = Rollout(TINY, BOUND, self.journal, "ab12")
            assert kept.weight >= weight
        self.served = weight
        if self.rollout.stage in (Stage.ROLLED_BACK, Stage.IDLE, Stage.VALIDATE, Stage.SHADOW):
            assert weight == 0

    def teardown(self):
        self.journal.close()
        self.folder.cleanup()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, derandomize=True
)
