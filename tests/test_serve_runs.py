"""Runs to serve, small and with planted faults, and the server over them as a user starts it.

Also what a server does at its start and end: refusals in plain words, its state, its token.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from paredown.core.errors import UserError
from paredown.core.measurement import Measurement
from paredown.core.results import Artifact, Run
from paredown.core.source import Source
from paredown.core.task import Target
from paredown.ship.serve import examples
from paredown.ship.serve.running import Serving
from paredown.ship.serve.token import read
from paredown.targets.artifact import digest

ROOT = Path(__file__).parent.parent
CLASSES = 3
LARGE = 100.0  # an input above it sets off what is planted in a candidate
QUICK = """
steps = [2500, 5000]
dwell_s = 0.5
soak_s = 0.5
window_s = 1.0
min_canary = 20
min_pairs = 20
shadow_share = 0.5
quiet_share = 0.2
margin = 0.3
error_floor = 0.3
latency_ratio = 20.0
psi = 50.0
min_drift = 20
no_data_pause = 1000
no_data_rollback = 2000
"""


def weights(seed=0):
    return np.random.default_rng(seed).normal(size=(4, CLASSES)).astype(np.float32)


def model(path, nodes=(), last="y0", noise=0.0, batch="batch", extra=()):
    """x (batch, 4) -> y (batch, 3) = x w, then ``nodes`` that make ``last`` of y0 and x."""
    w = weights() + noise * weights(1)
    made = [helper.make_node("MatMul", ["x", "w"], ["y0"]), *nodes]
    made.append(helper.make_node("Identity", [last], ["y"]))
    graph = helper.make_graph(
        made,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w, "w"), *extra],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(path))
    return path


def constant(name, value):
    return numpy_helper.from_array(np.asarray(value), name)


LIMIT = constant("limit", np.float32(LARGE))


def on_large(branch, value_of="y0"):
    """Nodes that take ``branch`` where the largest input is above LARGE, else ``value_of``."""
    plain = helper.make_node("Identity", [value_of], ["same"])
    unknown = helper.make_tensor_value_info
    then = helper.make_graph(branch, "then", [], [unknown("other", TensorProto.FLOAT, None)])
    other = helper.make_graph([plain], "else", [], [unknown("same", TensorProto.FLOAT, None)])
    return [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "limit"], ["large"]),
        helper.make_node("If", ["large"], ["y1"], then_branch=then, else_branch=other),
    ]


def faulty(path, kind):
    """A candidate that is like the original until a large input comes."""
    extra = [LIMIT]
    if kind == "nan":
        branch = [
            helper.make_node("Sub", ["y0", "y0"], ["zero"]),
            helper.make_node("Div", ["zero", "zero"], ["other"]),
        ]
    elif kind == "infinite":
        branch = [
            helper.make_node("Sub", ["y0", "y0"], ["zero"]),
            helper.make_node("Div", ["y0", "zero"], ["other"]),
        ]
    elif kind == "shape":
        branch = [helper.make_node("Concat", ["y0", "y0"], ["other"], axis=1)]
    elif kind == "class":
        branch = [helper.make_node("Neg", ["y0"], ["other"])]
    elif kind == "error":
        extra.append(constant("rows", np.array([7, 7], np.int64)))
        branch = [helper.make_node("Reshape", ["y0", "rows"], ["other"])]
    else:  # slow: a product that takes seconds
        extra += [constant("count", np.int64(120)), constant("on", np.bool_(True))]
        extra.append(constant("square", np.eye(700, dtype=np.float32)))
        unknown = helper.make_tensor_value_info
        body = helper.make_graph(
            [
                helper.make_node("MatMul", ["m", "square"], ["m2"]),
                helper.make_node("Identity", ["go"], ["go2"]),
            ],
            "body",
            [
                unknown("n", TensorProto.INT64, []),
                unknown("go", TensorProto.BOOL, []),
                unknown("m", TensorProto.FLOAT, [700, 700]),
            ],
            [unknown("go2", TensorProto.BOOL, []), unknown("m2", TensorProto.FLOAT, [700, 700])],
        )
        branch = [
            helper.make_node("Loop", ["count", "on", "square"], ["made"], body=body),
            helper.make_node("ReduceMin", ["made"], ["low"], keepdims=0),
            helper.make_node("Add", ["y0", "low"], ["other"]),
        ]
    return model(path, on_large(branch), "y1", extra=extra)


def run_folder(folder, candidate=None, met=True, name="tiny", quick=QUICK):
    """A finished run whose artifact is the ``candidate`` that a function writes to a path."""
    folder.mkdir(parents=True, exist_ok=True)
    model(folder / "original.onnx")
    (candidate or (lambda path: model(path, noise=1e-3)))(folder / "artifact.onnx")
    made = Run(
        name=name,
        created="2026-01-01",
        command="paredown.compress(...)",
        goals={},
        target=dataclasses.asdict(Target()),
        versions={},
        data={},
        seed=0,
        plan=[],
        baseline=Measurement(1),
        trials=[],
        artifact=_artifact(folder / "artifact.onnx"),
        original=_artifact(folder / "original.onnx"),
        on_device={},
        comparison=None,
        checks=[],
        met=met,
        verdict="Goals met." if met else "Size: missed.",
        details={},
    )
    (folder / "run.json").write_text(made.to_json())
    (folder / "serve").mkdir(exist_ok=True)
    np.savez(folder / "serve" / examples.FILE, **{"0": inputs(64)})
    (folder / "policy.toml").write_text(quick)
    return folder


def _artifact(path):
    return Artifact(path.name, "onnxruntime", digest(path), path.stat().st_size, "")


def inputs(count, seed=2):
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)


class Served:
    """`paredown serve` in a process of its own."""

    def __init__(self, folder, *options):
        self.folder = folder
        command = [sys.executable, "-m", "paredown", "serve", str(folder), "--port", "0"]
        policy = ["--policy", str(folder / "policy.toml")]
        self.log = folder / "log.txt"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *policy, *map(str, options)],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        self.seen = self.log.stat().st_size if self.log.exists() else 0

    def __enter__(self):
        self.url = self._wait_for("Serving ").split(" at ")[1].split("/v2")[0]
        self.host = self.url.removeprefix("http://")
        self.token = (self.folder / "serve" / "token").read_text().strip()
        return self

    def __exit__(self, *error):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def _wait_for(self, words, seconds=60):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            lines = self.log.read_text().splitlines()
            found = [line for line in lines if line.startswith(words)]
            if found and self.process.poll() is None:
                return found[-1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=20) as answer:
            body = answer.read()
        return json.loads(body) if answer.headers["content-type"] == "application/json" else body

    def post(self, path, said, **headers):
        """Status and JSON of an answer."""
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def infer(self, x, path="/v2/models/tiny/infer", **beside):
        tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.tolist()}
        return self.post(path, {"inputs": [tensor], **beside})

    def act(self, action, reason="a test"):
        said = {"reason": reason}
        return self.post(f"/v2/rollout/{action}", said, Authorization=f"Bearer {self.token}")

    def status(self):
        return self.get("/v2/rollout")

    def until(self, holds, seconds=30, work=None):
        """Wait for a status that holds, doing ``work`` meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.status()
            if holds(found):
                return found
            (work or (lambda: time.sleep(0.05)))()
        told = {name: found[name] for name in ("stage", "missing", "events") if name in found}
        raise AssertionError(f"{told}\n{self.log.read_text()}")


def refused(folder, *options):
    """What `paredown serve` says where it does not start."""
    command = [sys.executable, "-m", "paredown", "serve", str(folder), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return " ".join(done.stderr.split())


def test_a_run_that_missed_its_goals_is_refused(tmp_path):
    said = refused(run_folder(tmp_path / "run", met=False))
    assert "missed its goals" in said and "--even-so" in said


def test_a_port_in_use_is_told(tmp_path):
    import socket

    folder = run_folder(tmp_path / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: is in use" in refused(folder, "--port", port)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"port": 70000}, "port: expected a whole number from 0 to 65535"),
        ({"max_batch": 0}, "max-batch"),
        ({"threads": 0}, "threads"),
        ({"deadline_ms": 0}, "deadline-ms"),
        ({"max_wait_ms": -1}, "max-wait-ms"),
        ({"source": Source("none.py")}, "no such file"),
        ({"end_to_end": True}, "name it with --file"),
    ],
)
def test_wrong_options_are_told(given, said):
    with pytest.raises(UserError, match=said):
        Serving(Path("run"), **given)


@pytest.mark.parametrize("token", ["", "short", "two words of a token", "ünïcödeünïcöde"])
def test_a_token_of_ones_own_is_checked(tmp_path, token):
    (tmp_path / "mine").write_text(token)
    with pytest.raises(UserError, match="token"):
        read(tmp_path / "mine")


def test_no_run_is_refused(tmp_path):
    assert "no such folder" in refused(tmp_path / "none")


SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in ("granian", "starlette")]


@pytest.mark.parametrize("name", ["orjson", *SLOW])
def test_a_missing_package_is_told(tmp_path, name):
    folder = run_folder(tmp_path / "run")
    code = f"import sys; sys.modules[{name!r}] = None; from paredown.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "pip install 'paredown[serve]'" in done.stderr, done.stderr


def test_every_option_is_in_the_docs():
    import typer

    from paredown.cli import app

    group = typer.main.get_command(app)
    text = (ROOT / "docs" / "serving.md").read_text()
    options = {name for param in group.commands["serve"].params for name in param.opts}
    told = {name for name in options if name.startswith("--")}
    assert told and not [name for name in told if f"`{name}`" not in text]
    for verb in group.commands["rollout"].commands:
        assert f"`{verb}`" in text or f"rollout {verb}" in text
