# SPDX-License-Identifier: MIT
"""What a build reaches, by the real builder as its uid and in its network; `mmdebstrap` is an attacker."""

from __future__ import annotations

import json
import os
import socket
import tarfile
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger import debian, run
from banger.contract import building, errors
from banger.owner import builder
from tests.fakes import origin as origins
from tests.root import build_unit

ATTACKER = r"""
#!/usr/bin/python3
import io, json, os, socket, sys, tarfile, urllib.error, urllib.request

source, other = json.load(open("PLAN"))

def outcome(what):
    try:
        return what()
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        return type(error).__name__

def fetched(url):
    return urllib.request.urlopen(url, timeout=20).read().decode()

def connected(*place):
    socket.create_connection(place, timeout=20)
    return "did"

found = {
    "the source": outcome(lambda: fetched(f"http://127.0.0.1:{source}/x")),
    "a service of the host's": outcome(lambda: fetched(f"http://127.0.0.1:{other}/x")),
    "metadata": outcome(lambda: fetched("http://169.254.169.254/latest/meta-data/")),
    "a tunnel to metadata": outcome(lambda: fetched("https://169.254.169.254/")),
    "the host itself": outcome(lambda: connected("127.0.0.1", other)),
    "metadata itself": outcome(lambda: connected("169.254.169.254", 80)),
    "a name": outcome(lambda: connected("localhost", other)),
    "an abstract socket": outcome(lambda: socket.socket(socket.AF_UNIX).connect("\0of-the-host")),
    "links": sorted(line.split(":")[0].strip() for line in open("/proc/self/net/dev") if ":" in line),
    "told": sorted(name for name in os.environ if "proxy" in name.lower()),
    "secrets": [name for name, value in os.environ.items() if "secret" in value],
}
tar = next(word for word in sys.argv if word.endswith("/root.tar"))
with tarfile.open(tar, "w") as file:
    entry = tarfile.TarInfo("./report")
    entry.size = len(report := json.dumps(found).encode())
    file.addfile(entry, io.BytesIO(report))
"""


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="banger-build-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def servers() -> Iterator[tuple[origins.Origin, origins.Origin]]:
    """A package source and a service, both on the host's loopback."""
    both = origins.Origin(), origins.Origin()
    yield both
    for each in both:
        each.close()


@pytest.fixture
def prepare(home: Path, servers: tuple[origins.Origin, origins.Origin]) -> Callable[[], None]:
    """The host of the build: its mmdebstrap is the attacker."""
    (home / "bin").mkdir()
    (home / "plan").write_text(json.dumps([each.port for each in servers]))
    programs = {
        "mmdebstrap": textwrap.dedent(ATTACKER).lstrip().replace("PLAN", str(home / "plan")),
        "fakechroot": '#!/bin/sh\nexec "$@"\n',
        "fakeroot": '#!/bin/sh\nexec "$@"\n',
    }
    for name, text in programs.items():
        (home / "bin" / name).write_text(text)
        (home / "bin" / name).chmod(0o755)

    def lay() -> None:
        run.SEARCH_PATH = f"{home / 'bin'}:/usr/bin:/bin"  # type: ignore[misc]  # of the build's process
        debian.KEYRING = home  # type: ignore[misc]

    return lay


def wanted(mirror: str) -> building.Base:
    return building.Base(
        arch="x86_64", suite="bookworm", variant="minbase", packages=("dash",), mirror=mirror
    )


def test_a_build_reaches_its_package_source_and_nothing_else(
    home: Path,
    servers: tuple[origins.Origin, origins.Origin],
    prepare: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, other = servers
    monkeypatch.setattr(debian, "KEYRING", home)
    monkeypatch.setenv("no_proxy", "127.0.0.1,169.254.169.254,secret.example")
    monkeypatch.setenv("FTP_PROXY", "http://user:secret@127.0.0.1:1")
    with (
        socket.socket(socket.AF_UNIX) as abstract,
        build_unit.serving_one(home, os.getuid(), prepare) as path,
    ):
        abstract.bind("\0of-the-host")
        abstract.listen()
        builder.Builder(path)(wanted(source.url), home / "made.tar", print)
    with tarfile.open(home / "made.tar") as made:
        found = json.loads(made.extractfile("./report").read())  # type: ignore[union-attr]
    links = found.pop("links")
    assert found == {
        "the source": origins.BODY.decode(),
        "a service of the host's": 403,
        "metadata": 403,
        "a tunnel to metadata": "URLError",
        "the host itself": "ConnectionRefusedError",
        "metadata itself": "OSError",
        "a name": "ConnectionRefusedError",
        "an abstract socket": "ConnectionRefusedError",
        "told": ["HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "https_proxy"],
        "secrets": [],
    }
    assert "lo" in links
    assert len(source.heads) == 1
    assert other.heads == []


def test_a_builder_in_the_host_s_network_does_not_begin(home: Path, prepare: Callable[[], None]) -> None:
    """systemd starts a unit without the network that it cannot make."""
    with (
        build_unit.serving_one(home, os.getuid(), prepare, own_network=False) as path,
        pytest.raises(errors.UnavailableError, match="ended before its work did"),
    ):
        builder.Builder(path)(wanted("http://127.0.0.1:1"), home / "made.tar", print)
