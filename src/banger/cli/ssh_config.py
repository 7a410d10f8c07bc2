# SPDX-License-Identifier: MIT
"""What ssh is told of guests, and the one line about it in the user's own configuration.

Only `Install` writes, only on request, and only a fenced block at the top of `~/.ssh/config` and a file of
our own beside it. Taking it off leaves every other byte as it was.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from banger.contract import errors, reach

FILE: Final = "banger.conf"
_WAIT_S: Final = 60
"""How long a guest may boot before its ssh server takes a connection."""
_ANSWER_S: Final = 30
"""How long one that took it may say nothing."""
_MODE: Final = 0o600
_BEGIN: Final = "# >>> banger: `banger ssh-config --uninstall` takes this block away"
_NEW_FILE: Final = "; it made this file"
_NEW_DIRECTORY: Final = "; it made this file and its directory"
_END: Final = "# <<< banger"
_BLOCK: Final = re.compile(
    rf"^{re.escape(_BEGIN)}(?P<made>[^\n]*)\n(?:[^\n]*\n)*?{re.escape(_END)}\n", re.MULTILINE
)


def options(access: reach.SshAccess, proxy: str) -> tuple[tuple[str, str], ...]:
    """For every guest. A guest without network is reached too: the connection goes through the daemon."""
    return (
        ("User", "root"),
        ("ProxyCommand", proxy),
        ("ConnectTimeout", str(_WAIT_S + _ANSWER_S)),
        ("IdentityFile", _quoted(access.identity_file)),
        ("IdentitiesOnly", "yes"),
        ("PreferredAuthentications", "publickey"),
        ("StrictHostKeyChecking", "accept-new"),
        ("UserKnownHostsFile", _quoted(f"{access.host_keys_dir}/%n")),
        ("GlobalKnownHostsFile", "/dev/null"),
        ("UpdateHostKeys", "no"),
        ("CheckHostIP", "no"),
        ("HashKnownHosts", "no"),
        ("CanonicalizeHostname", "no"),
        ("ForwardAgent", "no"),
        ("ForwardX11", "no"),
    )


def proxy_command(program: Sequence[str], socket: str) -> str:
    """ssh hands it to a shell, with %n as the name it was given."""
    chosen = f" --socket {_shell(socket)}" if socket else ""
    # ssh has the shell run `exec COMMAND` (ssh_config(5), ProxyCommand): one more would be its name.
    return f"{' '.join(map(_shell, program))}{chosen} vm proxy --wait {_WAIT_S} -- %n"


def text(access: reach.SshAccess, proxy: str) -> str:
    """A configuration file for all guests: `NAME.vm`. Names below one are the guest's own business."""
    lines = ["# Made by `banger ssh-config`, and made anew by it.", "Host *.vm !*.*.vm"]
    lines += [f"    {key} {value}" for key, value in options(access, proxy)]
    return "\n".join(lines) + "\n"


def _quoted(path: str) -> str:
    if '"' in path or "\n" in path:
        raise errors.BadRequestError(f"{path!r} cannot stand in an ssh configuration")
    return f'"{path}"' if re.search(r"\s", path) else path


def _shell(word: str) -> str:
    """For a shell, and with `%` kept from ssh."""
    return shlex.quote(word).replace("%", "%%")


class Install:
    """The block in `<home>/.ssh/config` and the file that it includes."""

    def __init__(self, home: Path) -> None:
        self._directory = home / ".ssh"
        self._config = self._directory / "config"
        self._ours = self._directory / FILE

    def install(self, content: str) -> bool:
        """Idempotent. True when anything changed."""
        made = ""
        if not self._directory.exists():
            self._directory.mkdir(mode=0o700)
            made = _NEW_DIRECTORY
        elif not os.path.lexists(self._config):
            made = _NEW_FILE
        before = _read(self._config)
        found = _BLOCK.search(before)
        if found is not None:
            made = found["made"]
        block = f"{_BEGIN}{made}\nInclude {FILE}\n{_END}\n"
        # An Include below a Host line would belong to that host, so the block is the first thing.
        after = block + (before if found is None else before[: found.start()] + before[found.end() :])
        changed = _write(self._ours, content)
        return _write(self._config, after) or changed

    def uninstall(self) -> bool:
        """Takes back exactly what `install` made. True when anything changed."""
        before = _read(self._config)
        found = _BLOCK.search(before)
        changed = os.path.lexists(self._ours)
        if found is not None:
            after = before[: found.start()] + before[found.end() :]
            if not after and found["made"] and not self._config.is_symlink():
                self._config.unlink()
            else:
                _write(self._config, after)
            changed = True
        self._ours.unlink(missing_ok=True)
        if found is not None and found["made"] == _NEW_DIRECTORY:
            with contextlib.suppress(OSError):  # others have files there by now
                self._directory.rmdir()
        return changed


def _read(path: Path) -> str:
    """Bytes that are no UTF-8 survive. Raises ConflictError for what is not a file of the user's own."""
    try:
        with path.open("rb") as file:
            _check(path, os.fstat(file.fileno()))
            return file.read().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        if path.is_symlink():
            raise _refused(path, "it is a link to nothing") from None
        return ""


def _write(path: Path, content: str) -> bool:
    """Whole or not at all, behind a link where there is one, with the mode that it had."""
    real = Path(os.path.realpath(path))
    data = content.encode("utf-8", "surrogateescape")
    mode = _MODE
    if real.exists():
        found = real.stat()
        _check(path, found)
        if real.read_bytes() == data:
            return False
        mode = stat.S_IMODE(found.st_mode)
    descriptor, name = tempfile.mkstemp(dir=real.parent, prefix=".banger-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(name, real)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return True


def _check(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _refused(path, "it is not a regular file")
    if found.st_uid != os.getuid():
        raise _refused(path, f"it belongs to uid {found.st_uid}")
    if found.st_nlink > 1:
        raise _refused(path, "it has several names, which replacing it would part")


def _refused(path: Path, why: str) -> errors.ConflictError:
    hint = "`banger ssh-config` prints what you may include yourself"
    return errors.ConflictError(f"{path} is left alone: {why}", hint=hint)
