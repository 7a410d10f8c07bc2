# SPDX-License-Identifier: MIT
"""Pinned files: any source, one hash; with the real pip, on an index of this machine's own."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import resource
import socket
import struct
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger import pinned, run
from banger.contract import errors
from banger.kernels import catalog
from banger.system import kvm, runtime

CONTENT = b"#!/bin/sh\necho 'Firecracker v1.12.1'\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WHEEL = "banger_sample-1.0-py3-none-any.whl"


def pin(*sources: pinned.Source, sha256: str = SHA256) -> pinned.PinnedFile:
    return pinned.PinnedFile(
        name="firecracker",
        version="1.12.1",
        arch="x86_64",
        sha256=sha256,
        size_bytes=len(CONTENT),
        licence="Apache-2.0",
        sources=sources,
    )


def local(path: Path, content: bytes = CONTENT) -> pinned.LocalFile:
    path.write_bytes(content)
    return pinned.LocalFile(str(path))


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "pinned").iterdir())


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pinned.WheelMember:
    """A wheel that pip finds in a directory, and nowhere else."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / WHEEL, "w") as archive:
        archive.writestr("sample/bin/firecracker", CONTENT)
        archive.writestr(
            "banger_sample-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: banger-sample\nVersion: 1.0\n",
        )
        archive.writestr(
            "banger_sample-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("banger_sample-1.0.dist-info/RECORD", "")
    monkeypatch.setattr("os.geteuid", lambda: 1000)  # root's pip does not hear what a test would tell it
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return pinned.WheelMember(
        package="banger-sample",
        version="1.0",
        wheel=WHEEL,
        wheel_sha256=pinned.sha256_of_path(index / WHEEL),
        member="sample/bin/firecracker",
    )


def test_a_member_of_a_wheel(tmp_path: Path, wheel: pinned.WheelMember) -> None:
    found = pinned.fetch(pin(wheel), tmp_path / "cache")
    assert found.path.read_bytes() == CONTENT
    assert found.source == "banger-sample 1.0 of the Python package index"
    assert kept(tmp_path / "cache") == [SHA256]


def test_nothing_of_the_current_directory_is_run(
    tmp_path: Path, wheel: pinned.WheelMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may be in anybody's directory."""
    hostile = tmp_path / "hostile"
    for module in ("pip", "zipfile", "banger"):
        (hostile / module).mkdir(parents=True)
        for name in ("__init__", "__main__"):
            (hostile / module / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("PYTHONPATH", str(hostile))
    pinned.fetch(pin(wheel), tmp_path / "cache")
    kvm.refusal("flags : vmx\n")
    assert not (tmp_path / "ran").exists()


def test_root_s_pip_is_told_nothing_by_its_caller(
    tmp_path: Path, wheel: pinned.WheelMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as another interpreter to run."""
    other = tmp_path / "other"
    other.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    other.chmod(0o755)
    monkeypatch.setenv("PIP_PYTHON", str(other))
    with pytest.raises(errors.UnavailableError):
        pinned.fetch(pin(wheel), tmp_path / "user")
    (tmp_path / "ran").unlink()
    monkeypatch.setattr("os.geteuid", lambda: 0)
    told: list[str] = []
    real = run.run

    def running(argv: Sequence[str], **options: Any) -> run.Result:
        if "download" not in argv:
            return real(argv, **options)
        told.extend(options["env"])
        raise errors.UnavailableError("no index in this test")

    monkeypatch.setattr(run, "run", running)
    with pytest.raises(errors.UnavailableError, match="no index"):
        pinned.fetch(pin(wheel), tmp_path / "root")
    assert not {name for name in told if name.startswith(("PIP_", "XDG_", "HOME", "PYTHON"))}


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, wheel: pinned.WheelMember) -> None:
    other = pinned.WheelMember(
        package=wheel.package, version="1.0", wheel=WHEEL, wheel_sha256="0" * 64, member=wheel.member
    )
    with pytest.raises(errors.UnavailableError, match="another sha256"):
        pinned.fetch(pin(other), tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


def test_a_package_the_index_lacks(tmp_path: Path, wheel: pinned.WheelMember) -> None:
    missing = pinned.WheelMember(
        package="banger-sample-missing", version="1.0", wheel=WHEEL, wheel_sha256="", member=wheel.member
    )
    with pytest.raises(errors.UnavailableError) as caught:
        pinned.fetch(pin(missing), tmp_path / "cache")
    assert "supply the file yourself" in caught.value.hint


def test_a_wheel_that_lacks_the_member_is_passed_over(tmp_path: Path, wheel: pinned.WheelMember) -> None:
    wrong = msgspec.structs.replace(wheel, member="sample/bin/nothing")
    with pytest.raises(errors.UnavailableError, match=f"{WHEEL} has no sample/bin/nothing"):
        pinned.fetch(pin(wrong), tmp_path / "cache")
    assert pinned.fetch(pin(wrong, wheel), tmp_path / "cache").source == wheel.describe()


def test_a_full_disk_is_told_and_no_other_source_is_tried(tmp_path: Path) -> None:
    content, said = b"x" * (2 << 20), list[str]()
    source = local(tmp_path / "big", content)
    wanted = msgspec.structs.replace(
        pin(source, source), sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(errors.NoSpaceError, match="no space left for firecracker"):
            pinned.fetch(wanted, tmp_path / "cache", on_line=said.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (len(said), kept(tmp_path / "cache")) == (1, [])


def _larger(path: Path) -> None:
    path.write_bytes(CONTENT + b"more")


def _grows(path: Path) -> None:
    """As what is still being written does, and what has no size at all."""
    path.symlink_to("/proc/self/maps")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_larger, f"has {len(CONTENT) + 4} bytes, and not the {len(CONTENT)} pinned"),
        (_grows, f"has 0 bytes, and not the {len(CONTENT)} pinned"),
        (os.mkfifo, "is not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
    ],
)
def test_nothing_is_copied_of_what_is_certainly_another_file(
    tmp_path: Path, make: Callable[[Path], None], why: str
) -> None:
    make(tmp_path / "other")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT), before[1]))
    try:
        with pytest.raises(errors.UnavailableError, match=why):
            pinned.fetch(pin(pinned.LocalFile(str(tmp_path / "other"))), tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert kept(tmp_path / "cache") == []


def test_what_is_copied_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a wrong file as large as the right one, which nothing but its hash tells."""
    hashed = list[object]()
    monkeypatch.setattr(pinned, "sha256_of_path", hashed.append)
    with pytest.raises(errors.UnavailableError, match="sha256 is"):
        pinned.fetch(pin(local(tmp_path / "bad", b"x" * len(CONTENT))), tmp_path / "cache")
    assert hashed == []


async def test_a_copy_can_be_cancelled_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "big"
    with source.open("wb") as file:
        file.truncate(1 << 40)
    wanted = msgspec.structs.replace(pin(pinned.LocalFile(str(source))), size_bytes=1 << 40)
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def say(line: str) -> None:
        loop.call_soon_threadsafe(begun.set)

    fetching = asyncio.create_task(run.in_thread(pinned.fetch, wanted, tmp_path / "cache", on_line=say))
    await begun.wait()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert kept(tmp_path / "cache") == []


def test_platform_tags_come_from_the_wheel_name() -> None:
    member = pinned.WheelMember("p", "1", "p-1-cp310-abi3-manylinux_2_28_x86_64.whl", "", "m")
    assert (member.platform, member.abi) == ("manylinux_2_28_x86_64", "abi3")


def test_the_next_source_is_tried(tmp_path: Path) -> None:
    sources = (pinned.LocalFile("/nowhere"), local(tmp_path / "bad", b"other"), local(tmp_path / "good"))
    found = pinned.fetch(pin(*sources), tmp_path / "cache")
    assert found.source == f"file {tmp_path / 'good'}"


def test_a_directory_of_the_user_comes_first(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "firecracker").write_bytes(CONTENT)
    found = pinned.fetch(pin(), tmp_path / "cache", local_dirs=[tmp_path / "mine"])
    assert str(tmp_path / "mine") in found.source
    (tmp_path / "mine" / "firecracker").unlink()
    assert pinned.fetch(pin(), tmp_path / "cache").source == "cache"


def test_nothing_unverified_is_kept(tmp_path: Path) -> None:
    with pytest.raises(errors.UnavailableError, match="sha256 is"):
        pinned.fetch(pin(local(tmp_path / "bad", b"x" * len(CONTENT))), tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


def test_a_damaged_cache_is_repaired(tmp_path: Path) -> None:
    source = local(tmp_path / "good")
    found = pinned.fetch(pin(source), tmp_path / "cache")
    found.path.write_bytes(b"x" * len(CONTENT))
    again = pinned.fetch(pin(source), tmp_path / "cache")
    assert again.source != "cache"
    assert again.path.read_bytes() == CONTENT


def test_only_https_addresses(tmp_path: Path) -> None:
    with pytest.raises(errors.UnavailableError, match="not an https address"):
        pinned.fetch(pin(pinned.Url("http://127.0.0.1:1/x")), tmp_path / "cache")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], pinned.Url]]:
    """Says what it is told to whoever asks, and resets the connection; by plain http for this test."""
    opened = urllib.request.urlopen
    monkeypatch.setattr(
        urllib.request,
        "urlopen",
        lambda url, timeout: opened(url.replace("https", "http", 1), timeout=timeout),
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said: list[bytes] = []

        def serve() -> None:
            with listener.accept()[0] as peer, contextlib.suppress(ConnectionError):
                peer.recv(1 << 16)
                peer.sendall(said[0])
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        thread = threading.Thread(target=serve)

        def say(text: bytes) -> pinned.Url:
            said.append(text)
            thread.start()
            return pinned.Url(f"https://127.0.0.1:{listener.getsockname()[1]}/x")

        yield say
        thread.join()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param(b"", "cannot download", id="nothing"),
        pytest.param(b"no http\r\n\r\n", "cannot download", id="not http"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nx", "", id="cut off"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            "cannot download",
            id="bad chunks",
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + b"x" * 9999,
            f"more than the {len(CONTENT)} bytes",
            id="too much",
        ),
    ],
)
def test_after_a_server_that_fails_the_next_source_is_tried(
    tmp_path: Path, server: Callable[[bytes], pinned.Url], text: bytes, why: str
) -> None:
    with pytest.raises(errors.UnavailableError, match=f"{why}.*; file /nowhere: cannot read"):
        pinned.fetch(pin(server(text), pinned.LocalFile("/nowhere")), tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


async def test_a_download_from_a_slow_server_can_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = urllib.request.urlopen
    monkeypatch.setattr(
        urllib.request,
        "urlopen",
        lambda url, timeout: opened(url.replace("https", "http", 1), timeout=timeout),
    )
    begun, loop, left = asyncio.Event(), asyncio.get_running_loop(), threading.Event()

    def trickle() -> None:
        with listener.accept()[0] as peer, contextlib.suppress(ConnectionError):
            peer.recv(1 << 16)
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n")
            loop.call_soon_threadsafe(begun.set)
            while not left.wait(0.01):
                peer.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle)
        thread.start()
        url = pinned.Url(f"https://127.0.0.1:{listener.getsockname()[1]}/x")
        wanted = msgspec.structs.replace(pin(url), size_bytes=9999999)
        fetching = asyncio.create_task(run.in_thread(pinned.fetch, wanted, tmp_path / "cache"))
        await begun.wait()
        fetching.cancel()
        done, _ = await asyncio.wait([fetching], timeout=20)
        left.set()
        thread.join()
        assert done
    assert fetching.cancelled()
    assert kept(tmp_path / "cache") == []


def test_a_proxy_that_is_in_the_way_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever set it, long ago, would look for the fault at the server's."""

    def refuse() -> None:
        with contextlib.suppress(TimeoutError), listener.accept()[0] as peer:
            peer.recv(1 << 16)
            peer.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")

    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of its first use
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        place = f"127.0.0.1:{listener.getsockname()[1]}"
        for name in ("https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://me:hunter2@{place}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(errors.UnavailableError) as caught:
            pinned.fetch(pin(pinned.Url("https://files.invalid/x")), tmp_path / "cache")
        thread.join()
    assert f"through the proxy http://{place}" in caught.value.message
    assert "502" in caught.value.message
    assert "hunter2" not in caught.value.message


def test_install_verifies_what_it_copies(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    done = pinned.install(source, tmp_path / "runtime", "firecracker", SHA256)
    assert (done.read_bytes(), done.stat().st_mode & 0o7777) == (CONTENT, 0o755)
    source.write_bytes(b"changed since")
    with pytest.raises(errors.OperationFailedError):
        pinned.install(source, tmp_path / "runtime", "firecracker", SHA256)
    assert [path.name for path in (tmp_path / "runtime").iterdir()] == ["firecracker"]
    assert done.read_bytes() == CONTENT


def test_install_takes_away_what_a_killed_one_left(tmp_path: Path) -> None:
    source, runtime_dir = tmp_path / "source", tmp_path / "runtime"
    source.write_bytes(CONTENT)
    runtime_dir.mkdir()
    (runtime_dir / ".firecracker-x1y2z3").write_bytes(CONTENT[:3])
    pinned.install(source, runtime_dir, "firecracker", SHA256)
    assert [path.name for path in runtime_dir.iterdir()] == ["firecracker"]


def test_the_catalog_pins_both_files() -> None:
    files = {file.name: file for file in runtime.catalog("x86_64")}
    assert set(files) == {"firecracker", "jailer"}
    assert all(len(file.sha256) == 64 for file in files.values())
    with pytest.raises(errors.NotFoundError):
        runtime.pull(Path("/nonexistent"), arch="riscv64")


def shipped() -> Iterator[pinned.PinnedFile]:
    for arch in ("x86_64", "aarch64"):
        yield from runtime.catalog(arch)
        for entry in catalog.entries(arch):
            if isinstance(entry.source, catalog.Library):
                yield entry.source.library
            assert not isinstance(entry.source, catalog.File), "its file belongs here too"


def test_every_shipped_file_has_another_source_when_one_fails() -> None:
    """A distribution's kernel comes from whichever archive the host is set up with."""
    files = list(shipped())
    assert {file.name.partition(".")[0] for file in files} == {"firecracker", "jailer", "libkrunfw"}
    for file in files:
        assert len({source.describe() for source in file.sources}) >= 2, file.name


def rows(directory: Path) -> dict[str, runtime.Status]:
    return {row.name: row for row in runtime.status(directory)}


def test_status_of_an_empty_directory(tmp_path: Path) -> None:
    assert [row.problem for row in runtime.status(tmp_path)] == [
        "firecracker is not installed",
        "jailer is not installed",
    ]


def test_a_users_own_file_is_recorded_as_such(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_bytes(CONTENT)
    runtime.install_runtime(tmp_path / "runtime", {}, user_files={"firecracker": own})
    row = rows(tmp_path / "runtime")["firecracker"]
    assert (row.source, row.version, row.sha256_ok, row.problem) == ("user", "1.12.1", True, "")


def test_a_replaced_file_is_noticed(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_bytes(CONTENT)
    runtime.install_runtime(tmp_path / "runtime", {}, user_files={"firecracker": own})
    (tmp_path / "runtime" / "firecracker").write_bytes(CONTENT + b"# changed\n")
    row = rows(tmp_path / "runtime")["firecracker"]
    assert not row.sha256_ok
    assert "neither the pinned file nor one you supplied" in row.problem


@pytest.mark.parametrize(
    ("said", "problem"),
    [("Firecracker v1.10.0", "older than 1.12.0"), ("hello", "says no version")],
)
def test_programs_that_will_not_do(tmp_path: Path, said: str, problem: str) -> None:
    program = tmp_path / "firecracker"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    record = {"firecracker": runtime.Installed(pinned.sha256_of_path(program), "", "user")}
    runtime._write_record(tmp_path, record)
    assert problem in rows(tmp_path)["firecracker"].problem


def test_a_broken_record_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / runtime.RECORD).write_text("{")
    assert runtime.read_record(tmp_path) == {}


def test_an_unknown_runtime_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.BadRequestError):
        runtime.install_runtime(tmp_path, {"sh": Path("/bin/sh")})
