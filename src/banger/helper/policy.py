# SPDX-License-Identifier: MIT
"""What this helper may touch: read once from install.toml, frozen, never changed by a request."""

from __future__ import annotations

import hashlib
import io
import ipaddress
import os
import stat
from pathlib import Path
from typing import Annotated, Final

import msgspec

from banger.contract import decoding, errors, names

DEFAULT_PATH: Final = Path("/etc/banger/install.toml")
_MAX_POLICY_BYTES: Final = 64 * 1024
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
AbsolutePath = Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*$(?!\n)")]


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The keys of install.toml. The last two are not written there: tests and development set them."""

    owner_uid: Annotated[int, msgspec.Meta(ge=0)]
    owner_gid: Annotated[int, msgspec.Meta(ge=0)]
    owner_name: str
    uid_base: Annotated[int, msgspec.Meta(ge=65536, le=2**31 - 1 - names.MAX_SLOTS)] = names.UID_BASE
    uid_count: Annotated[int, msgspec.Meta(ge=1, le=names.MAX_SLOTS)] = names.MAX_SLOTS
    bridge: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,14}$(?!\n)")] = names.BRIDGE
    network: str = names.NETWORK
    network6: str = names.NETWORK6
    state_dir: AbsolutePath = "/var/lib/banger"
    helper_dir: AbsolutePath = "/var/lib/banger-root"
    firecracker_sha256: Sha256
    jailer_sha256: Sha256
    guest_dir: AbsolutePath = str(Path(__file__).parents[1] / "_guest")
    cgroup_mount: AbsolutePath = "/sys/fs/cgroup"

    def __post_init__(self) -> None:
        if self.prefix.num_addresses < self.uid_count + 3:
            raise ValueError(f"network {self.network} is too small for {self.uid_count} VMs")
        names.parse_network6(self.network6)

    @property
    def prefix(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(self.network)

    @property
    def prefix6(self) -> ipaddress.IPv6Network:
        return ipaddress.IPv6Network(self.network6)

    @property
    def jails(self) -> str:
        return f"{self.helper_dir}/jails"

    @property
    def firecracker(self) -> str:
        return f"{self.helper_dir}/runtime/firecracker"

    @property
    def jailer(self) -> str:
        return f"{self.helper_dir}/runtime/jailer"

    @property
    def console(self) -> str:
        return f"{self.guest_dir}/banger-console-{os.uname().machine}"

    @property
    def guest(self) -> str:
        return f"{self.guest_dir}/banger-guest-{os.uname().machine}"

    def uid(self, slot: int) -> int:
        """The uid of the VM in that slot; its gid is the same number."""
        if not 1 <= slot <= self.uid_count:
            raise errors.BadRequestError(f"slot {slot} is outside 1 to {self.uid_count}")
        return self.uid_base + slot

    def is_vm_uid(self, uid: int) -> bool:
        return self.uid_base < uid <= self.uid_base + self.uid_count


def load(path: Path = DEFAULT_PATH) -> Policy:
    """Raises UnauthorizedError unless root alone can write the file, BadRequestError when it is wrong."""
    fd = open_root_owned(str(path))
    with open(fd, "rb") as file:
        text = file.read(_MAX_POLICY_BYTES)
    try:
        return decoding.toml(text, Policy)
    except (ValueError, msgspec.MsgspecError) as error:
        hint = "`banger doctor` says how to mend it"
        raise errors.BadRequestError(f"{path} is not valid: {error}", hint=hint) from error


def open_root_owned(path: str) -> int:
    """A descriptor for reading a file that root alone can change or replace, down from /."""
    hint = "run banger system install again"
    for directory in Path(path).parents:
        found = os.lstat(directory)
        sticky = found.st_mode & stat.S_ISVTX  # as /tmp: what root owns there, others cannot rename
        open_to_others = found.st_mode & _WRITABLE_BY_OTHERS and not sticky
        if found.st_uid != 0 or open_to_others or not stat.S_ISDIR(found.st_mode):
            raise errors.UnauthorizedError(f"{directory}, above {path}, is not root's alone", hint=hint)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(fd)
    if found.st_uid != 0 or found.st_mode & _WRITABLE_BY_OTHERS or not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise errors.UnauthorizedError(f"{path} is not a file of root's alone", hint=hint)
    return fd


def require_pinned(path: str, sha256: str) -> None:
    """Raises unless `path` is root's alone and has this content."""
    try:
        fd = open_root_owned(path)
    except FileNotFoundError:
        hint = "run banger runtime pull, then banger system install"
        raise errors.MissingToolError(f"{path} is not installed", hint=hint) from None
    with open(fd, "rb") as file:
        if _digest(file) != sha256:
            message = f"{path} is not the file recorded at installation, sha256 {sha256}"
            raise errors.UnauthorizedError(message)


_digests: Final[dict[str, str]] = {}


def _digest(file: io.BufferedReader) -> str:
    """Read again only when the file was changed or replaced."""
    version = file_version(file.fileno())
    if version not in _digests:
        _digests[version] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[version]


def file_version(fd: int) -> str:
    """Another one when the file is changed or replaced: nobody but root can do that and keep its ctime."""
    status = os.fstat(fd)
    parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "-".join(f"{part:x}" for part in parts)
