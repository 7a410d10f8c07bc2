# SPDX-License-Identifier: MIT
"""What runs in a guest when a command is asked for: the request, over what the image says."""

from __future__ import annotations

import shlex
from typing import Final

from banger.contract import errors, guest, resources
from banger.images import bundle

_TOOLS: Final = "/root/.local/share/mise/shims"
"""Where mise puts the tools of a workspace; a directory that is not there harms no search."""
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""The agent's own default."""


def exec_spec(request: resources.ExecRequest, image: bundle.RunConfig, workspace: str) -> guest.ExecSpec:
    """The request over what the image says. Its user is for its own command: others are root's, as in a
    machine of one's own.
    """
    argv = request.argv or image.argv
    if not argv:
        raise errors.BadRequestError("the image names nothing to run", hint="give a command")
    if not argv[0]:
        raise errors.BadRequestError(
            "the command's first word is empty", hint="is a variable of it not set?"
        )
    user = request.user or ("" if request.argv else image.user)
    # Other users cannot look into root's home, where workspaces are.
    begins = workspace if user in {"", "root", "0"} else ""
    known = dict(item.partition("=")[::2] for item in image.env)
    if begins:
        known["PATH"] = f"{_TOOLS}:{known.get('PATH', _PATH)}"
    known |= dict(item.partition("=")[::2] for item in request.env)
    return guest.ExecSpec(
        argv=argv,
        env=tuple(f"{name}={value}" for name, value in known.items()),
        cwd=request.cwd or begins or image.working_dir,
        user=user,
        tty=request.tty,
        rows=request.rows,
        cols=request.cols,
    )


def explained(
    error: errors.BangerError, request: resources.ExecRequest, spec: guest.ExecSpec, vm: str
) -> errors.BangerError | None:
    """What to say for an agent's error of the directory: it does not know whose wish that was."""
    if not error.message.startswith(guest.NO_DIRECTORY):
        return None
    reason = error.message.removeprefix(guest.NO_DIRECTORY)
    if not request.cwd:
        hint = "the VM's workspace or its image says to begin there; --cwd / begins elsewhere"
    elif request.remove or not isinstance(error, errors.NotFoundError):
        hint = "choose another --cwd"
    else:
        made = shlex.join(("mkdir", "-p", spec.cwd))
        hint = f"choose another --cwd, or make it: `banger vm exec --cwd / {vm} -- {made}`"
    return type(error)(f"cannot begin in {spec.cwd} of {vm}: {reason}", hint=hint, **error.fields)
