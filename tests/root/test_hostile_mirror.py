# SPDX-License-Identifier: MIT
"""A mirror that lies: a genuine one, twisted on its way. apt and mmdebstrap are this machine's."""

from __future__ import annotations

import base64
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from banger import debian, run
from banger.contract import errors
from banger.images import recipe as recipes
from lab import cache, mirror

pytestmark = pytest.mark.timeout(180)
Twist = Callable[[str, bytes], bytes | None]
"""What comes instead, for a path; None for nothing."""
ENDLESS: Final = 64 << 20


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def unsigned(path: str, data: bytes) -> bytes | None:
    if path.endswith("/InRelease"):
        return None
    return data


TWISTS: Final[dict[str, Twist]] = {
    "another package": lambda path, data: flipped(data) if path.endswith(".deb") else data,
    "a longer package": lambda path, data: data + b"more" if path.endswith(".deb") else data,
    "another index": lambda path, data: flipped(data) if "/by-hash/" in path else data,
    "another release": lambda path, data: data.replace(b"Suite:", b"Suite: x", 1),
    "no signature": unsigned,
    "a release without end": lambda path, data: bytes(ENDLESS) if path.endswith("Release") else data,
}


class Mirror(http.server.ThreadingHTTPServer):
    """Serves a directory, and what the twist makes of it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.twist: Twist = lambda path, data: data
        self.wants = ""
        """As `user:password`; without one everybody is let in."""


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Mirror)
        given = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        if given != self.server.wants:
            self.send_error(401)
            return
        path = self.server.directory / self.translate_path(self.path).removeprefix(f"{Path.cwd()}/")
        data = self._content(path)
        twisted = None if data is None else self.server.twist(str(path), data)
        if twisted is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(twisted)))
        self.end_headers()
        self.wfile.write(twisted)

    def _content(self, path: Path) -> bytes | None:
        if path.is_file():
            return path.read_bytes()
        if path.name == "Release":  # what is in the signed one, without its signature
            text = path.with_name("InRelease").read_bytes()
            return text.partition(b"\n\n")[2].partition(b"-----BEGIN PGP SIGNATURE")[0]
        return None

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


@pytest.fixture(scope="module")
def served() -> Iterator[Mirror]:
    """A genuine mirror of the smallest recipe's package."""
    entry = mirror.ensure(cache.default_root(), ("busybox-static",))
    with Mirror(entry.path) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    entry.close()


@pytest.fixture
def build(served: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Makes the smallest recipe's system of that mirror alone."""
    uri = f"http://127.0.0.1:{served.server_address[1]}"
    entry = f"deb [signed-by={debian.KEYRING}] {uri} {mirror.SUITE} main"
    monkeypatch.setattr(debian, "sources", lambda suite, mirror="": [entry])
    return lambda: recipes.base_archive(recipes.load("busybox"), arch="x86_64", cache_dir=tmp_path)


LAX: Final = """
Acquire::AllowInsecureRepositories "true";
Acquire::AllowDowngradeToInsecureRepositories "true";
Acquire::AllowWeakRepositories "true";
APT::Get::AllowUnauthenticated "true";
Acquire::Check-Valid-Until "false";
"""


@pytest.fixture
def lax_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose own apt believes anybody: what is said before our options is as in its apt.conf."""
    (tmp_path / "lax.conf").write_text(LAX)
    for name in ("apt-get", "apt-cache"):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec /usr/bin/{name} -c {tmp_path / "lax.conf"} "$@"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(run, "SEARCH_PATH", f"{tmp_path}:{run.SEARCH_PATH}")


@pytest.mark.parametrize("twist", ["no signature", "another release", "another package"])
def test_a_package_is_verified_on_a_host_that_verifies_nothing(
    served: Mirror, tmp_path: Path, lax_host: None, twist: str
) -> None:
    """A kernel's, which is booted."""
    uri = f"http://127.0.0.1:{served.server_address[1]}"
    entry = f"deb [signed-by={debian.KEYRING}] {uri} {mirror.SUITE} main"
    apt = debian.Apt(tmp_path / "apt", [entry], "x86_64")

    def download() -> debian.Package:
        apt.update()
        return apt.download("busybox-static")

    served.twist = TWISTS[twist]
    with pytest.raises(errors.OperationFailedError, match="apt-get exited"):
        download()
    assert list((tmp_path / "apt/downloads").glob("*.deb")) == []
    served.twist = lambda path, data: data
    assert download().path.stat().st_size > 1 << 18


def test_a_mirror_that_tells_the_truth_is_believed(served: Mirror, build: Callable[[], Path]) -> None:
    served.twist = lambda path, data: data
    assert build().stat().st_size > 1 << 20


@pytest.mark.parametrize("twist", TWISTS)
def test_a_mirror_that_lies_is_not(
    served: Mirror, build: Callable[[], Path], tmp_path: Path, twist: str
) -> None:
    served.twist = TWISTS[twist]
    with pytest.raises(errors.OperationFailedError, match="mmdebstrap exited"):
        build()
    assert list((tmp_path / "recipes").iterdir()) == []


def test_a_mirror_s_password_reaches_neither_the_image_nor_a_command_line(
    served: Mirror, build: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.twist, served.wants = lambda path, data: data, "me:correct-horse"
    [entry] = debian.sources(mirror.SUITE)
    private = entry.replace("://", "://me:correct-horse@")
    monkeypatch.setattr(debian, "sources", lambda suite, mirror="": [private])
    program = tmp_path / "mmdebstrap"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nexec /usr/bin/mmdebstrap "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(run, "SEARCH_PATH", f"{tmp_path}:{run.SEARCH_PATH}")
    made = build().read_bytes()
    served.wants = ""
    assert entry.encode() in made
    assert entry in (tmp_path / "called").read_text()
    assert b"correct-horse" not in made
    assert "correct-horse" not in (tmp_path / "called").read_text()
