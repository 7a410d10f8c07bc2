# SPDX-License-Identifier: MIT
"""A directory of the lab's host, served over HTTP on its loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lab.session import Lab

_WAITING = ("--retry", "60", "--retry-connrefused", "--retry-delay", "1")


@contextmanager
def directory(host: Lab, path: str, port: int) -> Iterator[None]:
    """Until the block ends; it answers when the block begins."""
    unit = f"served-{port}"
    server = ("python3", "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", path)
    host.run(["systemd-run", "--quiet", f"--unit={unit}", *server])
    try:
        host.run(["curl", "-sSf", *_WAITING, "-o/dev/null", f"http://127.0.0.1:{port}/"])
        yield
    finally:
        host.run(["systemctl", "stop", unit])
