# SPDX-License-Identifier: MIT
"""Repositories for tests, one for each state that users' repositories are in, and how two are compared."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

ENV = {
    "PATH": os.environ["PATH"],
    "LC_ALL": "C.UTF-8",
    "HOME": "/nonexistent",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
}


def git(where: Path, *arguments: str, stdin: bytes = b"", check: bool = True) -> bytes:
    done = subprocess.run(
        ["git", "-c", "protocol.file.allow=always", *arguments],
        cwd=where,
        env=ENV,
        input=stdin,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert not check or done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def commit(where: Path, message: str = "more") -> str:
    git(where, "add", "-A")
    git(where, "commit", "-q", "--allow-empty", "-m", message)
    return git(where, "rev-parse", "HEAD").decode().strip()


def age(where: Path) -> None:
    """As if it had lain there for long: git trusts its index, and looks into no file again."""
    for name in git(where, "ls-files", "-z").split(b"\0")[:-1]:
        os.utime(os.path.join(os.fsencode(where), name), (1_000_000_000,) * 2, follow_symlinks=False)
    git(where, "update-index", "-q", "--refresh")


def plain(where: Path) -> None:
    """Two commits, a branch and a tag besides, nothing changed."""
    where.mkdir(parents=True)
    git(where, "init", "-q", "-b", "main")
    (where / "README").write_text("hello\n")
    (where / "src").mkdir()
    (where / "src" / "tool.sh").write_text("#!/bin/sh\necho tool\n")
    (where / "src" / "tool.sh").chmod(0o755)
    (where / "src" / "data.bin").write_bytes(bytes(range(256)) * 40)
    (where / "link").symlink_to("src/tool.sh")
    (where / ".gitignore").write_text("*.log\n.env\n")
    commit(where, "first")
    (where / "README").write_text("hello\nagain\n")
    commit(where, "second")
    git(where, "branch", "other", "HEAD~1")
    git(where, "tag", "-a", "v1", "-m", "one")


def dirty(where: Path) -> None:
    plain(where)
    (where / "README").write_text("changed\n")
    (where / "src" / "data.bin").write_bytes(os.urandom(100_000))
    (where / "link").unlink()
    (where / "link").symlink_to("/etc/passwd")
    (where / "secret.log").write_text("ignored\n")
    (where / ".env").write_text("TOKEN=1\n")
    (where / "untracked.txt").write_text("new\n")


def staged(where: Path) -> None:
    plain(where)
    (where / "README").write_text("staged\n")
    git(where, "add", "README")
    (where / "README").write_text("staged, then changed\n")
    (where / "added").write_text("added\n")
    git(where, "add", "added")
    git(where, "mv", "src/data.bin", "moved.bin")
    git(where, "rm", "-q", "--cached", ".gitignore")
    (where / "later").write_text("intended\n")
    git(where, "add", "-N", "later")


def deleted(where: Path) -> None:
    plain(where)
    (where / "README").unlink()
    git(where, "rm", "-q", "link")
    (where / "src" / "tool.sh").chmod(0o644)


def line_ends(where: Path) -> None:
    plain(where)
    (where / ".gitattributes").write_text("*.txt text=auto\n*.win text eol=crlf\n*.id ident\n")
    (where / "a.txt").write_bytes(b"one\ntwo\n")
    (where / "b.win").write_bytes(b"one\r\ntwo\r\n")
    (where / "c.id").write_text("$Id$\n")
    (where / "mixed.raw").write_bytes(b"one\r\ntwo\n")
    commit(where)
    for name in ("b.win", "c.id"):
        (where / name).unlink()
    git(where, "checkout", "--", ".")
    assert (where / "b.win").read_bytes() == b"one\r\ntwo\r\n"
    assert b"$Id: " in (where / "c.id").read_bytes()
    age(where)


def automatic_line_ends(where: Path) -> None:
    plain(where)
    git(where, "config", "core.autocrlf", "true")
    (where / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    commit(where)
    (where / "dos.txt").write_bytes(b"one\r\ntwo\r\nthree\r\n")


def odd_names(where: Path) -> None:
    plain(where)
    raw = os.fsencode(where)
    for name in (
        b"new\nline",
        b"-rf",
        b"--help",
        b"sp ace",
        b"tab\t",
        b'quo"te',
        b"back\\slash",
        b"\xff\xfe",
        b"$HOME",
        b"*",
        b":(top)x",
        "naïve".encode(),
    ):
        with open(os.path.join(raw, name), "wb") as file:
            file.write(name)
    os.mkdir(os.path.join(raw, b"d\xe9r"))
    with open(os.path.join(raw, b"d\xe9r", b"\n"), "wb") as file:
        file.write(b"deep")
    commit(where)
    with open(os.path.join(raw, b"\xff\xfe"), "wb") as file:
        file.write(b"changed")
    os.unlink(os.path.join(raw, b"-rf"))


def pointers(where: Path) -> None:
    """Large files kept elsewhere, with only the pointers here."""
    plain(where)
    (where / ".gitattributes").write_text("*.big filter=lfs diff=lfs merge=lfs -text\n")
    (where / "pointer.big").write_text(pointer(b"content" * 1000))
    commit(where)


def pointer(content: bytes) -> str:
    """As git-lfs has it."""
    oid = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n"


def fetched(where: Path) -> None:
    """The same, and here is the content; like git-lfs, a filter makes git call it unchanged."""
    pointers(where)
    content = b"content" * 1000
    git(where, "config", "filter.lfs.clean", f"cat >/dev/null; printf '%s' '{pointer(content)}'")
    (where / "pointer.big").write_bytes(content)
    git(where, "add", "pointer.big")
    assert git(where, "status", "--porcelain") == b""


def unborn(where: Path) -> None:
    where.mkdir(parents=True)
    git(where, "init", "-q", "-b", "trunk")
    (where / "staged").write_text("s\n")
    git(where, "add", "staged")


def empty(where: Path) -> None:
    where.mkdir(parents=True)
    git(where, "init", "-q", "-b", "trunk")


def detached(where: Path) -> None:
    plain(where)
    git(where, "checkout", "-q", "HEAD~1")


def shallow(where: Path) -> None:
    origin = where.with_name(where.name + "-origin")
    plain(origin)
    git(where.parent, "clone", "-q", "--depth", "1", f"file://{origin}", where.name)


def linked(where: Path) -> None:
    main = where.with_name(where.name + "-main")
    plain(main)
    git(main, "worktree", "add", "-q", "-b", "feature", str(where))
    (where / "README").write_text("in the linked tree\n")


def conflicted(where: Path) -> None:
    plain(where)
    git(where, "checkout", "-q", "-b", "side", "HEAD~1")
    (where / "README").write_text("other\n")
    commit(where)
    git(where, "merge", "-q", "main", check=False)
    assert b"UU README" in git(where, "status", "--porcelain")


def sparse(where: Path) -> None:
    plain(where)
    git(where, "sparse-checkout", "set", "--no-cone", "/README", "/link")
    assert not (where / "src").exists()


def split_index(where: Path) -> None:
    plain(where)
    git(where, "update-index", "--split-index")
    (where / "more").write_text("more\n")
    git(where, "add", "more")


def assumed(where: Path) -> None:
    plain(where)
    git(where, "update-index", "--assume-unchanged", "README")
    (where / "README").write_text("changed behind git's back\n")


def sha256(where: Path) -> None:
    where.mkdir(parents=True)
    git(where, "init", "-q", "-b", "main", "--object-format=sha256")
    (where / "README").write_text("hello\n")
    commit(where)
    (where / "README").write_text("changed\n")


def with_submodule(where: Path) -> None:
    """One, `libs/below`, fetched; it takes a full copy."""
    below = where.with_name("below")
    plain(below)
    plain(where)
    git(where, "submodule", "add", "-q", str(below), "libs/below")
    git(where, "commit", "-q", "-m", "submodule")


STATES: dict[str, Callable[[Path], None]] = {
    made.__name__: made
    for made in (
        plain,
        dirty,
        staged,
        deleted,
        line_ends,
        automatic_line_ends,
        odd_names,
        pointers,
        fetched,
        unborn,
        empty,
        detached,
        shallow,
        linked,
        conflicted,
        sparse,
        split_index,
        assumed,
        sha256,
    )
}


def tree(where: Path, names: list[bytes]) -> dict[bytes, tuple[str, int, bytes]]:
    """What lies under these names: kind, executable or not, content."""
    found = {}
    for name in names:
        path = os.path.join(os.fsencode(where), name)
        if os.path.islink(path):
            found[name] = ("link", 0, os.readlink(path))
        elif os.path.exists(path):
            with open(path, "rb") as file:
                found[name] = ("file", os.stat(path).st_mode & 0o100, file.read())
    return found


def status(where: Path, *, untracked: bool = False) -> bytes:
    mode = "normal" if untracked else "no"
    return git(where, "status", "--porcelain=v2", "--branch", "-z", f"--untracked-files={mode}")


def tracked(where: Path) -> list[bytes]:
    return [name for name in git(where, "ls-files", "-z").split(b"\0") if name]
