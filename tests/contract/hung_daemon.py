# SPDX-License-Identifier: MIT
"""bangerd, whose event loop hangs from SIGUSR1 on: a handler runs in the loop's own thread."""

from __future__ import annotations

import signal
import sys

from banger import systemd
from banger.owner import main


def hang_here(*_: object) -> None:
    systemd.notify("STATUS=it hangs")
    while True:
        signal.pause()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, hang_here)
    sys.exit(main.main())
