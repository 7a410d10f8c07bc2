# SPDX-License-Identifier: MIT
"""Who the owner is to git, for the home of every new VM: a commit there is then theirs, in any repository.

Only name and address, of what git knows in all repositories here. Nothing that the configuration names is
run by asking for them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from banger import run
from banger.contract import errors

_log = logging.getLogger(__name__)

_DEADLINE_S: Final = 5.0
_KEYS: Final = (b"name", b"email")
_MAX_BYTES: Final = 1000
_ESCAPED: Final = ((b"\\", b"\\\\"), (b'"', b'\\"'), (b"\n", b"\\n"), (b"\t", b"\\t"))


def git_config(home: Path) -> bytes:
    """The text of a git configuration; empty where git here, or its user, says nothing. May block."""
    env = run.environment(HOME=str(home), GIT_CONFIG_NOSYSTEM="1")
    asked = ["git", "config", "--global", "--includes", "--null", "--get-regexp", r"^user\.(name|email)$"]
    try:
        said = run.run(asked, deadline_s=_DEADLINE_S, ok=(0, 1), env=env, cwd=Path("/")).stdout
    except errors.BangerError as error:
        _log.warning("git does not say who the owner is", extra={"error": error.message})
        return b""
    found = {}
    for record in said.split(b"\0"):
        key, has_value, value = record.removeprefix(b"user.").partition(b"\n")
        if has_value and value and len(value) <= _MAX_BYTES:
            found[key] = value
    lines = [b'\t%s = "%s"\n' % (key, _escaped(found[key])) for key in _KEYS if key in found]
    return b"[user]\n" + b"".join(lines) if lines else b""


def _escaped(value: bytes) -> bytes:
    for plain, written in _ESCAPED:
        value = value.replace(plain, written)
    return value
