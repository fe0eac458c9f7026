"""The run folder is killed, filled, torn and misused; what was finished must survive."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import time

import pytest

from paredown.core import files
from paredown.core.errors import UserError
from paredown.core.files import FILE_POINTS, write_atomically, write_together
from paredown.run.ledger import IDENTITY, RECORDS, STAGES, Ledger, stage_key
from paredown.targets.artifact import digest, parts
from paredown.targets.runtimes import onnxruntime

IDENTITY_A = {"recipe": "Cast()", "seed": 0, "versions": {"torch": "2.13.0", "onnx": "1.23.2"}}
LEDGER_POINTS = tuple(f"ledger-{point}" for point in ("before-write", "after-write", "after-fsync"))
POINTS = tuple(f"file-{point}" for point in FILE_POINTS) + LEDGER_POINTS
ACTIONS = ("kill", "enospc", "eio", "short")


def in_child(work):
    """Run ``work`` in a child process; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        work()
        code = 0
    except UserError:
        code = 3
    finally:
        os._exit(code)


def finish(run, name):
    key = stage_key({"step": name})
    sha256 = run.put(f"what {name} made".encode() * 1000, ".bin")
    run.finish(key, {"stage": sha256, "suffix": ".bin", "name": name})
    return key


def assert_whole(run):
    """Nothing half-written is visible, and the names tell the contents."""
    stages = run.folder / STAGES
    for path in stages.iterdir() if stages.exists() else ():
        assert run.get(path.stem, path.suffix) == path
    assert not [name for name in os.listdir(run.folder) if files.is_temporary(name)]
    assert not stages.exists() or not [n for n in os.listdir(stages) if files.is_temporary(n)]


def test_goes_on_where_it_stopped(tmp_path):
    with Ledger.open(tmp_path / "a" / "run", IDENTITY_A) as run:
        key = finish(run, "one")
        run.append("note", {"text": "two\nlines, \N{MICRO SIGN}", "pair": (1, 2.5)})
        before = run.records()
    with Ledger.open(tmp_path / "a" / "run", dict(reversed(IDENTITY_A.items()))) as run:
        assert run.records() == before
        assert [record["kind"] for record in before] == ["stage", "note"]
        assert run.done(key)["name"] == "one"
        assert run.done(stage_key({"step": "two"})) is None
        finish(run, "two")
        assert len(run.records()) == 3


def test_records_are_lines_with_length_and_checksum(tmp_path):
    with Ledger.open(tmp_path, {}) as run:
        run.append("note", {"n": 1})
    assert (tmp_path / RECORDS).read_bytes() == b'21 938a2804 {"kind":"note","n":1}\n'


def test_the_caller_cannot_change_what_was_recorded(tmp_path):
    with Ledger.open(tmp_path, {}) as run:
        key = finish(run, "one")
        run.records()[0]["name"] = run.done(key)["name"] = "changed"
        assert run.done(key)["name"] == "one"


def test_the_last_record_of_a_key_counts_and_a_stage_may_have_no_file(tmp_path):
    with Ledger.open(tmp_path, {}) as run:
        key = finish(run, "one")
        run.finish(key, {"stage": "", "name": "could not be applied"})
        assert run.done(key)["name"] == "could not be applied"


@pytest.mark.parametrize("fields", [{"kind": "x"}, {"n": float("nan")}, {"n": object()}])
def test_a_record_that_cannot_be_kept_leaves_the_ledger_as_it_was(tmp_path, fields):
    with Ledger.open(tmp_path, {}) as run:
        with pytest.raises((ValueError, TypeError)):
            run.append("note", fields)
        run.append("note", {"n": 1})
        assert len(run.records()) == 1


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("point", POINTS)
def test_failpoint_loses_nothing_finished(tmp_path, point, action):
    def work():
        with Ledger.open(tmp_path, IDENTITY_A) as run:
            finish(run, "one")
            os.environ[files.FAILPOINT] = f"{point}:{action}"
            finish(run, "two")

    assert in_child(work) == (3 if action in ("enospc", "eio") else -signal.SIGKILL)
    with Ledger.open(tmp_path, IDENTITY_A) as run:
        assert_whole(run)
        assert run.done(stage_key({"step": "one"}))["name"] == "one"
        written = point in ("ledger-after-write", "ledger-after-fsync")
        killed = action in ("kill", "short")
        assert len(run.records()) == 1 + (written and killed)
        key = finish(run, "two")
        assert run.done(key)["name"] == "two"
        assert_whole(run)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("point", [p for p in POINTS if p.startswith("file")])
def test_failpoint_while_the_folder_is_made(tmp_path, point, action):
    def work():
        os.environ[files.FAILPOINT] = f"{point}:{action}"
        Ledger.open(tmp_path / "run", IDENTITY_A)

    assert in_child(work) == (3 if action in ("enospc", "eio") else -signal.SIGKILL)
    with Ledger.open(tmp_path / "run", IDENTITY_A) as run:
        assert run.records() == []
        assert_whole(run)
        finish(run, "one")


def test_killed_at_random_moments(tmp_path):
    chance = random.Random(0)
    for _ in range(8):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with Ledger.open(tmp_path, IDENTITY_A) as run:
                while True:
                    name = str(len(run.records()))
                    finish(run, name)
                    os.write(writer, f"{name}\n".encode())
        os.close(writer)
        time.sleep(0.03 + 0.05 * chance.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader) as told:
            finished = told.read().split()
        with Ledger.open(tmp_path, IDENTITY_A) as run:
            assert_whole(run)
            assert all(run.done(stage_key({"step": name})) for name in finished)


def test_every_torn_end_is_cut_off(tmp_path):
    with Ledger.open(tmp_path, {}) as run:
        run.append("note", {"n": 1})
        whole = (tmp_path / RECORDS).read_bytes()
        run.append("note", {"n": 2, "text": "\r\n\x00"})
        data = (tmp_path / RECORDS).read_bytes()
    for size in range(len(whole), len(data)):
        for end in (b"", b"\0" * (len(data) - size)):
            if data[:size] + end == data:
                continue
            (tmp_path / RECORDS).write_bytes(data[:size] + end)
            with Ledger.open(tmp_path, {}) as run:
                assert [record["n"] for record in run.records()] == [1]
                assert (tmp_path / RECORDS).read_bytes() == whole
    with Ledger.open(tmp_path, {}) as run:
        run.append("note", {"n": 3})
    with Ledger.open(tmp_path, {}) as run:
        assert [record["n"] for record in run.records()] == [1, 3]


def test_a_flipped_bit_is_seen_wherever_it_is(tmp_path):
    with Ledger.open(tmp_path, {}) as run:
        for n in range(3):
            run.append("note", {"n": n})
    data = (tmp_path / RECORDS).read_bytes()
    second = data.index(b"\n") + 1
    for place in range(second, 2 * second - 1):
        (tmp_path / RECORDS).write_bytes(
            data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        )
        with pytest.raises(UserError, match=r"line 2 is damaged.*delete the folder"):
            Ledger.open(tmp_path, {})
    (tmp_path / RECORDS).write_bytes(data[:-2] + b"?\n")  # the last one is cut off instead
    with Ledger.open(tmp_path, {}) as run:
        assert [record["n"] for record in run.records()] == [0, 1]


def test_one_run_at_a_time(tmp_path):
    with Ledger.open(tmp_path, {}):
        assert in_child(lambda: Ledger.open(tmp_path, {})) == 3
        with pytest.raises(UserError, match=rf"another run \(pid {os.getpid()}\) is working in"):
            Ledger.open(tmp_path, {})
    with Ledger.open(tmp_path, {}) as run:
        pass
    with pytest.raises(UserError, match="it is closed"):
        run.append("note", {})


def test_a_refused_open_lets_go_of_the_lock(tmp_path):
    Ledger.open(tmp_path, {"seed": 0}).close()
    with pytest.raises(UserError, match="seed"):
        Ledger.open(tmp_path, {"seed": 1})
    Ledger.open(tmp_path, {"seed": 0}).close()


def test_changed_identity_names_every_change(tmp_path):
    long = "Quantize('int8')\n" * 20
    Ledger.open(tmp_path, IDENTITY_A | {"goals": long + "old", "notes": long}).close()
    changed = {"recipe": "Cast()", "seed": 1, "versions": {"torch": "2.14.0", "onnx": "1.23.2"}}
    with pytest.raises(UserError) as caught:
        Ledger.open(tmp_path, changed | {"goals": long + "new", "data": [1], "notes": long + "x"})
    text = str(caught.value)
    assert "  seed: was 0, is now 1\n" in text
    assert '  versions.torch: was "2.13.0", is now "2.14.0"\n' in text
    assert "  data: was (nothing), is now [1]\n" in text
    assert 'old", is now ...' in text and 'new"\n' in text
    assert text.count('x"\n') == 1, "what was added at the end of a long text is shown"
    assert "onnx" not in text and "recipe" not in text
    assert text.endswith("Choose another --out, or delete the folder.")


@pytest.mark.parametrize("name", ["thesis.tex", RECORDS, "stages"])
def test_a_folder_of_others_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        Ledger.open(tmp_path, {})
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"paredown": 1, "identity": 3}', "\x00"])
def test_an_identity_that_is_not_ours(tmp_path, text):
    (tmp_path / IDENTITY).write_text(text)
    with pytest.raises(UserError, match="holds other files"):
        Ledger.open(tmp_path, {})
    assert (tmp_path / IDENTITY).read_text() == text


def test_another_format_is_refused(tmp_path):
    (tmp_path / IDENTITY).write_text(json.dumps({"paredown": 99, "identity": {}}))
    with pytest.raises(UserError, match="format 99; this paredown reads format 2"):
        Ledger.open(tmp_path, {})


def test_a_file_as_the_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    for folder in (tmp_path / "run", tmp_path / "run" / "deeper"):
        with pytest.raises(UserError, match="Choose another --out"):
            Ledger.open(folder, {})


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(path, flags, mode=0o777):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"Permission denied.*Choose another --out"):
        Ledger.open(tmp_path, {})


def test_a_stage_is_kept_once_and_checked(tmp_path):
    with Ledger.open(tmp_path, {}) as run:
        key = finish(run, "one")
        sha256 = run.records()[0]["stage"]
        path = run.get(sha256, ".bin")
        data, written = path.read_bytes(), path.stat().st_mtime_ns
        assert run.put(data, ".bin") == sha256 and path.stat().st_mtime_ns == written
        path.write_bytes(data[:-1] + b"?")
        assert run.done(key) is None and not path.exists()
        assert run.get(sha256, ".bin") is None
        path.write_bytes(b"")
        assert run.put(data, ".bin") == sha256 and path.read_bytes() == data


@pytest.fixture
def pairs(monkeypatch):
    """The default runtime's files come in pairs."""
    monkeypatch.setattr(onnxruntime, "COMPANIONS", (".weights",))


def write_pair(folder, graph=b"graph", weights=b"weights"):
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(graph)
    (folder / "model.weights").write_bytes(weights)
    return folder / "model.onnx"


def test_a_pair_of_files_is_one_stage(tmp_path, pairs):
    with Ledger.open(tmp_path / "run", {}) as run:
        sha256 = run.keep(write_pair(tmp_path / "made"))
        assert sha256 == hashlib.sha256(b"graphweights").hexdigest()
        assert run.keep(write_pair(tmp_path / "made")) == sha256
        assert run.keep(write_pair(tmp_path / "made", weights=b"others")) != sha256
        kept = run.get(sha256, ".onnx")
        assert [part.read_bytes() for part in parts(kept)] == [b"graph", b"weights"]
        assert len(list((tmp_path / "run" / STAGES).iterdir())) == 4
        parts(kept)[1].write_bytes(b"weighty")
        assert run.get(sha256, ".onnx") is None and not any(part.exists() for part in parts(kept))
        kept = run.get(run.keep(write_pair(tmp_path / "made")), ".onnx")
        parts(kept)[1].unlink()
        assert run.get(sha256, ".onnx") is None and not kept.exists()


@pytest.mark.parametrize("kill_at", range(1, 11))
def test_a_pair_is_whole_or_not_there(tmp_path, monkeypatch, pairs, kill_at):
    """Killed at any moment; also where another pair stood under that name."""
    passed = 0

    def failpoint(name, short=None):
        nonlocal passed
        passed += 1
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace():
        monkeypatch.setattr(files, "failpoint", failpoint)
        write_together({shown: b"new", parts(shown)[1]: b"twin"})

    def keep():
        with Ledger.open(tmp_path / "run", {}) as run:
            monkeypatch.setattr(files, "failpoint", failpoint)
            run.keep(made)

    shown = write_pair(tmp_path / "shown", b"old", b"pair")
    assert in_child(replace) == -signal.SIGKILL
    both = [part.read_bytes() if part.exists() else None for part in parts(shown)]
    assert both[0] is None or both == [b"new", b"twin"]
    made = write_pair(tmp_path / "made")
    assert in_child(keep) == -signal.SIGKILL
    with Ledger.open(tmp_path / "run", {}) as run:
        found = list((tmp_path / "run" / STAGES).glob("*.onnx"))
        assert found == [run.get(digest(made), ".onnx")] * len(found)
        kept = run.get(run.keep(made), ".onnx")
        assert [part.read_bytes() for part in parts(kept)] == [b"graph", b"weights"]


@pytest.mark.parametrize("name", [("../../x", ""), ("0" * 64, "/../x"), ("", ".bin")])
def test_a_stage_cannot_be_named_outside_the_folder(tmp_path, name):
    with Ledger.open(tmp_path, {}) as run, pytest.raises(UserError, match="not the name"):
        run.get(*name)


@pytest.mark.parametrize("point", LEDGER_POINTS)
@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_a_failed_write_is_told_and_never_retried(tmp_path, monkeypatch, point, action):
    with Ledger.open(tmp_path, {}) as run:
        finish(run, "one")
        size = (tmp_path / RECORDS).stat().st_size
        with monkeypatch.context() as failing:
            failing.setenv(files.FAILPOINT, f"{point}:{action}")
            with pytest.raises(UserError, match="What was finished before is kept"):
                run.append("note", {})
        with pytest.raises(UserError, match="cannot be written"):
            run.append("note", {})
        assert (tmp_path / RECORDS).stat().st_size == size and len(run.records()) == 1


def test_a_failed_fsync_is_called_once(tmp_path, monkeypatch):
    calls = []

    def fails(handle):
        calls.append(handle)
        raise OSError(errno.EIO, "Input/output error")

    with Ledger.open(tmp_path, {}) as run:
        monkeypatch.setattr(os, "fsync", fails)
        for _ in range(2):
            with pytest.raises(UserError, match="Input/output error"):
                run.append("note", {})
        assert len(calls) == 1
        with pytest.raises(UserError, match="Input/output error"):
            run.put(b"data", ".bin")
        assert len(calls) == 2 and os.listdir(tmp_path / STAGES) == []


def test_check_space(tmp_path):
    with Ledger.open(tmp_path, {}) as run:
        run.check_space(1)
        with pytest.raises(UserError, match=r"1e\+09 GB of free space are needed.* are free"):
            run.check_space(10**18)


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of 256 KB, where the system lets us mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a tmpfs cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_disk_that_is_really_full(tiny_disk):
    with Ledger.open(tiny_disk, {}) as run:
        key = finish(run, "one")
        with pytest.raises(UserError, match="No space left on device"):
            run.put(bytes(300_000), ".bin")
        with pytest.raises(UserError, match="No space left on device"):
            while True:
                run.append("note", {"text": "x" * 3000})
        count = len(run.records())
    with Ledger.open(tiny_disk, {}) as run:
        assert_whole(run)
        assert run.done(key) and len(run.records()) == count
        with pytest.raises(UserError, match="are needed"):
            run.check_space(100_000)


def test_write_atomically_keeps_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "deep" / "model.bin"
    write_atomically(path, b"old")

    def work(point):
        os.environ[files.FAILPOINT] = f"file-{point}:kill"
        write_atomically(path, b"new" * 1000)

    for point in FILE_POINTS:
        assert in_child(lambda point=point: work(point)) == -signal.SIGKILL
        renamed = point in ("after-rename", "after-folder-fsync")
        assert path.read_bytes() == (b"new" * 1000 if renamed else b"old")


def test_write_atomically_obeys_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_write_atomically_to_a_device_that_is_full():
    handle = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            files.write_synced(handle, b"data", "ledger")
    finally:
        os.close(handle)
