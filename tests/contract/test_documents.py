# SPDX-License-Identifier: MIT
"""Every command and setting that a page shows is one, by the parsers of the CLI and the daemon.

What pages show of a machine is run on one: `root/test_documents.py`, and in the lab.
"""

from __future__ import annotations

import ast
import re
import shlex
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import pytest

from banger.cli import command, main
from banger.images import catalog, edit, paths, recipe
from banger.images.mkfs import filesystem
from banger.owner import config
from bench import fake_host, served
from tests.contract import conftest, publishing

TREE: Final = Path(__file__).parents[2]
GENERATED: Final = {"cli.md", "api.md"}
PAGES: Final = [
    *(TREE / name for name in ("README.md", "ARCHITECTURE.md", "SECURITY.md")),
    *sorted(page for page in (TREE / "docs").glob("*.md") if page.name not in GENERATED),
]
BLOCK: Final = re.compile(r"^```[a-z]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE: Final = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
COMMAND: Final = re.compile(r"(?:\$ )?(?:sudo )?(banger .*)")
# What a reader puts something of their own for.
STANDS_FOR: Final = {
    "CMD": "true",
    "DIRECTORY": ".",
    "IMAGE": "tiny",
    "NAME": "web",
    "PATH": ".",
    "REFERENCE": "a:1",
}
PUT_IN: Final = "web"


def shown(page: Path) -> Iterator[str]:
    text = page.read_text()
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    for code in (*lines, *CODE.findall(BLOCK.sub("", text))):
        found = COMMAND.fullmatch(code.strip())
        if found:
            yield found[1]


def spelled_out(line: str) -> Iterator[list[str]]:
    """The words of a line, once for each of `a|b`, with what is in brackets; up to a comment or a pipe."""
    text = re.sub(r"(\w)\\?\|(?=\w)", r"\1,", line.replace("…", "").replace("sha256:", "sha256:" + "0" * 64))
    lexer = shlex.shlex(re.sub(r"[\[\]](?![^']*')", " ", text), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list[str]()
    for word in lexer:
        if set(word) <= set("();<>|&"):
            break
        words.append(STANDS_FOR.get(word, word))
    choice = next(
        (number for number, word in enumerate(words) if re.fullmatch(r"[a-z]+(,[a-z]+)+", word)), None
    )
    if choice is None:
        yield words
    else:
        yield from ([*words[:choice], one, *words[choice + 1 :]] for one in words[choice].split(","))


def parse(words: list[str]) -> None:
    """As `banger` would, up to running it. A command that is only named has to exist. Raises UsageError."""
    found: click.Command = main.root
    rest, above = words[1:], click.Context(main.root, info_name="banger", obj=command.Settings())
    while isinstance(found, click.Group) and rest and not rest[0].startswith("-"):
        name, below, rest = found.resolve_command(above, rest)
        assert name is not None
        assert below is not None
        found, above = below, click.Context(below, info_name=name, parent=above)
    if rest and "--help" not in rest:
        found.make_context(above.info_name, list(rest), parent=above.parent)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_one(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that it names are its reader's."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, context: Path(value))
    for line in shown(page):
        for words in spelled_out(line):
            try:
                parse(words)
            except click.UsageError as error:
                pytest.fail(f"{line}: {error.format_message()}")


def test_every_command_in_a_message_is_one() -> None:
    """Hints above all: who follows one must not meet the next error."""
    wrong = []
    for path in sorted((TREE / "src/banger").rglob("*.py")):
        for text in _texts(ast.parse(path.read_text())):
            for found in filter(None, map(COMMAND.fullmatch, CODE.findall(text))):
                line = re.sub(rf"{PUT_IN}(?=[MG]\b)", "512", found[1])
                line = line.replace(f"unpublish {PUT_IN} {PUT_IN}", f"unpublish {PUT_IN} 8080:80")
                if re.match(rf"banger (image )?{PUT_IN} ", line):
                    continue  # which command it is, is put in as well
                try:
                    list(map(parse, spelled_out(line)))
                except (click.BadOptionUsage, click.MissingParameter):
                    pass  # it speaks of a command or an option, and leaves the rest to the reader
                except click.UsageError as error:
                    wrong.append(f"{path.relative_to(TREE)}: {found[1]}: {error.format_message()}")
    assert wrong == []


def _texts(node: ast.AST) -> Iterator[str]:
    """What a module says, with one word for whatever it puts in."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else PUT_IN for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for below in ast.iter_child_nodes(node):
            yield from _texts(below)


@pytest.mark.parametrize(
    "line",
    [
        "banger vm rnu",
        "banger vm set web --nat maybe",
        "banger vm stop|burn web",
        "banger vm create web --cpus 2",
    ],
)
def test_what_is_no_command_is_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        list(map(parse, spelled_out(line)))


def test_the_settings_on_the_page_about_images_are_read(tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```toml\n(.*?)^```$", (TREE / "docs/images.md").read_text(), re.MULTILINE | re.DOTALL
    )
    registries, images, mine, tree = blocks
    settings = tmp_path / "config.toml"
    settings.write_text(registries)
    assert config.load(settings).insecure_registries == ("registry.lan:5000",)
    extension = tmp_path / "images.toml"
    extension.write_text(
        images.replace('"sha256:…"', f'"sha256:{"0" * 64}"').replace('"…"', f'"{"0" * 64}"')
    )
    found = catalog.Catalog(extension)
    for name, kind in (("ci", catalog.OciEntry), ("mine", catalog.RecipeEntry)):
        entry = found.find(name, "x86_64")
        assert entry is not None
        assert isinstance(entry, kind)
    made = recipe.parse(mine.encode())
    assert made.name == "mine"
    assert {"git", "build-essential"} <= set(made.packages)
    changed = recipe.parse(f'extends = "busybox"\n{tree}'.encode()).tree
    base = recipe.load("busybox").tree
    assert [file.path for file in changed.file[len(base.file) :]] == ["/usr/local/bin/hello"]
    assert [link.path for link in changed.link[len(base.link) :]] == ["/usr/local/bin/hi"]


def test_the_recipe_on_the_page_about_workspaces_brings_mise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `vm run` looks for it, and with git, which it wants too."""
    (block,) = re.findall(
        r"^## Tools$.*?^```toml\n(.*?)^```$",
        (TREE / "docs/workspace.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".local/bin").mkdir(parents=True)
    (tmp_path / ".local/bin/mise").write_text("program")
    made = recipe.parse(block.encode())
    assert "git" in made.packages
    made.tree.check_sources()
    with filesystem.Filesystem(tmp_path / "root.ext4") as fs:
        made.tree.apply(edit.Edits(fs))
        directory = paths.Paths(fs).make_directory(b"/usr/local/bin")[-1]
        mise = fs.lookup(directory, b"mise")
        assert mise is not None
        assert (b"".join(fs.read(mise)), fs.attributes(mise).mode & 0o777) == (b"program", 0o755)


def test_the_page_about_images_has_every_key_of_a_recipe() -> None:
    text = (TREE / "docs/images.md").read_text()
    rows = re.findall(r"^\| (`\w+`.*?) \| (.+?) \|", text, re.MULTILINE)
    said = {key for keys, _ in rows for key in CODE.findall(keys)}
    assert set(recipe.Recipe.__struct_fields__) | {"extends", "more_packages"} <= said
    assert set(recipe.TreeSteps.__struct_fields__) <= said
    fields = {keys: set(CODE.findall(what)) for keys, what in rows}
    steps = {"directory": recipe.Directory, "file": recipe.File, "link": recipe.Link, "links": recipe.Links}
    for step, kind in steps.items():
        assert fields[f"`{step}`"] == set(kind.__struct_fields__), step


def test_the_page_about_settings_has_every_key_with_its_default(tmp_path: Path) -> None:
    text = (TREE / "docs/config.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", text, re.MULTILINE)
    said = {
        key: None if default == "–" else tomllib.loads(f"_ = {default[1:-1]}")["_"]
        for key, default, _ in rows
    }
    assert said == {key: None if value == () else value for key, value in _defaults().items()}
    meant = next(meaning for key, _, meaning in rows if key == "file_sync")
    assert all(f"`{key}`" in meant for key in config.FileSync.__struct_fields__)
    settings = tmp_path / "config.toml"
    settings.write_text(re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0])
    assert config.load(settings) != config.Config()


def _defaults() -> dict[str, object]:
    return {key: getattr(config.Config(), key) for key in config.Config.__struct_fields__}


def _fragments() -> Iterator[str]:
    """What the table of the page about the network has a user say to `vm create` or `vm run`."""
    for row in re.findall(r"^\|.*\|$", (TREE / "docs/network.md").read_text(), re.MULTILINE):
        yield from (code for code in CODE.findall(row.rpartition(" | ")[2]) if code.startswith("--"))


async def test_the_pages_about_the_network_and_ssh_are_true() -> None:
    """Real processes and a real daemon over a fake host; what needs a guest's own programs is in the lab."""
    lines = [f"banger vm create vm-{number} {what}" for number, what in enumerate(_fragments())]
    assert len(lines) >= 5
    lines += [
        line
        for page in ("network.md", "ssh.md")
        for line in dict.fromkeys(shown(TREE / "docs" / page))
        if re.match(r"banger (vm run -|vm set|vm publish|vm unpublish|ssh-config)", line)
        and " ." not in line
    ]
    port = publishing.free_port()
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as home:
        answering = conftest.answering(fake_host.SETTINGS)
        async with served.running(settings=answering, network=conftest.own_network()) as (daemon, address):
            await daemon.start("web")
            program = served.program(Path(home))
            env = served.environment(address) | {"HOME": home}
            for line in lines:
                _, *words = shlex.split(line.replace("8080:", f"{port}:"), comments=True)
                if words[:2] == ["vm", "run"]:
                    # The fake host's guests have no shell, and two VMs cannot offer one port.
                    await served.run(program, *words, "-d", "--name", "once", env=env)
                    words = ["vm", "delete", "once"]
                await served.run(program, *words, env=env)
