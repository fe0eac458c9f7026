"""Devices over ssh: a real sshd at another address of this machine, and all that may go wrong."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paredown
from paredown.core.errors import UserError
from paredown.core.task import Target, Task
from paredown.graph.capture import capture
from paredown.measure import looks, speedups, timing
from paredown.measure.measure import measure
from paredown.targets.devices import keeper, local, lost, shell, ssh
from paredown.targets.devices.address import parsed
from paredown.targets.devices.device import device, write_batches
from paredown.targets.runtimes import onnxruntime, source
from tests.sshd import machine, missing

CODE = source("onnxruntime")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A machine with an sshd, which is really this one, at another address."""
    why = missing()
    if why:
        pytest.skip(why)
    with machine(tmp_path_factory.mktemp("sshd"), sys.executable) as found:
        os.environ[shell.CONFIG] = str(found.config)
        yield found
        ssh.end()
        del os.environ[shell.CONFIG]


@pytest.fixture
def quick(monkeypatch):
    """No long waiting for what is gone."""
    monkeypatch.setattr(shell, "PAUSES_S", (0.05, 0.1))
    monkeypatch.setattr(shell, "FIRST_PAUSES_S", (0.05,))
    monkeypatch.setattr(shell, "CONNECT_S", 1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layers = nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)
    return capture(nn.Sequential(*layers).eval(), (torch.zeros(1, 16),))


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return onnxruntime.lower(model, tmp_path_factory.mktemp("file") / "model.onnx")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs") / "inputs.npz"
    generator = np.random.default_rng(0)
    batches = [[generator.normal(size=(1, 16)).astype(np.float32)] for _ in range(20)]
    write_batches(path, batches)
    return path


def test_a_device_answers_as_this_machine_does(there, file, inputs, tmp_path):
    with local.Probe(file, CODE) as here, device(there.url)(file, CODE, threads=2) as far:
        assert far.input_names == here.input_names and far.output_names == here.output_names
        outputs = [each.run(inputs, tmp_path / "out.npz") for each in (here, far)]
        assert all(np.array_equal(a, b) for [a], [b] in zip(*outputs, strict=True))
        latencies, _ = far.time(inputs, 25, warmup=2)
        assert latencies.shape == (25,) and (latencies > 0).all()
        assert 1e6 < far.memory() < 1e9
        told = far.describe()
        assert told["device"] == there.url and told["threads"] == "2"
        assert told["cpu"] == here.describe()["cpu"]
    assert not list((there.cache / "runs").iterdir())  # what was made for the run is gone


def test_files_are_sent_once_and_checked_there(there, file, monkeypatch):
    sent = []
    send = ssh.Store._send
    monkeypatch.setattr(ssh.Store, "_send", lambda *given: [sent.append(given[1]), send(*given)])
    with device(there.url)(file, CODE):
        pass
    assert not [each for each in sent if each == file]
    [kept] = (there.cache / "files").glob("*/model.onnx")
    kept.write_bytes(kept.read_bytes()[:-1])  # damaged meanwhile
    with device(there.url)(file, CODE):
        assert sent == [file]
    assert kept.read_bytes() == file.read_bytes()
    monkeypatch.setattr(
        ssh.Store, "_send", lambda self, _, path: self.shell.run(f"echo x > '{path}'", 9)
    )
    kept.unlink()
    with pytest.raises(UserError, match=r"model\.onnx arrived as another file: its SHA-256 is"):
        device(there.url)(file, CODE).__enter__()


def test_a_lost_connection_is_made_again(there, file, inputs, tmp_path, quick):
    with device(there.url)(file, CODE) as far:
        [first], *_ = far.run(inputs, tmp_path / "out.npz")
        assert there.drop() == 1
        [again], *_ = far.run(inputs, tmp_path / "out.npz")
        assert np.array_equal(first, again)
        far.time(inputs, 5)
        peak = far.memory()
        assert there.drop() == 1
        assert abs(far.memory() - peak) < 0.05 * peak  # the new process has run it too


def test_a_device_that_is_gone_is_told_after_some_tries(there, file, inputs, tmp_path, quick):
    with device(there.url)(file, CODE) as far:
        there.stop()
        try:
            with pytest.raises(UserError, match=r"refuses the connection.*tried 3 times"):
                far.run(inputs, tmp_path / "out.npz")
        finally:
            there.start()
    with device(there.url)(file, CODE) as far:  # the next one goes on
        assert far.run(inputs, tmp_path / "out.npz")


def test_a_network_that_is_gone_is_noticed(there, file, inputs, tmp_path, quick, monkeypatch):
    ssh.end()
    monkeypatch.setattr(shell, "ALIVE_S", 1)
    monkeypatch.setattr(shell, "ALIVE_COUNT", 1)
    monkeypatch.setattr(shell, "PAUSES_S", ())
    link = ["ip", "-n", there.name, "link", "set", "lo", "up"]
    name = subprocess.run(
        ["ip", "-n", there.name, "-o", "link", "show", "type", "veth"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[1]
    link[5] = name.partition("@")[0]
    with device(there.url)(file, CODE) as far:
        subprocess.run([*link[:-1], "down"], check=True)
        try:
            with pytest.raises(UserError, match=r"connection was lost|cannot be reached"):
                far.run(inputs, tmp_path / "out.npz")
        finally:
            subprocess.run(link, check=True)
            ssh.end()


CRASH = """
import os, time
IMPORTS = ()
class Predictor:
    input_names, output_names = ["x"], ["y"]
    def __call__(self, *arrays):
        {does}
def open(path, threads):
    return Predictor()
def version():
    return "odd"
"""


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("os.kill(os.getpid(), 11)", r"on ssh://.*running it crashed \(SIGSEGV\)"),
        ("os._exit(3)", "running it ended with exit code 3"),
        ("raise ValueError('no such luck')", "running it failed: ValueError: no such luck"),
        ("time.sleep(60)", "running it took more than 2 s and was stopped"),
    ],
)
def test_a_crash_there_is_no_lost_connection(there, file, inputs, tmp_path, does, told, quick):
    code = tmp_path / "odd.py"
    code.write_text(CRASH.format(does=does))
    with (
        device(there.url)(file, code, timeout_s=60) as far,
        pytest.raises(UserError, match=told),
    ):
        far.timeout_s = 2
        far.run(inputs, tmp_path / "out.npz")


# --- what may be wrong with a device ---------------------------------------------------------


def refused(url, file):
    with pytest.raises(UserError) as caught:
        device(url)(file, CODE).__enter__()
    return str(caught.value)


def test_what_is_wrong_with_a_device_is_told(there, file, quick, tmp_path, monkeypatch):
    assert "refuses the connection" in refused(f"ssh://root@{there.address}:9", file)
    assert "no such host is known" in refused("ssh://root@nowhere.invalid", file)
    assert "no /nowhere/python there" in refused(there.at("/nowhere/python"), file)
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    said = refused(there.at(bare), file)
    assert "lacks numpy and onnxruntime" in said
    assert f"run {bare} -m pip install numpy onnxruntime there" in said
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of order >&2; exit 2\n")
    broken.chmod(0o755)
    assert "gives no answer: out of order" in refused(there.at(broken), file)
    (tmp_path / "none").write_text("Nonsense yes\n")
    monkeypatch.setenv(shell.CONFIG, str(tmp_path / "none"))
    ssh.end()
    assert "ssh cannot read its configuration" in refused(there.url, file)
    ssh.end()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs OpenSSH's client, not installed here" in refused(there.url, file)


def test_a_wrong_key_and_a_changed_host_are_told(there, file, quick, tmp_path, monkeypatch):
    known, config = there.folder / "known", there.config.read_text()
    other = " ".join((there.folder / "stranger.pub").read_text().split()[:2])
    (tmp_path / "changed").write_text(f"{there.address} {other}\n")
    (tmp_path / "empty").write_text("")

    def asked(text):
        ssh.end()
        (tmp_path / "config").write_text(text)
        monkeypatch.setenv(shell.CONFIG, str(tmp_path / "config"))
        return refused(there.url, file)

    wrong = config.replace(f"{there.folder}/user", f"{there.folder}/stranger")
    assert f"ssh-copy-id root@{there.address}" in asked(wrong)
    changed = asked(config.replace(str(known), str(tmp_path / "changed")))
    assert f"ssh-keygen -R {there.address}" in changed
    unknown = asked(config.replace(str(known), str(tmp_path / "empty")))
    assert "its host key is not known here" in unknown
    ssh.end()


def test_a_full_disk_is_told(there, file, quick):
    ssh.end()
    inside = ["nsenter", "-t", str(there.process.pid), "-m"]  # mounts of its own, as ip makes it
    folder = str(there.cache.parent)
    mount = [*inside, "mount", "-t", "tmpfs", "-o", "size=16k", "none", folder]
    mounted = subprocess.run(mount, check=False)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        said = refused(there.url, file)
        assert "disk is full" in said and "make room there" in said
    finally:
        ssh.end()
        subprocess.run([*inside, "umount", folder], check=True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ssh:", "it names no host"),
        ("ssh://", "it names no host"),
        ("ssh://pi@", "it names no host"),
        ("ssh://-oProxyCommand=touch", "its host is no name of a host"),
        ("ssh://-l@host", "its user is no name of a user"),
        ("ssh://pi@host:99999", "out of range"),
        ("ssh://pi@host:x", "could not be cast"),
        ("ssh://pi@host:0", "its port is no number"),
        ("ssh://pi:secret@host", "holds a password"),
        ("ssh://pi@host/home/pi", "something stands behind the host"),
        ("ssh://pi@host/?pyhton=x", "python alone may be asked for"),
        ("ssh://pi@host/?python", "bad query"),
        ("ssh://pi@ho st", "its host is no name of a host"),
    ],
)
def test_an_address_that_is_none(text, told):
    with pytest.raises(UserError) as caught:
        device(text)
    assert told in str(caught.value) and "write it as ssh://user@host" in str(caught.value)


def test_other_devices_are_none():
    with pytest.raises(UserError, match="'telnet://x' is not one of local, ssh"):
        device("telnet://x")
    at = parsed("ssh://[::1]:22/")
    assert (at.host, at.port, at.user) == ("::1", 22, "")


def test_what_ssh_says_is_kept_where_nothing_else_fits():
    found = lost.cause("line\nkex_exchange_identification: read: odd\n", parsed("ssh://b"), True)
    assert str(found) == "the connection was lost: kex_exchange_identification: read: odd"
    assert not found.final
    assert str(lost.cause("", parsed("ssh://b"), False)) == "the connection failed"


def test_what_is_kept_on_a_device_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(keeper, "KEPT", 3)
    old = tmp_path / "paredown" / "runs" / "old"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    for n in range(6):
        folder = tmp_path / "paredown" / "files" / str(n)
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * 100)
        os.utime(folder, (n, n))
    digest = keeper.sha256(folder / "file")
    found = keeper.begin("new", ["json", "no_such"], {"0/file": digest, "9/file": digest})
    assert found["missing"] == ["no_such"] and found["lacking"] == ["9/file"]
    left = {path.name for path in (tmp_path / "paredown" / "files").iterdir()}
    assert left == {"0", "9", "5"} and not old.exists()  # the two asked for, and the newest
    keeper.prune(tmp_path / "paredown" / "files", 9, 150)
    assert len(list((tmp_path / "paredown" / "files").iterdir())) < 3


# --- measured there --------------------------------------------------------------------------


def task():
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    y = torch.arange(64) % 4
    data = TensorDataset(x, y)
    return Task((x[:1],), paredown.accuracy, F.cross_entropy, validation=data, test=data)


@pytest.mark.slow
def test_a_file_is_measured_there(there, model, file):
    target = Target(device=there.url, rounds=2)
    found = measure({"model": file}, model, task(), target)["model"]
    here = measure({"model": file}, model, task(), Target(rounds=2))["model"]
    assert found.measurement.where["device"] == there.url
    assert torch.equal(found.scores, here.scores) and found.predictions == here.predictions
    assert found.measurement.memory_bytes and found.measurement.latency_ms_p50 > 0
    assert found.measurement.size_bytes == Path(file).stat().st_size


@pytest.mark.slow
def test_times_there_agree_with_times_here(there, tmp_path):
    """Both are the same processor, so neither is faster within the interval of 99.9 %."""
    torch.manual_seed(0)
    layers = [nn.Linear(512, 512) for _ in range(6)]
    big = capture(nn.Sequential(*layers).eval(), (torch.randn(8, 512),))
    path = onnxruntime.lower(big, tmp_path / "big.onnx")
    batches = [[np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)]]
    rounds = {"here": [], "there": []}
    for _ in range(8):  # in turn, so that a drift of the machine meets both
        for name, url in (("here", "local"), ("there", there.url)):
            target = Target(device=url)
            timed = timing.interleaved({"x": path}, target, batches, 1, 400.0, fresh=True)
            rounds[name] += timed["x"].rounds
    ratio = speedups.median_ratio(rounds["here"], rounds["there"], looks.SURE)
    assert ratio.low <= 1 <= ratio.high, ratio
