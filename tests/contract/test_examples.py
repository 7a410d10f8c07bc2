# SPDX-License-Identifier: MIT
"""Examples of `--help`, and what pages show of other programs and of files: by those who read them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import click
import pytest

from banger.kernels import catalog
from banger.owner import config
from banger.owner import main as owner
from banger.system.doctor import programs, table
from lab import cli as lab
from lab import provision
from tests.contract import test_documents as documents
from tests.unit import test_cli_parts

TREE: Final = documents.TREE
WITHIN: Final = re.compile(r"\$\((banger [^)]*)\)|'(banger [^']*)'")
INSTALLED: Final = f"{provision.VENV}/bin/"


def commands_in(line: str) -> Iterator[str]:
    """Those that the shell puts in another's words, and the line with something in their place."""
    yield from (one or other for one, other in WITHIN.findall(line))
    rest = WITHIN.sub(documents.PUT_IN, line)
    if "banger " in rest:
        yield rest[rest.index("banger ") :]


@pytest.mark.parametrize("path", test_cli_parts.ALL)
def test_every_example_of_help_is_a_command(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, context: Path(value))
    found = test_cli_parts.ALL[path]
    for line, _ in getattr(found, "examples", ()):
        shown = list(commands_in(line))
        assert shown or line.startswith("git "), line
        for words in (words for each in shown for words in documents.spelled_out(each)):
            try:
                documents.parse(words)
            except click.UsageError as error:
                pytest.fail(f"{line}: {error.format_message()}")


def lines_of(page: str, program: str) -> list[list[str]]:
    """The words of each line of a block that begins with this program, after `sudo`."""
    text = "\n".join(documents.BLOCK.findall((TREE / page).read_text())).replace("\\\n", " ")
    found = (line.removeprefix("sudo ") for line in text.splitlines())
    return [shlex.split(line, comments=True) for line in found if line.startswith(program)]


@pytest.mark.parametrize(
    ("page", "program"), [("docs/lab.md", "python -m lab "), ("docs/config.md", "bangerd ")]
)
def test_every_line_for_another_program_of_ours_is_one(page: str, program: str) -> None:
    parser = lab._parser() if "lab" in program else owner._parser()
    lines = lines_of(page, program)
    assert lines
    for words in lines:
        parser.parse_args(words[len(program.split()) :])


class Listening:
    """A machine that takes down what it is to run, as root."""

    name = "none"

    def __init__(self) -> None:
        self.argvs: list[Sequence[str]] = []

    def run(self, argv: Sequence[str], *, user: str = "root", timeout_s: float = 60) -> object:
        if user == "root":
            self.argvs.append(argv)
        return None


def _options(words: Sequence[str]) -> list[str]:
    handed = ("--disable-pip-version-check", "--no-index", "--find-links", "--firecracker=", "--jailer=")
    return [word for word in words if word.startswith("--") and not word.startswith(handed)]


def test_what_the_first_page_installs_by_is_what_the_lab_installs_by() -> None:
    """But for where files come from: there a registry and a tree, here what was handed to the lab."""
    machine = Listening()
    provision.install(machine, Path("/parcel"))
    shown = [
        words
        for words in lines_of("README.md", "")
        if words[:3] == ["python3", "-m", "venv"] or (words[:1] and words[0].startswith(INSTALLED))
    ]
    assert len(shown) == len(machine.argvs) == 4
    for words, argv in zip(shown, machine.argvs, strict=True):
        assert words[0] == argv[0]
        assert _options(words) == _options(argv)
        assert [word for word in words if word.isalpha() and word not in argv] == []
    again = [words for words in lines_of("docs/upgrade.md", INSTALLED) if "--force-reinstall" not in words]
    assert all(words in shown or words[1:] == ["system", "install"] for words in again), again


def test_the_first_page_has_every_package_that_doctor_asks_for() -> None:
    asked = {each.run.package for each in table.ORDINARY if isinstance(each.run, programs.Programs)}
    [shown] = lines_of("README.md", "apt ")
    assert {"git", "mmdebstrap"} <= asked <= set(shown)


def toml_of(page: str, after: str = "") -> str:
    """Of a page, or of what comes after a heading, with something in place of what a reader puts in."""
    shown = (TREE / page).read_text()
    shown = shown[shown.index(after) :]
    text = "".join(re.findall(r"^```toml\n(.*?)^```$", shown, re.MULTILINE | re.DOTALL))
    return text.replace('"…"', f'"{"0" * 64}"')


def test_the_settings_on_the_page_about_workspaces_are_read(tmp_path: Path) -> None:
    settings = tmp_path / "config.toml"
    settings.write_text(toml_of("docs/workspace.md", "## Files of your home\n"))
    assert [(each.source, each.target) for each in config.load(settings).file_sync] == [
        ("~/.gitconfig", config.FileSync(source="~/.gitconfig").target),
        ("~/.config/tool", ".config/tool"),
    ]


def test_the_catalog_on_the_page_about_kernels_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(toml_of("docs/kernels.md"))
    for name, kind in (("mine-6.12", catalog.File), ("debian-generic", catalog.Package)):
        assert isinstance(catalog.find(name, "x86_64", tmp_path).source, kind)
