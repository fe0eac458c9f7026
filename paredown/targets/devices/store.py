"""What lies on a device that is reached by ssh: files by content, and what is made for a run."""

from __future__ import annotations

import ast
import hashlib
import json
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError
from paredown.core.files import read_parts, sha256
from paredown.targets.devices import keeper
from paredown.targets.devices.shell import Ran, Shell

REMOVE_S = 60.0  # the longest that removing a file may take
UNKNOWN = (126, 127)  # what a shell ends with where it cannot start a program
INPUTS_KEPT = 4  # files of inputs that lie there at a time


class Store:
    """The folder of a device in which files are kept, and one in it for this run.

    Args:
        timeout_s: the longest that sending, fetching or checking a file may take, in seconds.
    """

    def __init__(self, shell: Shell, timeout_s: float) -> None:
        self.shell, self._timeout_s = shell, timeout_s
        self._run = secrets.token_hex(8)
        self._inputs: dict[str, str] = {}  # SHA-256 -> its path there
        self._home = ""
        self._free = 0

    @property
    def folder(self) -> str:
        """The run's own folder on the device."""
        return f"{self._home}/runs/{self._run}"

    def begin(self, runtime_file: Path, groups: Sequence[Sequence[Path]]) -> list[str]:
        """Look what the device has, make the run's folder there, and send what is not there.

        Args:
            groups: files that lie in one folder there, which is named after what they hold.

        Returns:
            the path there of the first of each group.

        Raises:
            UserError: no Python there, one that is too old, no NumPy, or no such runtime; the disk
                is full, or what came is not what was sent.
            Lost: the connection failed.
        """
        digests = {file: sha256(read_parts(file)) for group in groups for file in group}
        folders = [_folder({file.name: digests[file] for file in group}) for group in groups]
        places = {
            f"{folder}/{file.name}": file
            for folder, group in zip(folders, groups, strict=True)
            for file in group
        }
        files = {place: digests[file] for place, file in places.items()}
        modules = ["numpy", *_imports(runtime_file)]
        found = self._ask("begin", run=self._run, modules=modules, files=files)
        self._check(found["python"], found["missing"])
        self._home, self._free, self._inputs = found["home"], found["free_bytes"], {}
        for place in found["lacking"]:
            self._send(places[place], f"{self._home}/files/{place}{keeper.PART}")
        if found["lacking"]:
            self._arrived({place: files[place] for place in found["lacking"]})
        return [
            f"{self._home}/files/{folder}/{group[0].name}"
            for folder, group in zip(folders, groups, strict=True)
        ]

    def _check(self, version: Sequence[int], missing: Sequence[str]) -> None:
        said = ".".join(map(str, version))
        if tuple(version[:2]) < keeper.OLDEST:
            least = ".".join(map(str, keeper.OLDEST))
            raise self._refused(f"its {self._python} is Python {said}; {least} is needed")
        if missing:
            wheels = " ".join(name.replace("_", "-") for name in missing)
            raise self._refused(
                f"its {self._python} (Python {said}) lacks {' and '.join(missing)}; run "
                f"{self._python} -m pip install {wheels} there, or name another Python in the "
                "address, as in ssh://host/?python=/opt/venv/bin/python"
            )

    def _arrived(self, sent: dict[str, str]) -> None:
        for name, found in self._ask("arrived", files=sent)["wrong"].items():
            raise self._refused(
                f"{Path(name).name} arrived as another file: its SHA-256 is {found} there, and "
                f"{sent[name]} here"
            )

    def inputs(self, file: Path) -> str:
        """A file of inputs on the device; its path there.

        Raises:
            UserError, Lost: as `begin`.
        """
        digest = sha256(read_parts(file))
        if digest not in self._inputs:
            while len(self._inputs) >= INPUTS_KEPT:
                oldest = self._inputs.pop(next(iter(self._inputs)))
                self.shell.run(f"rm -f {shlex.quote(oldest)}", REMOVE_S)
            there = f"{self.folder}/{digest}.npz"
            self._send(file, there)
            self._inputs[digest] = there
        return self._inputs[digest]

    def fetch(self, there: str, file: Path) -> None:
        """Copy a file from the device.

        Raises:
            UserError: it is not there.
            Lost: the connection failed.
        """
        self._done(self.shell.run(f"cat {shlex.quote(there)}", self._timeout_s, into=file), there)

    def end(self) -> None:
        """Remove what was made for this run from the device.

        Raises:
            UserError, Lost: it cannot be removed; what is left is removed by a later run.
        """
        if self._home:
            self._ask("end", run=self._run)

    def _send(self, file: Path, there: str) -> None:
        ran = self.shell.run(f"cat > {shlex.quote(there)}", self._timeout_s, given=file)
        if ran.code and "No space left" in ran.said:
            raise self._refused(
                f"its disk is full: {file.name} takes {file.stat().st_size:,} bytes, and "
                f"{self._free:,} were free in {self._home}; make room there"
            )
        self._done(ran, there)

    def _done(self, ran: Ran, there: str) -> None:
        if ran.code:
            raise self._refused(f"{there} there: {_last(ran.said) or f'exit code {ran.code}'}")

    def _ask(self, command: str, **values: Any) -> dict[str, Any]:
        line = shlex.join([self._python, "-", command, json.dumps(values)])
        ran = self.shell.run(line, self._timeout_s, given=Path(keeper.__file__).read_bytes())
        if ran.code in UNKNOWN:
            raise self._refused(
                f"no {self._python} there ({_last(ran.said)}); install Python, or name the one to "
                "take, as in ssh://host/?python=/opt/venv/bin/python"
            )
        try:
            found: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
        except (ValueError, IndexError):
            said = _last(ran.said) or f"exit code {ran.code}"
            raise self._refused(f"its {self._python} gives no answer: {said}") from None
        if "error" in found:
            full = (
                "; its disk is full, make room there" if "No space left" in found["error"] else ""
            )
            raise self._refused(f"{found['error']}{full}")
        return found

    @property
    def _python(self) -> str:
        return self.shell.address.python

    def _refused(self, why: str) -> UserError:
        return UserError(f"device: {self.shell.address.text!r}: {why}.")


def _folder(digests: dict[str, str]) -> str:
    """The name of the folder of these files: the SHA-256 of what they are called and hold."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _imports(runtime_file: Path) -> list[str]:
    """The packages that a runtime's file imports to open one, without importing any."""
    for node in ast.parse(runtime_file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "IMPORTS":
            return [name.partition(".")[0] for name in ast.literal_eval(node.value)]
    return []


def _last(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
