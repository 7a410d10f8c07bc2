# SPDX-License-Identifier: MIT
"""The lab with banger installed that benchmarks share: brought up when the first of them wants it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from bench import inside
from lab import errors, provision
from lab.session import Lab

PYTHON: Final = f"{provision.VENV}/bin/python"
PLACE: Final = "/root/measured"
RUN_LIMIT_S: Final = 3000


class Host:
    """One lab for one run of `bench`; `name` takes up a lab that runs already, and leaves it running."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._stack = contextlib.ExitStack()
        self._lab: Lab | None = None

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(self, module: str, *words: str) -> Iterator[dict[str, Any]]:
        """What `python -m bench.inside.<module>` prints in the lab, document by document, as root."""
        argv = ["env", "-C", PLACE, PYTHON, "-m", f"bench.inside.{module}", *words]
        with self._up().shell.open(argv, limit_s=RUN_LIMIT_S) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            for line in running.stdout:
                yield json.loads(line)
            said = running.stderr.read().decode(errors="replace")
            if running.wait() != 0:
                raise errors.LabError(f"bench.inside.{module} failed in the lab", hint=said)

    def _up(self) -> Lab:
        if self._lab is None:
            if self._name:
                self._lab = Lab.find(self._name)
            else:
                self._lab = self._stack.enter_context(provision.installed(f"bench-{os.getpid()}"))
            self._lab.write(f"{PLACE}/bench/__init__.py", b"")
            self._lab.put(Path(inside.__path__[0]), f"{PLACE}/bench/inside")
        return self._lab
