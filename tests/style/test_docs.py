# SPDX-License-Identifier: MIT
"""The documents keep step with the code: every command, package and link is really there."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from banger.cli import main as cli
from banger.cli import reference
from banger.owner import reference as api
from tests.style import tree

DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "SPECIFICATION.md",
    "CHANGELOG.md",
    "LICENSE",
)
_LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
_CODE = re.compile(r"`[^`\n]*`")
_TARGET = re.compile(r"\bmake ([a-z-]+)")


def _read(name: str) -> str:
    return (tree.ROOT / name).read_text()


def _commands(group: click.Group, path: str = "banger") -> list[str]:
    context = click.Context(group)
    found = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        if command.hidden:
            continue
        found.append(f"{path} {name}")
        if isinstance(command, click.Group):
            found += _commands(command, f"{path} {name}")
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_document_is_there(name: str) -> None:
    assert _read(name).strip()


def test_the_readme_begins_with_the_two_commands() -> None:
    lines = [line for line in _read("README.md").splitlines()[:6] if line.startswith("make ")]
    assert [line.split()[:2] for line in lines] == [["make", "run"], ["make", "test"]]


def test_every_command_is_documented() -> None:
    text = _read("docs/cli.md")
    commands = _commands(cli.root)
    assert "banger vm run" in commands
    assert [command for command in commands if command not in text] == []


def test_the_architecture_names_every_package() -> None:
    text = _read("ARCHITECTURE.md")
    packages = {path.parent for path in tree.shipped_modules() if path.name == "__init__.py"}
    names = {str(path.relative_to(tree.PACKAGE)) for path in packages} - {"."}
    assert {name for name in names if f"{name.rpartition('/')[2]}/" not in text} == set()
    others = {path.relative_to(tree.ROOT).parts[0] for path in tree.files() if path.parent != tree.ROOT}
    ours = {name for name in others if not name.startswith(".")} - {"src", "docs", "requirements"}
    assert {name for name in ours if f"`{name}/`" not in text} == set()


@pytest.mark.parametrize("path", tree.with_suffix(".md"), ids=tree.name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    prose = _CODE.sub("", path.read_text())
    gone = [link for link in _LINK.findall(prose) if not (path.parent / link).exists()]
    assert gone == []


@pytest.mark.parametrize("path", tree.with_suffix(".md"), ids=tree.name_of)
def test_every_make_target_named_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", _read("Makefile"), re.MULTILINE))
    commands = re.findall(r"`(make [a-z-]+)|^(make [a-z-]+)", path.read_text(), re.MULTILINE)
    named = {target for pair in commands for text in pair for target in _TARGET.findall(text)}
    assert named <= targets


def test_the_command_reference_is_current() -> None:
    assert _read("docs/cli.md") == reference.reference(), "run: python -m banger.cli.reference > docs/cli.md"


def test_the_api_reference_is_current() -> None:
    assert _read("docs/api.md") == api.reference(), "run: python -m banger.owner.reference > docs/api.md"
