# SPDX-License-Identifier: MIT
"""The catalog of kernels: ours and a host's own, strict about every key, nothing unverified."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from banger import run
from banger.contract import errors
from banger.kernels import catalog, records
from tests.unit import kernel_samples as samples


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A host's own directory of catalogs, empty."""
    path = tmp_path / "kernels.d"
    path.mkdir()
    return path


def mine(tmp_path: Path, name: str = "mine", sha256: str = "") -> str:
    data = samples.bzimage(gzip.compress(samples.vmlinux()), len(samples.vmlinux()))
    (tmp_path / "k").write_bytes(data)
    return samples.CATALOG_ENTRY.format(
        name=name, sha256=sha256 or hashlib.sha256(data).hexdigest(), size=len(data), path=tmp_path / "k"
    )


def test_what_ships_has_every_kind_of_source_but_files() -> None:
    entries = {entry.name: type(entry.source) for entry in catalog.entries("x86_64")}
    assert entries == {
        "generic-6.12": catalog.Library,
        "debian-6.1": catalog.Package,
        "debian-6.12": catalog.Package,
    }
    assert {entry.name for entry in catalog.entries("aarch64")} == {"debian-6.1", "debian-6.12"}
    assert catalog.entries("riscv64") == ()


def test_an_unknown_kernel_names_the_known() -> None:
    with pytest.raises(errors.NotFoundError) as caught:
        catalog.find("nope", "x86_64")
    assert "generic-6.12" in caught.value.hint


def test_a_library_with_another_kernel_is_refused(tmp_path: Path) -> None:
    embedded = catalog.find("generic-6.12", "x86_64").source
    assert isinstance(embedded, catalog.Library)
    source = tmp_path / "lib.c"
    source.write_text("char KERNEL_BUNDLE[0x2000] = {1};\n")
    run.run(["gcc", "-shared", "-o", str(tmp_path / "lib.so"), str(source)], deadline_s=30)
    with pytest.raises(errors.OperationFailedError, match="not the pinned"):
        catalog.extract(embedded, (tmp_path / "lib.so").read_bytes())


def test_a_host_s_own_kernel_is_pulled_by_its_sha256(tmp_path: Path, directory: Path) -> None:
    (directory / "mine.toml").write_text(mine(tmp_path))
    (directory / "notes.txt").write_text("not a catalog")
    assert next(entry.name for entry in catalog.entries("x86_64", directory)) == "mine"
    (tmp_path / "guest").write_bytes(b"guest")
    kernels, said = records.Kernels(tmp_path / "kernels"), list[str]()
    entry = catalog.find("mine", "x86_64", directory)
    made = catalog.pull(
        kernels, entry, cache_dir=tmp_path / "c", guest_binary=tmp_path / "guest", on_line=said.append
    )
    assert (made.name, made.version, made.source) == ("mine", samples.VERSION, "catalog: mine 6.1")
    assert any("from file" in line for line in said)
    assert list((tmp_path / "c").iterdir()) == [tmp_path / "c/pinned"]


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, directory: Path) -> None:
    (directory / "mine.toml").write_text(mine(tmp_path, sha256="0" * 64))
    entry = catalog.find("mine", "x86_64", directory)
    with pytest.raises(errors.UnavailableError, match=r"sha256 is .*, not 0000"):
        catalog.pull(
            records.Kernels(tmp_path / "kernels"),
            entry,
            cache_dir=tmp_path / "c",
            guest_binary=tmp_path / "guest",
        )
    assert not (tmp_path / "kernels").exists()
    assert list((tmp_path / "c/pinned").iterdir()) == []


def test_a_host_s_own_goes_before_ours(tmp_path: Path, directory: Path) -> None:
    (directory / "mine.toml").write_text(mine(tmp_path, "generic-6.12"))
    found = [entry for entry in catalog.entries("x86_64", directory) if entry.name == "generic-6.12"]
    assert [type(entry.source) for entry in found] == [catalog.File]


def test_a_name_in_two_files_is_refused(tmp_path: Path, directory: Path) -> None:
    for name in ("a", "b"):
        (directory / f"{name}.toml").write_text(mine(tmp_path))
    with pytest.raises(errors.BadRequestError, match=r"b\.toml: kernel\.name: 'mine' is in another file"):
        catalog.entries("x86_64", directory)


def test_a_name_twice_in_one_file_is_refused(tmp_path: Path, directory: Path) -> None:
    (directory / "a.toml").write_text(mine(tmp_path) * 2)
    with pytest.raises(errors.BadRequestError, match=r"a\.toml: kernel\.name: mine is there twice"):
        catalog.entries("x86_64", directory)


def test_no_directory_is_an_empty_one(tmp_path: Path) -> None:
    assert catalog.entries("x86_64", tmp_path / "none") == catalog.entries("x86_64")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('name = "mine"', 'name = "My Kernel"', "kernel[0].name"),
        ('name = "mine"', "", "`name`"),
        ('arch = "x86_64"', 'arch = "mips"', "kernel[0].arch"),
        ('kind = "file"\nversion', 'kind = "magic"\nversion', "kernel[0].source"),
        ('version = "6.1"', 'version = "6.1"\ncolour = "red"', "colour"),
        ('sha256 = "', 'sha256 = "x', "kernel[0].source.sha256"),
        ("size_bytes = ", "size_bytes = -", "kernel[0].source.size_bytes"),
        ("sources = [", "sources = []\n#", "kernel[0].source.sources"),
        ('path = "/', 'path = "', "not an absolute path"),
        (
            '{ kind = "file", path',
            '{ kind = "url", url = "http://example.org/k" }]\n#',
            "not an https address",
        ),
        (
            '{ kind = "file", path',
            f'{{ kind = "pypi-wheel-member", package = "p", version = "1", wheel = "p-1.whl", '
            f'wheel_sha256 = "{64 * "0"}", member = "m" }}]\n#',
            "'p-1.whl' is not a wheel's name",
        ),
        ("[[kernel]]", "[[kernel", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name_and_key(
    tmp_path: Path, directory: Path, before: str, after: str, said: str
) -> None:
    text = mine(tmp_path)
    assert before in text
    (directory / "mine.toml").write_text(text.replace(before, after, 1))
    with pytest.raises(errors.BadRequestError) as caught:
        catalog.entries("x86_64", directory)
    assert caught.value.message.startswith(f"{directory / 'mine.toml'}: ")
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("suite", "package"),
    [
        ("bookworm main\ndeb http://x", "linux-image-amd64"),
        ("-o", "linux-image-amd64"),
        ("bookworm", "--help"),
        ("bookworm", "a b"),
    ],
)
def test_what_goes_to_apt_is_a_suite_and_a_package(directory: Path, suite: str, package: str) -> None:
    entry = '[[kernel]]\nname = "d"\nsummary = ""\narch = "x86_64"\n[kernel.source]\nkind = "package"\n'
    (directory / "d.toml").write_text(f"{entry}suite = '''{suite}'''\npackage = '''{package}'''\n")
    with pytest.raises(errors.BadRequestError, match=r"kernel\[0\]\.source\.(suite|package)"):
        catalog.entries("x86_64", directory)
