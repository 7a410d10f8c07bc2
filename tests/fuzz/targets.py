# SPDX-License-Identifier: MIT
"""Every parser of ours in Python that reads bytes from outside, as a target of the fuzzer."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import gzip
import io
import ipaddress
import json
import lzma
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dnslib
import msgspec
import zstandard

from banger import archive
from banger.builder import main as build_program
from banger.contract import building, errors, guest, privileged
from banger.helper import operations as privileged_operations
from banger.helper import policy as policies
from banger.helper import server as helper_server
from banger.images import bundle, catalog, decompress, manifest, recipe, reference
from banger.kernels import build_config, deb, elf, inspect, modules
from banger.kernels import catalog as kernel_catalog
from banger.net import wire, zone
from banger.owner import builder, config, helper
from banger.owner import guest as guests
from banger.tarstream import reader
from tests.contract import privileged_cases
from tests.contract import test_guest_hostile as hostile
from tests.fuzz import api, forwarded
from tests.fuzz.engine import Target
from tests.unit import kernel_samples, tars

_OURS = (errors.BangerError,)
_NETWORK = ipaddress.IPv4Network("10.213.240.0/20")
_DIGEST = "sha256:" + "ab" * 32


def _scratch() -> Path:
    """Kept for the process: what is written there is overwritten by the next input."""
    made = tempfile.TemporaryDirectory(prefix="fuzz-")
    _KEPT.append(made)
    return Path(made.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


# --- the root helper's wire, both ends ---


def _helper() -> Target:
    """A request as it comes, with its length or what says it is; no operation has an effect here."""
    policy = policies.Policy(
        owner_uid=0, owner_gid=0, owner_name="o", firecracker_sha256="0" * 64, jailer_sha256="0" * 64
    )

    def run(data: bytes) -> None:
        here, there = socket.socketpair()
        with here, there:
            there.sendall(data)
            there.shutdown(socket.SHUT_WR)
            request = helper_server._decode(
                helper_server._receive(here, time.monotonic() + helper_server.READ_DEADLINE_S)
            )
        assert type(request.request) in privileged_operations.OPERATIONS
        assert policy.owner_uid == 0

    return Target(
        "helper", run, _requests(), _OURS, (b'"op":"', b'"vm_id":"', b'{"request":', b"null", b"1e999")
    )


class _Sources:
    image = "aaaaaaaaaaaa"
    kernel = "bbbbbbbbbbbb"
    initrd = True


def _requests() -> list[bytes]:
    """One of each kind, as callers ask it."""
    asked = {
        type(each.request): each.request
        for case in privileged_cases.cases(_Sources())
        for each in case.exchanges
    }
    asked[privileged.CheckRuntime] = privileged.CheckRuntime()
    texts = [msgspec.json.encode({"request": each, "op_id": "1"}) for each in asked.values()]
    return [struct.pack("!I", len(text)) + text for text in texts]


def _helper_reply() -> Target:
    decoder = msgspec.json.Decoder(privileged.Reply)
    seeds = [
        msgspec.json.encode(privileged.Reply(result=privileged.Vmm(pid=7))),
        msgspec.json.encode(
            privileged.Reply(error=errors.to_body(errors.NoSpaceError("full", hint="free")))
        ),
        msgspec.json.encode(privileged.Reply(result=privileged.World(vms=(), bridge=True))),
        msgspec.json.encode(
            privileged.Reply(
                result=privileged.World(
                    vms=(privileged.VmWorld("0123456789ab", snapshot=True, loops=3, vmm_pid=7),),
                    bridge=True,
                    others=(privileged.Other("process", "7 e2fsck", slot=1),),
                )
            )
        ),
        msgspec.json.encode(privileged.Reply(result=privileged.Ensured(True, ("0123456789ab",)))),
        msgspec.json.encode(privileged.Reply(result=privileged.Routed("no resolver"))),
        msgspec.json.encode(privileged.Reply(result=privileged.HostInfo("1", 4))),
    ]
    return Target("helper-reply", lambda data: helper._result(data, decoder), seeds, _OURS)


# --- the builder's wire, both ends ---


def _build() -> Target:
    """Whatever comes is a request whose every word is as it must be, or refused."""
    wanted = building.Base(arch="x86_64", suite="bookworm", variant="minbase", packages=("curl", "a1=2"))
    seed = msgspec.json.encode(building.Request(base=wanted, environment={"SSL_CERT_DIR": "/x"}))

    def run(data: bytes) -> None:
        here, there = socket.socketpair()
        with here, there:
            there.sendall(data)
            there.shutdown(socket.SHUT_WR)
            request = build_program._read(here)
        words = (*request.base.packages, request.base.suite, *request.environment.values())
        assert not any(word.startswith("-") or "\n" in word for word in words)
        assert all(package[0].isalnum() for package in request.base.packages)

    return Target(
        "build", run, [building.LENGTH.pack(len(seed)) + seed], _OURS, (b'"mirror":"', b"SSL_CERT_")
    )


def _build_answer() -> Target:
    frames = [
        (building.LINE, b"I: running apt-get update..."),
        (building.TAR, bytes(512)),
        (building.ANSWER, msgspec.json.encode(building.Answer(errors.to_body(errors.NoSpaceError("full"))))),
    ]
    ends = [frames, [*frames[:2], (building.ANSWER, msgspec.json.encode(building.Answer()))]]
    seeds = [
        b"".join(building.FRAME.pack(kind, len(content)) + content for kind, content in each)
        for each in ends
    ]

    def run(data: bytes) -> None:
        here, there = socket.socketpair()
        with here, there, tempfile.NamedTemporaryFile(dir="/tmp") as tar:
            there.sendall(data)
            there.shutdown(socket.SHUT_WR)
            builder.receive(here, tar.file, lambda line: None, within_s=1, serve=socket.socket.close)

    return Target("build-answer", run, seeds, _OURS)


# --- a guest, seen from the daemon ---


class _Silent(asyncio.Transport):
    """Takes everything, as a socket whose other end never reads and never fills."""

    _closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        del data

    def abort(self) -> None:
        self._closing = True

    def close(self) -> None:
        self._closing = True

    def is_closing(self) -> bool:
        return self._closing


def _guest() -> Target:
    """The first byte is what is asked, the rest is what the guest says before it hangs up."""
    asks = hostile.ASKS
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)

    async def ask(data: bytes) -> None:
        async def connect() -> guests.Stream:
            stream = asyncio.StreamReader(limit=guest.MAX_PAYLOAD_BYTES * 2)
            stream.feed_data(data[1:])
            stream.feed_eof()
            protocol = asyncio.StreamReaderProtocol(stream)
            transport = _Silent()
            protocol._closed.set_result(None)  # type: ignore[attr-defined]
            return stream, asyncio.StreamWriter(transport, protocol, stream, loop)

        await [*asks.values()][data[0] % len(asks)](guests.GuestClient(connect))

    def run(data: bytes) -> None:
        if data:
            loop.run_until_complete(ask(data))

    answers = [guest.frame(kind, guest.encode([(guest.Tag.UPTIME_MS, 5)])) for kind in guest.FrameType]
    seeds = [bytes([number]) + hostile.whole(name) for number, name in enumerate(asks)]
    return Target("guest", run, seeds, _OURS, answers)


def _unpack() -> Target:
    """What comes out of a guest, and where it is written."""
    target = _scratch() / "target"
    target.mkdir()

    def unpack(data: bytes) -> None:
        archive.unpack(iter([data]), target, rename=None, report=lambda _: None)

    def run(data: bytes) -> None:
        with contextlib.suppress(*_OURS):
            unpack(data)
        unpack(_sealed(data))

    return Target("unpack", run, _tars(), _OURS, (b"../", b"/", b"././@LongLink", b"ustar"))


# --- names ---


def _dns() -> Target:
    """A question to us and, read again as one, an answer from a server that we asked."""
    respond = wire.responder(zone.of([("web", ipaddress.IPv4Address("10.213.240.2"))], _NETWORK, serial=1))
    asked = wire.parse(bytes(dnslib.DNSRecord.question("example.org").pack()))

    def run(data: bytes) -> None:
        reply = respond(data)
        assert reply is None or len(reply) <= wire.PAYLOAD_BYTES
        with contextlib.suppress(wire.RefusedError):
            wire.fit(data, wire.parse(data))
        if len(data) >= 2:
            wire.read_reply(data, asked, int.from_bytes(data[:2], "big"))

    question = dnslib.DNSRecord.question("example.org")
    answer = question.reply()
    answer.add_answer(*dnslib.RR.fromZone("example.org 60 CNAME a.b\na.b 60 A 1.2.3.4\na.b 9 AAAA ::1"))
    seeds = [
        bytes(dnslib.DNSRecord.question(name).pack())
        for name in ("web.vm", "vm", "2.240.213.10.in-addr.arpa")
    ]
    return Target(
        "dns", run, [*seeds, bytes(answer.pack())], (), (b"\xc0\x0c", b"\xc0\x00", b"\x03web\x02vm\0")
    )


# --- images ---


def _oci() -> Target:
    def run(data: bytes) -> None:
        for parse in (
            manifest.parse,
            functools.partial(manifest.parse_config, layers=1, arch="x86_64"),
            lambda data: reference.parse(data.decode(errors="replace")),
        ):
            with contextlib.suppress(errors.BangerError):
                parse(data)

    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": _DIGEST, "size": 3}
    described = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": _DIGEST, "size": 2}
    platform = {"architecture": "amd64", "os": "linux"}
    documents = [
        {"schemaVersion": 2, "mediaType": manifest.OCI_MANIFEST, "config": described, "layers": [layer]},
        {
            "schemaVersion": 2,
            "manifests": [{**layer, "mediaType": manifest.OCI_MANIFEST, "platform": platform}],
        },
        {
            **platform,
            "rootfs": {"type": "layers", "diff_ids": [_DIGEST]},
            "config": {"User": "a:b", "Cmd": ["x"]},
        },
    ]
    seeds = [json.dumps(each).encode() for each in documents]
    return Target(
        "oci", run, [*seeds, f"reg.io:5000/a/b:c@{_DIGEST}".encode()], (), (_DIGEST.encode(), b"sha512:")
    )


def _tars() -> list[bytes]:
    members = [
        tars.tar(tars.directory(b"d"), tars.file(b"d/f", b"abc"), tars.symlink(b"d/l", b"/f")),
        tars.tar(tars.long(b"L", b"n" * 150), tars.file(b"x", b"y"), tars.hard_link(b"h", b"x")),
        tars.tar(
            tars.pax((b"path", b"p" * 200), (b"mtime", b"1.5"), (b"SCHILY.xattr.user.a", b"b")),
            tars.file(b"x"),
        ),
        tars.tar(
            tars.pax(
                (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9")
            ),
            tars.file(b"x", b"1\n0\n3\n".ljust(512, b"\0") + b"abc"),
        ),
    ]
    return members


def _sealed(data: bytes) -> bytes:
    """With the checksum of whatever looks like a header made right: no mutation guesses one."""
    sealed = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        block = sealed[at : at + 512]
        if block[257:262] == b"ustar" or block[148:154].isdigit():
            block[148:156] = b" " * 8
            sealed[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(sealed)


def _tar() -> Target:
    def read(data: bytes) -> None:
        for entry in reader.entries(tars.pieces(data, 1000)):
            for _ in entry.content:
                pass

    def run(data: bytes) -> None:
        with contextlib.suppress(*_OURS):
            read(data)
        read(_sealed(data))

    words = (b"././@LongLink", b"ustar\x0000", b"ustar  \0", b"GNU.sparse.map=", b"30 mtime=1.5\n", b"../")
    return Target("tar", run, _tars(), _OURS, words)


def _layer() -> Target:
    """What a layer is compressed with; the first byte says which."""
    kinds = list(bundle.Compression)

    def run(data: bytes) -> None:
        if data:
            left = 1 << 26
            for piece in decompress.decompressed(io.BytesIO(data[1:]), kinds[data[0] % len(kinds)]):
                left -= len(piece)
                if left < 0:
                    return

    text = b"abc" * 1000
    packed = [text, gzip.compress(text), zstandard.compress(text), zstandard.compress(text) * 2]
    seeds = [bytes([kind]) + each for kind in range(len(kinds)) for each in packed]
    return Target("layer", run, seeds, _OURS)


# --- kernels ---


def _kernel() -> Target:
    """vmlinux and vmlinuz of every form, the configuration in them, and modules."""

    def run(data: bytes) -> None:
        for look in (
            inspect.look,
            elf.parse,
            build_config.embedded,
            modules.Info.of,
            build_config.parse,
            lambda data: b"".join(inspect.boot_image(data, limit_bytes=1 << 22)),
        ):
            with contextlib.suppress(errors.BangerError):
                look(data)

    plain = kernel_samples.vmlinux(200)
    seeds = [
        plain,
        kernel_samples.arm64_image(200),
        kernel_samples.config(),
        kernel_samples.module("a", ("b",)),
        kernel_samples.zboot(gzip.compress(plain)),
        *(kernel_samples.bzimage(pack(plain), len(plain)) for pack in _PACKERS),
    ]
    return Target(
        "kernel", run, seeds, (), (b"HdrS", b"\x7fELF", b"IKCFG_ST", b"IKCFG_ED", b"zimg", b"ARM\x64")
    )


_PACKERS: tuple[Callable[[bytes], bytes], ...] = (
    gzip.compress,
    zstandard.compress,
    kernel_samples.lz4_frame,
    lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
)


def _deb() -> Target:
    scratch = _scratch()
    package, target = scratch / "a.deb", scratch / "target"

    def run(data: bytes) -> None:
        package.write_bytes(data)
        deb.extract_kernel(package, target)

    tar = tars.tar(tars.file(b"./boot/vmlinuz-1", b"k"), tars.file(b"./lib/modules/1/a.ko", b"m"))
    packed = {"": tar, ".gz": gzip.compress(tar), ".xz": lzma.compress(tar), ".zst": zstandard.compress(tar)}
    seeds = [
        deb.MAGIC + _member("debian-binary", b"2.0\n") + _member(f"data.tar{end}", data)
        for end, data in packed.items()
    ]
    return Target("deb", run, seeds, _OURS, (b"`\n", b"data.tar.bz2   ", b"9999999999", *seeds))


def _member(name: str, data: bytes) -> bytes:
    return (
        f"{name:<16}{0:<12}{0:<6}{0:<6}{0o644:<8o}{len(data):<10}`\n".encode()
        + data
        + b"\n" * (len(data) % 2)
    )


# --- what people write ---


def _toml() -> Target:
    """Recipes, both catalogs and the configuration; the first byte says which."""
    parsers: tuple[Callable[[bytes], object], ...] = (
        recipe.parse,
        lambda data: catalog._parse(data, "images.toml", "x86_64"),
        lambda data: _file_of(data, lambda path: kernel_catalog._read(path)),
        lambda data: _file_of(data, config.load),
        lambda data: _file_of(data, config.load_installation),
    )
    path = _scratch() / "file.toml"

    def _file_of(data: bytes, parse: Callable[[Path], object]) -> object:
        path.write_bytes(data)
        return parse(path)

    def run(data: bytes) -> None:
        if data:
            parsers[data[0] % len(parsers)](data[1:])

    return Target(
        "toml", run, list(_documents()), _OURS, (b"[" * 9, b'"""', b"1e9", b"0x", b"= [", b"{a=", b"inf")
    )


def _documents() -> Iterator[bytes]:
    yield b"\0" + recipe.shipped(recipe.available()[0])
    yield b'\0extends = "debian-bookworm"\nmore_packages = ["vim"]\n'
    yield b"\1" + (Path(catalog.__file__).parent / "catalog.toml").read_bytes()
    yield b"\2" + (Path(kernel_catalog.__file__).parent / "catalog.toml").read_bytes()
    yield b'\3image = "a"\nvcpus = 2\ndns = ["1.1.1.1"]\n[[file_sync]]\nsource = "~/a"\n'
    yield b'\4owner_uid = 1000\nnetwork = "10.0.0.0/16"\n'


TARGETS: dict[str, Callable[[], Target]] = {
    "api": api.target,
    "build": _build,
    "build-answer": _build_answer,
    "deb": _deb,
    "dns": _dns,
    "forward": forwarded.target,
    "guest": _guest,
    "helper": _helper,
    "helper-reply": _helper_reply,
    "kernel": _kernel,
    "layer": _layer,
    "oci": _oci,
    "tar": _tar,
    "toml": _toml,
    "unpack": _unpack,
}
