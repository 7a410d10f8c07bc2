# SPDX-License-Identifier: MIT
"""The tools that a repository declares, installed in its VM by mise before anything else runs there."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Final

from banger.cli import attach, client, exits, render
from banger.contract import destinations, egress, errors, resources

LOG: Final = "~/.banger-bootstrap.log"
_DECLARATIONS: Final = (b"mise.toml", b".mise.toml", b".tool-versions", b".config/mise/config.toml")
_NO_MISE: Final = 90
_SHOWN_BYTES: Final = 8192
_SCRIPT: Final = r"""
command -v mise >/dev/null 2>&1 || exit 90
cd "$1" || exit 1
log="$HOME/.banger-bootstrap.log"
mise trust -q "$1" >"$log" 2>&1
mise install --yes >>"$log" 2>&1 || { tail -n 20 "$log" >&2; exit 1; }
# For root's login shells, such as those of ssh.
[ "$HOME" != /root ] || { mkdir -p /etc/profile.d &&
  echo 'export PATH="$HOME/.local/share/mise/shims:$PATH"' >/etc/profile.d/banger-mise.sh; }
"""


def is_wanted(files: Collection[bytes]) -> bool:
    return any(name in files for name in _DECLARATIONS)


def require_network(asked: resources.CreateVm) -> None:
    """Refuses, before anything is made, to install tools where nothing can be fetched."""
    has_nat, mode = destinations.opened(asked.nat, asked.egress, asked.allow)
    if not asked.allow and (not has_nat or mode is egress.Egress.NONE):
        raise errors.BadRequestError(
            "the repository declares tools for mise, and a VM that reaches nothing cannot fetch them",
            hint="add --nat, --allow with where they come from, or --no-bootstrap to do without them",
        )


def install(api: client.Client, vm: resources.Vm, path: str) -> None:
    """Raises OperationFailedError when it did not work; the end of its log is on stderr then.

    A signal that ends us ends the installation, for the guest ends what its client leaves.
    """
    render.note(f"installing the repository's tools in {vm.name}; the log is {LOG} there")
    argv = ("/bin/sh", "-c", _SCRIPT, "banger-bootstrap", path)
    said = attach.Kept(_SHOWN_BYTES)
    request = resources.ExecRequest(argv=argv, cwd="/")
    try:
        status = attach.run(api, vm.id, request, stdin=False, kept=said, forwarded=())
    except (KeyboardInterrupt, exits.SignalledError):
        render.note(f"the repository's tools are not all installed in {vm.name}")
        raise
    if status == _NO_MISE:
        raise errors.MissingToolError(
            f"the repository declares tools for mise, which {vm.name} does not have",
            hint="docs/workspace.md says how to make an image with mise; or do without: --no-bootstrap",
            tool="mise",
        )
    if status:
        # Nobody asked to be connected to the guest here: it gets no terminal of its own.
        print(render.safe_log(said.data.decode(errors="replace")), end="", file=sys.stderr)
        raise errors.OperationFailedError(
            f"the repository's tools could not be installed in {vm.name}",
            hint=f"see {LOG} there, or do without them: --no-bootstrap",
        )
