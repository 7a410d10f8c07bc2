# SPDX-License-Identifier: MIT
"""banger's own ssh key pair, and the host keys of guests: pinned at first use, forgotten with their VM.

Nothing here touches `~/.ssh`. One file holds the host key of one VM, so that forgetting is deleting a file.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Final

from banger import run
from banger.contract import errors, names, reach

_log = logging.getLogger(__name__)

_KEYGEN_S: Final = 30.0
_COMMENT: Final = "banger"
_PRIVATE: Final = 0o600


class SshKeys:
    """The directory `<state>/ssh`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._identity = directory / "id_ed25519"
        self._host_keys = directory / "hosts"
        self._making = threading.Lock()

    def public_key(self) -> str:
        """One line for authorized_keys. Empty without ssh-keygen: a VM then starts all the same."""
        try:
            return self.access().public_key
        except errors.MissingToolError as error:
            _log.warning("the new guest will accept no ssh key", extra={"error": error.message})
            return ""

    def access(self) -> reach.SshAccess:
        """Makes the key pair when there is none. Raises MissingToolError without ssh-keygen."""
        for directory in (self._directory, self._host_keys):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._making:
            if not self._identity.exists() or not self._public.exists():
                self._make_pair()
        return reach.SshAccess(
            identity_file=str(self._identity),
            host_keys_dir=str(self._host_keys),
            public_key=self._public.read_text().strip(),
        )

    def forget(self, name: names.VmName) -> None:
        """The host key of whoever had this name; whoever has it next brings another one.

        An ssh client that connected just before the end pins it just after: so also when a name is given.
        """
        (self._host_keys / f"{name}.vm").unlink(missing_ok=True)

    @property
    def _public(self) -> Path:
        return self._identity.with_suffix(".pub")

    def _make_pair(self) -> None:
        """The private key appears last: one that is there is whole and has its public key."""
        with tempfile.TemporaryDirectory(dir=self._directory, prefix=".new-") as scratch:
            made = Path(scratch) / self._identity.name
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", _COMMENT, "-f", str(made)]
            run.run(argv, deadline_s=_KEYGEN_S)
            made.chmod(_PRIVATE)
            os.replace(made.with_suffix(".pub"), self._public)
            os.replace(made, self._identity)
        _log.info("ssh key pair made", extra={"path": str(self._identity)})
