# SPDX-License-Identifier: MIT
"""Files and directories: the owner's are opened without trust, ours (jails, logs, kernels) are made here.

What the owner or a VMM can write is only reached by descriptors: opened without following links, checked,
and then acted upon. Everything above `<jail>/root` belongs to root alone and is reached by path.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import threading
import time
from collections.abc import Generator, Iterator
from typing import Final

from banger.contract import errors, names, privileged
from banger.helper import policy as policies
from banger.helper.linux import libc, pidfd

LOGS: Final = ("console", "vmm", "metrics")
ENDING: Final = "ending"
"""The log of how the VMM ended, in which no VMM writes."""
MAX_DISK_BYTES: Final = 16 << 40
MAX_KERNEL_BYTES: Final = 1 << 30
KEPT_KERNELS: Final = 8
MAX_LOGS: Final = 2 * names.MAX_SLOTS
"""VMs whose logs there are, those that are gone too. All are listed with the world."""
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NODE: Final = "node-"
_PATH_ONLY: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_claims = threading.Lock()
_kernels = threading.Lock()


def open_owned(policy: policies.Policy, path: str, *, writable: bool, max_bytes: int) -> int:
    """A regular file of the owner, `path` beneath the state directory. Leases and pipes cannot stall us."""
    with libc.closing(_walk(policy.state_dir, path)) as found:
        status = os.fstat(found)
        good = stat.S_ISREG(status.st_mode) and status.st_uid == policy.owner_uid and status.st_nlink == 1
        if not good or not 0 < status.st_size <= max_bytes:
            raise errors.UnauthorizedError(f"{policy.state_dir}/{path} is not a plain file of the owner's")
        mode = os.O_RDWR if writable else os.O_RDONLY
        return os.open(f"/proc/self/fd/{found}", mode | os.O_NONBLOCK | os.O_CLOEXEC)


def _walk(top: str, path: str) -> int:
    """One name after the other, through no link and onto no other mount (the owner may mount with FUSE).

    openat2(2) would do it in one call, but systemd's RestrictSUIDSGID= has to refuse that call.
    """
    here = os.open(top, _PATH_ONLY | os.O_DIRECTORY)
    mount = _mount_of(here)
    for name in path.split("/"):
        above = here
        try:
            here = os.open(name, _PATH_ONLY, dir_fd=above)
        except FileNotFoundError:
            raise errors.NotFoundError(f"{top}/{path} does not exist") from None
        except OSError as error:
            raise errors.UnauthorizedError(f"{top}/{path}: {error.strerror} at {name}") from None
        finally:
            os.close(above)
        if _mount_of(here) != mount:
            os.close(here)
            raise errors.UnauthorizedError(f"{top}/{path}: {name} is on another mount")
    return here


def _mount_of(fd: int) -> str:
    """Asks the kernel's table, not the file system, which may be one that never answers."""
    with open(f"/proc/thread-self/fdinfo/{fd}") as lines:
        return next(line for line in lines if line.startswith("mnt_id:"))


# --- jails ---


def jail(policy: policies.Policy, vm_id: str) -> str:
    return os.path.dirname(privileged.jail_root(policy.jails, vm_id))


def claim(policy: policies.Policy, vm_id: str, slot: int) -> int:
    """The VM's uid; refused while another VM's jail has it. A jail's file `uid` is owned by that uid.

    No two jails have one uid: who has a jail was compared with all others when it was made.
    """
    uid = policy.uid(slot)
    base = os.path.dirname(jail(policy, vm_id))
    own = _claimed(base, vm_id)
    found = {other: _claimed(base, other) for other in listed(base)} if own is None else {vm_id: own}
    for other, taken in found.items():
        if taken is not None and (taken == uid) != (other == vm_id):
            raise errors.ConflictError(f"slot {slot}: VM {other} has uid {taken}", vm=vm_id)
    return uid


def _claimed(base: str, vm_id: str) -> int | None:
    """The uid of that VM's jail; None when it has none."""
    with contextlib.suppress(FileNotFoundError):
        return os.lstat(f"{base}/{vm_id}/uid").st_uid
    return None


def make_jail(policy: policies.Policy, vm_id: str, slot: int) -> int:
    """An empty jail, for the VM's uid alone."""
    place = jail(policy, vm_id)
    for directory in (policy.jails, os.path.dirname(place)):
        make_directory(directory, 0o711)
    if os.statvfs(policy.jails).f_flag & os.ST_NODEV:
        hint = "mount it without nodev: jails hold the device nodes of their VM"
        raise errors.MissingToolError(f"{policy.jails} is on a file system mounted nodev", hint=hint)
    with _claims:
        uid = claim(policy, vm_id, slot)
        make_directory(place, 0o710, gid=policy.owner_gid)
        with open(f"{place}/uid", "wb") as marker:
            os.fchown(marker.fileno(), uid, uid)
    remove_tree(f"{place}/root")
    for directory in (f"{place}/root", f"{place}/root/run"):
        os.mkdir(directory, 0o700)
        os.chown(directory, uid, uid, follow_symlinks=False)
    return uid


def open_jail(policy: policies.Policy, vm_id: str) -> int:
    """A descriptor of the jail's root."""
    try:
        return os.open(f"{jail(policy, vm_id)}/root", _DIRECTORY)
    except FileNotFoundError:
        raise errors.NotFoundError(f"VM {vm_id} has no jail") from None


def opened_run(root: int) -> contextlib.AbstractContextManager[int]:
    """Where the VMM makes its sockets."""
    return _opened(root, "run")


def _opened(root: int, path: str) -> contextlib.AbstractContextManager[int]:
    return libc.closing(os.open(path, _DIRECTORY, dir_fd=root))


def freeze_jail(root: int) -> None:
    """Takes the jail's directories from the VMM: what is in them stays what it is."""
    for path in (".", "run", "dev", "dev/net"):
        with contextlib.suppress(FileNotFoundError), _opened(root, path) as directory:
            os.fchown(directory, 0, 0)
            os.fchmod(directory, 0o711)


def wait_for(directory: int, name: str, *, process: int, deadline: float) -> bool:
    """True when `name` is in the directory, False when the process ended before or the deadline passed."""
    watch = libc.inotify(f"/proc/self/fd/{directory}", libc.IN_CREATE | libc.IN_MOVED_TO)
    with libc.closing(watch):
        while not _exists(directory, name):
            ready = pidfd.wait(process, deadline=deadline, other=watch)
            if process in ready or not ready or time.monotonic() >= deadline:
                return False  # also when something happens there all the time
            os.read(watch, 65536)
        return True


def grant_socket(policy: policies.Policy, directory: int, name: str, uid: int) -> None:
    """The owner's group may connect. `directory` is frozen, so that nothing can take the socket's place."""
    try:
        socket = os.open(name, _PATH_ONLY, dir_fd=directory)
    except FileNotFoundError:
        raise errors.NotFoundError(f"the VMM made no socket {name}") from None
    with libc.closing(socket):
        status = os.fstat(socket)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != uid or status.st_nlink != 1:
            raise errors.UnauthorizedError(f"{name} in the jail is not the VMM's socket")
        os.chown(f"/proc/self/fd/{socket}", -1, policy.owner_gid)
        os.chmod(f"/proc/self/fd/{socket}", 0o660)


def make_node(root: int, name: str, device: int, uid: int) -> None:
    os.mknod(name, stat.S_IFBLK | 0o600, device, dir_fd=root)
    os.chown(name, uid, uid, dir_fd=root, follow_symlinks=False)


@contextlib.contextmanager
def node(policy: policies.Policy, device: int, uid: int) -> Generator[int]:
    """A descriptor through which a program of that uid may open the block device; it has no name."""
    name = f"{_NODE}{secrets.token_hex(8)}"
    with libc.closing(os.open(policy.helper_dir, _DIRECTORY)) as top:
        make_node(top, name, device, uid)
        try:
            found = os.open(name, _PATH_ONLY, dir_fd=top)
        finally:
            os.unlink(name, dir_fd=top)
    with libc.closing(found):
        yield found


def half_made(policy: policies.Policy) -> list[str]:
    """What a helper that was killed left: nodes on their way to having no name, and unfinished copies."""
    found = [f"{policy.helper_dir}/{name}" for name in listed(policy.helper_dir) if name.startswith(_NODE)]
    cache = f"{policy.helper_dir}/kernels"
    return found + [f"{cache}/{name}" for name in listed(cache) if "." in name]


def sweep(policy: policies.Policy) -> None:
    """Only before the first request: what is half made now nobody goes on making."""
    for path in half_made(policy):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def listed(directory: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(os.listdir(directory))
    return []


def write_file(directory: int, name: str, data: bytes) -> None:
    """A new file of root's that a VMM may read."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=directory)
    with open(fd, "wb") as file:
        os.fchmod(fd, 0o644)
        file.write(data)


def remove_tree(path: str) -> None:
    """However deep or wide the tree: directories are moved up before they are emptied. Gone is gone."""
    try:
        top = os.open(path, _DIRECTORY)
    except FileNotFoundError:
        return
    with libc.closing(top):
        is_empty = False
        while not is_empty:
            is_empty = True
            for name in _entries(top):
                is_empty = False
                _remove_entry(top, name)
    os.rmdir(path)


def _entries(directory: int) -> Iterator[str]:
    """One after the other: a VMM makes as many as the disk holds."""
    with os.scandir(directory) as entries:
        for entry in entries:
            yield entry.name


def _remove_entry(top: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=top)
        return
    except IsADirectoryError:
        child = os.open(name, _DIRECTORY, dir_fd=top)
    with libc.closing(child):
        for inner in _entries(child):
            os.rename(inner, secrets.token_hex(16), src_dir_fd=child, dst_dir_fd=top)
    os.rmdir(name, dir_fd=top)


def _exists(directory: int, name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        os.lstat(name, dir_fd=directory)
        return True
    return False


def make_directory(path: str, mode: int, *, gid: int = 0) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    os.chown(path, 0, gid, follow_symlinks=False)
    os.chmod(path, mode)


# --- logs ---


def logs(policy: policies.Policy, vm_id: str) -> str:
    return f"{policy.helper_dir}/logs/{vm_id}"


def make_logs(policy: policies.Policy, vm_id: str) -> None:
    """Empty logs that the owner may read; the last start's remain as `.1`."""
    directory = logs(policy, vm_id)
    if len({vm_id, *listed(os.path.dirname(directory))}) > MAX_LOGS:
        raise errors.ConflictError("there are logs of too many VMs", hint="run banger gc", vm=vm_id)
    make_directory(os.path.dirname(directory), 0o711)
    make_directory(directory, 0o750, gid=policy.owner_gid)
    for name in (*LOGS, ENDING):
        path = f"{directory}/{name}.log"
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, f"{path}.1")
        for each in (path, f"{path}.1"):
            os.close(open_log(policy, each))


def open_log(policy: policies.Policy, path: str, flags: int = 0) -> int:
    fd = os.open(path, flags | os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchown(fd, 0, policy.owner_gid)
    os.fchmod(fd, 0o640)
    return fd


def log_tail(policy: policies.Policy, vm_id: str, name: str, limit: int = 1500) -> str:
    with contextlib.suppress(OSError), open(f"{logs(policy, vm_id)}/{name}.log", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
        return file.read().decode(errors="replace").strip()
    return ""


# --- kernels ---


def link_kernel(policy: policies.Policy, root: int, kernel_id: str, name: str) -> None:
    """Puts the owner's kernel file into a jail as a hard link of root's copy, made once for each version."""
    found = open_owned(policy, f"kernels/{kernel_id}/{name}", writable=False, max_bytes=MAX_KERNEL_BYTES)
    # One start at a time: the first one copies for all, and no pruning meets a copy that is being made.
    with libc.closing(found) as source, _kernels:
        os.link(_kept(policy, source, kernel_id), name, dst_dir_fd=root)


def _kept(policy: policies.Policy, source: int, kernel_id: str) -> str:
    identity = policies.file_version(source)
    cache = f"{policy.helper_dir}/kernels"
    make_directory(cache, 0o700)
    kept = f"{cache}/{identity}"
    if not os.path.exists(kept):
        _copy(source, kept)
        if policies.file_version(source) != identity:
            os.unlink(kept)
            raise errors.ConflictError(f"kernel {kernel_id} changed while it was read")
        _prune(cache, keep=identity)
    return kept


def _copy(source: int, target: str) -> None:
    staged = f"{target}.{secrets.token_hex(4)}"
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(source).st_size
        offset = 0
        while offset < size and (count := _copy_range(source, fd, size - offset, offset)):
            offset += count
        os.fchmod(fd, 0o444)
        os.rename(staged, target)
    except BaseException:
        os.unlink(staged)
        raise
    finally:
        os.close(fd)


def _copy_range(source: int, target: int, count: int, offset: int) -> int:
    """Shares the blocks where the file system can."""
    try:
        return os.copy_file_range(source, target, count, offset, offset)
    except OSError as error:
        if error.errno not in {18, 22, 38, 95}:  # EXDEV, EINVAL, ENOSYS, EOPNOTSUPP
            raise
        return os.sendfile(target, source, offset, count)


def _prune(cache: str, *, keep: str) -> None:
    """The copies used last stay; linking one into a jail changes its ctime."""
    unused: list[tuple[int, str]] = []
    for name in os.listdir(cache):
        status = os.lstat(f"{cache}/{name}")
        if name != keep and status.st_nlink == 1:
            unused.append((status.st_ctime_ns, name))
    for _, name in sorted(unused, reverse=True)[KEPT_KERNELS:]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{cache}/{name}")
