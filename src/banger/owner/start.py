# SPDX-License-Identifier: MIT
"""Console script of `bangerd`: VMs wait for a daemon that starts again, so it starts with little.

Most daemons make no image and import no kernel before they end. What only that needs is therefore imported
by the functions that do it (`owner/images.py`, `owner/pulls.py`, `owner/kernels.py` and what they call).
"""

from __future__ import annotations

import gc


def main() -> int:
    gc.disable()  # what is loaded stays: looking for garbage in it, again and again, finds none
    from banger.owner import main as daemon

    gc.freeze()
    gc.enable()
    return daemon.main()
