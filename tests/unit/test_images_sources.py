# SPDX-License-Identifier: MIT
"""Layouts, saved archives and root file systems from disk; the hostile ones are refused within bounds."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import resource
import shutil
import struct
import tarfile
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger import artefacts
from banger.contract import errors
from banger.images import bundle, decompress, sources
from tests import oci_make
from tests.unit import tars

BASE = oci_make.tar({"bin/sh": b"shell", "etc/a": b"a"})
TOP = oci_make.tar({"b": b"b"})


def _opened(path: Path, scratch: Path, wanted: str = "") -> tuple[bundle.Bundle, list[bytes]]:
    with sources.opened(path, arch="x86_64", scratch=scratch, wanted=wanted) as made:
        tars = []
        for layer in made.layers:
            with decompress.opened(layer, max_bytes=1 << 30) as pieces:
                tars.append(b"".join(pieces))
        return made, tars


def _refused(path: Path, scratch: Path, why: str) -> errors.BangerError:
    with pytest.raises(errors.BangerError, match=why) as caught:
        _opened(path, scratch)
    assert not scratch.exists() or list(scratch.iterdir()) == []
    return caught.value


def _archive(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def _file(name: str, data: bytes = b"") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), data


def _link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def _config(*layers: bytes) -> bytes:
    diff_ids = [oci_make.digest(layer) for layer in layers]
    return json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": diff_ids}}).encode()


def _saved(path: Path, *extra: tuple[tarfile.TarInfo, bytes], layers: list[str] | None = None) -> Path:
    """As `docker save` of old wrote it, one layer twice by way of a link."""
    name = "ab" * 32
    entry = {"Config": f"{name}.json", "RepoTags": ["app:v1"], "Layers": layers or [f"{name}/layer.tar"]}
    config = _config(*[BASE] * len(entry["Layers"]))
    return _archive(
        path,
        [
            _file(f"{name}/layer.tar", BASE),
            _link(f"{'cd' * 32}/layer.tar", f"../{name}/layer.tar"),
            _file(f"{name}.json", config),
            *extra,
            _file("manifest.json", json.dumps([entry]).encode()),
        ],
    )


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def test_a_layout_of_several_wants_to_know_which(tmp_path: Path, scratch: Path) -> None:
    oci_make.layout(tmp_path / "layout", "v1", [BASE])
    second = oci_make.layout(tmp_path / "layout", "v2", [BASE, TOP])
    assert "v1, v2" in _refused(tmp_path / "layout", scratch, "holds 2 images").hint
    for wanted in ("v2", second):
        made, tars = _opened(tmp_path / "layout", scratch, wanted)
        assert (made.digest, tars) == (second, [BASE, TOP])
    with pytest.raises(errors.BadRequestError, match="no image 'v3'"):
        _opened(tmp_path / "layout", scratch, "v3")


@pytest.mark.parametrize("wanted", ["app:v2", "v2", "docker.io/library/app:v2"])
def test_of_several_one_is_named_as_people_write_it(tmp_path: Path, scratch: Path, wanted: str) -> None:
    """As docker has saved several since it keeps them in containerd, with names in full."""
    layout = tmp_path / "layout"
    oci_make.layout(layout, "v1", [BASE])
    second = oci_make.layout(layout, "v2", [BASE, TOP])
    index = json.loads((layout / "index.json").read_text())
    for entry, tag in zip(index["manifests"], ("v1", "v2"), strict=True):
        entry["annotations"]["io.containerd.image.name"] = f"docker.io/library/app:{tag}"
    (layout / "index.json").write_text(json.dumps(index))
    made, _ = _opened(layout, scratch, wanted)
    assert (made.digest, made.reference) == (second, "docker.io/library/app:v2")
    path = _saved(tmp_path / "saved.tar")
    assert _opened(path, scratch, "docker.io/library/app:v1")[0].reference == "docker.io/library/app:v1"


def test_an_archive_of_old_with_linked_layers(tmp_path: Path, scratch: Path) -> None:
    names = [f"{'ab' * 32}/layer.tar", f"{'cd' * 32}/layer.tar"]
    made, tars = _opened(_saved(tmp_path / "saved.tar", layers=names), scratch)
    assert tars == [BASE, BASE]
    assert made.reference == "docker.io/library/app:v1"
    assert len({layer.path for layer in made.layers}) == 1


@pytest.mark.parametrize(
    ("config", "layer", "layer_first"),
    [
        (f"sha256:{'ab' * 32}", f"{'cd' * 32}.tar.gz", False),
        ("config.json", f"{'cd' * 32}.tar.gz", True),
    ],
    ids=["crane, ko and kaniko", "jib"],
)
def test_archives_as_builders_without_docker_write_them(
    tmp_path: Path, scratch: Path, config: str, layer: str, layer_first: bool
) -> None:
    entry = {"Config": config, "RepoTags": ["app:v1"], "Layers": [layer]}
    parts = [_file(config, _config(BASE)), _file(layer, gzip.compress(BASE))]
    if layer_first:
        parts.reverse()
    path = _archive(tmp_path / "app.tar", [*parts, _file("manifest.json", json.dumps([entry]).encode())])
    made, tars = _opened(path, scratch)
    assert (made.reference, tars) == ("docker.io/library/app:v1", [BASE])
    assert made.layers[0].diff_id == oci_make.digest(BASE)


@pytest.mark.parametrize("suffix", ["", "gzip", "zstd"])
def test_a_root_file_system(tmp_path: Path, scratch: Path, suffix: str) -> None:
    path = tmp_path / "root.tar"
    path.write_bytes(oci_make.compressed(BASE, suffix) if suffix else BASE)  # type: ignore[arg-type]
    made, tars = _opened(path, scratch)
    assert (tars, made.run.argv, made.layers[0].diff_id) == ([BASE], (), "")


def test_a_root_file_system_that_pzstd_packed(tmp_path: Path, scratch: Path) -> None:
    """It says of each frame how long it is, in another before it, which decompressors skip."""
    path, half = tmp_path / "root.tar.zst", len(BASE) // 2
    parts = [oci_make.compressed(part, "zstd") for part in (BASE[:half], BASE[half:])]
    path.write_bytes(b"".join(struct.pack("<III", 0x184D2A50, 4, len(part)) + part for part in parts))
    made, tars = _opened(path, scratch)
    assert (tars, made.layers[0].compression) == ([BASE], bundle.Compression.ZSTD)


def test_a_layer_that_is_not_what_it_should_be(tmp_path: Path, scratch: Path) -> None:
    oci_make.layout(tmp_path / "layout", "v1", [BASE])
    blob = tmp_path / "layout" / "blobs/sha256" / oci_make.digest(oci_make.compressed(BASE))[7:]
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    _refused(tmp_path / "layout", scratch, "not what its digest")


BACK = b"\xff" * 10 + b"\xfe\x00"
"""-512 as GNU writes it: from behind a header it leads to that header again."""


def _made(path: Path, *members: bytes, first: bytes = b"") -> Path:
    path.write_bytes(tars.tar(first, tars.file(b"blobs/a", b"x"), *members))
    return path


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a device": (lambda path: _saved(path, _link("dev", "", tarfile.CHRTYPE)), "which no image archive has"),
    "a fifo": (lambda path: _saved(path, _link("fifo", "", tarfile.FIFOTYPE)), "which no image archive has"),
    "a layer that climbs out": (
        lambda path: _saved(path, layers=["../../../../etc/passwd"]),
        "has no ../../../../etc/passwd",
    ),
    "an absolute layer": (lambda path: _saved(path, layers=["/etc/passwd"]), "has no /etc/passwd"),
    "a layer by a link out": (
        lambda path: _saved(path, _link("out", "../../../etc/passwd"), layers=["out"]),
        "has no out",
    ),
    "a layer by links in a circle": (
        lambda path: _saved(path, _link("a", "b"), _link("b", "a"), layers=["a"]),
        "has no a",
    ),
    "a layer that is not there": (lambda path: _saved(path, layers=["absent"]), "has no absent"),
    "a huge manifest": (
        lambda path: _archive(path, [_file("manifest.json", b" " * (5 << 20))]),
        "larger than",
    ),
    "a manifest that is none": (lambda path: _archive(path, [_file("manifest.json", b"[")]), "cannot be"),
    "a size below zero that leads back": (
        lambda path: _made(path, tars.header(b"manifest.json", size=BACK)),
        "not a whole tar: a size",
    ),
    "a size below zero to be read": (
        lambda path: _made(path, tars.header(b"manifest.json", size=b"\xff" * 12)),
        "not a whole tar: a size",
    ),
    "a size below zero in a pax header": (
        lambda path: _made(path, tars.pax((b"size", b"-1024")), tars.file(b"manifest.json", b"x" * 600)),
        "not a whole tar: a size",
    ),
    "a size below zero that a global header hides": (
        lambda path: _made(
            path, tars.pax((b"size", b"5"), flag=b"g"), tars.header(b"manifest.json", size=BACK)
        ),
        "not a whole tar: a size",
    ),
    "a size beyond the archive": (
        lambda path: _made(path, tars.header(b"manifest.json", size=b"\x80\0\0\0" + b"\x7f" * 8)),
        "not a whole tar: a size",
    ),
    "a header that Python's own reader takes a minute for": (
        lambda path: _made(path, tars.file(b"pax", b"9" * (128 << 10), flag=b"x"), tars.file(b"a")),
        "not a whole tar: a header is too long",
    ),
    "such a header first of all": (
        lambda path: _made(path, first=tars.file(b"pax", b"9" * (128 << 10), flag=b"x")),
        "not a whole tar: a pax header is malformed",
    ),
    "no manifest": (lambda path: _archive(path, [_file("repositories", b"{}")]), "neither"),
    "too many members": (
        lambda path: _archive(path, [_file("blobs/x")] + [_file(f"{number:x}") for number in range(50_001)]),
        "more than 50000",
    ),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_archives_are_refused(tmp_path: Path, scratch: Path, name: str) -> None:
    make, why = HOSTILE[name]
    _refused(make(tmp_path / "archive.tar"), scratch, why)


@pytest.mark.parametrize("way", ["..", "{}", "x/../.."])
@pytest.mark.parametrize("what", ["Config", "Layers"])
def test_an_unpacked_archive_names_nothing_outside(
    tmp_path: Path, scratch: Path, way: str, what: str
) -> None:
    directory = tmp_path / "saved"
    (directory / "x").mkdir(parents=True)
    entry = {"Config": "config", "RepoTags": None, "Layers": ["layer"]}
    for place in (directory, tmp_path):
        (place / "config").write_bytes(_config(BASE))
        (place / "layer").write_bytes(BASE)
    (directory / "manifest.json").write_text(json.dumps([entry]))
    assert _opened(directory, scratch)[1] == [BASE]
    outside = way.format(tmp_path)
    named = {"Config": f"{outside}/config", "Layers": [f"{outside}/layer"]}
    (directory / "manifest.json").write_text(json.dumps([entry | {what: named[what]}]))
    _refused(directory, scratch, "has no ")


def test_a_cut_archive_is_refused(tmp_path: Path, scratch: Path) -> None:
    path = _saved(tmp_path / "archive.tar")
    path.write_bytes(path.read_bytes()[:3000])
    _refused(path, scratch, "not a whole tar|cut short|neither")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_header_that_claims_gigabytes_takes_no_memory(
    tmp_path: Path, scratch: Path, compressed: bool
) -> None:
    head = tarfile.TarInfo("././@PaxHeader")
    head.type, head.size = tarfile.XHDTYPE, 6 << 30
    path = tmp_path / "bomb.tar"
    if compressed:
        with gzip.open(path, "wb", compresslevel=1) as out:
            out.write(head.tobuf(tarfile.GNU_FORMAT))
            for _ in range(300):
                out.write(bytes(1 << 20))
    else:
        path.write_bytes(head.tobuf(tarfile.GNU_FORMAT))
        os.truncate(path, 6 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _refused(path, scratch, "not a whole tar")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_compressed_archive_leaves_the_host_room(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.tar"
    path.write_bytes(gzip.compress(oci_make.tar({"blobs/x": bytes(2 << 20)}), 1))
    # A disk of a wanted fullness cannot be had without root.
    free = artefacts.RESERVE_BYTES + (1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    assert _refused(path, scratch, "unpacks to more than there is room").code == "no_space"


def test_a_layer_taken_out_of_an_archive_leaves_the_host_room(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _saved(tmp_path / "archive.tar")
    free = artefacts.RESERVE_BYTES + len(BASE) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    assert _refused(path, scratch, "no space left for what archive.tar holds").code == "no_space"


@pytest.mark.parametrize(
    ("data", "why", "hint"),
    [
        (lzma.compress(BASE), "packed with xz", "`xz -dk "),
        (bz2.compress(BASE), "packed with bzip2", "`bzip2 -dk "),
        (b"PK\3\4" + bytes(600), "not a whole tar", "plain or packed with gzip or zstd"),
    ],
    ids=["xz", "bzip2", "zip"],
)
def test_what_is_packed_in_another_way_says_what_to_do(
    tmp_path: Path, scratch: Path, data: bytes, why: str, hint: str
) -> None:
    (tmp_path / "root").write_bytes(data)
    assert hint in _refused(tmp_path / "root", scratch, why).hint


def test_what_is_neither_file_nor_directory(tmp_path: Path, scratch: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    _refused(tmp_path / "fifo", scratch, "neither a directory nor a file")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", scratch, "is no image")
    assert _refused(tmp_path / "absent", scratch, "there is no").code == "not_found"


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/var/tmp/no.tar", "does not see"),
        ("/tmp/no/image.tar", "does not see"),
        ("/no.tar", "by the daemon"),
    ],
)
def test_what_is_not_there_says_where_the_daemon_looks(path: str, hint: str, scratch: Path) -> None:
    assert hint in _refused(Path(path), scratch, "there is no").hint


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.integers(0, 4000), st.binary(min_size=1, max_size=40))
def test_a_damaged_archive_is_read_or_refused(tmp_path: Path, position: int, noise: bytes) -> None:
    data = bytearray(_saved(tmp_path / "archive.tar").read_bytes())
    data[position : position + len(noise)] = noise
    (tmp_path / "archive.tar").write_bytes(data)
    try:
        _opened(tmp_path / "archive.tar", tmp_path / "scratch")
    except errors.BangerError:
        return
