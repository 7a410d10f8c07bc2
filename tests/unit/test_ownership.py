# SPDX-License-Identifier: MIT
"""What root executes is root's alone: each way in which somebody else could change it is seen."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.contract import errors
from banger.helper import program
from banger.system import host, ownership

Break = Callable[[Path], object]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A host with a virtual environment that is ours alone; we play root."""
    before = os.umask(0o022)
    try:
        for name in ("usr/local/lib/banger/bin", "usr/bin", "usr/lib/python3.11", "home/eve", "tmp", "opt"):
            (tmp_path / name).mkdir(parents=True)
        for name in ("usr/bin/python3.11", "usr/local/lib/banger/site.py", "usr/lib/python3.11/os.py"):
            (tmp_path / name).write_text("")
        (tmp_path / "tmp").chmod(0o1777)
        (tmp_path / "home/eve").chmod(0o777)
        (tmp_path / "usr/bin/python3").symlink_to("python3.11")
        (tmp_path / "usr/local/lib/banger/bin/python").symlink_to("/usr/bin/python3")
        (tmp_path / "usr/local/lib/banger/lib64").symlink_to("bin")
        yield tmp_path
    finally:
        os.umask(before)


VENV = "usr/local/lib/banger"


def seen(root: Path, top: str = VENV) -> list[str]:
    eye = ownership.Eye(root, os.getuid())
    return [f"/{path.relative_to(root)} {why}" for path, why in eye.complaints([root / top])]


def test_what_is_root_s_alone_passes(root: Path) -> None:
    assert seen(root) == []


def mode(name: str, bits: int) -> Break:
    return lambda root: (root / name).chmod(bits)


def link(name: str, target: str) -> Break:
    return lambda root: (root / name).symlink_to(target)


def moved(name: str, to: str) -> Break:
    """Into a place of somebody else's, with a link where it was."""

    def change(root: Path) -> None:
        (root / name).rename(root / to)
        (root / name).symlink_to(f"/{to}")

    return change


BROKEN: list[tuple[str, Break, str]] = [
    ("a module", mode(f"{VENV}/site.py", 0o664), "site.py can be written"),
    ("a module, by anybody", mode(f"{VENV}/site.py", 0o602), "site.py can be written"),
    ("a directory in it", mode(f"{VENV}/bin", 0o775), "bin can be written"),
    ("a sticky directory in it", mode(f"{VENV}/bin", 0o1777), "bin can be written"),
    ("itself, sticky", mode(VENV, 0o1777), "banger can be written"),
    ("a directory above it", mode("usr/local", 0o777), "/usr/local can be written"),
    ("the root directory", lambda root: root.chmod(0o777), "/. can be written"),
    ("what a link in it leads to", mode("usr/bin/python3.11", 0o775), "python3.11 can be written"),
    ("above what a link leads to", mode("usr/bin", 0o777), "/usr/bin can be written"),
    ("a link to somebody's file", link(f"{VENV}/own.py", "/home/eve/own.py"), "leads nowhere, in"),
    ("a link to nothing in /tmp", link(f"{VENV}/own.py", "/tmp/own.py"), "leads nowhere, in"),
    ("a link to a directory", link(f"{VENV}/own", "/opt"), "is a link out of"),
    ("a link to a directory, by dots", link(f"{VENV}/own", "../../../../opt"), "is a link out of"),
    ("a link to itself", link(f"{VENV}/own", "own"), "leads nowhere: Too many levels"),
    ("it lies at somebody's", moved(VENV, "home/eve/banger"), "/home/eve can be written"),
    ("above it lies at somebody's", moved("usr/local", "home/eve/local"), "/home/eve can be written"),
    ("the interpreter lies at somebody's", moved("usr/bin", "home/eve/bin"), "/home/eve can be written"),
    ("a pipe", lambda root: os.mkfifo(root / VENV / "own.py"), "is neither a file nor a directory"),
]


@pytest.mark.parametrize(("change", "why"), [each[1:] for each in BROKEN], ids=[each[0] for each in BROKEN])
def test_whatever_others_could_change_is_seen(root: Path, change: Break, why: str) -> None:
    change(root)
    assert any(why in complaint for complaint in seen(root)), seen(root)


def test_what_belongs_to_somebody_else_is_seen(root: Path) -> None:
    eye = ownership.Eye(root, os.getuid() + 1)
    assert all(why == "does not belong to root" for _, why in eye.complaints([root / VENV]))
    assert {path.name for path, _ in eye.complaints([root / VENV])} >= {"site.py", "bin", "local", "usr"}


def test_a_link_to_nothing_where_only_root_makes_things_harms_nobody(root: Path) -> None:
    (root / VENV / "own.py").symlink_to("/opt/own.py")
    assert seen(root) == []


def test_what_is_not_there_is_an_error(root: Path) -> None:
    with pytest.raises(FileNotFoundError):
        seen(root, "usr/local/lib/other")


def test_where_programs_are_looked_for_nobody_adds_one(root: Path) -> None:
    (root / "bin").symlink_to("usr/bin")
    eye = ownership.Eye(root, os.getuid())
    assert list(eye.searched(ownership.directories(root))) == []
    (root / "usr/bin").chmod(0o1777)
    found = ownership.Eye(root, os.getuid()).searched(ownership.directories(root))
    assert {path for path, _ in found} == {root / "usr/bin", root / "bin"}


def test_an_installation_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("")
    (tmp_path / "own.py").chmod(0o666)
    with pytest.raises(errors.BadRequestError, match="root would execute") as raised:
        ownership.require(tmp_path)
    assert str(host.PREFIX) in raised.value.hint


def test_every_program_that_root_starts_is_looked_at() -> None:
    texts = [(host.unit_sources() / unit).read_text() for unit in host.UNITS]
    commands = [line for text in texts for line in text.splitlines() if line.startswith("ExecStart=")]
    of_units = {name for line in commands for name in re.findall(r"[= ](?:/usr)?/bin/(\S+)", line)}
    assert set(program.PACKAGES) | of_units == set(ownership.PROGRAMS)
    assert program.ENVIRONMENT["PATH"].split(":") == list(ownership.SEARCHED)


def test_every_program_in_the_helper_s_code_is_in_its_list() -> None:
    called = []
    for path in Path(program.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "program.run",
                "program.run_as_root",
            ):
                called.append(ast.unparse(node.args[0]))
    by_name = {name.strip("'") for name in called if name.startswith("'")}
    assert by_name <= program.PACKAGES.keys()
    assert set(called) - {repr(name) for name in by_name} == {"command", "tool"}, "is it in the list?"
