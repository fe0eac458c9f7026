# ruff: noqa: F811 (fixtures are imported)
"""What is told before any work: goals out of reach; what is measured once; what memory means."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import paredown
from paredown import cli
from paredown.core import cache, threads
from paredown.core.goals import Goals
from paredown.core.measurement import Comparison, Measurement
from paredown.core.task import Target
from paredown.measure import memory
from paredown.measure.measure import Measured, compare
from paredown.report.table import comparison
from paredown.run import baseline, preflight, reach, stages
from paredown.run.reach import unreachable
from paredown.run.stages import Point, State
from paredown.search import decide
from paredown.search.decide import Standing
from paredown.search.questions import questions
from paredown.steps import recipe as recipes
from tests.test_report import met_run
from tests.test_run import NO_TRAIN, TINY, here, load_user, paredown_cli, user  # noqa: F401

MEASURED = Measurement(
    1000, memory_bytes=61_700_000, memory_floor_bytes=59_300_000, memory_model_bytes=2_400_000
)
BESIDE = Measurement(
    5000, memory_bytes=65_500_000, memory_floor_bytes=59_300_000, memory_model_bytes=6_200_000
)
ORIGINAL = Measurement(50_000, latency_ms_p50=2.0, throughput_per_s=500.0)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "_floors", {})
    return tmp_path / "cache"


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "met", "words"),
    [
        ("0.5x", True, "Memory of the model is 2.4 MB of the 61.7 MB of its process"),
        ("0.3x", False, "at most 1.86 MB (0.3x of the original)"),
        ("62MB", True, "Memory is 61.7 MB; the goal is at most 62 MB."),
        ("60MB", False, "Memory is 61.7 MB; the goal is at most 60 MB."),
    ],
)
def test_a_share_speaks_of_the_model_and_a_quantity_of_the_process(goal, met, words):
    [check] = Goals(memory=goal).check(MEASURED, BESIDE)
    assert check.met is met and words in check.sentence


def test_a_share_of_what_was_not_measured_is_not_met():
    [check] = Goals(memory="0.5x").check(Measurement(1, memory_bytes=5), BESIDE)
    assert not check.met and "could not be measured" in check.sentence


def test_the_model_has_a_row_of_its_own_in_the_table():
    run = met_run()
    run.on_device.update(original=BESIDE, compressed=MEASURED)
    run.checks[:] = Goals(memory="0.5x").check(MEASURED, BESIDE)
    rows = {row["name"]: row for row in comparison(run)}
    share, whole = rows["Model memory"], rows["Peak memory"]
    assert share["figures"] == ["6.2 MB", "2.4 MB"] and share["goal"] == "≤ 3.1 MB" and share["met"]
    assert whole["figures"] == ["65.5 MB", "61.7 MB"] and not whole["met"]


def test_the_share_grows_with_the_model_and_not_with_the_runtime(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_floors", {})
    lower = paredown.Target().runtime
    shares = []
    for width in (8, 4096):
        net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 8)).eval()
        example = torch.zeros(1, 64)
        model = paredown.capture(net, (example,))
        file = paredown.export(model, Target(lower), tmp_path / f"{width}.onnx").path
        peak = memory.peak_bytes(Path(file), Target(), [example.numpy()])
        floor = memory.floor(Target()).memory_bytes
        if peak is None or floor is None:
            pytest.skip("this system does not tell peak memory")
        shares.append(peak - floor)
    assert abs(shares[0]) < 1_500_000
    assert 1_000_000 < shares[1] - shares[0] < 8_000_000  # 1.2 MB of weights, read and packed


# --- goals out of reach ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goals", "words"),
    [
        (Goals(size="20KB", memory="30GB"), []),
        (Goals(size="0.2x"), ["size: the goal is 10 KB, and of the original's 50 KB 12 KB are"]),
        (Goals(memory="64KB"), ["onnxruntime takes", "with a model of one op"]),
        (Goals(memory="0.9x"), []),
        (Goals(latency="10ns"), ["latency: the goal is", "for a model of one op at its quickest"]),
        (Goals(latency="0.00001x"), ["latency: the goal is"]),
        (Goals(latency="0.5x", throughput="2x"), []),
        (Goals(throughput="2000000000/s"), ["throughput: the goal is", "gives at most"]),
    ],
)
def test_goals_that_nothing_can_meet_are_told(monkeypatch, goals, words):
    monkeypatch.setattr(memory, "_floors", {})
    found = " ".join(unreachable(goals, Target(), ORIGINAL, 12_000).values())
    assert all(each in found for each in words) and bool(found) == bool(words)


def test_energy_without_a_meter_is_told(monkeypatch):
    floor = memory.Floor(1000, 0.004, 100, False)
    monkeypatch.setattr(memory, "_floors", {("onnxruntime", "local", 1): floor})
    [sentence] = unreachable(Goals(energy="5mJ"), Target(), ORIGINAL, 100).values()
    assert "no meter can be read here" in sentence
    read = memory.Floor(1000, 0.004, 100, True)
    monkeypatch.setattr(memory, "_floors", {("onnxruntime", "local", 1): read})
    assert unreachable(Goals(energy="5mJ"), Target(), ORIGINAL, 100) == {}


def test_a_size_is_in_reach_of_a_student_that_is_named(user, here):
    model, task = load_user(Path(user()))
    captured = paredown.capture(model, task.example)
    pool = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 4))
    whole, graph = reach.exported_bytes(captured, Target())
    own = reach.exported_bytes(paredown.capture(pool, task.example), Target())[1]
    assert own < graph
    for size, missed in ((graph, False), (own, True)):
        goals = Goals(size=f"{size}B")
        assert preflight.check(model, task, Target(), goals=goals).problems
        named = dataclasses.replace(task, student=pool)
        assert bool(preflight.check(model, named, Target(), goals=goals).problems) is missed
        steps = [paredown.Distill(student=pool)]
        assert bool(preflight.check(model, task, Target(), steps, goals).problems) is missed


def test_a_goal_out_of_reach_steers_nothing():
    """A candidate that is smaller, and takes the hopeless goal further away, is kept and done."""
    goals = Goals(size="0.5x", memory="1MB")
    state = State(
        None, None, goals, Target(), None, Path(), BESIDE, 0, False, frozenset({"memory"})
    )
    heavier = dataclasses.replace(MEASURED, memory_bytes=90_000_000, memory_model_bytes=30_000_000)
    measured = {
        name: Measured(each, torch.ones(4, dtype=torch.float64), [np.ones(3)] * 4, None)
        for name, each in (("original", BESIDE), ("candidate", heavier))
    }
    assert not decide.decide(state.goals, measured).kept
    assert decide.decide(state.steering, measured).kept
    standing = Standing(heavier, BESIDE)
    assert state.done(standing) and state.goals.missed(heavier, BESIDE)
    assert decide.rank(state.steering, standing, BESIDE)[0] == 0


def test_every_verb_that_measures_has_the_same_options():
    given = [
        dict(inspect.signature(verb.callback).parameters) for verb in cli.app.registered_commands
    ]
    options = ("device", "threads", "rounds")
    measures = [each for each in given if "device" in each]
    assert len(measures) == 3
    for option in options:
        kinds = {str(each[option]) for each in measures}
        assert len(kinds) == 1


def test_check_plan_and_run_say_it_before_any_work(user, paredown_cli):
    file = user(NO_TRAIN)
    code, out, _ = paredown_cli("check", file, "--memory", "1MB")
    assert code == 1 and "problem: memory: the goal is 1 MB" in out
    assert paredown_cli("check", file, "--memory", "0.5x")[0] == 0
    code, out, _ = paredown_cli("plan", file, "--memory", "1MB", "--size", "0.5x")
    assert code == 0 and "out of reach: memory: the goal is 1 MB" in out
    code, out, _ = paredown_cli("plan", file, "--memory", "1MB", "--json")
    assert "memory" in json.loads(out)["out_of_reach"][0]


# --- what is measured once -------------------------------------------------------------------


def test_one_baseline_serves_all_verbs(user, here, own_cache, monkeypatch):
    model, task = load_user(Path(user(NO_TRAIN)))
    captured, made = paredown.capture(model, task.example), []
    measure = baseline.measure
    counted = lambda *args, **more: made.append(1) or measure(*args, **more)  # noqa: E731
    monkeypatch.setattr(baseline, "measure", counted)
    first, _ = preflight.baseline(captured, task, Target())
    again, _ = preflight.baseline(captured, task, Target())
    assert again == first and len(made) == 1
    preflight.baseline(captured, task, Target(threads=2))
    with torch.no_grad():
        next(iter(captured.parameters())).add_(1)
    preflight.baseline(captured, task, Target())
    assert len(made) == 3
    monkeypatch.setattr(baseline, "LASTS_S", -1.0)  # too old
    preflight.baseline(captured, task, Target())
    monkeypatch.setenv(cache.VARIABLE, cache.OFF)
    preflight.baseline(captured, task, Target())
    assert len(made) == 5


def test_a_score_that_calls_other_code_is_measured_anew(user, here, own_cache):
    """What it calls may change without the file it is written in."""
    model, task = load_user(Path(user(NO_TRAIN)))
    captured, shift = paredown.capture(model, task.example), [0.0]
    shifted = dataclasses.replace(task, score=lambda out, y: task.score(out, y) + shift[0])
    before, _ = preflight.baseline(captured, shifted, Target())
    shift[0] = 1.0
    after, _ = preflight.baseline(captured, shifted, Target())
    assert after.score == pytest.approx(before.score + 1)


def test_a_run_works_with_as_many_threads_as_cores_are_free(user, here, monkeypatch):
    """Where they would spin; and so does whoever goes on with it, or replays it."""
    now, used = [4], []
    monkeypatch.setattr(torch, "set_num_threads", lambda number: now.__setitem__(0, number))
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(threads, "free_cores", lambda: 2)
    for name in (threads.POLICY, "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    apply_step = recipes.apply_step
    monkeypatch.setattr(recipes, "apply_step", lambda *a: used.append(now[0]) or apply_step(*a))
    model, task = load_user(Path(user(NO_TRAIN)))
    steps, shown = [paredown.PruneChannels(0.3)], Console(record=True)
    with paredown.progress(shown):
        run = paredown.compress(model, task, Goals(size="0.9x"), steps=steps, out="r")
    assert "2 of 4 threads work" in shown.export_text()
    assert now == [4] and used == [2] and run.details["threads"] == 2
    monkeypatch.setattr(threads, "free_cores", lambda: 9)
    paredown.compress(model, task, Goals(size="0.9x"), steps=[paredown.Cast()], out="r")
    artifact, digest = paredown.replay("r", model, task)
    assert used == [2, 2, 2] and artifact.sha256 == digest and now == [4]
    monkeypatch.setattr(threads, "free_cores", lambda: 0)
    paredown.apply(model, steps, task)
    monkeypatch.setenv(threads.POLICY, "PASSIVE")
    paredown.apply(model, steps, task)
    assert used[3:] == [1, 4] and now == [4]


def test_free_cores_are_counted():
    assert 0 <= threads.free_cores() <= (os.cpu_count() or 1)


def test_the_cache_keeps_by_key_for_a_while_and_survives_damage(own_cache):
    def get(key, value, last_s=None):
        def read(found):
            return found["value"]

        return cache.kept("kind", {"of": key}, lambda: {"value": value}, read, last_s)

    assert [get("a", 1), get("a", 2), get("b", 3)] == [1, 1, 3]
    assert get("a", 4, last_s=-1.0) == 4
    [first, *_] = sorted(own_cache.iterdir())
    for value, damage in enumerate(("", "{", "[]", '{"other": 1}'), 5):
        for each in own_cache.iterdir():
            each.write_text(damage)
        assert get("a", value) == value and first.exists()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    assert cache.kept("kind", {}, lambda: {"value": 1}, dict) == {"value": 1}


def test_an_absolute_latency_is_proven_by_its_own_interval():
    before = Measurement(1, latency_ms_p50=4.0, throughput_per_s=250.0)
    after = dataclasses.replace(before, latency_ms_p50=1.9, throughput_per_s=1000 / 1.9)
    unsure = Comparison(speedup=2.1, speedup_low=1.9, speedup_high=2.3, latency_ms_high=2.1)
    for goal in ({"latency": "2ms"}, {"throughput": "500/s"}):
        for strict in (False, True):
            [check] = Goals(**goal, proof=strict).check(after, before, compared=unsure)
            assert check.proven is False and check.within and check.met is not strict
            end = "2.1 ms" if "latency" in goal else "476 /s"
            assert f"not proven with this data: its 95 % interval ends at {end}" in check.sentence
        sure = dataclasses.replace(unsure, latency_ms_high=1.99)
        [check] = Goals(**goal, proof=True).check(after, before, compared=sure)
        assert check.proven and check.met
    scores = torch.ones(8, dtype=torch.float64)
    rounds = [np.array([1.8, 1.9, 2.0]) + 0.02 * n for n in range(6)]
    found = compare(*(Measured(before, scores, rounds, None) for _ in range(2)), None)
    assert found.latency_ms_low < 1.95 < found.latency_ms_high


# --- what is asked of the speed --------------------------------------------------------------


def test_the_goals_are_questions_of_ratios():
    before = Measurement(1, latency_ms_p50=4.0, throughput_per_s=250.0)
    found = questions(Goals(latency="1ms", throughput="500/s"), before, "best")
    asked = {(each.before, round(each.factor, 6)) for each in found}
    assert asked == {("best", 1.0), ("best", 1.02), ("original", 4.0), ("original", 2.0)}
    assert {each.after for each in found} == {"candidate"}


def test_rounds_are_an_option_that_a_run_may_be_gone_on_with(user, paredown_cli):
    file = user(NO_TRAIN)
    asked = ("run", file, "--size", "0.9x", "--out", "r")
    assert paredown_cli(*asked, "--rounds", "2")[0] == 0
    assert paredown_cli(*asked)[0] == 0
    code, _, err = paredown_cli(*asked, "--rounds", "1")
    assert code == 1 and "rounds: expected a whole number from 2 up, got 1" in err


# --- the front door --------------------------------------------------------------------------


def test_help_waits_for_no_pytorch():
    code = (
        "import sys, paredown, paredown.cli as cli; sys.argv = ['paredown', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "False False" and time.monotonic() - began < 30


def test_public_names_stay_what_they_are_beside_rooms_of_that_name():
    code = (
        "import paredown.measure.timing, paredown.report.page, paredown\n"
        "assert callable(paredown.measure) and callable(paredown.report)\n"
        "from paredown import *\n"
        "assert measure is paredown.measure and Quantize is paredown.Quantize"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def found_in(rounds, latency_ms, noise, seed):
    made = np.random.default_rng(seed).lognormal(np.log(latency_ms), noise, (rounds, 5))
    return Measured(MEASURED, torch.zeros(5, dtype=torch.float64), list(made), None)


@pytest.mark.parametrize(
    ("latency", "rounds", "enough"),
    [("0.9x", 4, True), ("0.5x", 4, False), ("0.5x", 10, True)],
)
def test_other_goals_are_asked_of_rounds_that_answer_them(latency, rounds, enough):
    """The candidate is 2.01 times faster; what was measured for other goals may leave it open."""
    made = {
        "original": found_in(rounds, 2.01, 0.01, 0),
        "candidate": found_in(rounds, 1.0, 0.01, 1),
    }
    best = Point("", Path(), (), Standing(BESIDE, BESIDE))
    goals = Goals(latency=latency)
    state = State(None, None, goals, Target(), None, Path(), BESIDE, 0, False)
    assert stages._enough(state, best, made) is enough


@pytest.mark.parametrize(("own_bytes", "kept"), [(3_000_000, True), (6_100_000, False)])
def test_a_step_is_lighter_by_what_the_model_takes(own_bytes, kept):
    """By 5 % of the process and half of the model, or by what a process varies by."""
    peak = BESIDE.memory_floor_bytes + own_bytes
    after = dataclasses.replace(BESIDE, memory_bytes=peak, memory_model_bytes=own_bytes)
    before, then = (
        Measured(each, torch.ones(5, dtype=torch.float64), [np.ones(5)] * 4, None)
        for each in (BESIDE, after)
    )
    goals = Goals(memory="0.4x")
    assert decide.decide(goals, {"original": before, "candidate": then}).kept is kept


@pytest.mark.parametrize(("memory", "kept"), [("20MB", True), ("0.4x", False)])
def test_a_goal_of_the_process_is_not_further_away_for_a_hundredth_of_it(memory, kept):
    """The model takes 10 % more, which is 1 % of its process; the file is a third."""
    own_bytes = int(1.1 * BESIDE.memory_model_bytes)
    peak = BESIDE.memory_floor_bytes + own_bytes
    after = dataclasses.replace(
        BESIDE, size_bytes=1500, memory_bytes=peak, memory_model_bytes=own_bytes
    )
    before, then = (
        Measured(each, torch.ones(5, dtype=torch.float64), [np.ones(5)] * 4, None)
        for each in (BESIDE, after)
    )
    goals = Goals(size="0.3x", memory=memory)
    assert decide.decide(goals, {"original": before, "candidate": then}).kept is kept
