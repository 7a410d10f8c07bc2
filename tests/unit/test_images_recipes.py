# SPDX-License-Identifier: MIT
"""Recipes as data, and their edits of a tree; no root needed."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

import hypothesis
import msgspec
import pytest
from hypothesis import strategies

from banger.contract import errors
from banger.images import edit, paths, publish, recipe, records
from banger.images.mkfs import filesystem
from tests.unit import tars
from tests.unit.tars import directory, file, symlink, tar

MIB = 1 << 20


@pytest.fixture
def fs(tmp_path: Path) -> filesystem.Filesystem:
    made = filesystem.Filesystem(tmp_path / "fs.ext4")
    tars.put(
        made,
        [
            tar(
                file(b"./usr/bin/su", b"\x7fELF su"),
                symlink(b"./sbin", b"usr/bin"),
                directory(b"./usr/lib/systemd"),
            )
        ],
    )
    return made


def test_the_shipped_recipes_read() -> None:
    assert recipe.available() == ["busybox", "debian-bookworm", "debian-trixie"]
    default, newer = recipe.load("debian-bookworm"), recipe.load("debian-trixie")
    assert {"systemd-sysv", "openssh-server", "git", "ca-certificates"} <= set(default.packages)
    assert (newer.suite, newer.packages, newer.tree) == ("trixie", default.packages, default.tree)
    assert "init" not in recipe.load("busybox").tree.links[0].names


def test_an_unknown_recipe_names_the_known() -> None:
    with pytest.raises(errors.NotFoundError) as caught:
        recipe.load("../../etc/passwd")
    assert "debian-bookworm" in caught.value.hint


def test_a_users_recipe_may_extend_a_shipped_one() -> None:
    mine = recipe.parse(b'extends = "debian-bookworm"\nname = "mine"\nmore_packages = ["gcc", "make"]\n')
    base = recipe.load("debian-bookworm")
    assert (mine.name, mine.packages) == ("mine", (*base.packages, "gcc", "make"))
    assert mine.tree == base.tree


def test_what_a_users_recipe_does_is_done_after_what_the_shipped_one_does() -> None:
    mine = recipe.parse(
        b'extends = "debian-bookworm"\nname = "mine"\n[tree]\nremove = ["/srv"]\n'
        b'[[tree.link]]\npath = "/here"\ntarget = "there"\n'
    )
    base = recipe.load("debian-bookworm")
    assert "/etc/ssh/ssh_host_*" in base.tree.remove, "else all guests would have one host key"
    assert mine.tree.remove == (*base.tree.remove, "/srv")
    assert mine.tree.link == (*base.tree.link, recipe.Link("/here", "there"))
    assert mine.tree.mask == base.tree.mask


def toml(value: object) -> str:
    """As TOML has it: like JSON, but for tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


MINE = {"name": "mine", "summary": "s", "suite": "bookworm", "variant": "minbase", "kernel": "k"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("packagez", []),
        ("name", "../mine"),
        ("name", "Mine"),
        ("suite", "--help"),
        ("suite", "book worm"),
        ("variant", "-"),
        ("variant", "other"),
        ("packages", []),
        ("packages", ["git", "-o=Evil"]),
        ("packages", ["git,evil"]),
        ("packages", ["./local.deb"]),
        ("packages", ["git\n"]),
        ("packages", "git"),
        ("headroom_mib", -1),
        ("headroom_mib", "many"),
        ("exclude_paths", ["/usr/*\npre-invoke=/bin/evil"]),
        ("exclude_paths", ["usr"]),
        ("summary", "two\nlines"),
        ("kernel", "../../kernel"),
        ("tree", {"mask": ["../evil.service"]}),
        ("tree", {"file": [{"path": "relative", "content": ""}]}),
        ("tree", {"file": [{"path": "/a", "content": "", "mode": 0o10000}]}),
        ("tree", {"file": [{"path": "/a"}]}),
        ("tree", {"file": [{"path": "/a", "content": "", "source": "/b"}]}),
        ("tree", {"file": [{"path": "/a", "source": "b"}]}),
        ("tree", {"file": [{"path": "/a", "source": "~root/b"}]}),
        ("tree", {"links": [{"directory": "/bin", "target": "x", "names": ["a/b"]}]}),
        ("extends", 7),
        ("extends", "nothing"),
        ("more_packages", "git"),
    ],
    ids=str,
)
def test_a_recipe_is_read_strictly(key: str, value: object) -> None:
    said: dict[str, object] = {**MINE, "headroom_mib": 1, "packages": ["git"], key: value}
    with pytest.raises((errors.BadRequestError, errors.NotFoundError)) as caught:
        recipe.parse("".join(f"{name} = {toml(each)}\n" for name, each in said.items()).encode())
    assert caught.value.hint or key in ("extends", "more_packages")


@pytest.mark.parametrize("text", [b"\xff", b"name = ", b"x" * (300 << 10), b"a = " + b"[" * 5000])
def test_what_is_no_toml_is_no_recipe(text: bytes) -> None:
    with pytest.raises(errors.BadRequestError):
        recipe.parse(text)


@pytest.mark.parametrize("name", ["gcc make", "-oops", 7])
def test_what_is_no_package_is_named(name: object) -> None:
    text = f'extends = "debian-bookworm"\nname = "mine"\nmore_packages = ["gcc", {json.dumps(name)}]\n'
    with pytest.raises(errors.BadRequestError, match=f"{name!r} is not the name of a package"):
        recipe.parse(text.encode())


def test_tree_steps(fs: filesystem.Filesystem) -> None:
    tars.put(fs, [tar(symlink(b"usr/lib/systemd/dangling", b"/nowhere"))])
    steps = recipe.TreeSteps(
        remove=("/usr/bin/s*", "/nothing*", "/usr/*/systemd/dangling"),
        directory=(recipe.Directory("/tmp", 0o1777),),
        file=(recipe.File("/etc/deep/conf", "\nline\n", 0o600), recipe.File("/sbin/tool", "x")),
        link=(recipe.Link("/etc/alias", "/etc/deep"),),
        links=(recipe.Links("/usr/bin", "busybox", ("ls", "cat")),),
        mask=("slow.service",),
    )
    steps.apply(edit.Edits(fs))
    found = tars.listing(fs)
    assert b"usr/bin/su" not in found
    assert b"usr/lib/systemd/dangling" not in found
    assert found[b"tmp"] == "drwxrwxrwt 0"
    assert found[b"etc/deep/conf"] == "-rw------- 0 x1 line\n"
    assert found[b"usr/bin/tool"] == "-rw-r--r-- 0 x1 x"
    assert found[b"etc/systemd/system/slow.service"] == "lrwxrwxrwx 0 > /dev/null"
    assert found[b"usr/bin/ls"] == found[b"usr/bin/cat"] == "lrwxrwxrwx 0 > busybox"
    conf = fs.lookup(paths.Paths(fs).make_directory(b"/etc/alias")[-1], b"conf")
    assert conf is not None


def test_a_recipe_takes_files_of_this_host(
    fs: filesystem.Filesystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    program = "program " * (MIB // 4)
    (tmp_path / "tool").write_text(program)
    (tmp_path / "link").symlink_to("tool")
    plain = recipe.File("/usr/bin/plain", source=str(tmp_path / "tool"))
    of_home = recipe.File("/usr/bin/linked", mode=0o755, source="~/link")
    steps = recipe.TreeSteps(file=(plain, of_home))
    steps.check_sources()
    steps.apply(edit.Edits(fs))
    found = tars.listing(fs)
    assert found[b"usr/bin/plain"] == f"-rw-r--r-- 0 x1 {program}"
    assert found[b"usr/bin/linked"] == f"-rwxr-xr-x 0 x1 {program}"


def test_a_build_says_which_files_of_this_host_go_into_the_image(tmp_path: Path) -> None:
    """A recipe may be a stranger's, and the image is for guests."""
    (tmp_path / "id_ed25519").write_text("private")
    text = f"""
extends = "busybox"
name = "mine"
[[tree.file]]
path = "/etc/motd"
source = "{tmp_path}/id_ed25519"
"""
    made = recipe.parse(text.encode())
    kept = tmp_path / "cache/recipes" / f"{made.name}-{made.base_key('x86_64', '')}.tar"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(tar(file(b"bin/sh", b"")))
    (tmp_path / "guest").write_bytes(b"")
    said: list[str] = []
    publish.build(
        records.Images(tmp_path / "images"),
        made,
        arch="x86_64",
        cache_dir=tmp_path / "cache",
        guest_binary=tmp_path / "guest",
        on_line=said.append,
    )
    assert f"taking {tmp_path}/id_ed25519 of this host as /etc/motd" in said


@pytest.mark.parametrize(
    "step",
    [
        '[[tree.file]]\npath = "/usr/../../etc/x"\ncontent = ""',
        '[[tree.file]]\npath = "/./"\ncontent = ""',
        f'[[tree.file]]\npath = "/{"n" * 256}"\ncontent = ""',
        '[[tree.directory]]\npath = "//"',
        '[[tree.link]]\npath = "/etc/.."\ntarget = "x"',
        '[[tree.links]]\ndirectory = "/bin"\ntarget = "x"\nnames = ["a", ".."]',
        '[[tree.links]]\ndirectory = "/bin"\ntarget = "x"\nnames = ["."]',
        '[tree]\nremove = ["/etc/../*"]',
    ],
)
def test_a_path_that_is_none_in_the_image_is_said_before_the_build(step: str) -> None:
    text = f'extends = "debian-bookworm"\nname = "mine"\n{step}\n'
    with pytest.raises(errors.BadRequestError, match=r"is no path in an image .*\$\.tree"):
        recipe.parse(text.encode())


@pytest.mark.parametrize("what", ["absent", "directory", "pipe", "device"])
def test_a_file_of_this_host_that_cannot_be_taken_is_said_before_the_build(
    tmp_path: Path, what: str
) -> None:
    path = tmp_path / what
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/null")
    steps = recipe.TreeSteps(file=(recipe.File("/a", source=str(path)),))
    with pytest.raises(errors.BadRequestError, match=str(path)):
        steps.check_sources()


@pytest.mark.parametrize(
    ("path", "hint"), [("/tmp/no-program", "does not see the host's /tmp"), ("/no", "by the daemon")]
)
def test_a_source_that_is_not_there_says_where_the_daemon_looks(path: str, hint: str) -> None:
    steps = recipe.TreeSteps(file=(recipe.File("/a", source=path),))
    with pytest.raises(errors.BadRequestError) as caught:
        steps.check_sources()
    assert hint in caught.value.hint


@hypothesis.given(
    strategies.text("ab*", min_size=1).filter(lambda text: "*" in text), strategies.text("ab\n", min_size=1)
)
def test_a_star_stands_for_any_part_of_a_name(pattern: str, name: str) -> None:
    pieces = re.sub(r"\*+", "*", pattern).split("*")
    wanted = re.fullmatch(".*".join(pieces), name, re.DOTALL) is not None
    with tempfile.TemporaryDirectory() as there, filesystem.Filesystem(Path(there, "fs.ext4")) as made:
        tars.put(made, [tar(file(name.encode()))])
        edit.Edits(made).remove(f"/{pattern}")
        assert (made.lookup(made.ROOT, name.encode()) is None) == wanted


def test_thirty_stars_are_looked_through_at_once(tmp_path: Path) -> None:
    """As a regular expression they took longer than there is time, with all threads standing still."""
    with filesystem.Filesystem(tmp_path / "fs.ext4") as made:
        tars.put(made, [tar(file(b"a" * 98 + b"b"))])
        edit.Edits(made).remove("/" + "*a" * 30 + "*c")
        edit.Edits(made).remove("/" + "*" * 30 + "c")
        assert made.lookup(made.ROOT, b"a" * 98 + b"b")


@pytest.mark.parametrize("path", ["/a/../../b", "/.."])
def test_an_edit_stays_inside(fs: filesystem.Filesystem, path: str) -> None:
    with pytest.raises(errors.BadRequestError):
        edit.Edits(fs).write(path, [b"x"])


def test_only_what_the_packages_depend_on_names_the_cache() -> None:
    found = recipe.load("debian-bookworm")
    other = msgspec.structs.replace(found, tree=recipe.TreeSteps(), headroom_mib=1)
    more = msgspec.structs.replace(found, packages=(*found.packages, "gcc"))
    assert found.base_key("x86_64", "") == other.base_key("x86_64", "")
    assert (
        len({found.base_key("x86_64", ""), more.base_key("x86_64", ""), found.base_key("aarch64", "")}) == 3
    )
