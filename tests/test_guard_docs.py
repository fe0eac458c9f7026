"""docs/guarding.md: its code runs, its tables are what the code says."""

import dataclasses
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import paredown
from paredown.ship.guard.lines import FIELDS, GAUGES, TIME
from paredown.ship.guard.policy import Policy

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "guarding.md").read_text()
BLOCKS = re.findall(r"^```python ?(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def run(code, folder, path=""):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    env["PATH"] = f"{path}{os.pathsep}{env['PATH']}" if path else env["PATH"]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def block(kind):
    found = [code for name, code in BLOCKS if name == kind]
    assert found, f"the page has no block {kind!r}"
    return found


def test_plain_blocks_run(tmp_path):
    out = run("\n".join(block("")), tmp_path)
    assert out.splitlines()[0] == "shadow 0.0"


def test_every_block_is_python():
    for name, code in BLOCKS:
        compile(code, name or "plain", "exec")


def test_kserve_is_told_each_weight(tmp_path):
    """A program of the same name stands in for kubectl, and keeps what it was told."""
    tool = tmp_path / "kubectl"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    tool.chmod(0o755)
    code = block("kserve")[0].replace("with guard:", "guard.promote('now')\nwith guard:")
    run(code + "\nguard.abort('enough')\nguard.look()\n", tmp_path, tmp_path)
    told = [json.loads(line.split(" -p ")[1]) for line in (tmp_path / "told").open()]
    weights = [each["spec"]["predictor"]["canaryTrafficPercent"] for each in told]
    assert weights[-1] == 0 and 100 in weights


CALLS = """
import asyncio, json

async def post(number):
    path = f"/predict/{number}"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
             "query_string": b"", "headers": [(b"content-type", b"application/json")],
             "http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": ("x", 1)}
    told = []
    async def receive():
        return {"type": "http.request", "body": b"[1.0, 2.0]", "more_body": False}
    async def send(message):
        told.append(message)
    await app(scope, receive, send)
    return told[0]["status"], json.loads(told[1]["body"])

async def main():
    assert [await post(n) for n in range(50)] == [(200, [2.0, 4.0])] * 50
    await asyncio.sleep(0.5)
    def broken(x): raise RuntimeError("broken")
    models["candidate"] = broken
    assert [await post(n) for n in range(50)] == [(200, [2.0, 4.0])] * 50
    await asyncio.sleep(0.5)

asyncio.run(main())
print(guard.look().stage)
"""


@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="fastapi is not installed")
def test_fastapi_clients_never_see_the_candidates_faults(tmp_path):
    assert run(block("fastapi")[0] + CALLS, tmp_path).strip() == "rolled back"


def rows(first):
    """Name -> the other cells, of the table whose head begins so."""
    lines = PAGE[PAGE.index(first) :].split("\n\n")[0].splitlines()[2:]
    cells = [[each.strip() for each in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): rest for names, *rest in cells for name in names.split(", ")}


def test_every_number_of_the_policy_stands_on_the_page_with_its_default():
    table = rows("| name | default | what |")
    assert list(table) == [field.name for field in dataclasses.fields(Policy)]
    for field in dataclasses.fields(Policy):
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        assert json.loads(table[field.name][0]) == default
        text = " ".join(Policy.__doc__.split())
        assert table[field.name][1] in text, f"{field.name} is told otherwise"


def test_every_name_of_a_line_stands_on_the_page():
    assert set(rows("| name | what |")) == {*FIELDS, *GAUGES, TIME}


def test_the_options_of_the_command_are_there():
    import typer

    from paredown.cli import app

    options = set(re.findall(r"(--[a-z]+)", PAGE[PAGE.index("paredown monitor --bound") :]))
    verb = typer.main.get_command(app).commands["monitor"]
    known = {name for option in verb.params for name in option.opts}
    assert options == known


def test_the_package_can_be_sent_to_a_cluster_by_name():
    """As Ray does with whatever a deployment's functions use."""
    assert pickle.loads(pickle.dumps(paredown)) is paredown
