"""A candidate with planted faults: no client sees them, and it is rolled back."""

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from paredown.core.measurement import Measurement
from paredown.ship.serve.rollout_runner import Runner
from tests.test_serve_runs import ROOT, Served, faulty, inputs, model, run_folder, weights

LARGE = np.full((1, 4), 200, np.float32)


def good(served, x):
    """Ask for an answer, which must be right to what the original gives."""
    status, said = served.infer(x)
    assert status == 200, said
    found = np.reshape(said["outputs"][0]["data"], said["outputs"][0]["shape"])
    assert np.allclose(found, x @ weights(), rtol=0.01, atol=0.02), said
    return said["model_version"]


def rolled_back(status):
    return status["stage"] == "rolled back"


def lives(pid):
    """Whether a process runs; one that has ended may wait for the system to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def at(stage):
    return lambda status: status["stage"] == stage


KINDS = ["infinite", "shape", "error", "slow"]
MORE = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.mark.parametrize("kind", ["nan", *MORE])
def test_a_fault_of_the_promoted_candidate_is_not_seen_by_clients(tmp_path, kind):
    folder = run_folder(tmp_path / "run", lambda path: faulty(path, kind))
    with Served(folder, "--deadline-ms", 400) as served:
        served.until(at("shadow"))
        assert served.act("promote")[0] == 200
        assert {good(served, inputs(1, seed)) for seed in range(5)} == {"2"}
        for _ in range(5):
            assert good(served, LARGE) == "1"
        found = served.until(rolled_back)
        assert good(served, inputs(1)) == "1" and found["weight"] == 0
        seen = {"infinite": "nan", "slow": "deadline"}.get(kind, kind)
        assert (seen, False) in {(each["kind"], each["shadow"]) for each in found["examples"]}
        assert f'fault="{seen}"' in served.get("/metrics").decode()


def test_a_rollback_outlives_a_kill_right_behind_it(tmp_path):
    """It is decided by an answer, between two ticks, and written before the next."""
    folder = run_folder(tmp_path / "run", lambda path: faulty(path, "nan"))
    with Served(folder) as first:
        first.until(at("shadow"))
        assert first.act("promote")[0] == 200
        while not rolled_back(first.status()):
            good(first, LARGE)
        time.sleep(0.3)
        first.process.kill()
        first.process.wait()
    first.log.unlink()
    with Served(folder) as again:
        assert rolled_back(again.status()) and good(again, inputs(1)) == "1"


@pytest.mark.slow
def test_faults_beside_the_answers_roll_back_before_any_client_is_routed(tmp_path):
    folder = run_folder(tmp_path / "run", lambda path: faulty(path, "nan"))
    with Served(folder) as served:
        served.until(at("shadow"))
        served.until(rolled_back, work=lambda: good(served, LARGE))
        status, said = served.act("promote")
        assert status == 409 and "rolled" in said["error"]


@pytest.mark.slow
def test_what_neither_model_gives_is_no_fault_of_the_candidate(tmp_path):
    def both(path):
        faulty(path.with_name("original.onnx"), "error")
        return faulty(path, "error")

    with Served(run_folder(tmp_path / "run", both)) as served:
        served.until(at("shadow"))
        served.act("promote")
        for _ in range(6):
            status, said = served.infer(LARGE)
            assert status == 400 and "does not take these inputs" in said["error"]
        assert served.status()["stage"] == "promoted"


@pytest.mark.slow
def test_a_candidate_that_is_killed_again_and_again_is_rolled_back(tmp_path):
    with Served(run_folder(tmp_path / "run")) as served:
        served.until(at("shadow"))
        served.act("promote")
        assert good(served, inputs(1)) == "2"
        os.kill(served.status()["models"]["candidate"]["pid"], signal.SIGKILL)
        served.until(rolled_back, work=lambda: good(served, inputs(1)))


@pytest.mark.slow
def test_the_original_is_waited_for_when_it_is_killed(tmp_path):
    with Served(run_folder(tmp_path / "run")) as served:
        served.until(at("shadow"))
        os.kill(served.status()["models"]["original"]["pid"], signal.SIGKILL)
        for seed in range(5):
            good(served, inputs(1, seed))
        assert served.status()["models"]["original"]["starts"] == 2


def test_a_good_candidate_goes_all_the_way(tmp_path):
    with Served(run_folder(tmp_path / "run")) as served:
        rows = iter(range(10**9))

        def ask():
            for _ in range(10):
                good(served, inputs(1, next(rows)))

        found = served.until(at("promoted"), 60, ask)
        steps = [(each["kind"], each["weight"]) for each in found["events"]]
        shares = [("advance", 2500), ("advance", 5000), ("advance", 10000), ("promote", 10000)]
        assert steps == [("begin", 0), ("validated", 0), *shares]
        assert {good(served, inputs(1, n)) for n in range(9)} == {"2"}


def test_a_candidate_that_names_other_classes_is_rolled_back(tmp_path):
    folder = run_folder(tmp_path / "run", lambda path: faulty(path, "class"))
    with Served(folder) as served:
        served.until(at("shadow"))
        x = LARGE + np.arange(4, dtype=np.float32)
        found = served.until(rolled_back, 60, lambda: [good(served, x) for _ in range(10)])
        assert "disagreement" in found["events"][-1]["reason"]
        assert found["examples"][0]["kind"] == "disagree"


def test_a_killed_server_goes_on_where_it_was(tmp_path):
    folder = run_folder(tmp_path / "run")
    with Served(folder) as first:
        first.until(at("shadow"))
        first.act("promote", "by the test")
        orphans = [each["pid"] for each in first.status()["models"].values()]
        first.process.kill()
        first.process.wait()
    first.log.unlink()
    with Served(folder) as again:
        found = again.until(at("promoted"))
        assert found["events"][-1]["reason"] == "by the test"
        again.until(lambda _: good(again, inputs(1)) == "2")
        assert again.token == first.token
        children = [each["pid"] for each in again.status()["models"].values()]
    time.sleep(0.2)
    assert not any(map(lives, children + orphans))


@pytest.mark.slow
def test_a_bound_that_is_lost_is_found_again(tmp_path):
    folder = run_folder(tmp_path / "run")
    with Served(folder) as served:
        served.until(at("shadow"))
        served.act("promote")
    served.log.unlink()
    (folder / "serve" / "validation.json").unlink()
    with Served(folder) as served:
        served.until(lambda _: good(served, inputs(1)) == "2")
        assert served.status()["stage"] == "promoted" and served.status()["bound"] < 0.1
        assert "Validated" in served.log.read_text()


@pytest.mark.slow
def test_a_candidate_that_was_rolled_back_is_not_tried_again(tmp_path):
    folder = run_folder(tmp_path / "run")
    for _ in range(2):
        with Served(folder) as served:
            if not _:
                served.until(at("shadow"))
                served.act("abort", "enough")
            assert served.until(rolled_back)["events"][-1]["reason"] == "enough"
            assert good(served, inputs(1)) == "1"
        served.log.unlink()


@pytest.mark.parametrize("broken", ["state", pytest.param("candidate", marks=pytest.mark.slow)])
def test_the_original_serves_alone_where_something_is_broken(tmp_path, broken):
    folder = run_folder(tmp_path / "run")
    if broken == "state":
        (folder / "serve" / "rollout.db").write_bytes(b"no database" * 1000)
    else:
        (folder / "artifact.onnx").write_bytes(b"damaged")
    with Served(folder) as served:
        assert good(served, inputs(1)) == "1"
        found = served.status()
        assert found["alone"] and found["weight"] == 0
        assert "The original serves alone" in served.log.read_text()
        assert served.act("promote")[0] == 409


@pytest.mark.slow
def test_a_candidate_that_fails_on_real_examples_is_not_shadowed(tmp_path):
    def wrong(path):
        from onnx import helper

        nodes = [helper.make_node("Concat", ["y0", "y0"], ["y1"], axis=1)]
        return model(path, nodes, "y1")

    with Served(run_folder(tmp_path / "run", wrong)) as served:
        found = served.until(rolled_back)
        assert "validation failed" in found["events"][-1]["reason"]
        assert good(served, inputs(1)) == "1"


def test_a_candidate_that_differs_more_than_its_run_saw_is_not_shadowed(tmp_path):
    folder = run_folder(tmp_path / "run", lambda path: model(path, noise=0.3))
    told = json.loads((folder / "run.json").read_text())
    told["on_device"] = {"compressed": dataclasses.asdict(Measurement(1, score=0.99))}
    told["details"]["flip_counts"] = {"now_wrong": 2, "now_right": 1, "examples": 400}
    (folder / "run.json").write_text(json.dumps(told))
    with Served(folder) as served:
        found = served.until(rolled_back)
        assert "and the run saw at most 5 of 400" in found["events"][-1]["reason"]
        assert good(served, inputs(1)) == "1"


@pytest.mark.slow
def test_what_has_come_is_answered_before_the_end(tmp_path):
    def both(path):
        faulty(path.with_name("original.onnx"), "slow")
        return model(path)

    with Served(run_folder(tmp_path / "run", both)) as served:
        with ThreadPoolExecutor() as pool:
            slow = pool.submit(served.infer, LARGE)
            time.sleep(0.3)
            served.process.send_signal(signal.SIGTERM)
            assert slow.result()[0] == 200, slow.result()
        assert served.process.wait(20) == 0


def test_a_guard_that_fails_pauses_and_rolls_back():
    class Broken:
        done: ClassVar[list[str]] = []

        def pause(self, why, by):
            self.done.append(f"pause: {why}")

        def abort(self, why, by):
            self.done.append("abort")

    async def run():
        service = SimpleNamespace(rollout=Broken())
        runner = Runner(service, None, None, ("", ""), None, lambda text: None)
        for _ in range(12):
            await runner.unjudged(ValueError("x"))

    asyncio.run(run())
    assert Broken.done == ["pause: the guard failed 3 times: ValueError: x", "abort"]


def test_the_command_line_moves_a_rollout(tmp_path):
    folder = run_folder(tmp_path / "run")

    def rollout(*words):
        command = [sys.executable, "-m", "paredown", "rollout", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    with Served(folder) as served:
        served.until(at("shadow"))
        mine = ("--token-file", str(folder / "serve" / "token"), "--reason", "because")
        done = rollout("pause", served.url, *mine)
        assert done.returncode == 0 and "paused" in done.stdout, done.stderr
        assert "paused" in rollout("status", served.url).stdout
        again = rollout("pause", served.url, *mine)
        assert again.returncode == 1 and "paused" in again.stderr
        (folder / "other").write_text("x" * 20)
        wrong = rollout("abort", served.url, "--token-file", str(folder / "other"), "--reason", "x")
        assert wrong.returncode == 1 and "Bearer TOKEN" in wrong.stderr
    gone = rollout("status", served.url)
    assert gone.returncode == 1 and "no answer" in gone.stderr and "Traceback" not in gone.stderr
