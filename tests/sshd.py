"""A real sshd for tests: in a network namespace of its own, at another address of this machine."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

SSHD = "/usr/sbin/sshd"


def missing() -> str:
    """Why there can be none here; "" where there can."""
    lacking = [name for name in (SSHD, "ssh", "ssh-keygen", "ip") if shutil.which(name) is None]
    if lacking:
        return f"no {' and no '.join(lacking)}: apt-get install openssh-server iproute2"
    if os.geteuid():
        return "a network namespace needs root"
    name = f"pare-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclasses.dataclass
class Machine:
    """Another machine, as ssh sees it: an address, an sshd, keys, and a home for its cache."""

    folder: Path
    name: str
    address: str
    python: str
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return self.at(self.python)

    def at(self, python: str) -> str:
        return f"ssh://root@{self.address}/?python={python}"

    @property
    def config(self) -> Path:
        return self.folder / "ssh_config"

    @property
    def cache(self) -> Path:
        return self.folder / "cache" / "paredown"

    def start(self) -> None:
        command = ["ip", "netns", "exec", self.name, SSHD, "-D", "-e"]
        log = (self.folder / "sshd.log").open("ab")
        self.process = subprocess.Popen(
            [*command, "-f", str(self.folder / "sshd_config")], stderr=log, stdout=log
        )
        log.close()
        until = time.monotonic() + 20
        while not self._greets():
            assert time.monotonic() < until and self.process.poll() is None, self.log()
            time.sleep(0.05)

    def log(self) -> str:
        return (self.folder / "sshd.log").read_text()[-2000:]

    def _greets(self) -> bool:
        import socket

        with contextlib.suppress(OSError), socket.create_connection((self.address, 22), 1) as sock:
            return sock.recv(4) == b"SSH-"
        return False

    def connections(self) -> list[int]:
        """The processes that serve a connection each."""
        listing = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in listing.split()]

    def drop(self) -> int:
        """Kill what serves the connections there are, and how many that were."""
        found = self.connections()
        for pid in found:
            below = []
            with contextlib.suppress(OSError):  # it may have ended by itself
                below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for each in (pid, *map(int, below)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        return len(found)

    def stop(self) -> None:
        if self.process is not None:
            self.drop()
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def machine(folder: Path, python: str):
    """Another machine for as long as the block lasts."""
    number = os.getpid() % 60000 + random.randrange(1000)
    name, ours, theirs = f"pare{number}", f"pa{number}", f"pb{number}"
    net = f"10.213.{number // 256 % 256}.{number % 64 * 4}".rpartition(".")
    last = int(net[2])
    here, there = f"{net[0]}.{last + 1}", f"{net[0]}.{last + 2}"
    for key in ("host", "user", "stranger"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(command, check=True)
    (folder / "cache").mkdir()
    _write(folder, there)
    _ip("netns", "add", name)
    found = Machine(folder, name, there, python)
    try:
        _ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        _ip("addr", "add", f"{here}/30", "dev", ours)
        _ip("link", "set", ours, "up")
        _ip("-n", name, "addr", "add", f"{there}/30", "dev", theirs)
        _ip("-n", name, "link", "set", theirs, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        found.start()
        yield found
    finally:
        with contextlib.ExitStack() as stack:
            stack.callback(_ip, "netns", "del", name)
            found.stop()


def _write(folder: Path, there: str) -> None:
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    (folder / "sshd_config").write_text(f"""
ListenAddress {there}
HostKey {folder}/host
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/authorized
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxSessions 20
SetEnv XDG_CACHE_HOME={folder}/cache
""")
    key = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known").write_text(f"{there} {key}\n")
    (folder / "ssh_config").write_text(f"""
Host *
  IdentityFile {folder}/user
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {folder}/known
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
""")
