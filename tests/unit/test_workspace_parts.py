# SPDX-License-Identifier: MIT
"""Parts of workspaces and copies that need no guest: a stranger's archives, paths, and what is said."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger import archive
from banger.cli import vm_copy
from banger.contract import decoding, errors, transfers
from banger.owner import workspaces
from banger.vm import workspace, workspace_out


def member(name: str, kind: bytes = tarfile.REGTYPE, **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in values.items():
        setattr(info, key, value)
    return info


def made(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pieces(data: bytes, size: int = 1000) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def unpack(data: bytes, target: Path, rename: str | None = None) -> archive.Unpacked:
    return archive.unpack(pieces(data), target, rename=rename, report=lambda _: None)


HOSTILE = {
    "absolute": [(member("/tmp/banger-escaped"), b"x")],
    "dots": [(member("a/../../escaped"), b"x")],
    "dots first": [(member("../escaped"), b"x")],
    "through a link": [(member("out", tarfile.SYMTYPE, linkname=".."), b""), (member("out/escaped"), b"x")],
    "through a deep link": [
        (member("a", tarfile.DIRTYPE), b""),
        (member("a/out", tarfile.SYMTYPE, linkname="../.."), b""),
        (member("a/out/escaped"), b"x"),
    ],
    "hard link by dots": [(member("own", tarfile.LNKTYPE, linkname="../secret"), b"")],
    "hard link to an absolute": [(member("own", tarfile.LNKTYPE, linkname="/etc/passwd"), b"")],
    "hard link through a link": [
        (member("out", tarfile.SYMTYPE, linkname=".."), b""),
        (member("own", tarfile.LNKTYPE, linkname="out/secret"), b""),
    ],
    "no name": [(member("./"), b"x")],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_leaves_the_target(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("s")
    with pytest.raises(errors.BangerError):
        unpack(made(*HOSTILE[name]), inside)
    assert sorted(os.listdir(tmp_path)) == ["inside", "secret"]
    assert not (inside / "own").exists()
    assert not Path("/tmp/banger-escaped").exists()


def test_a_link_in_the_way_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("s")
    (inside / "file").symlink_to("../secret")
    (inside / "directory").symlink_to("..")
    unpack(made((member("file"), b"new"), (member("directory", tarfile.DIRTYPE, mode=0o700), b"")), inside)
    assert (tmp_path / "secret").read_text() == "s"
    assert (inside / "file").read_text() == "new"
    assert (inside / "directory").is_dir()
    assert not (inside / "directory").is_symlink()


def test_devices_and_privileges_are_left_out(tmp_path: Path) -> None:
    data = made(
        (member("t/null", tarfile.CHRTYPE, devmajor=1, devminor=3), b""),
        (member("t/disk", tarfile.BLKTYPE, devmajor=8), b""),
        (member("t/su", mode=0o6755), b"x"),
    )
    done = unpack(data, tmp_path, rename="r")
    assert os.listdir(tmp_path / "r") == ["su"]
    assert (tmp_path / "r" / "su").stat().st_mode & 0o7777 == 0o755
    assert len(done.skipped) == 2


def test_a_directory_that_holds_something_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "name" / "kept").mkdir(parents=True)
    with pytest.raises(errors.OperationFailedError, match="not empty"):
        unpack(made((member("name"), b"x")), tmp_path)
    assert (tmp_path / "name" / "kept").is_dir()


@pytest.mark.parametrize("cut", [100, 512, 700, 1024])
def test_a_cut_archive_is_an_error(tmp_path: Path, cut: int) -> None:
    with pytest.raises(errors.ProtocolError):
        unpack(made((member("file"), b"y" * 600))[:cut], tmp_path)


@given(st.binary(max_size=2048))
def test_noise_is_an_error_or_nothing(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.raises(errors.BangerError):
        unpack(b"x" + data, Path(name))


def block(name: str = "x", size: int = 0, kind: bytes = b"0", *fields: tuple[int, bytes]) -> bytes:
    """A header; a field is a place in it and what is there."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    made = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for at, data in fields:
        made[at : at + len(data)] = data
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


def said(key: str, value: str) -> bytes:
    """A pax header and a file that it speaks of."""
    length = len(f"{key}={value}".encode()) + 4
    record = f"{length} {key}={value}\n".encode()
    assert len(record) == length
    kind = b"2" if key == "linkpath" else b"0"
    return block("p", length, b"x") + record.ljust(512, b"\0") + block(kind=kind)


END = bytes(1024)
SPARSE = ((386, bytes(96)), (483, b"%011o\0" % (1 << 33)))
IMPOSSIBLE = {
    **{f"time {value}": said("mtime", value) for value in ("infinity", "not-number", "--500000", "5²5²5²5")},
    "time that no file has": block("x", 0, b"0", (136, b"\x80\x7f" + b"\xff" * 10)),
    "size of nothing": block("x", 0, b"0", (124, b"\xff" * 12)),
    "size in words": said("size", "thousands"),
    "zero byte in a link": said("linkpath", "a\0b"),
    "name on name": (block(size=1, kind=b"L") + b"a".ljust(512, b"\0")) * 1200 + block(),
    "sparse bomb": block("x", 0, b"S", *SPARSE),
    "header without end": block(size=1 << 33, kind=b"x"),
    "long name without end": block(size=1 << 33, kind=b"L"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_archive_that_no_agent_makes_is_the_guest_s_fault(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.ProtocolError):
        unpack(IMPOSSIBLE[name] + END, tmp_path)
    assert sum(path.lstat().st_size for path in tmp_path.iterdir() if path.is_file()) == 0


def test_a_header_is_held_to_a_size_before_it_is_read(tmp_path: Path) -> None:
    """Of what it announces not a byte is waited for, by neither of the two who read archives."""

    def begun() -> Iterator[bytes]:
        yield block(size=1 << 33, kind=b"x")
        raise AssertionError("more was asked for")

    with pytest.raises(errors.ProtocolError):
        archive.unpack(begun(), tmp_path, rename=None, report=lambda _: None)
    with pytest.raises(errors.ProtocolError):
        archive.begins_with_directory(begun())


def test_what_a_guest_may_have_remembered_is_bounded(tmp_path: Path) -> None:
    devices = b"".join(block(f"t/{number}", kind=b"3") for number in range(300))
    done = unpack(devices + END, tmp_path)
    assert (len(done.skipped), done.skipped_count) == (100, 300)
    closed = b"".join(block(f"t/{number}", 0, b"5", (100, b"0000000\0")) for number in range(10_001))
    with pytest.raises(errors.ProtocolError, match="too many directories"):
        unpack(closed + block("t") + END, tmp_path)


def test_why_an_archive_does_not_come_is_not_the_archive_s_fault(tmp_path: Path) -> None:
    def refused() -> Iterator[bytes]:
        yield block("t", kind=b"5")
        raise errors.BadRequestError("said by somebody else")

    with pytest.raises(errors.BadRequestError, match="somebody else"):
        archive.unpack(refused(), tmp_path, rename=None, report=lambda _: None)


def test_directories_get_their_modes_and_times_when_they_are_full(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("a/deep", "b", "shut"):
        (source / name).mkdir(parents=True)
        (source / name / "f").write_text(name)
    os.link(source / "shut" / "f", source / "zz")
    for name, mode in (("a/deep", 0o500), ("a", 0o555), ("b", 0o700), ("shut", 0o100), (".", 0o700)):
        os.utime(source / name, ns=(10**18 + mode,) * 2)
        (source / name).chmod(mode)
    target = tmp_path / "target"
    target.mkdir()
    # As the agent packs: all that is in a directory follows it.
    unpack(b"".join(archive.packed(sorted(archive.walk(source, "s")))), target)
    for name in (".", "a", "a/deep", "b", "shut"):
        found, wanted = (target / "s" / name).stat(), (source / name).stat()
        assert (found.st_mode, found.st_mtime_ns) == (wanted.st_mode, wanted.st_mtime_ns), name


def test_what_was_packed_is_unpacked_the_same(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "f").write_bytes(os.urandom(700_000))
    (source / "l").symlink_to("sub/f")
    os.link(source / "sub" / "f", source / "z")
    os.utime(source / "sub" / "f", ns=(1_234_567_890_123_456_789,) * 2)
    target = tmp_path / "target"
    target.mkdir()
    data = b"".join(archive.packed(archive.walk(source, "s")))
    done = unpack(data, target, rename="t")
    assert done.entries == 5
    assert (target / "t" / "sub" / "f").read_bytes() == (source / "sub" / "f").read_bytes()
    assert (target / "t" / "sub" / "f").stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert (target / "t" / "l").readlink() == Path("sub/f")
    assert (target / "t" / "z").stat().st_ino == (target / "t" / "sub" / "f").stat().st_ino


@pytest.mark.parametrize("mtime_ns", [-1, -250_000_000, -(10**9), -1_750_000_000, 0, 999_999_999])
def test_times_before_1970_travel_too(tmp_path: Path, mtime_ns: int) -> None:
    (tmp_path / "f").touch()
    os.utime(tmp_path / "f", ns=(0, mtime_ns))
    if (tmp_path / "f").stat().st_mtime_ns != mtime_ns:
        pytest.fail("this file system has no such times")
    target = tmp_path / "target"
    target.mkdir()
    unpack(b"".join(archive.packed([("f", str(tmp_path / "f"))])), target)
    assert (target / "f").stat().st_mtime_ns == mtime_ns


def test_times_of_links_and_pipes_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "link").symlink_to("old")
    os.mkfifo(source / "pipe")
    (source / "pipe").chmod(0o626)
    for path in source.iterdir():
        os.utime(path, ns=(10**18 + 1,) * 2, follow_symlinks=False)
    unpack(b"".join(archive.packed(archive.walk(source, "s"))), tmp_path)
    for path in source.iterdir():
        found, wanted = (tmp_path / "s" / path.name).lstat(), path.lstat()
        assert (found.st_mode, found.st_mtime_ns) == (wanted.st_mode, wanted.st_mtime_ns), path.name


def test_attributes_are_kept_of_directories_and_of_what_is_not_to_be_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "d").mkdir(parents=True)
    (source / "d" / "f").write_text("f")
    for path in (source, source / "d", source / "d" / "f"):
        os.setxattr(path, "user.note", bytes(path))
    (source / "d" / "f").chmod(0o400)
    data = b"".join(archive.packed(archive.walk(source, "s")))
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="b-") as name, as_anybody(Path(name)) as target:
        unpack(data, target)
        assert os.getxattr(target / "s" / "d", "user.note") == bytes(source / "d")
        assert os.getxattr(target / "s" / "d" / "f", "user.note") == bytes(source / "d" / "f")
        unpack(data, target, rename="")
        assert "user.note" not in os.listxattr(target)


@contextlib.contextmanager
def as_anybody(target: Path) -> Iterator[Path]:
    """Where the tests are root's, root's rights would hide what others may not do."""
    if os.geteuid() != 0:
        yield target
        return
    os.chown(target, 65534, 65534)
    os.seteuid(65534)
    try:
        yield target
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", [b"user.\xff", b"user.a=b", b"user.=", "user.naïve".encode()])
def test_an_attribute_is_kept_or_left_here_and_never_another(tmp_path: Path, name: bytes) -> None:
    """No pax header has a name that is no text, or with an equals sign in it."""
    (tmp_path / "f").write_text("f")
    os.setxattr(tmp_path / "f", name, b"value")
    unpack(b"".join(archive.packed([("t/f", str(tmp_path / "f"))])), tmp_path)
    found = {each: os.getxattr(tmp_path / "t" / "f", each) for each in os.listxattr(tmp_path / "t" / "f")}
    assert found == ({os.fsdecode(name): b"value"} if b"na" in name else {})


@pytest.mark.parametrize("after", [b"longer than before", b"s"])
def test_a_file_that_is_replaced_meanwhile_is_the_old_one_wholly(tmp_path: Path, after: bytes) -> None:
    """Most programs write a new file and rename it: where that begins, the old one has not been read."""
    path = tmp_path / "f"
    path.write_bytes(b"before")
    stream = archive.packed([("t/f", str(path))])
    head = next(stream)
    (tmp_path / "new").write_bytes(after)
    (tmp_path / "new").replace(path)
    unpack(head + b"".join(stream), tmp_path)
    assert (tmp_path / "t" / "f").read_bytes() == b"before"


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    stream = archive.packed([("f", str(path))])
    next(stream)
    path.write_bytes(b"")
    with pytest.raises(errors.OperationFailedError, match="shorter"):
        list(stream)


@pytest.mark.parametrize(
    ("text", "vm", "path"),
    [
        ("web:/etc", "web", "/etc"),
        ("web:notes", "web", "/root/notes"),
        ("web:", "web", "/root/"),
        ("web:~", "web", "/root/"),
        ("web:~/", "web", "/root/"),
        ("web:~/a/b", "web", "/root/a/b"),
        ("web:~a", "web", "/root/~a"),
        ("./a:b", "", "./a:b"),
        ("/a:b", "", "/a:b"),
        ("plain", "", "plain"),
        (":x", "", ":x"),
        ("-", "", "-"),
    ],
)
def test_the_sides_of_a_copy(text: str, vm: str, path: str) -> None:
    assert vm_copy.parse_place(text) == vm_copy.Place(vm, path)


@pytest.mark.parametrize("text", ["/", "/root", "/proc/x", "/sys/a/b", "/dev/shm", "/.banger/x", "//x"])
def test_a_workspace_is_a_directory_of_its_own(text: str) -> None:
    with pytest.raises(errors.BadRequestError):
        workspace.clean_path(text)


def test_paths_are_made_plain() -> None:
    assert workspace.clean_path("/root/../srv//code/./") == "/srv/code"
    assert workspace.staging("/srv/code") == "/srv/.code.banger-new"


def test_what_a_guest_says_of_its_workspace() -> None:
    found = workspace.parse_found(b"ours\ntip %s\nchange M\tREADME\nnoise\n" % (b"a1" * 20))
    assert (found.exists, found.tips, found.changes) == (True, ("a1" * 20,), ("M\tREADME",))
    for said in (b"", b"yes\n", b"\xff\n"):
        with pytest.raises(errors.ProtocolError):
            workspace.parse_found(said)


def test_what_a_script_in_a_guest_says_drives_no_terminal() -> None:
    said = workspaces._lines(b"\x1b[2Jgit\nfatal: \xc2\x9b31m \xe2\x80\xae owned\x7f\n")
    assert said == ["?[2Jgit", "fatal: ?31m ? owned?"]
    found = workspace.Found(exists=True, changes=("M\t\x9b2J\u202e",))
    with pytest.raises(errors.ConflictError, match=r"changes of its own: M \?2J\?"):
        workspace.refuse_to_lose("web", "/root/repo", found, discard=False)


REVISIONS = ("HEAD", "--all", "", "a1" * 19, "A1" * 20, "a1" * 20 + "^{tree}", "@{upstream}", ":/secret")
"""What git would look up, and is no object's id."""


@pytest.mark.parametrize("word", REVISIONS)
def test_a_guest_names_objects_and_no_revisions(word: str) -> None:
    with pytest.raises(errors.ProtocolError):
        workspace.parse_found(f"ours\ntip {word}\n".encode())
    with pytest.raises(msgspec.ValidationError):
        decoding.json(msgspec.json.encode({"exists": True, "tips": [word]}), transfers.WorkspaceState)
    for pair in ((word, "none"), ("none", word), ("a1" * 20, word)):
        said = " ".join(pair).encode() + b" /root/repo\n\nPACK"
        with pytest.raises(errors.ProtocolError):
            asyncio.run(workspaces._Headed(_Deaf()).take(said))
        if word:
            exported = msgspec.json.encode(dict(zip(("base", "head"), pair, strict=True)))
            with pytest.raises(msgspec.ValidationError):
                decoding.json(exported, transfers.Exported)


LINES = ("", "work", "else vendor", f"aside {'z' * 40} refs/heads/x", "aside HEAD refs/heads/x")


@pytest.mark.parametrize("line", LINES)
def test_a_guest_says_what_its_export_holds_or_is_not_listened_to(line: str) -> None:
    head = workspace_out.Head()
    said = f"none {'1' * 40} /root/repo\n"
    assert head.take(said.encode()) is None
    found = head.take(f"work a\nfetched b/c\naside {'2' * 40} refs/heads/x\n\nPACK".encode())
    assert found is not None
    assert [(each.path, each.is_fetched) for each in found[0].nested] == [("a", False), ("b/c", True)]
    assert [(each.name, each.commit) for each in found[0].aside] == [("x", "2" * 40)]
    assert (found[0].path, found[1]) == ("/root/repo", b"PACK")
    with pytest.raises(errors.ProtocolError):
        workspace_out.Head().take(f"{said}{line}\n\n".encode() if line else said.encode() * 20_000)
    with pytest.raises(errors.ConflictError, match="no text"):
        workspace_out.Head().take(said.encode() + b"work \xff\n\n")


def test_a_guest_answers_no_more_than_it_was_asked() -> None:
    with pytest.raises(errors.ProtocolError):
        asyncio.run(workspaces._Asking(_Deaf()).answer(b"x"))


class _Deaf:
    """A client that must be told nothing."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [
        (90, ["the guest has no git"], errors.MissingToolError),
        (92, ["the guest has no commit x"], errors.NotFoundError),
        (127, ["sh: not found"], errors.MissingToolError),
        (
            1,
            ["fatal: write error: No space left on device", "fatal: index-pack failed"],
            errors.NoSpaceError,
        ),
        (128, [], errors.OperationFailedError),
    ],
)
def test_why_a_script_failed(status: int, said: list[str], kind: type[errors.BangerError]) -> None:
    error = workspace.script_failure("web", status, said)
    assert type(error) is kind
    assert "web" in error.message
