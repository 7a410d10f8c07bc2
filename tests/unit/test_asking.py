# SPDX-License-Identifier: MIT
"""What is asked of the services, and something else is answered."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.contract import privileged
from banger.system import asking


@pytest.fixture
def place() -> Iterator[Path]:
    """A path that fits into a socket's address."""
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as path:
        yield Path(path) / "helper.sock"


@pytest.mark.parametrize("answer", [b"", b"\0\0", b"\0\0\0\x09{", b"\0\0\0\x02{]", b"\0\0\0\x01\xff"])
def test_a_helper_that_ends_in_its_answer_does_not_answer(place: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()

        def serve() -> None:
            taken, _ = listener.accept()
            with taken:
                taken.recv(4096)
                taken.sendall(answer)

        serving = threading.Thread(target=serve)
        serving.start()
        try:
            with pytest.raises(OSError, match="answer"):
                asking.helper(privileged.GetHost(), at=place)
        finally:
            serving.join()
