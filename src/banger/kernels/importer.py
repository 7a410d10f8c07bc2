# SPDX-License-Identifier: MIT
"""Turns a directory, a package, a vmlinux, a vmlinuz or an arm64 Image into a kernel that boots.

The kernel is inspected first and refused, with every reason, when it cannot boot; if its drivers are
modules, an initrd is built around the guest binary. The result is published whole. Used by the daemon and
the lab.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from banger import artefacts, pinned
from banger.contract import decoding, errors, given_names, names
from banger.kernels import build_config, elf, files, initrd, inspect, modules, needs, parts, records

Say = Callable[[str], None]


def import_path(
    kernels: records.Kernels,
    path: Path,
    *,
    name: str,
    guest_binary: Path,
    source: str = "",
    arch: str = "",
    on_line: Say | None = None,
) -> records.Kernel:
    """Imports under a name. `arch` is that of the machine that will boot it, this one if it is absent."""
    given_names.parse_artefact_name(name, "a kernel")
    kernel_id = names.new_id()
    with kernels.stage(kernel_id) as staged:
        work = staged / "work"
        work.mkdir()
        found = parts.find(path, work / "unpacked")
        made = _Import(staged, found, guest_binary, arch or platform.machine(), on_line or _silent)
        try:
            record = made.make(kernel_id, name, source or f"imported from {path}")
        except errors.BadRequestError as error:
            error.message = f"{path} was not imported: {error.message}"
            error.args = (error.message,)
            raise
        shutil.rmtree(work)
        return kernels.publish(staged, record)


def _silent(_: str) -> None:
    pass


class _Import:
    """One import: fills a staged directory and says what is in it."""

    def __init__(self, staged: Path, found: parts.Parts, guest_binary: Path, arch: str, say: Say) -> None:
        self._staged = staged
        self._parts = found
        self._guest = guest_binary
        self._arch = arch
        self._say = say

    def make(self, kernel_id: str, name: str, source: str) -> records.Kernel:
        vmlinux = self._staged / records.VMLINUX
        self._unpack(vmlinux)
        with files.mapped(vmlinux) as image:
            kernel = inspect.look(image)
            if kernel.machine != self._arch:
                raise errors.BadRequestError(f"it is for {kernel.machine}, and this host is {self._arch}")
            sha256 = pinned.sha256_of_path(vmlinux)
            before = self._earlier_record(sha256)
            if before is not None:
                return msgspec.structs.replace(
                    before,
                    id=kernel_id,
                    name=name,
                    version=kernel.version,
                    vmlinux_bytes=vmlinux.stat().st_size,
                    initrd_bytes=self._size_of_initrd(),
                    loaded_end=kernel.end,
                    source=source,
                    created_at=artefacts.now(),
                )
            verdict, load = self._judge(image, kernel)
        guest_sha256 = self._make_initrd(load)
        ready = self._staged / records.INITRD
        return records.Kernel(
            id=kernel_id,
            name=name,
            version=kernel.version,
            arch=kernel.machine,
            kind="initrd" if ready.exists() else "direct",
            vmlinux_sha256=sha256,
            vmlinux_bytes=vmlinux.stat().st_size,
            initrd_sha256=pinned.sha256_of_path(ready) if ready.exists() else "",
            initrd_bytes=self._size_of_initrd(),
            guest_sha256=guest_sha256,
            modules=tuple(module.name for module in load),
            loaded_end=kernel.end,
            checked_by=verdict.basis,
            lacks=verdict.lacks,
            unknown=verdict.unknown,
            source=source,
            created_at=artefacts.now(),
        )

    def _unpack(self, target: Path) -> None:
        self._say("unpacking the kernel")
        packed = self._staged / "work" / "image"
        files.copy(self._parts.image, packed)
        with files.mapped(packed) as data:
            files.write(inspect.boot_image(data, files.MAX_IMAGE_BYTES), target)
        packed.unlink()
        if files.head(target, len(elf.MAGIC)) == elf.MAGIC:
            elf.strip(target)

    def _judge(
        self, image: files.Data, kernel: inspect.Kernel
    ) -> tuple[needs.Verdict, list[modules.Module]]:
        self._say(f"checking Linux {kernel.version}")
        found = self._parts
        tree = modules.Tree(found.modules) if found.modules is not None else None
        config = embedded = build_config.embedded(image)
        if config is None and found.config is not None:
            config = build_config.read(found.config)
        evidence = needs.Evidence(image, kernel.machine, config, embedded is not None, tree)
        ready = found.initrd is not None and tree is None
        verdict = needs.judge(evidence, ready_initrd=ready)
        return verdict, tree.closure(verdict.load, kernel.version) if tree is not None else []

    def _make_initrd(self, load: list[modules.Module]) -> str:
        """With modules, ours, whatever initrd came beside them. Returns the sha256 of the guest in it."""
        if not load:
            if self._parts.modules is None:
                self._copy_initrd()
            return ""
        self._say(f"making the initrd with {len(load)} modules")
        (self._staged / records.INITRD).write_bytes(initrd.build(self._guest, load))
        return pinned.sha256_of_path(self._guest)

    def _copy_initrd(self) -> None:
        if self._parts.initrd is not None:
            files.copy(self._parts.initrd, self._staged / records.INITRD)

    def _size_of_initrd(self) -> int:
        ready = self._staged / records.INITRD
        return ready.stat().st_size if ready.exists() else 0

    def _earlier_record(self, sha256: str) -> records.Kernel | None:
        """What banger said of a directory it published elsewhere, as long as the files are still those.

        Its initrd is staged then: what is hashed is what is kept.
        """
        found = self._parts
        if found.record is None:
            return None
        try:
            record = decoding.json(files.read(found.record, 1 << 20), records.Kernel)
        except (errors.BangerError, msgspec.DecodeError, UnicodeDecodeError):
            return None
        self._copy_initrd()
        ready = self._staged / records.INITRD
        initrd_sha256 = pinned.sha256_of_path(ready) if ready.exists() else ""
        same = (sha256, initrd_sha256) == (record.vmlinux_sha256, record.initrd_sha256)
        if same and record.checked_by and record.arch == self._arch:
            return record
        ready.unlink(missing_ok=True)
        return None
