# SPDX-License-Identifier: MIT
"""The host's package sources, and what a server gives for a suite; with the real apt, on a directory."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import platform
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from banger import debian, run
from banger.contract import building, errors
from banger.images import base, recipe
from tests.unit.tars import file, symlink, tar

ARCH = platform.machine()
PACKAGES = b"Package: sample\nVersion: 1\nArchitecture: all\nFilename: x.deb\nSize: 1\nSHA256: 00\n"


def archive(root: Path, *, codename: str, suite: str) -> str:
    """One that is trusted, as its signature is that of any of the distribution's suites; its entry."""
    where = f"main/binary-{debian.ARCHITECTURES[ARCH]}/Packages"
    index = root / "dists/bookworm" / where
    index.parent.mkdir(parents=True)
    index.write_bytes(PACKAGES)
    (root / "dists/bookworm/Release").write_text(
        f"Origin: Debian\nSuite: {suite}\nCodename: {codename}\nComponents: main\n"
        f"Architectures: {debian.ARCHITECTURES[ARCH]}\nDate: Sat, 01 Jan 2022 10:00:00 UTC\n"
        f"SHA256:\n {hashlib.sha256(PACKAGES).hexdigest()} {len(PACKAGES)} {where}\n"
    )
    return f"deb [trusted=yes] file:{root} bookworm main"


@pytest.fixture
def apt_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A host's apt: what its sources are, and whose those are that it has fetched lists of."""
    program = tmp_path / "apt-get"
    program.write_text(
        f'#!/bin/sh\ncase " $* " in *" --no-release-info "*) exec cat {tmp_path}/all;; esac\n'
        f"exec cat {tmp_path}/known\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(run, "SEARCH_PATH", f"{tmp_path}:{run.SEARCH_PATH}")
    monkeypatch.setattr(debian, "KEYRING", program)

    def say(everything: str, known: str) -> None:
        (tmp_path / "all").write_text(everything)
        (tmp_path / "known").write_text(known)

    return say


DEBIAN = "http://deb.example/debian/|bookworm|main\n"
UPDATES = "http://deb.example/debian/|bookworm-updates|main\n"
VENDOR = "https://apt.vendor.example/|bookworm|main\n"
THEIRS = "https://apt.vendor.example/|bookworm|Artifactory\n"
OURS = "http://deb.example/debian/|bookworm|Debian\n"


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        pytest.param(OURS + THEIRS, ["deb bookworm", "deb bookworm-updates"], id="both known"),
        pytest.param(
            OURS + THEIRS.replace("Artifactory", ""), ["deb bookworm", "deb bookworm-updates"], id="nameless"
        ),
        pytest.param(OURS, ["deb bookworm", "deb bookworm-updates"], id="ours known"),
        pytest.param(THEIRS, ["deb bookworm", "deb bookworm-updates"], id="theirs known"),
        pytest.param("", ["apt bookworm", "deb bookworm", "deb bookworm-updates"], id="none known"),
    ],
)
def test_the_host_s_other_package_sources_are_left_alone(
    apt_says: Callable[[str, str], None], known: str, expected: list[str]
) -> None:
    """A vendor's repository names its releases as Debian does, and is signed by the vendor."""
    apt_says(VENDOR + DEBIAN + UPDATES, known)
    found = [entry.split() for entry in debian.sources("bookworm")]
    assert sorted(f"{uri.split('/')[2][:3]} {release}" for _, _, uri, release, _ in found) == expected


def test_a_suite_that_the_host_lacks_comes_from_its_debian_servers(
    apt_says: Callable[[str, str], None],
) -> None:
    apt_says(VENDOR + DEBIAN, OURS + THEIRS)
    found = [entry.split()[2:4] for entry in debian.sources("trixie")]
    server = "http://deb.example/debian/"
    assert found == [[server, "trixie"], [server, "trixie-updates"]]


@pytest.mark.parametrize(("codename", "suite"), [("bookworm", "oldstable"), ("trixie", "bookworm")])
def test_a_suite_by_its_codename_or_its_suite_name(tmp_path: Path, codename: str, suite: str) -> None:
    entry = archive(tmp_path / "archive", codename=codename, suite=suite)
    apt = debian.Apt(tmp_path / "apt", [entry], ARCH)
    apt.update()
    assert apt.listed("sample").version == "1"


def test_a_server_that_gives_another_suite_is_refused(tmp_path: Path) -> None:
    entry = archive(tmp_path / "archive", codename="bullseye", suite="oldoldstable")
    with pytest.raises(errors.UnavailableError, match=r"archive/? gives bullseye, and not bookworm"):
        debian.Apt(tmp_path / "apt", [entry], ARCH).update()


class _Private(http.server.SimpleHTTPRequestHandler):
    """Gives nothing to who does not log in."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization") == f"Basic {base64.b64encode(b'me@work:hu%sh').decode()}":
            super().do_GET()
        else:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def private(tmp_path: Path) -> Iterator[str]:
    """An entry of an archive behind a login, which is in its address."""
    archive(tmp_path / "archive", codename="bookworm", suite="stable")
    handler = functools.partial(_Private, directory=str(tmp_path / "archive"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        address = f"http://me%40work:hu%25sh@127.0.0.1:{server.server_address[1]}/"
        yield f"deb [trusted=yes] {address} bookworm main"
        server.shutdown()
        thread.join()


def test_a_login_in_an_address_is_in_a_file_that_apt_reads_and_nowhere_else(
    tmp_path: Path, private: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nexec /usr/bin/apt-get "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(run, "SEARCH_PATH", f"{program.parent}:{run.SEARCH_PATH}")
    apt = debian.Apt(tmp_path / "apt", [private], ARCH)
    apt.update()
    assert apt.listed("sample").version == "1"
    assert "update" in (tmp_path / "called").read_text()
    assert "hu" not in (tmp_path / "called").read_text()
    files = [path for path in (tmp_path / "apt").rglob("*") if path.is_file()]
    [holder] = [path for path in files if b"hu%sh" in path.read_bytes() or b"hu%25sh" in path.read_bytes()]
    assert (holder.name, holder.stat().st_mode & 0o777) == ("auth.conf", 0o600)


@pytest.mark.parametrize("login", ["me:hush%20hush", "me:hush%0Amachine", "me:hüsh", ":hush", ""])
def test_a_login_that_apt_cannot_be_told_is_not_told_to_anybody(tmp_path: Path, login: str) -> None:
    entry = f"deb http://{login}@deb.example/debian/ bookworm main"
    with pytest.raises(errors.BadRequestError, match=r"http://deb\.example/debian/ ") as caught:
        debian.without_logins([entry], tmp_path / "auth.conf")
    assert "hush" not in repr(errors.to_body(caught.value))
    assert not (tmp_path / "auth.conf").exists()


@pytest.mark.parametrize(
    ("login", "line"),
    [("token", "login token\n"), ("token:", "login token\n"), ("a:b", "login a password b\n")],
)
def test_a_login_is_told_for_its_source_alone(tmp_path: Path, login: str, line: str) -> None:
    entries = [f"deb https://{login}@deb.example:8443/debian/ {release} main" for release in ("a", "b")]
    public = debian.without_logins([*entries, "deb file:/srv/me@home c main"], tmp_path / "auth.conf")
    assert [entry.split()[1] for entry in public] == ["https://deb.example:8443/debian/"] * 2 + [
        "file:/srv/me@home"
    ]
    assert (tmp_path / "auth.conf").read_text() == f"machine https://deb.example:8443/debian/ {line}"


@pytest.fixture
def mmdebstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives the tar of this path for whatever it is asked to make."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/mmdebstrap"
    program.write_text(
        '#!/bin/sh\nfor each in "$@"; do case $each in */root.tar) '
        f'exec cp {tmp_path}/given.tar "$each";; esac; done; exit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(run, "SEARCH_PATH", f"{tmp_path / 'bin'}:{run.SEARCH_PATH}")
    monkeypatch.setattr(debian, "KEYRING", program)
    monkeypatch.setattr(base, "mode", lambda: "root")
    return tmp_path / "given.tar"


@pytest.mark.parametrize(
    ("mode", "lacking"), [("root", "mmdebstrap"), ("fakechroot", "mmdebstrap fakechroot fakeroot")]
)
def test_what_a_build_lacks_is_said_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: base.Mode, lacking: str
) -> None:
    monkeypatch.setattr(run, "SEARCH_PATH", str(tmp_path))
    monkeypatch.setattr(base, "mode", lambda: mode)
    with pytest.raises(errors.MissingToolError, match=f"have: {', '.join(lacking.split())}$") as caught:
        recipe.base_archive(recipe.load("busybox"), arch=platform.machine(), cache_dir=tmp_path)
    assert caught.value.hint == f"`sudo apt install {lacking}`"


@pytest.mark.parametrize(
    ("suite", "said", "fits"),
    [
        ("bookworm", b'NAME="Debian"\nVERSION_CODENAME=bookworm\n', True),
        ("bookworm", b'NAME="Debian"\nVERSION_CODENAME=bullseye\n', False),
        ("bookworm", b"", True),
        ("stable", b"VERSION_CODENAME=trixie\n", True),
    ],
)
def test_a_system_of_another_suite_is_not_kept(
    tmp_path: Path, mmdebstrap: Path, suite: str, said: bytes, fits: bool
) -> None:
    """A mirror may give an older suite, which is signed as well."""
    link = symlink(b"./etc/os-release", b"../usr/lib/os-release")
    mmdebstrap.write_bytes(tar(link, *([file(b"./usr/lib/os-release", said)] if said else [])))
    wanted = msgspec.structs.replace(recipe.load("debian-bookworm"), suite=suite)

    def make() -> Path:
        return recipe.base_archive(
            wanted, arch=platform.machine(), cache_dir=tmp_path / "cache", mirror="http://mirror.example"
        )

    if fits:
        assert make().read_bytes() == mmdebstrap.read_bytes()
    else:
        with pytest.raises(errors.UnavailableError, match="gave bullseye, and not bookworm"):
            make()
        assert recipe.kept_archives(tmp_path / "cache") == []


def test_what_a_system_says_of_its_suite_takes_little_memory(tmp_path: Path) -> None:
    """What comes from the builder is what packages made of it."""

    def make(wanted: building.Base, target: Path, on_line: base.OnLine | None) -> None:
        said = b"VERSION_CODENAME=bookworm\n" + bytes(64 << 20)
        target.write_bytes(tar(file(b"./usr/lib/os-release", said)))
        del said
        tracemalloc.start()

    try:
        recipe.base_archive(
            recipe.load("debian-bookworm"),
            arch=platform.machine(),
            cache_dir=tmp_path / "cache",
            mirror="http://mirror.example",
            make=make,
        )
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_an_archive_that_is_not_reached_is_named_with_why(tmp_path: Path) -> None:
    """apt's last line is always that some index files failed to download."""
    entry = "deb [trusted=yes] http://127.0.0.1:1/debian bookworm main"
    with pytest.raises(errors.UnavailableError, match=r"127\.0\.0\.1:1.*onnect") as caught:
        debian.Apt(tmp_path / "apt", [entry], ARCH).update()
    assert "network" in caught.value.hint


def test_an_archive_that_has_no_index_is_not_the_network_s_fault(tmp_path: Path) -> None:
    entry = f"deb [trusted=yes] file:{tmp_path}/nowhere bookworm main"
    with pytest.raises(errors.OperationFailedError, match="apt-get exited"):
        debian.Apt(tmp_path / "apt", [entry], ARCH).update()
