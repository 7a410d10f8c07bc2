# SPDX-License-Identifier: MIT
"""A distribution's package opened as data: what tricks an archive plays are refused or have no effect."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import shutil
import tarfile
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from banger import artefacts
from banger.contract import errors
from banger.kernels import deb
from banger.tarstream import pax

IMAGE = "./boot/vmlinuz-1"


def ar(*members: tuple[str, bytes], size: int | str | None = None) -> bytes:
    """An `ar` archive; `size` is what its members say instead of the truth."""
    out = deb.MAGIC
    for name, data in members:
        said = len(data) if size is None else size
        out += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{said:<10}`\n".encode()
            + data
            + b"\n" * (len(data) % 2)
        )
    return out


def package(data: bytes, name: str = "data.tar") -> bytes:
    return ar(("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (name, data))


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tarred(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def unpack(tmp_path: Path) -> Callable[[bytes], dict[str, bytes]]:
    """Opens a package; what it left below the target."""

    def work(data: bytes) -> dict[str, bytes]:
        (tmp_path / "k.deb").write_bytes(data)
        target = tmp_path / "target"
        deb.extract_kernel(tmp_path / "k.deb", target)
        assert {path.name for path in tmp_path.iterdir()} <= {"k.deb", "target"}
        found = [path for path in target.rglob("*") if not path.is_dir()]
        assert all(path.is_file() and not path.is_symlink() for path in found)
        return {str(path.relative_to(target)): path.read_bytes() for path in found}

    return work


Unpack = Callable[[bytes], dict[str, bytes]]


def test_what_is_unpacked_leaves_the_host_room(unpack: Unpack, monkeypatch: pytest.MonkeyPatch) -> None:
    # A disk of a wanted fullness cannot be had without root.
    free = artefacts.RESERVE_BYTES + 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    wanted = package(tarred(member(IMAGE, b"image")))
    with pytest.raises(errors.NoSpaceError, match=r"no space left for what k\.deb holds"):
        unpack(wanted)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("data.tar", bytes),
        ("data.tar.gz", gzip.compress),
        ("data.tar.xz", lzma.compress),
        ("data.tar.zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_every_compression_of_a_package(unpack: Unpack, name: str, pack: Callable[[bytes], bytes]) -> None:
    data = os.urandom(300_001)
    assert unpack(package(pack(tarred(member(IMAGE, data))), name)) == {"boot/vmlinuz-1": data}


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_of_every_kind_are_read(unpack: Unpack, kind: int) -> None:
    long = "lib/modules/1/kernel/" + "/".join(f"{number:040}" for number in range(4)) + "/m.ko"
    last = member("./usr/share/doc/x", b"doc")
    assert unpack(package(tarred(member(f"./usr/{long}", b"m"), last, kind=kind))) == {long: b"m"}


def test_only_plain_files_of_a_kernel_come_out(unpack: Unpack) -> None:
    odd = [
        member("./etc/shadow", b"x"),
        member("./boot/System.map-1", b"x"),
        member("./boot/../boot/vmlinuz-2", b"x"),
        member("./lib/modules/../../../../escaped", b"x"),
        member("/boot/vmlinuz-3", b"x"),
        member("./boot/vmlinuz-4/../../../escaped", b"x"),
        member("./lib/modules/1/./x", b"x"),
        member("./boot/vmlinuz-5", type=tarfile.SYMTYPE, linkname="/etc/shadow"),
        member("./boot/vmlinuz-6", type=tarfile.LNKTYPE, linkname="./etc/shadow"),
        member("./lib/modules/1", type=tarfile.SYMTYPE, linkname="/etc"),
        member("./lib/modules/1/dev", type=tarfile.CHRTYPE),
        member("./lib/modules/1/fifo", type=tarfile.FIFOTYPE),
        member("./lib/modules/1/dir", type=tarfile.DIRTYPE, mode=0o7777),
    ]
    good = member("./lib/modules/1/passwd", b"m", mode=0o6777, uid=0)
    assert unpack(package(tarred(*odd, good, member(IMAGE, b"k")))) == {
        "lib/modules/1/passwd": b"m",
        "boot/vmlinuz-1": b"k",
    }


def test_a_link_that_was_passed_over_is_not_written_through(unpack: Unpack, tmp_path: Path) -> None:
    link = member("./lib/modules/1", type=tarfile.SYMTYPE, linkname=str(tmp_path))
    assert unpack(package(tarred(link, member("./lib/modules/1/x", b"m")))) == {"lib/modules/1/x": b"m"}


def test_a_name_twice_is_its_last_file(unpack: Unpack) -> None:
    assert unpack(package(tarred(member(IMAGE, b"1"), member(IMAGE, b"2")))) == {"boot/vmlinuz-1": b"2"}


def _long_header(kind: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, pax.MAX_BYTES + 1
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(pax.MAX_BYTES + 1024)


def _sized(size: bytes) -> bytes:
    """A member whose header says this size, with a check sum that is right."""
    header = bytearray(tarfile.TarInfo(IMAGE).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _pax(text: bytes) -> bytes:
    info = tarfile.TarInfo("pax")
    info.type, info.size = b"x", len(text)
    return info.tobuf(tarfile.GNU_FORMAT) + text.ljust(512, b"\0") + tarred(member(IMAGE, b"k"))


GOOD = tarred(member(IMAGE, b"k" * 5000))
TRICKS: dict[str, tuple[bytes, str]] = {
    "no package": (b"PK\3\4" + bytes(100), "not a Debian package"),
    "no members": (deb.MAGIC, "holds no data"),
    "no data": (ar(("debian-binary", b"2.0\n")), "holds no data"),
    "a hundred members before the data": (ar(*[("x", b"")] * 100, ("data.tar", GOOD)), "holds no data"),
    "a member of a negative size": (ar(("x", b""), ("data.tar", GOOD), size="-5"), "holds no data"),
    "a member of a size that is no number": (ar(("data.tar", GOOD), size="0x20"), "holds no data"),
    "a member larger than the file": (ar(("data.tar", GOOD[:700]), size=10**9), "cut short"),
    "a header cut short": (package(GOOD)[:100], "holds no data"),
    "unknown compression": (package(GOOD, "data.tar.rar"), "unknown compression"),
    "xz that is none": (package(GOOD, "data.tar.xz"), "damaged"),
    "zstd that is none": (package(GOOD, "data.tar.zst"), "damaged"),
    "gzip that is none": (package(GOOD, "data.tar.gz"), "damaged"),
    "bzip2 that is none": (package(GOOD, "data.tar.bz2"), "damaged"),
    "xz cut short": (package(lzma.compress(os.urandom(9000))[:4000], "data.tar.xz"), "damaged"),
    "zstd cut short": (package(zstandard.compress(GOOD)[:-6], "data.tar.zst"), "cut short|damaged"),
    "a tar cut short": (package(GOOD[:3000]), "cut short"),
    "a tar without its end": (package(GOOD[: 512 + 5120]), "cut short"),
    "a wrong check sum": (package(b"x" + GOOD[1:]), "checksum"),
    "a long name of a megabyte": (package(_long_header(b"L")), "a header about a member has"),
    "a pax header of a megabyte": (package(_long_header(b"x")), "a header about a member has"),
    "a member of 2**88 bytes": (package(_sized(b"\xff" * 12) + bytes(1024)), "claims to have"),
    "a size in letters": (package(_sized(b"size\0       ") + bytes(1024)), "no number"),
    "a pax size in letters": (package(_pax(b"16 size=letters\n")), "no number"),
    "a pax size of a petabyte": (package(_pax(b"25 size=1000000000000000\n")), "claims to have"),
    "a file that is a directory too": (
        package(tarred(member("./lib/modules/1/x", b"1"), member("./lib/modules/1/x/y", b"2"))),
        "cannot be made",
    ),
    "a directory that is a file too": (
        package(tarred(member("./lib/modules/1/x/y", b"2"), member("./lib/modules/1/x", b"1"))),
        "cannot be made",
    ),
    "a name that no file can have": (
        package(tarred(member("./lib/modules/1/" + "x" * 300, b"1"))),
        "cannot be made",
    ),
}


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_are_refused_with_the_reason(unpack: Unpack, name: str) -> None:
    data, said = TRICKS[name]
    with pytest.raises(errors.BadRequestError, match=said):
        unpack(data)


def test_too_many_members_are_refused(unpack: Unpack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deb, "MAX_MEMBERS", 3)
    assert unpack(package(tarred(*[member(IMAGE, b"k")] * 3))) == {"boot/vmlinuz-1": b"k"}
    with pytest.raises(errors.BadRequestError, match="more than 3 members"):
        unpack(package(tarred(*[member("./etc/x", b"")] * 4)))


def test_a_bomb_is_refused_by_its_own_word_before_it_is_unpacked(unpack: Unpack) -> None:
    claimed = _sized(b"%011o\0" % (deb.MAX_UNPACKED_BYTES + 1))
    with pytest.raises(errors.BadRequestError, match="more than 4 GiB"):
        unpack(package(lzma.compress(claimed + bytes(1 << 20)), "data.tar.xz"))
