# SPDX-License-Identifier: MIT
"""`vm cp` both ways over the real daemon and agent: exact, and nothing lands where it should not."""

from __future__ import annotations

import asyncio
import io
import os
import re
import shlex
import socket
import stat
import subprocess
import tarfile
import time
from pathlib import Path
from unittest import mock

import pytest

from tests.contract import cli_process, workspaces

Guest = workspaces.Guest
MTIME_NS = 1_700_000_000_123_456_789


def make_tree(root: Path) -> None:
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "big").write_bytes(os.urandom(3 << 20))
    (root / "tool").write_text("#!/bin/sh\n")
    (root / "tool").chmod(0o750)
    (root / "sub" / "link").symlink_to("../tool")
    (root / "sub" / "dangling").symlink_to("/nowhere")
    os.link(root / "tool", root / "sub" / "again")
    (root / "odd\n \udcff").write_bytes(b"odd")
    (root / ("n" * 200)).write_bytes(b"long")
    os.setxattr(root / "tool", "user.note", b"a\0b")
    os.utime(root / "tool", ns=(MTIME_NS, MTIME_NS))
    os.utime(root / "sub" / "empty", ns=(MTIME_NS, MTIME_NS))


def described(root: Path) -> dict[str, tuple[int, int, object]]:
    """Of each path: kind and mode, time, and content or target."""
    found: dict[str, tuple[int, int, object]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        if path.is_symlink():
            content: object = path.readlink()
        else:
            content = path.read_bytes() if path.is_file() else b""
        time = 0 if path.is_symlink() else status.st_mtime_ns
        found[str(path.relative_to(root))] = (status.st_mode, time, content)
    return found


async def test_a_tree_goes_in_and_comes_back_the_same(guest: Guest, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    inside = tmp_path / "inside"
    inside.mkdir()
    await guest.banger("vm", "cp", str(tmp_path / "tree"), f"web:{inside}")
    assert described(inside / "tree") == described(tmp_path / "tree")
    assert os.getxattr(inside / "tree" / "tool", "user.note") == b"a\0b"
    assert (inside / "tree" / "tool").stat().st_nlink == 2
    await guest.banger("vm", "cp", f"web:{inside / 'tree'}", str(tmp_path / "back"))
    assert described(tmp_path / "back") == described(tmp_path / "tree")
    assert os.getxattr(tmp_path / "back" / "tool", "user.note") == b"a\0b"
    assert (tmp_path / "back" / "tool").stat().st_nlink == 2


async def test_names_follow_cp(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    inside, out = tmp_path / "inside", tmp_path / "out"
    inside.mkdir()
    out.mkdir()
    await guest.banger("vm", "cp", str(tmp_path / "file"), f"web:{inside}/renamed")
    await guest.banger("vm", "cp", str(tmp_path / "file"), f"web:{inside}/")
    await guest.banger("vm", "cp", str(tmp_path / "file"), f"web:{inside}/new/")
    assert sorted(str(path.relative_to(inside)) for path in inside.rglob("*")) == [
        "file",
        "new",
        "new/file",
        "renamed",
    ]
    await guest.banger("vm", "cp", f"web:{inside}/file", f"{out}/renamed")
    await guest.banger("vm", "cp", f"web:{inside}/file", str(out))
    assert sorted(os.listdir(out)) == ["file", "renamed"]
    (inside / "alias").symlink_to("file")
    await guest.banger("vm", "cp", f"web:{inside}/alias", str(out))
    await guest.banger("vm", "cp", "-L", f"web:{inside}/alias", f"{out}/followed")
    assert (out / "alias").is_symlink()
    assert (out / "followed").read_text() == "text"


async def test_a_dot_is_what_lies_in_a_directory(guest: Guest, tmp_path: Path) -> None:
    """As cp and docker have it; the directory that it goes into stays as it is."""
    make_tree(tmp_path / "tree")
    for made in ("inside", "back"):
        (tmp_path / made).mkdir(mode=0o700)
        (tmp_path / made / "mine").touch()
    (tmp_path / "tree").chmod(0o777)
    whole = described(tmp_path / "tree")
    for source, target in (
        (f"{tmp_path}/tree/.", f"web:{tmp_path}/inside"),
        (f"{tmp_path}/tree/.", f"web:{tmp_path}/new-inside"),
        (f"web:{tmp_path}/tree/.", f"{tmp_path}/back"),
        (f"web:{tmp_path}/tree/.", f"{tmp_path}/new-back"),
    ):
        await guest.banger("vm", "cp", source, target)
    mine = {"mine": (mock.ANY, mock.ANY, b"")}
    assert described(tmp_path / "inside") == whole | mine
    assert described(tmp_path / "back") == whole | mine
    assert described(tmp_path / "new-inside") == described(tmp_path / "new-back") == whole
    assert {stat.S_IMODE((tmp_path / made).stat().st_mode) for made in ("inside", "back")} == {0o700}
    assert (tmp_path / "back/sub/again").stat().st_nlink == 2
    said = await guest.banger("vm", "cp", f"{tmp_path}/tree/tool/.", f"web:{tmp_path}/inside", status=2)
    assert "tool is not a directory" in said.err
    said = await guest.banger("vm", "cp", f"web:{tmp_path}/tree/tool/.", f"{tmp_path}/back", status=1)
    assert "tool is not a directory" in said.err


async def test_a_shell_completes_what_is_in_the_guest(guest: Guest, tmp_path: Path) -> None:
    """In bash itself, which takes web:/etc for three words."""
    cli = cli_process.Cli(guest.served.path)
    for name in ("sub", "sub two"):
        (tmp_path / "in" / name).mkdir(parents=True)
    for name in (".hidden", "sub\x1b[2J"):
        (tmp_path / "in" / name).touch()
    (tmp_path / "banger").write_text(f'#!/bin/sh\nexec {shlex.join(cli.argv())} "$@"\n')
    (tmp_path / "banger").chmod(0o755)
    (tmp_path / "web-log").touch()
    environment = cli.environment(PATH=f"{tmp_path}:{os.environ['PATH']}")

    def completed(*words: str) -> list[str]:
        script = (
            "source <(banger completion bash); COMP_WORDS=(banger vm cp "
            f"{shlex.join(words)}); COMP_CWORD={len(words) + 2}; "
            '_banger_completion banger; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        argv = ["bash", "--norc", "-c", script]
        done = subprocess.run(
            argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        # Only a shell that is typed into can be told what is not in its list.
        assert {line.partition("compopt: ")[2] for line in done.stderr.splitlines()} <= {
            "not currently executing completion function"
        }, done.stderr
        return done.stdout.splitlines()

    inside = f"{tmp_path}/in"
    assert await asyncio.to_thread(completed, "web", ":", f"{inside}/su") == [
        f"{inside}/sub/",
        f"{inside}/sub\\ two/",
    ]
    assert await asyncio.to_thread(completed, "web", ":", f"{inside}/.") == [f"{inside}/.hidden"]
    assert await asyncio.to_thread(completed, "notes", "web", ":", f"{inside}/none") == [""]
    assert await asyncio.to_thread(completed, "we") == ["web:", "web-log"]
    assert await asyncio.to_thread(completed, "nobody", ":", "/") == [""]


async def test_a_directory_never_takes_the_place_of_a_file(guest: Guest, tmp_path: Path) -> None:
    """Nor a file that of a directory, as cp and docker have it: what is there is somebody's work."""
    make_tree(tmp_path / "tree")
    for side in ("inside", "here"):
        (tmp_path / side / "tool").mkdir(parents=True)
        (tmp_path / side / "tree").write_text("work")
        (tmp_path / side / "tool" / "kept").touch()
    inside, here, tree = f"web:{tmp_path}/inside", f"{tmp_path}/here", f"{tmp_path}/tree"
    for words in ((tree, inside), (tree, f"{inside}/"), (tree, f"{inside}/tree")):
        refused = await guest.banger("vm", "cp", *words, status=2)
        assert f"{tmp_path}/inside/tree in web is not a directory, and {tree} is one" in refused.err
    for target in (here, f"{here}/", f"{here}/tree"):
        refused = await guest.banger("vm", "cp", f"web:{tree}", target, status=1)
        assert f"cannot write tree in {here}: Not a directory" in refused.err
    for words, said in (
        ((f"{tree}/tool", inside), "delete what is there in web"),
        ((f"{tree}/tool", f"{inside}/tree/"), "Not a directory"),
        ((f"web:{tree}/tool", here), "cannot write tool"),
    ):
        assert said in (await guest.banger("vm", "cp", *words, status=1)).err
    for side in ("inside", "here"):
        assert (tmp_path / side / "tree").read_text() == "work"
        assert (tmp_path / side / "tool" / "kept").exists()


async def test_several_sources_go_into_a_directory_that_is_there(guest: Guest, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    (tmp_path / "file").write_text("text")
    (tmp_path / "alias").symlink_to("file")
    inside, out = tmp_path / "inside", tmp_path / "out"
    inside.mkdir()
    out.mkdir()
    sources = [f"{tmp_path}/{each}" for each in ("tree", "file", "alias", "file")]
    await guest.banger("vm", "cp", *sources, f"web:{inside}")
    assert described(inside / "tree") == described(tmp_path / "tree")
    assert sorted(os.listdir(inside)) == ["alias", "file", "tree"]
    assert (inside / "alias").is_symlink()
    words = (f"web:{inside}/tree/.", f"web:{inside}/file", str(out))
    done = await guest.banger("vm", "cp", "--json", *words)
    assert [(each["name"], each["ok"]) for each in done.json] == [(word, True) for word in words[:2]]
    assert done.json[1]["copied"]["entries"] == 1
    assert described(out) == described(tmp_path / "tree") | {"file": (mock.ANY, mock.ANY, b"text")}
    await guest.banger("vm", "cp", "-L", sources[1], sources[2], f"web:{inside}/tree/sub/empty")
    assert sorted(os.listdir(inside / "tree/sub/empty")) == ["alias", "file"]
    assert not (inside / "tree/sub/empty/alias").is_symlink()


async def test_of_several_sources_one_that_fails_is_named_and_the_others_are_copied(
    guest: Guest, tmp_path: Path
) -> None:
    for name in ("first", "last"):
        (tmp_path / name).write_text(name)
    inside, out = tmp_path / "inside", tmp_path / "out"
    inside.mkdir()
    out.mkdir()
    words = [f"{tmp_path}/{each}" for each in ("first", "none", "last")]
    done = await guest.banger("vm", "cp", *words, f"web:{inside}/", status=1)
    assert f"cannot copy {tmp_path}/none: " in done.err
    assert sorted(os.listdir(inside)) == ["first", "last"]
    words = [f"web:{inside}/{each}" for each in ("first", "none", "last")]
    done = await guest.banger("vm", "cp", "--json", *words, str(out), status=1)
    assert [each["ok"] for each in done.json] == [True, False, True]
    assert done.json[1]["error"]["message"] == (
        f"cannot copy web:{inside}/none: {inside}/none does not exist in web"
    )
    assert sorted(os.listdir(out)) == ["first", "last"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{0}/a", "{0}/b", "web:{0}/none"), "{0}/none in web does not exist"),
        (("{0}/a", "{0}/b", "web:{0}/none"), "`banger vm exec --cwd / web -- mkdir -p {0}/none`"),
        (("{0}/a", "{0}/b", "web:{0}/file"), "{0}/file in web is not a directory"),
        (("web:{0}/a", "web:{0}/b", "{0}/none"), "{0}/none does not exist"),
        (("web:{0}/a", "web:{0}/b", "{0}/file"), "{0}/file is not a directory"),
        (("{0}/a", "web:{0}/b", "web:{0}"), "one side of a copy"),
        (("{0}/a", "{0}/b", "{0}"), "one side of a copy"),
        (("{0}/a", "-", "web:{0}"), "- is one stream"),
        (("web:{0}/a", "web:{0}/b", "-"), "- is one stream"),
        (("{0}/a", "{0}/sub/a", "web:{0}/there"), "{0}/a and {0}/sub/a would both be a there"),
        (("web:{0}/a", "web:{0}/sub/../a", "{0}/there"), "would both be a there"),
        (("{0}/a",), "Missing argument 'TARGET'"),
    ],
)
async def test_several_sources_that_cannot_be_are_refused_before_anything_is_written(
    guest: Guest, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    for name in ("sub", "there"):
        (tmp_path / name).mkdir()
    for name in ("a", "b", "file", "sub/a"):
        (tmp_path / name).write_text(name)
    before = described(tmp_path)
    refused = await guest.banger("vm", "cp", *(word.format(tmp_path) for word in words), status=2)
    assert message.format(tmp_path) in refused.err
    assert described(tmp_path) == before


async def test_a_copy_of_nothing_is_no_success(guest: Guest, tmp_path: Path) -> None:
    refused = await guest.banger("vm", "cp", "web:/dev/null", str(tmp_path), status=1)
    assert "left out: null is a device" in refused.err
    assert "nothing of /dev/null was copied" in refused.err
    told = await guest.banger("vm", "cp", "web:/proc/version", f"{tmp_path}/version")
    assert f"{tmp_path}/version is empty: `banger vm exec web -- cat /proc/version` prints" in told.err


async def test_streams_are_archives(guest: Guest, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    done = await guest.banger("vm", "cp", f"web:{tmp_path / 'tree'}", "-")
    with tarfile.open(fileobj=io.BytesIO(done.out)) as tar:
        assert "tree/sub/link" in tar.getnames()
    await guest.banger("vm", "cp", "-", f"web:{tmp_path / 'again'}", stdin=done.out)
    assert described(tmp_path / "again" / "tree") == described(tmp_path / "tree")


async def test_a_compressed_stream_is_told_what_to_do(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(tmp_path / "text", "text")
    words = ("vm", "cp", "-", f"web:{tmp_path / 'again'}")
    refused = await guest.banger(*words, stdin=packed.getvalue(), status=1)
    assert "no tar archive" in refused.err
    assert "zcat" in refused.err
    assert "-- df" not in refused.err


async def test_progress_is_seen_on_a_terminal(guest: Guest, tmp_path: Path) -> None:
    """Of a stream too, whose other end is a file or another program."""
    large, inside = tmp_path / "large", tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "content").write_bytes(bytes(24 << 20))
    with tarfile.open(large, "w") as tar:
        tar.add(tmp_path / "content", "content")
    cli = cli_process.Cli(guest.served.path)

    def watched(words: str) -> tuple[int, bytes]:
        shell = f"exec {shlex.join(cli.argv('vm', 'cp'))} {words}"
        with cli_process.on_terminal(["sh", "-c", shell], cli.environment(TERM="xterm")) as terminal:
            return terminal.wait(), re.sub(rb"\x1b\[[0-9;]*m", b"", terminal.seen)

    for words, shown in (
        (f"{large} web:{inside}/", rb"copying [0-9]+%"),
        (f"{large} web:{inside}/", rb"1 file, 24 MiB: %b/large in web now" % str(inside).encode()),
        (f"- web:{inside} <{large}", rb"copying [0-9]+%"),
        (f"web:{large} - >{tmp_path / 'out'}", rb"copying [0-9.]+ MiB"),
    ):
        status, seen = await asyncio.to_thread(watched, words)
        assert status == 0, seen
        assert re.search(shown, seen), seen


async def test_a_file_with_a_colon_in_its_name_is_told_how_to_be_one(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x:y").touch()
    monkeypatch.chdir(tmp_path)
    assert "write ./x:y" in (await guest.banger("vm", "cp", "x:y", "web:/tmp", status=2)).err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("a", "b"), 2, "one side of a copy"),
        (("web:/a", "web:/b"), 2, "one side of a copy"),
        (("/nonexistent", "web:/tmp"), 2, "does not exist"),
        (("web:/nonexistent", "/tmp/x"), 1, "/nonexistent does not exist in web"),
        (("web:/nonexistent*", "/tmp/x"), 1, "patterns are not expanded"),
        (("web:/etc/hostname", "/proc/x"), 1, "cannot write x in /proc"),
        (("web:/etc/hostname", "/nonexistent/x"), 2, "no directory /nonexistent"),
        (("/etc/hostname", "web:/proc/"), 1, "that is in web: `banger vm exec web -- df`"),
        (("nobody:/etc/hostname", "/tmp/x"), 1, "there is no VM 'nobody'"),
        (("/etc/hosts", "nobody:/tmp"), 1, "there is no VM 'nobody'"),
        (("/etc/hosts", "/etc/hostname", "nobody:/tmp"), 1, "there is no VM 'nobody'"),
        (("UPPER:/etc/hostname", "/tmp/x"), 2, "UPPER"),
        (("web:/", "/tmp/x"), 2, "-- tar -c --one-file-system -C / . > web.tar"),
        (("web:/tmp/..", "-"), 2, "--one-file-system"),
    ],
)
async def test_what_cannot_be_copied_is_said(
    guest: Guest, words: tuple[str, ...], status: int, message: str
) -> None:
    assert message in (await guest.banger("vm", "cp", *words, status=status)).err


@pytest.mark.parametrize("target", ["-", "{tmp_path}/out"])
async def test_a_file_that_became_shorter_while_it_was_copied_out_is_named(
    guest: Guest, tmp_path: Path, target: str
) -> None:
    """As sysfs has them: each is said to hold a page, and read to its end it holds less."""
    directory = tmp_path / "sys"
    directory.mkdir()
    source = "/sys/kernel/uevent_seqnum"
    done = await guest.banger("vm", "cp", f"web:{source}", target.format(tmp_path=tmp_path), status=1)
    assert "uevent_seqnum became shorter while it was read, and ends in zeros" in done.err
    if target != "-":
        assert (tmp_path / "out").stat().st_size == os.stat(source).st_size


async def test_what_is_left_out_on_the_way_in_is_said(guest: Guest, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "talk"))
    done = await guest.banger("vm", "cp", str(tree), f"web:{tmp_path}/inside/")
    assert "left out: tree/talk is a socket" in done.err
    assert list((tmp_path / "inside/tree").iterdir()) == []
    assert "left out: null is a device" in (await guest.banger("vm", "cp", "/dev/null", f"web:{tree}/")).err


async def test_set_user_id_does_not_come_out_of_a_guest(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "su").write_text("#!/bin/sh\n")
    (tmp_path / "su").chmod(0o6755)
    await guest.banger("vm", "cp", f"web:{tmp_path / 'su'}", f"{tmp_path}/out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def wait_for_file(path: Path) -> None:
    """Nothing tells of one, so we look."""
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


async def test_a_stream_in_hears_that_its_vm_is_gone_while_nothing_comes(
    guest: Guest, tmp_path: Path
) -> None:
    """As of a tar that is slow, or of somebody who types: there need be nothing to send for that."""
    cli = cli_process.Cli(guest.served.path)
    (tmp_path / "file").write_bytes(bytes(2 << 20))
    begun = await guest.banger("vm", "cp", f"web:{tmp_path}/file", "-")
    copying = await asyncio.create_subprocess_exec(
        *cli.argv("vm", "cp", "-", f"web:{tmp_path}/inside"),
        env=cli.environment(),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert copying.stdin is not None
    copying.stdin.write(begun.out[: 1 << 20])
    async with asyncio.timeout(20):
        await asyncio.to_thread(wait_for_file, tmp_path / "inside/file")
        await guest.served.done("POST", "/v1/vms/web/stop")
        assert copying.stderr is not None
        assert "closed the connection" in (await copying.stderr.read()).decode()
        assert await copying.wait() == 1


async def test_what_is_not_in_the_guest_makes_no_directory_here(guest: Guest, tmp_path: Path) -> None:
    await guest.banger("vm", "cp", "web:/nonexistent/.", f"{tmp_path}/new", status=1)
    assert not (tmp_path / "new").exists()


async def test_a_stream_out_waits_for_a_pipe_that_does_not_block(guest: Guest, tmp_path: Path) -> None:
    """Another program that has it too may have made it so, as node does."""
    (tmp_path / "file").write_bytes(os.urandom(2 << 20))
    cli = cli_process.Cli(guest.served.path)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    copying = await asyncio.create_subprocess_exec(
        *cli.argv("vm", "cp", f"web:{tmp_path}/file", "-"), env=cli.environment(), stdout=writer
    )
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = await asyncio.to_thread(pipe.read)
    assert await copying.wait() == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        content = tar.extractfile("file")
        assert content is not None
        assert content.read() == (tmp_path / "file").read_bytes()
