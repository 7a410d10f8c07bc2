# SPDX-License-Identifier: MIT
"""What a user may write for a published port."""

from __future__ import annotations

import pytest

from banger.contract import errors, ports


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("8080:80", "127.0.0.1:8080:80/tcp"),
        ("5353:53/udp", "127.0.0.1:5353:53/udp"),
        ("0.0.0.0:8080:80", "0.0.0.0:8080:80/tcp"),
        ("127.0.0.1:8080:80/tcp", "127.0.0.1:8080:80/tcp"),
    ],
)
def test_a_published_port(text: str, parsed: str) -> None:
    assert str(ports.parse(text)) == parsed
    assert ports.parse(parsed) == ports.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "80", "0:80", "80:0", "65536:80", "80:65536", "80:80/sctp", "1.2.3:80:80", "a:80:80", "::1:80:80"],
)
def test_not_a_published_port(text: str) -> None:
    with pytest.raises(errors.BadRequestError):
        ports.parse(text)


def test_one_place_of_the_host_is_published_once() -> None:
    assert len(ports.parse_all(("8080:80", "8080:80/udp", "0.0.0.0:8080:80"))) == 3
    with pytest.raises(errors.BadRequestError, match=r"port 127\.0\.0\.1:8080/tcp of .* twice"):
        ports.parse_all(("8080:80", "127.0.0.1:8080:81"))
    with pytest.raises(errors.BadRequestError, match="more than"):
        ports.parse_all(tuple(f"{n}:80" for n in range(8000, 8033)))
