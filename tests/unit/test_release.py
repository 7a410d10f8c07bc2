# SPDX-License-Identifier: MIT
"""A release is what one of the host's signers has signed, byte for byte, or it is refused before any use."""

from __future__ import annotations

import os
import platform
import re
import shlex
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from banger.contract import errors
from banger.system import environment, signed, versions
from lab import command, release
from tests import releases

ENTRY = "[console_scripts]\nbangerd = banger.owner.main:main\n"
Break = Callable[["Given"], object]


class Given:
    """A release, the keys, and a host's signers."""

    def __init__(self, top: Path, keys: Path) -> None:
        self.top = top
        self.key = keys / "maintainer"
        self.other = keys / "somebody"
        self.directory = top / "banger-1.3.0"
        self.directory.mkdir()
        releases.wheel(self.own, {"banger/__init__.py": "first"})
        releases.wheel(self.directory / "rich-15.0-py3-none-any.whl", {"rich/__init__.py": ""})
        release.sign(self.directory, self.key)
        self.signers = top / "release-signers"
        self.signers.write_text("# who\n" + releases.signer(self.key))
        self.scratch = top / "scratch"
        self.scratch.mkdir()

    @property
    def own(self) -> Path:
        return self.directory / "banger-1.3.0-py3-none-any.whl"

    @property
    def listed(self) -> Path:
        return self.directory / signed.LIST

    def take(self) -> list[str]:
        """Read and copied, as an upgrade does it; the names of what it would unpack."""
        found = signed.read(self.directory, self.signers, self.scratch)
        target = self.scratch / "wheels"
        target.mkdir()
        signed.copy(found, self.directory, target)
        return sorted(path.name for path in target.iterdir())

    def says(self, old: str, new: str, key: Path | None = None) -> None:
        """The list says something else, and is signed again by this key."""
        text = self.listed.read_text()
        assert old in text
        self.listed.write_text(text.replace(old, new))
        if key is not None:
            self.sign(key)

    def lists(self, text: str) -> None:
        self.listed.write_text(text)
        self.sign(self.key)

    def sign(self, key: Path, namespace: str = signed.NAMESPACE) -> None:
        (self.directory / signed.SIGNATURE).unlink()
        argv = ["ssh-keygen", "-q", "-Y", "sign", "-n", namespace, "-f", str(key), str(self.listed)]
        command.run(argv, timeout_s=30)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("keys")
    for name in ("maintainer", "somebody"):
        releases.key(top, name)
    return top


@pytest.fixture
def given(tmp_path: Path, keys: Path) -> Given:
    return Given(tmp_path, keys)


def test_what_is_signed_is_taken_and_nothing_else(given: Given) -> None:
    (given.directory / "extra-1.0-py3-none-any.whl").write_text("unsigned")
    assert given.take() == ["banger-1.3.0-py3-none-any.whl", "rich-15.0-py3-none-any.whl"]


def becomes_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def becomes_link(path: Path) -> None:
    path.rename(path.with_suffix(".aside"))
    path.symlink_to(path.with_suffix(".aside").name)


NOT_SIGNED = "is not signed by anybody"
REFUSED: list[tuple[str, Break, str]] = [
    ("by somebody else", lambda g: g.sign(g.other), NOT_SIGNED),
    ("for something else", lambda g: g.sign(g.key, "git"), NOT_SIGNED),
    ("the list changed", lambda g: g.says("1.3.0", "1.4.0"), NOT_SIGNED),
    ("the signature is nonsense", lambda g: (g.directory / signed.SIGNATURE).write_text("x"), NOT_SIGNED),
    ("of another list", lambda g: g.listed.write_bytes(g.listed.read_bytes() + b" "), NOT_SIGNED),
    ("no signature", lambda g: (g.directory / signed.SIGNATURE).unlink(), "cannot read"),
    ("no list", lambda g: g.listed.unlink(), "cannot read"),
    ("nobody may sign", lambda g: g.signers.write_text("# nobody\n"), "nobody may sign"),
    ("no signers", lambda g: g.signers.unlink(), "nobody may sign"),
    (
        "the signer may sign other things only",
        lambda g: g.signers.write_text(releases.signer(g.key).replace("banger-release", "git")),
        NOT_SIGNED,
    ),
    (
        "the key was good once",
        lambda g: g.signers.write_text(
            releases.signer(g.key).replace("namespaces", 'valid-before="20200101",namespaces')
        ),
        NOT_SIGNED,
    ),
    (
        "a wheel changed",
        lambda g: releases.wheel(g.own, {"banger/__init__.py": "other"}),
        "not the file",
    ),
    ("a wheel grew", lambda g: g.own.write_bytes(g.own.read_bytes() + b"x"), "not the file"),
    ("a wheel shrank", lambda g: g.own.write_bytes(g.own.read_bytes()[:-1]), "not the file"),
    ("a wheel is gone", lambda g: g.own.unlink(), "cannot read"),
    ("a wheel is a link", lambda g: becomes_link(g.own), "cannot read"),
    ("a wheel is a pipe", lambda g: becomes_pipe(g.own), "no regular file"),
    ("the list is a link", lambda g: becomes_link(g.listed), "cannot read"),
    ("the list is a pipe", lambda g: becomes_pipe(g.listed), "no regular file"),
    ("the list is endless", lambda g: os.truncate(g.listed, signed.MAX_LIST_BYTES + 1), "is larger than"),
    # Signed, and nonsense all the same.
    ("a name with a slash", lambda g: g.says('"rich-15', '"../rich-15', g.key), "is no name"),
    ("no name", lambda g: g.says('"rich-15.0-py3-none-any.whl"', '""', g.key), "is no name"),
    (
        "another kind",
        lambda g: g.says("rich-15.0-py3-none-any.whl", "rich.tar.gz", g.key),
        "is no name",
    ),
    ("twice", lambda g: g.says("rich-15.0", "banger-1.3.0", g.key), "is twice in the list"),
    (
        "not its wheel",
        lambda g: g.says('"version": "1.3.0"', '"version": "1.4.0"', g.key),
        "no wheel of",
    ),
    ("no version", lambda g: g.says('"version": "1.3.0"', '"version": "../x"', g.key), "is no version"),
    (
        "another field",
        lambda g: g.says('"version"', '"run": "x", "version"', g.key),
        "is no list",
    ),
    ("no wheels", lambda g: g.lists('{"version": "1.3.0", "wheels": []}'), "has 1 to"),
]


@pytest.mark.parametrize(
    ("change", "why"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED]
)
def test_anything_else_is_refused(given: Given, change: Break, why: str) -> None:
    change(given)
    with pytest.raises(errors.BangerError, match=why) as raised:
        given.take()
    assert raised.value.hint or isinstance(raised.value, errors.BadRequestError)


def test_a_wheel_that_is_swapped_while_it_is_read_is_not_used(given: Given) -> None:
    """What is unpacked is the copy that was hashed, whatever happens to the file it was read from."""
    taken = given.take()
    given.own.write_text("swapped")
    copied = given.scratch / "wheels" / given.own.name
    assert copied.name in taken
    with zipfile.ZipFile(copied) as archive:
        assert archive.read("banger/__init__.py") == b"first"


def test_a_list_names_what_lies_there(given: Given) -> None:
    found = msgspec.json.decode(given.listed.read_bytes(), type=signed.Release)
    assert found.version == "1.3.0"
    assert {wheel.name: wheel.size_bytes for wheel in found.wheels} == {
        path.name: path.stat().st_size for path in given.directory.glob("*.whl")
    }


@pytest.mark.parametrize(
    ("older", "newer"),
    [("0.9", "0.10"), ("1.3.0rc1", "1.3.0"), ("1.3.0a2", "1.3.0b1"), ("1.3", "1.3.0.1"), ("1.2.9", "1.10")],
)
def test_versions_have_an_order(older: str, newer: str) -> None:
    assert versions.parse(older) < versions.parse(newer)
    versions.refuse_older(newer, older)
    with pytest.raises(errors.ConflictError, match=f"banger {newer} is installed, and {older} is older"):
        versions.refuse_older(older, newer)


@pytest.mark.parametrize("text", ["", "1.", "v1", "1.3-x", "1.3\n", "../1", "1" * 7, "1.3.post1"])
def test_nonsense_is_no_version(text: str) -> None:
    with pytest.raises(errors.BadRequestError):
        versions.parse(text)
    assert versions.parse("1.3") == versions.parse("1.3.0")


def test_the_wheels_of_this_machine_are_chosen() -> None:
    machine = platform.machine()
    names = [
        "a-1-py3-none-any.whl",
        "b-1-cp310-cp310-manylinux_2_17_riscv64.whl",
        f"b-1-cp310-cp310-manylinux_2_17_{machine}.whl",
        f"b-1-cp311-cp311-musllinux_1_2_{machine}.whl",
        f"b-1-cp311-cp311-manylinux_2_17_{machine}.manylinux2014_{machine}.whl",
        f"c-1-cp39-abi3-manylinux_2_17_{machine}.whl",
    ]
    assert environment.chosen(names, minor=11) == [names[0], names[4], names[5]]
    with pytest.raises(errors.BadRequestError, match="has no b for Python 3"):
        environment.chosen(names, minor=12)


@pytest.mark.parametrize(
    "name", ["../own.py", "/own.py", "a/../../own.py", "banger-1.3.0.data/scripts/x", "a\\own.py"]
)
def test_a_wheel_that_reaches_out_is_refused(tmp_path: Path, name: str) -> None:
    wheel = releases.wheel(tmp_path / "w.whl", {name: "x"})
    (tmp_path / "in/site").mkdir(parents=True)
    with pytest.raises(errors.BadRequestError, match="no plain file"):
        environment._unpack(wheel, tmp_path / "in/site")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [wheel]


def test_a_link_in_a_wheel_is_refused(tmp_path: Path) -> None:
    member = zipfile.ZipInfo("banger/own.py")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(errors.BadRequestError, match="no plain file"):
        environment._unpack(tmp_path / "w.whl", tmp_path)


def test_two_wheels_with_one_file_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        releases.wheel(tmp_path / f"{name}.whl", {"banger/own.py": name})
    site = tmp_path / "site"
    environment._unpack(tmp_path / "a.whl", site)
    with pytest.raises(FileExistsError):
        environment._unpack(tmp_path / "b.whl", site)


def test_an_environment_is_made_and_compiled(tmp_path: Path) -> None:
    """What did not change is not compiled again, and what changed is."""
    files: dict[str, str | bytes] = {"banger/__init__.py": ""}
    files |= {f"banger/{part}/__init__.py": "" for part in ("cli", "owner", "helper")}
    files["banger/owner/composition.py"] = ""
    files |= {f"banger/{part}/main.py": "def main(): return 3" for part in ("cli", "owner", "helper")}
    files["banger-1.3.0.dist-info/entry_points.txt"] = ENTRY
    first, second = tmp_path / "1.3.0", tmp_path / "1.4.0"
    wheel = releases.wheel(tmp_path / "banger-1.3.0-py3-none-any.whl", files)
    environment.make(first, [wheel], Path(sys.executable))
    assert environment.version(first) == "1.3.0"
    assert command.run([str(first / "bin/bangerd")], timeout_s=30, check=False).status == 3
    assert not (first / "bin/pip").exists()

    (marked,) = environment.packages(first).glob("banger/helper/__pycache__/main.*.pyc")
    marked.write_bytes(marked.read_bytes() + b"marked")
    files["banger/owner/main.py"] = "def main(): return 4"
    environment.make(second, [releases.wheel(wheel, files)], Path(sys.executable), like=first)
    assert command.run([str(second / "bin/bangerd")], timeout_s=30, check=False).status == 4
    assert (second / marked.relative_to(first)).read_bytes().endswith(b"marked")
    assert len([*environment.packages(second).glob("banger/**/*.pyc")]) == 8


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that everybody can look into, unlike pytest's own, with an environment in it."""
    with tempfile.TemporaryDirectory(prefix="b ", dir="/tmp") as name:
        site = Path(name, "venv/lib/python3.11/site-packages/banger")
        site.mkdir(parents=True)
        (site / "__init__.py").touch(mode=0o644)
        (site / "gone").symlink_to("nowhere")
        (site / "tool").touch(mode=0o755)
        for path in (Path(name), *Path(name).rglob("*/")):
            path.chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize(
    ("closed", "mode"),
    [
        ("", 0o700),
        ("venv", 0o700),
        ("venv/lib/python3.11", 0o750),
        ("venv/lib/python3.11/site-packages/banger/__init__.py", 0o600),
        ("venv/lib/python3.11/site-packages/banger/tool", 0o744),
    ],
)
def test_code_that_only_root_could_read_is_named_with_what_to_do(
    open_place: Path, closed: str, mode: int
) -> None:
    environment.require_readable(open_place / "venv")
    (open_place / closed).chmod(mode)
    with pytest.raises(errors.BadRequestError, match=re.escape(f"{open_place / closed}")) as refused:
        environment.require_readable(open_place / "venv")
    words = shlex.split(refused.value.hint.partition("sudo ")[2].partition(",")[0])
    assert words[0] == "chmod"
    subprocess.run([*words], check=True)
    environment.require_readable(open_place / "venv")
