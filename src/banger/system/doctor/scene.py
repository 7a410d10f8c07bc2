# SPDX-License-Identifier: MIT
"""What the probes look at: one host, seen by one user. A test gives another root with fake programs."""

from __future__ import annotations

import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

import msgspec

from banger import run
from banger.contract import decoding, errors, inventory, privileged, resources
from banger.system import asking, host
from banger.system import settings as installation

T = TypeVar("T")

LIMIT_S: Final = 60.0
_EXEC_START: Final = re.compile(r"^ExecStart=(/\S+)/bin/bangerd$", re.MULTILINE)


class UnseenError(Exception):
    """What a probe needs cannot be looked at; `remedy` is what would let it be."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.why = why
        self.remedy = remedy


class Effective(msgspec.Struct, frozen=True, kw_only=True):
    """A value that a VM gets when nothing is asked for, and where it comes from."""

    value: int | str
    source: resources.SizeSource


class _Checked(msgspec.Struct, frozen=True):
    """What `bangerd --check-config` prints."""

    values: dict[str, Effective] = {}
    error: errors.ErrorBody | None = None


class _Once(Generic[T]):
    """A question that many probes have and that is asked once. An answer or an error, each kept."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._answers: list[T] = []
        self._error: Exception | None = None

    def __call__(self) -> T:
        with self._lock:
            if self._error is not None:
                raise self._error
            if not self._answers:
                try:
                    self._answers.append(self._ask())
                except Exception as error:
                    self._error = error
                    raise
            return self._answers[0]


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks at what kind of machine; `root_uid` is another's in a test that is not root."""

    uid: int
    root_uid: int = 0
    machine: str = platform.machine()
    kernel: str = os.uname().release
    python: Path = Path(sys.executable)


class Scene:
    """Paths below a root, programs found there, and the answers of the two services.

    `limit_s` is what one check may take; what it asks others for has a part of that.
    """

    def __init__(
        self, root: Path = Path("/"), viewer: Viewer | None = None, *, limit_s: float = LIMIT_S
    ) -> None:
        self.limit_s = limit_s
        self.answer_s = limit_s / 3
        self._program_s = limit_s / 2
        self.long_program_s = limit_s * 3 / 4
        self.root = root
        self.viewer = viewer or Viewer(os.geteuid())
        self.settings: Callable[[], installation.Settings] = _Once(self._read_settings)
        self.info: Callable[[], resources.DaemonInfo] = _Once(self._ask_info)
        """Raises OSError when the daemon does not answer."""
        self.helper: Callable[[], privileged.HostInfo] = _Once(self._ask_helper)
        """Raises OSError when the helper does not answer."""
        self.defaults: Callable[[], dict[str, Effective]] = _Once(self._ask_defaults)
        """Raises the daemon's own error about a configuration that is not valid."""

    @property
    def is_root(self) -> bool:
        return self.viewer.uid == self.viewer.root_uid

    def at(self, path: Path | str) -> Path:
        return self.root / str(path).lstrip("/")

    def shown(self, path: Path) -> str:
        """As the host names it."""
        return f"/{path.relative_to(self.root)}"

    def text(self, path: Path | str) -> str:
        """Without the last line end. Raises OSError."""
        return self.at(path).read_text(errors="replace").rstrip("\n")

    def text_or_none(self, path: Path | str) -> str | None:
        """None where the kernel, or the installation, has no such file."""
        try:
            return self.text(path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def mounts(self) -> list[list[str]]:
        """The fields of each. A place may have any byte in its name but the space and the line end."""
        text = self.at("/proc/self/mountinfo").read_bytes().decode(errors="replace")
        return [line.split(" ") for line in text.split("\n") if line]

    def program(self, name: str) -> Path | None:
        for directory in run.SEARCH_PATH.split(":"):
            path = self.at(directory) / name
            if os.access(path, os.X_OK) and path.is_file():
                return path
        return None

    def run(
        self, name: str, *arguments: str, ok: Collection[int] = (0,), deadline_s: float | None = None
    ) -> run.Result:
        """A program of this host. Raises UnseenError when it is not there."""
        program = self.program(name)
        if program is None:
            raise UnseenError(f"{name} is not installed", f"install the package that has {name}")
        return run.run([str(program), *arguments], deadline_s=deadline_s or self._program_s, ok=ok)

    def prefix(self) -> Path:
        """The virtual environment that the installed units run from, or ours."""
        unit = self.text_or_none(host.UNIT_DIR / "bangerd.service") or ""
        found = _EXEC_START.search(unit)
        return Path(found[1] if found else sys.prefix)

    def require_daemon(self) -> resources.DaemonInfo:
        """Raises UnseenError when the daemon does not answer: a row of its own says so."""
        try:
            return self.info()
        except OSError as error:
            raise self._silent("bangerd", error) from error

    def require_helper(self) -> privileged.HostInfo:
        try:
            return self.helper()
        except OSError as error:
            raise self._silent("bangerd-root", error) from error

    def inventory(self) -> inventory.Inventory:
        """What of banger's is on the host and whose it is, looked for anew: by both services."""
        self.require_daemon()
        self.require_helper()
        path = self.at(host.API_SOCKET)
        return asking.daemon("/v1/inventory", inventory.Inventory, at=path, timeout_s=self.answer_s)

    def _silent(self, who: str, error: OSError) -> UnseenError:
        if isinstance(error, PermissionError):
            return UnseenError(f"this user may not ask {who}", "run it as the owner, or: sudo banger doctor")
        return UnseenError(f"{who} does not answer", f"see the row {who}")

    def _read_settings(self) -> installation.Settings:
        try:
            found = installation.read(self.at(host.INSTALL_TOML))
        except errors.BadRequestError as error:
            raise UnseenError(error.message, "see the row installed") from error
        if found is None:
            raise UnseenError("banger is not installed on this host", "sudo banger system install")
        return found

    def _ask_info(self) -> resources.DaemonInfo:
        path = self.at(host.API_SOCKET)
        return asking.daemon("/v1/info", resources.DaemonInfo, at=path, timeout_s=self.answer_s)

    def _ask_helper(self) -> privileged.HostInfo:
        return asking.helper(privileged.GetHost(), at=self.at(host.HELPER_SOCKET), timeout_s=self.answer_s)

    def _ask_defaults(self) -> dict[str, Effective]:
        """The daemon's own program reads its configuration; it runs as whoever asks, and serves nothing."""
        program = self.at(self.prefix() / "bin/bangerd")
        if not program.exists():
            raise UnseenError(f"{self.shown(program)} is not installed", "sudo banger system install")
        argv = [str(program), "--check-config", f"--config={self.at(host.CONFIG_TOML)}"]
        answer = decoding.json(run.run(argv, deadline_s=self._program_s, ok=(0, 3)).stdout, _Checked)
        if answer.error is not None:
            raise errors.from_body(answer.error)
        return answer.values
