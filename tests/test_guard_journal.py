"""The state on the disk: killed anywhere, damaged, full, held by another, and never growing."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.guard_simulation import BOUND
from paredown.core.errors import UserError
from paredown.ship.guard import journal as module
from paredown.ship.guard.bound import Bound
from paredown.ship.guard.guard import Guard
from paredown.ship.guard.journal import POINTS, Journal
from paredown.ship.guard.observation import Observation
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.rollout import Rollout, Stage
from paredown.ship.guard.stages import Event

ROOT = Path(__file__).parent.parent
CHILD = """
import os, sys
from benchmarks.guard_simulation import Model, Simulation
from paredown.core.files import FAILPOINT
from paredown.ship.guard.journal import Journal
from tests.test_guard_rollout import TINY

path, point, at, bad_from = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
candidate = lambda second: Model("crash", 1.0) if second >= bad_from else Model()
with Journal.open(path) as journal:
    made = Simulation(candidate, policy=TINY, journal=journal)
    if made.rollout.stage.name == "IDLE":
        made.begin()
    for second in range(200):
        if second == at:
            os.environ[FAILPOINT] = point + ":kill"
        made.run(1)
        print(made.rollout.stage.name, made.rollout.weight, flush=True)
"""
RANK = {"IDLE": 0, "VALIDATE": 1, "SHADOW": 2, "CANARY": 3, "SOAK": 4, "PROMOTED": 5}


def child(path, point="none", at=-1, bad_from=10**9, kill_after=None):
    """What a child that serves has told before it was killed."""
    words = [sys.executable, "-c", CHILD, str(path), point, str(at), str(bad_from)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    made = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in made.stdout:
        lines.append(line.split())
        if len(lines) == kill_after:
            made.kill()
    assert made.wait() == -signal.SIGKILL
    return [(stage, int(weight)) for stage, weight in lines]


@pytest.mark.parametrize(
    "point, at, bad_from",
    [
        (POINTS[0], 15, 10**9),  # in the shadows, or as they end
        (POINTS[1], 15, 10**9),
        (POINTS[0], 30, 35),  # as it rolls back
        (POINTS[1], 30, 35),
    ],
)
def test_killed_around_a_commit_the_state_is_whole_and_no_weight_was_too_high(
    tmp_path, point, at, bad_from
):
    path = tmp_path / "state.db"
    told = child(path, point, at, bad_from)
    stage, weight = told[-1]
    with Journal.open(path) as journal:
        again = Rollout(Policy(steps=(2500, 5000)), BOUND, journal, "ab12")
        assert again.weight >= weight or again.stage is Stage.ROLLED_BACK
        if stage != "ROLLED_BACK":
            assert again.stage is Stage.ROLLED_BACK or RANK[again.stage.name] >= RANK[stage]
        else:
            assert again.stage is Stage.ROLLED_BACK


def test_killed_anywhere_it_goes_on_or_stays_back(tmp_path):
    path = tmp_path / "state.db"
    told = child(path, kill_after=30)
    again = child(path, bad_from=0, kill_after=2)
    assert RANK[told[-1][0]] >= 2 and again[-1] == ("ROLLED_BACK", 0)
    with Journal.open(path) as journal:
        assert "crash" in journal.latched("ab12")


def filled(path):
    with Journal.open(path) as journal:
        for number in range(40):
            journal.append(event(number), {"digest": "ab12", "number": number})
        return journal


def event(number, stage=Stage.CANARY, digest="ab12"):
    return Event(float(number), "advance", stage, 100, "a reason " * 20, "guard", digest)


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "its head overwritten": lambda data: b"x" * 100 + data[100:],
    "text": lambda data: b"not a database",
    "a page overwritten": lambda data: data[:4096] + b"\xff" * 4096 + data[8192:],
    "a letter changed": lambda data: data.replace(b"a reason a", b"a season a", 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_and_the_original_alone_serves(tmp_path, damage):
    path = tmp_path / "state.db"
    filled(path)
    data = path.read_bytes()
    assert DAMAGES[damage](data) != data
    path.write_bytes(DAMAGES[damage](data))
    with pytest.raises(UserError, match=r"state\.db: (is|cannot)"):
        Journal.open(path)
    guard = Guard(Bound(0.01, 0.02), digest="ab12", state=path)
    assert guard.problem and guard.route("x").model == "original"
    decision = guard.observe(Observation("candidate", latency_ms=1.0))
    assert decision.weight == 0 and decision.why == guard.problem


def test_a_torn_log_is_read_up_to_its_last_whole_commit(tmp_path):
    """As power loss leaves it: the write-ahead log ends within a commit."""
    path, torn = tmp_path / "state.db", tmp_path / "torn.db"
    with Journal.open(path) as journal:
        for number in range(10):
            journal.append(event(number), {"number": number})
        log = Path(f"{path}-wal").read_bytes()
        torn.write_bytes(path.read_bytes())
        Path(f"{torn}-wal").write_bytes(log[: len(log) - 2000])
    with Journal.open(torn) as journal:
        assert journal.snapshot()["number"] == 8 and len(journal.events()) == 9


def test_one_process_at_a_time_holds_it(tmp_path):
    held = pytest.raises(UserError, match="another process holds it")
    with Journal.open(tmp_path / "state.db"), held:
        Journal.open(tmp_path / "state.db")
    Journal.open(tmp_path / "state.db").close()


def test_of_something_else(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE mine (id INTEGER)")
    base.close()
    with pytest.raises(UserError, match="database of something else"):
        Journal.open(path)
    with pytest.raises(UserError, match="cannot be used"):
        Journal.open(tmp_path)


def test_it_stays_small_and_keeps_its_latches(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KEPT_EVENTS", 50)
    path = tmp_path / "state.db"
    with Journal.open(path) as journal:
        journal.append(event(0, Stage.ROLLED_BACK, "first"), {})
        for number in range(400):
            journal.append(event(number), {"number": number})
        assert len(journal.events()) == 50
    assert path.stat().st_size < 150_000 and not Path(f"{path}-wal").exists()
    with Journal.open(path) as journal:
        assert len(journal.events()) == 50 and journal.events()[-1].time_s == 399
        assert journal.latched("first") and journal.latched("ab12") is None


def test_after_a_failed_write_nothing_more_is_written(tmp_path, monkeypatch):
    def fails(name):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Journal.open(tmp_path / "state.db") as journal:
        journal.append(event(1), {"number": 1})
        with monkeypatch.context() as patch:
            patch.setattr(module, "failpoint", fails)
            with pytest.raises(UserError, match="output error"):
                journal.append(event(2), {"number": 2})
        with pytest.raises(UserError, match="output error"):
            journal.save({"number": 3})
        assert journal.snapshot() == {"number": 1}
    with Journal.open(tmp_path / "state.db") as journal:
        assert journal.snapshot() == {"number": 1} and len(journal.events()) == 1


def test_a_disk_with_no_room_for_a_new_file(tmp_path):
    """A real refusal by the system: the file cannot grow."""
    import resource

    def few_bytes():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    code = (
        "import sys; from paredown.ship.guard.journal import Journal\n"
        "from paredown.core.errors import UserError\n"
        "try: Journal.open(sys.argv[1])\n"
        "except UserError as error: print(error)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "state.db")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, env=env, capture_output=True, text=True, preexec_fn=few_bytes, check=False
    )
    assert "cannot be used" in done.stdout, done.stderr
    assert not (tmp_path / "state.db").exists()
