# SPDX-License-Identifier: MIT
"""What runs in a guest when a command is asked for: the request, over what the image says."""

from __future__ import annotations

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
