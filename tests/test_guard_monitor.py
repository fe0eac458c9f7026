"""Guard for one's own server, and `paredown monitor`: lines in, decisions out, alerts aside."""

import contextlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import paredown
from benchmarks.guard_simulation import BOUND, QUICK, Clock
from paredown.core.errors import UserError
from paredown.ship.guard.journal import Journal
from paredown.ship.guard.lines import read_line
from paredown.ship.guard.monitor import monitor
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.webhook import WAITING, Webhook

ROOT = Path(__file__).parent.parent
TINY = Policy(
    steps=(2500, 5000), dwell_s=20.0, soak_s=20.0, window_s=10.0, min_canary=50, min_pairs=50,
    margin=0.2, quiet_share=0.0,
)  # fmt: skip


def day(seconds, bad_from=10**9, fault="nan"):
    """Lines of a server that shadows every request and lets both answer."""
    draws = np.random.default_rng(0)
    for second in range(seconds):
        for part in range(20):
            told = {"time_s": second + part / 20, "latency_ms": 2 + float(draws.random())}
            yield {**told, "model": "original"}
            bad = second >= bad_from
            more = {"fault": fault} if bad else {"agreed": bool(draws.random() > 0.005)}
            yield {**told, "model": "candidate", "shadow": part % 2 == 0, **more}


def text(lines):
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def monitored(lines, **given):
    out = io.StringIO()
    rolled_back = monitor(
        io.BytesIO(lines), out, BOUND, policy=TINY, digest="ab12", replay=True, **given
    )
    return rolled_back, [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_good_days_lines_promote():
    rolled_back, told = monitored(text(day(150)))
    assert not rolled_back
    assert [each["stage"] for each in told] == [
        "validate", "shadow", "canary", "canary", "soak", "promoted", "promoted",
    ]  # fmt: skip
    assert told[-1] == {
        "kind": "end", "stage": "promoted", "weight": 10_000, "lines": 6000, "bad_lines": 0,
    }  # fmt: skip


def test_bad_lines_are_counted_and_told_and_end_nothing():
    bad = (
        b"no json\n[]\n{}\n" + b'{"model": "third"}\n{"model": "candidate", "latency": 1}\n'
        b'{"model": "candidate", "latency_ms": "1"}\n{"model": "candidate", "latency_ms": NaN}\n'
        b'{"model": "candidate", "shadow": 1}\n{"model": "candidate", "fault": "boom"}\n'
        b'{"model": "candidate", "inputs": {"x": [[1], [1, 2]]}}\n{"time_s": 1}\n\xff\xfe\n'
        b'{"model": "candidate", "inputs": {"x": ["a"]}}\n{"queue": true}\n{"queue": 1e999}\n'
        + b'{"model": "candidate", "latency_ms": 1%s}\n{"queue": 1%s}\n' % (2 * (b"0" * 400,))
        + b'{"model": "candidate", "distance": -1%s, "agreed": true}\n' % (b"0" * 400)
        + b'{"model": "candidate", "inputs": {"x": [1%s]}}\n{"time_s": 1%s}\n' % (2 * (b"0" * 400,))
        + b'{"model":' + b"[" * 100_000 + b"\n" + b"x" * (9 * 2**20) + b"\n\n"
    )  # fmt: skip
    rolled_back, told = monitored(bad + text(day(30)))
    assert not rolled_back and told[-1]["stage"] == "canary"
    assert told[-1]["lines"] - told[-1]["bad_lines"] == 1200 and told[-1]["bad_lines"] >= 21
    assert told[-1]["first_bad"].startswith("line 1: ")


def test_gaps_and_steps_back_in_time_decide_nothing():
    lines = list(day(30))
    for line in lines[600:]:
        line["time_s"] += 1e15
    lines += [{"time_s": 5.0, "model": "original", "latency_ms": 1.0}]
    rolled_back, told = monitored(text(lines))
    assert not rolled_back or "data: " in told[-2]["reason"]


def test_times_in_nanoseconds_are_bad_lines():
    lines = [{**each, "time_s": each["time_s"] + 1.8e18} for each in day(2)]
    _, told = monitored(text(lines))
    assert told[-1]["bad_lines"] == 80 and "time_s: expected seconds" in told[-1]["first_bad"]


def test_lines_may_hold_arrays_and_gauges():
    line = read_line('{"model": "candidate", "outputs": {"y": [[1, 2.5]]}, "memory_bytes": 5}')
    assert line.observation.outputs["y"].shape == (1, 2) and line.gauges == {"memory_bytes": 5}
    assert read_line('{"queue": 3}').observation is None
    with pytest.raises(ValueError, match="latency_ms: expected a number"):
        read_line('{"model": "candidate", "latency_ms": true}')


class Hook:
    """A real server that takes alerts; it refuses the first ones, or is slow."""

    def __init__(self, refuses=0, waits_s=0.0):
        self.alerts, self.tries, hook = [], 0, self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                hook.tries += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(waits_s)
                good = hook.tries > refuses
                if good:
                    hook.alerts.append(json.loads(body))
                with contextlib.suppress(OSError):
                    self.send_response(204 if good else 500)
                    self.end_headers()

            def log_message(self, *words):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/alerts"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hook():
    made = []

    def start(**given):
        made.append(Hook(**given))
        return made[-1]

    yield start
    for each in made:
        each.close()


def test_alerts_are_posted_and_tried_again(hook):
    there = hook(refuses=2)
    webhook = Webhook(there.url, pause_s=0.01)
    rolled_back, told = monitored(text(day(40, bad_from=30)), webhook=webhook)
    assert rolled_back and there.tries == len(there.alerts) + 2
    assert [each["kind"] for each in there.alerts] == [each["kind"] for each in told[:-1]]
    assert webhook.sent == len(there.alerts) and told[-1]["alerts_failed"] == 0


def test_a_slow_webhook_or_none_never_holds_a_decision(hook):
    for url in (hook(waits_s=30).url, "http://127.0.0.1:9/gone"):
        webhook = Webhook(url, timeout_s=0.1, pause_s=0.01)
        started = time.monotonic()
        for number in range(WAITING + 50):
            webhook.send({"number": number})
        assert time.monotonic() - started < 5.0
        assert webhook.dropped >= 40
        webhook.close(wait_s=0.2)
        assert time.monotonic() - started < 10.0
        assert webhook.sent == 0 and webhook.failed + webhook.dropped == WAITING + 50
    wrong_ones = (
        "ftp://x/y",
        "x",
        "",
        None,
        "http://",
        "http://[::1",
        "http://x:99999",
        "http://a b",
    )
    for wrong in wrong_ones:
        with pytest.raises(UserError, match="webhook"):
            Webhook(wrong)


POLICY = """
steps = [2500, 5000]
dwell_s = 20
soak_s = 20
window_s = 10
min_canary = 50
min_pairs = 50
margin = 0.2
quiet_share = 0.0
"""


def command(*words, lines=b""):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "paredown", "monitor", *map(str, words)]
    return subprocess.run(words, input=lines, capture_output=True, env=env, check=False)


def test_the_command_ends_with_3_where_it_rolled_back_and_remembers(tmp_path):
    (tmp_path / "policy.toml").write_text(POLICY)
    paredown.Profile.of([{"x": np.zeros((100, 2))}]).save(tmp_path / "profile.json")
    options = ["--bound", 0.02, "--policy", tmp_path / "policy.toml", "--replay"]
    options += ["--state", tmp_path / "state.db", "--profile", tmp_path / "profile.json"]
    done = command(*options, lines=text(day(30, bad_from=5)))
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 3, done.stderr
    assert told[-2]["kind"] == "roll back" and told[-2]["share"] == 0
    again = command(*options, lines=text(day(3)))
    assert again.returncode == 3
    assert json.loads(again.stdout.splitlines()[-1])["stage"] == "rolled back"


def test_mistakes_of_the_command_are_told(tmp_path):
    (tmp_path / "policy.toml").write_text("dwell = 3")
    (tmp_path / "state.db").write_text("mine")
    (tmp_path / "profile.json").write_text('{"a": 1}')
    for words, said in (
        (["--bound", 0.02, "--policy", tmp_path / "policy.toml"], "did you mean 'dwell_s'"),
        (["--bound", 0.02, "--state", tmp_path / "state.db"], "state.db"),
        (["--bound", 2], "--bound: expected a share above 0 and below 1, such as 0.02, got 2.0"),
        (["--bound", "nan"], "--bound: expected"),
        (["--bound", 0.02, "--profile", tmp_path / "profile.json"], 'lacks "format" and'),
        (["--bound", 0.02, "--webhook", "http://[::1"], "webhook: expected a URL of http or https"),
    ):
        done = command(*words)
        assert done.returncode == 1 and said in done.stderr.decode(), done.stderr
        assert b"Traceback" not in done.stderr


def test_a_closed_input_is_told():
    script = f'"{sys.executable}" -m paredown monitor --bound 0.02 <&-'
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", script], capture_output=True, env=env, check=False)
    assert done.returncode == 1 and b"standard input" in done.stderr, done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_words_and_keeps_what_was_seen(tmp_path, number, code):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "paredown", "monitor", "--bound", "0.02"]
    words += ["--state", str(tmp_path / "state.db")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(words, env=env, **pipes) as running:
        running.stdin.write(text(day(2)))
        running.stdin.flush()
        assert b"validate" in running.stdout.readline()  # it reads, and looks
        running.send_signal(number)
        out, said = running.communicate(timeout=60)
    ended = json.loads(out.splitlines()[-1])
    assert running.returncode == code and ended["kind"] == "end" and ended["lines"] == 80
    assert b"the state is kept in" in said and b"the same command goes on" not in said
    kept = Journal.open(tmp_path / "state.db")
    assert kept.snapshot()["guards"]["disagreement"]["samples"] == 40
    kept.close()


def test_a_replay_begins_at_its_first_lines_time():
    lines = [{**each, "time_s": each["time_s"] + 1000.0} for each in day(30)]
    _, told = monitored(text(lines))
    assert told[0]["kind"] == "begin" and told[0]["time_s"] == 1000.0
    assert {each["kind"] for each in told} == {"begin", "validated", "advance", "end"}


@pytest.mark.parametrize(
    "table, said",
    [
        ("steps = [1, 2.5]", "steps: expected"),
        ("steps = 100", "steps: expected"),
        ("dwell_s = '5'", "dwell_s: expected a number"),
        ("dwell_s = nan", "dwell_s: expected"),
        ("dwell_s = inf", "dwell_s: expected"),
        ("min_pairs = 1.5", "min_pairs: expected a whole number"),
        ("psi = true", "psi: expected a number"),
        ("shadow_share = 1.5", "shadow_share: expected"),
        ("[more]\na = 1", "has no setting 'more'"),
        ("a = ", "not a policy in TOML"),
    ],
)
def test_a_policy_is_read_strictly(tmp_path, table, said):
    (tmp_path / "policy.toml").write_text(table)
    with pytest.raises(UserError, match=r"policy\.toml: ") as told:
        Policy.from_toml(tmp_path / "policy.toml")
    assert said in str(told.value)


def test_a_policy_that_is_right_and_one_that_is_not_there(tmp_path):
    (tmp_path / "policy.toml").write_text(POLICY)
    assert Policy.from_toml(tmp_path / "policy.toml") == TINY
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'")
    for name in ("none.toml", "latin.toml"):
        with pytest.raises(UserError, match=name):
            Policy.from_toml(tmp_path / name)


def test_guard_decides_for_a_server_of_ones_own(tmp_path):
    clock, alerts = Clock(), []
    given = dict(digest="ab12", state=tmp_path / "state.db", clock=clock.wall)
    guard = paredown.Guard(BOUND, QUICK, **given, alert=alerts.append, monotonic=clock.monotonic)
    decision = guard.observe(paredown.Observation("original", latency_ms=2.0))
    assert (decision.stage, decision.share, decision.rolled_back) == ("shadow", 0.0, False)
    guard.promote("trusted", by="me")
    assert guard.route("a key").model == "candidate" and guard.look().share == 1.0
    for _ in range(5):
        decision = guard.observe(paredown.Observation("candidate", fault="shape"))
    assert decision.rolled_back and "shape" in decision.why
    assert [each.kind for each in alerts] == ["begin", "validated", "promote", "roll back"]
    guard.close()
    again = paredown.Guard(BOUND, QUICK, **given)
    assert again.look().rolled_back
    again.close()
    with pytest.raises(UserError, match="bound: expected a Bound"):
        paredown.Guard(0.02)


def test_in_a_with_block_it_looks_by_itself():
    alerts = []
    with paredown.Guard(BOUND, TINY, alert=alerts.append) as guard:
        limit = time.monotonic() + 20
        while not alerts and time.monotonic() < limit:
            time.sleep(0.05)
    assert [each.kind for each in alerts][:2] == ["begin", "validated"]
    assert guard.status()["stage"] == "shadow"


def test_threads_may_route_and_observe_while_it_looks():
    """Every answer is counted, whoever tells it."""
    guard = paredown.Guard(BOUND, TINY)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:

        def works():
            for number in range(500):
                guard.route(b"%d" % number)
                guard.rollout.observe(paredown.Observation("original", latency_ms=1.0))

        threads = [threading.Thread(target=works) for _ in range(4)]
        for each in threads:
            each.start()
        for _ in range(50):
            guard.look()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(before)
    guard.look()
    window = guard.rollout._windows.open
    assert (
        window.original.answers
        + sum(each["original"]["answers"] for each in guard.rollout._windows.records)
        == 2000
    )


def test_the_guard_needs_nothing_but_numpy():
    heavy = ("torch", "scipy", "onnx", "starlette", "granian", "orjson", "prometheus_client")
    code = (
        "import sys, paredown; paredown.Guard; import paredown.ship.guard.monitor\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
