# SPDX-License-Identifier: MIT
"""What an upgrade needs of its host: systemd, the owner's rows, the answer of both services."""

from __future__ import annotations

import asyncio
import pwd
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

from banger import run, steps
from banger.contract import errors, resources
from banger.system import asking, environment, host, own_units, ownership, releases, settings

UPGRADING: Final = "upgrading"
"""In the helper's directory: names the version that an upgrade switches to, until that has answered."""
ANSWER_S: Final = 120.0
_POLL_S: Final = 0.2
_BANGERD_S: Final = 120.0


class Machine:
    """This host, as root. A test has one of its own."""

    def __init__(self) -> None:
        self.releases = releases.Releases()
        self.helper_dir = host.HELPER
        self.signers = host.SIGNERS

    def systemctl(self, *arguments: str) -> None:
        host.systemctl(*arguments)

    def make_environment(self, prefix: Path, wheels: Sequence[Path]) -> None:
        environment.make(prefix, wheels, Path(sys.executable), like=self.releases.current())

    def require_trust(self, prefix: Path) -> None:
        """Raises BadRequestError when others than root could change what root would execute."""
        ownership.require(prefix, [host.ETC, host.RUNTIME])

    def bangerd(self, prefix: Path, *arguments: str, ok: Collection[int] = (0,)) -> int:
        """That version's `bangerd`, as the owner; its exit status."""
        argv = host.as_user(self._owner(), [str(prefix / "bin/bangerd"), *arguments])
        return run.run(argv, deadline_s=_BANGERD_S, ok=ok).status

    def lay_units(self, prefix: Path) -> own_units.Laid:
        """That version lays its units, which this one may not know; nothing leads to them yet."""
        return own_units.asked_of(prefix, self._owner().pw_name)

    def answers(self, version: str) -> bool:
        """Both services do, in this version."""
        try:
            info = asking.daemon("/v1/info", resources.DaemonInfo)
        except OSError:
            return False
        return info.version == info.helper_version == version

    async def wait_answer(self, version: str) -> None:
        await wait_answer(version)

    def _owner(self) -> pwd.struct_passwd:
        given = settings.read()
        if given is None:
            raise errors.NotFoundError("banger is not installed on this host")
        try:
            return pwd.getpwuid(given.owner_uid)
        except KeyError:
            raise errors.NotFoundError(
                f"banger's owner, uid {given.owner_uid}, is no user of this host",
                hint="`sudo banger system install --owner USER` gives it another",
            ) from None


async def wait_answer(version: str, within_s: float = ANSWER_S) -> None:
    """Until both services answer, in this version. Raises DeadlineError, UnavailableError."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            info = await asyncio.to_thread(asking.daemon, "/v1/info", resources.DaemonInfo)
        except OSError as error:
            if time.monotonic() > deadline:
                raise errors.DeadlineError(
                    f"the daemon did not answer within {within_s:g} s: {error}",
                    hint="see: journalctl -u bangerd -u bangerd-root",
                ) from error
            # It is being started by systemd, whose own notice came when it was ready; this is the proof.
            await asyncio.sleep(_POLL_S)
            continue
        _check(info, version)
        return


def _check(info: resources.DaemonInfo, version: str) -> None:
    for name, found in (("bangerd", info.version), ("bangerd-root", info.helper_version)):
        if found != version:
            said = f"answers in version {found}, and not {version}" if found else "does not answer"
            raise errors.UnavailableError(f"{name} {said}", hint=f"see: journalctl -u {name}")


class Said:
    """Tells the user of each step as it begins."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def began(self, step: steps.Step, name: str) -> None:
        self._say(step.detail if name == step.name else f"taking back: {step.detail}")

    def ended(self, step: steps.Step, name: str, elapsed_s: float, error: BaseException | None) -> None:
        del step, name, elapsed_s, error
