# SPDX-License-Identifier: MIT
"""The catalog of images, whose entries are verified, and which image a word means."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from banger.contract import errors, resources
from banger.images import bundle, catalog, lookup, recipe, records
from banger.vm import command

SHA = "sha256:" + "ab" * 32


def test_everything_that_ships_is_what_the_catalog_says() -> None:
    found = catalog.Catalog().entries("x86_64")
    assert sorted(entry.name for entry in found) == recipe.available()
    for entry in found:
        assert isinstance(entry, catalog.RecipeEntry)
        assert recipe.parse(entry.text()).name == entry.name
        assert recipe.parse(entry.text()).summary == entry.summary


def _entry(**changes: str) -> str:
    whole = {"name": "mine", "kind": "oci", "source": "ghcr.io/a/b:1", "digest": SHA, **changes}
    return "[[image]]\n" + "".join(f'{key} = "{value}"\n' for key, value in whole.items() if value)


def test_a_host_adds_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "images.toml"
    path.write_text(_entry() + _entry(name="busybox") + _entry(name="arm", arch="aarch64"))
    known = catalog.Catalog(path)
    assert {"mine", "busybox", "debian-bookworm"} <= {entry.name for entry in known.entries("x86_64")}
    assert known.find("arm", "x86_64") is None
    replaced = known.find("busybox", "x86_64")
    assert isinstance(replaced, catalog.OciEntry)
    assert str(replaced.pinned()) == f"ghcr.io/a/b:1@{SHA}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[", "images.toml"),
        (_entry(digest="sha256:12"), "not a digest"),
        (_entry(digest=""), "digest"),
        (_entry(source="Not A Reference"), "not an image reference"),
        (_entry(source=f"a@sha256:{'cd' * 32}"), "another digest"),
        (_entry(kind="url"), "url"),
        (_entry(more="x"), "more"),
        (_entry(name="../x"), "name"),
        (_entry() + _entry(), "two entries have one name: mine"),
        (_entry(kind="recipe", digest="", sha256="12"), "sha256"),
    ],
)
def test_a_catalog_is_read_strictly(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "images.toml"
    path.write_text(text)
    with pytest.raises(errors.BadRequestError, match=why) as caught:
        catalog.Catalog(path).entries("x86_64")
    assert str(path) in caught.value.message


def test_a_recipe_that_changed_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "busybox"\nname = "mine"\n')
    sha256 = hashlib.sha256(mine.read_bytes()).hexdigest()
    (tmp_path / "images.toml").write_text(_entry(kind="recipe", digest="", source=str(mine), sha256=sha256))
    entry = catalog.Catalog(tmp_path / "images.toml").find("mine", "x86_64")
    assert isinstance(entry, catalog.RecipeEntry)
    assert recipe.parse(entry.text()).name == "mine"
    mine.write_text(mine.read_text() + "# changed\n")
    with pytest.raises(errors.OperationFailedError, match="not the one that the catalog knows"):
        entry.text()
    mine.unlink()
    with pytest.raises(errors.NotFoundError, match="cannot read") as caught:
        entry.text()
    assert "daemon" in caught.value.hint


def _image(number: int, name: str, reference: str = "", digest: str = "") -> records.Image:
    return records.Image(
        id=f"{number:012x}",
        name=name,
        arch="x86_64",
        size_bytes=1,
        stored_bytes=1,
        source="",
        guest_sha256="",
        has_init=False,
        kernel="",
        created_at="",
        reference=reference,
        digest=digest,
    )


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("web", 3),
        ("debian:bookworm", 4),
        ("docker.io/library/debian:bookworm", 4),
        ("debian", None),
        ("alpine", 5),
        (f"debian@{SHA}", 4),
        (f"ghcr.io/a/debian@{SHA}", None),
        (SHA[:20], 4),
        ("sha256:ab", None),
        ("00000000000a", 10),
        ("b1b1", 0xB1B1B1B1B1B1),
        ("b1", None),
        ("0000", None),
        ("Not A Name", None),
    ],
)
def test_an_image_is_found_by_what_people_call_it(text: str, meant: int | None) -> None:
    images = [
        _image(1, "web"),
        _image(3, "web"),
        _image(4, "debian:bookworm", "docker.io/library/debian:bookworm", SHA),
        _image(5, "mine", "docker.io/library/alpine:latest", "sha256:" + "cd" * 32),
        _image(10, "0000000000aa"),
        _image(0xB1B1B1B1B1B1, "other"),
    ]
    found = lookup.find(images, text)
    assert (None if found is None else int(found.id, 16)) == meant


def test_a_command_goes_over_what_the_image_says() -> None:
    image = bundle.RunConfig(
        entrypoint=("/e",), command=("c",), env=("A=1", "B=2"), user="7", working_dir="/srv"
    )
    own = command.exec_spec(resources.ExecRequest(argv=()), image, "")
    assert (own.argv, own.env, own.cwd, own.user) == (("/e", "c"), ("A=1", "B=2"), "/srv", "7")
    other = command.exec_spec(resources.ExecRequest(argv=("id",), env=("B=3",), cwd="/"), image, "")
    assert (other.argv, other.env, other.cwd, other.user) == (("id",), ("A=1", "B=3"), "/", "")
    named = command.exec_spec(resources.ExecRequest(argv=(), user="root"), image, "")
    assert named.user == "root"
    shell = command.exec_spec(resources.ExecRequest(argv=("sh",)), image, "/root/repo")
    assert shell.cwd == "/root/repo"
    assert shell.env[2].startswith("PATH=/root/.local/share/mise/shims:/usr/local/sbin:")
    mine = command.exec_spec(resources.ExecRequest(argv=("sh",), env=("PATH=/x",)), image, "/root/repo")
    assert mine.env == ("A=1", "B=2", "PATH=/x")
    nobody = command.exec_spec(resources.ExecRequest(argv=("sh",), user="nobody"), image, "/root/repo")
    assert nobody.env == ("A=1", "B=2"), "who has no workspace has none of its tools"
    assert command.exec_spec(resources.ExecRequest(argv=()), image, "/root/repo").cwd == "/srv"
    with pytest.raises(errors.BadRequestError, match="names nothing to run"):
        command.exec_spec(resources.ExecRequest(argv=()), bundle.RunConfig(), "")
