# SPDX-License-Identifier: MIT
"""A host in a directory on which all is well: files, programs that are scripts, and both services' sockets.

A test breaks one thing in it and asks `banger.system.doctor` what it sees.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import shutil
import socketserver
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

import banger
from banger.contract import names, privileged
from banger.images import records as images
from banger.kernels import records as kernels
from banger.system import host, releases
from banger.system.doctor import report, scene, table
from tests.fakes import daemon

PREFIX = host.PREFIX
LIBC = "/usr/lib/x86_64-linux-gnu/libc.so.6"
RELEASE = "6.1.0-40-amd64"
VM = "0123456789ab"
VM_CGROUP = f"sys/fs/cgroup/{names.cgroup_path(names.VmId(VM))}"
KERNEL = "generic-6.12"
IMAGE = "debian-bookworm"
_LENGTH = struct.Struct("!I")
_CPU = "/sys/devices/system/cpu"
_FILES = {
    "/proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu svm\nprocessor\t: 1\nflags\t\t: fpu svm\n",
    "/proc/meminfo": "MemTotal:        8000000 kB\n",
    "/proc/misc": "232 kvm\n200 tun\n237 loop-control\n236 device-mapper\n",
    "/proc/modules": "dm_snapshot 61440 0 - Live 0x0\nbridge 311296 0 - Live 0x0\n",
    "/proc/net/route": (
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "eth0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        "br-fc\t00F0D50A\t00000000\t0001\t0\t0\t0\t00F0FFFF\t0\t0\t0\n"
    ),
    "/proc/self/mountinfo": (
        "25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "26 25 0:23 / /sys/fs/cgroup rw,nosuid,nodev,noexec shared:2 - cgroup2 cgroup2 rw,nsdelegate\n"
        "27 25 0:40 / /media/a\r\u2028b rw,nosuid,nodev shared:3 - fuse.any any rw\n"
    ),
    "/proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0\tpartition\t1\t0\t100\n",
    "/proc/cmdline": "root=/dev/vda quiet",
    "/proc/sys/net/ipv6/conf/all/disable_ipv6": "0\n",
    "/proc/sys/net/ipv6/conf/all/forwarding": "0\n",
    "/proc/sys/kernel/printk": "4\t4\t1\t7",
    f"/lib/modules/{RELEASE}/modules.builtin": "kernel/fs/ext4/ext4.ko\n",
    f"/lib/modules/{RELEASE}/modules.dep": (
        "kernel/net/netfilter/nf_tables.ko.xz: kernel/net/netfilter/nfnetlink.ko.xz\n"
        "kernel/net/netfilter/nft_ct.ko.xz:\nkernel/net/netfilter/nft_masq.ko.xz:\n"
        "kernel/drivers/md/dm-snapshot.ko: kernel/drivers/md/dm-bufio.ko\n"
        "kernel/net/bridge/bridge.ko: kernel/net/802/stp.ko\n"
    ),
    "/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids",
    f"/sys/fs/cgroup/{names.CGROUP_PARENT}/cgroup.controllers": "cpu io memory pids",
    f"/{VM_CGROUP}/cgroup.procs": "4242\n77\n",
    f"/{VM_CGROUP}/cpu.max": "300000 100000",
    f"/{VM_CGROUP}/memory.max": "268435456",
    f"/{VM_CGROUP}/pids.max": "18",
    f"/{VM_CGROUP}/io.max": "254:0 rbps=max wbps=1048576 riops=max wiops=max",
    "/proc/4242/cmdline": "/firecracker\0--id\0",
    "/proc/4242/status": (
        "Name:\tfirecracker\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\nCapPrm:\t0000000000000000\n"
        "CapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n"
    ).replace("{uid}", str(names.UID_BASE + 1)),
    "/proc/77/cmdline": "",
    f"{_CPU}/smt/active": "0",
    f"{_CPU}/vulnerabilities/meltdown": "Not affected",
    f"{_CPU}/vulnerabilities/itlb_multihit": "Not affected",
    "/sys/kernel/mm/ksm/run": "0",
    "/sys/module/kvm/parameters/nx_huge_pages": "never",
    "/sys/devices/system/edac/mc/mc0/ce_count": "0",
    "/etc/passwd": "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n",
    "/etc/group": "root:x:0:\nalice:x:1000:\n",
    "/etc/subuid": "alice:100000:65536\n",
    "/etc/banger/config.toml": "",
    "/etc/modules-load.d/banger.conf": "loop\n",
    "/var/lib/banger/images/.keep": "",
    "/dev/kvm": "",
    "/usr/lib/x86_64-linux-gnu/libnftables.so.1": "",
    f"/var/lib/banger-root/logs/{VM}/console.log": "hello\n",
    f"{PREFIX}/lib/python3/site-packages/banger/helper/policy.py": "",
    f"{PREFIX}/pyvenv.cfg": "home = /usr/bin\nversion = 3.11.2\n",
    "/usr/lib/python3.11/os.py": "",
    f"{LIBC}": "",
    "/etc/ld.so.cache": "",
}
_DEFAULTS = {
    "image": {"value": IMAGE, "source": "default"},
    "vcpus": {"value": 2, "source": "default"},
    "memory_mib": {"value": 512, "source": "config"},
    "disk_size_mib": {"value": 8192, "source": "default"},
}
_UNIT = """\
Id={0}
LoadState=loaded
ActiveState=active
SubState=running
UnitFileState=enabled
NeedDaemonReload=no
"""


class FakeHost:
    """Everything lies below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.account = pwd.getpwuid(os.getuid())
        self.viewer = scene.Viewer(
            uid=os.getuid(),
            root_uid=os.getuid(),
            machine="x86_64",
            kernel=RELEASE,
            python=root / "usr/bin/fake-python",
        )
        self._furnish()

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Both services answer, and `api` and `helper` are they."""
        self.api = daemon.FakeDaemon(self.at(host.API_SOCKET))
        self.helper = FakeHelper(self.at(host.HELPER_SOCKET))
        with contextlib.ExitStack() as stack:
            for service in (self.api, self.helper):
                service.start()
                stack.callback(service.stop)
                service.path.chmod(0o600)
            yield

    def at(self, path: Path | str) -> Path:
        return self.root / str(path).lstrip("/")

    def write(self, path: Path | str, text: str | bytes, *, mode: int = 0o644) -> Path:
        target = self.at(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.encode() if isinstance(text, str) else text)
        target.chmod(mode)
        return target

    def program(self, path: str, script: str = "", *, status: int = 0) -> Path:
        """A program that says this and ends."""
        return self.write(path, f"#!/bin/sh\n{script}\nexit {status}\n", mode=0o755)

    def says(self, path: str, text: str, *, status: int = 0) -> None:
        self.program(path, f"cat <<'END'\n{text}\nEND", status=status)

    def defaults(self, **values: object) -> None:
        """What bangerd says a VM gets by default."""
        self.says(f"{PREFIX}/bin/bangerd", json.dumps({"values": {**_DEFAULTS, **values}}))

    def unit_states(self, text: str) -> None:
        self.says("/usr/bin/systemctl", text)

    @staticmethod
    def all_units() -> str:
        return "\n".join(_UNIT.format(name) for name in host.LOADED)

    def ask(self, name: str) -> report.Row:
        """The row of one check, seen anew."""
        check = next(each for each in (*table.ORDINARY, *table.PRODUCTION) if each.name == name)
        return report.examine([check], scene.Scene(self.root, self.viewer)).rows[0]

    def ask_all(self) -> report.Report:
        return report.examine((*table.ORDINARY, *table.PRODUCTION), scene.Scene(self.root, self.viewer))

    def _furnish(self) -> None:
        for path, text in _FILES.items():
            self.write(path, text)
        self.at("/run/systemd/system").mkdir(parents=True)
        for directory in (host.API_SOCKET.parent, host.HELPER_SOCKET.parent, host.CACHE):
            self.at(directory).mkdir(parents=True)
        self.write(host.BUILDER_SOCKET, "", mode=0o600)
        for tool in ("e2fsck", "debugfs", "mkfs.ext4", "mmdebstrap", "git", "ssh", "ssh-keygen"):
            self.program(f"/usr/bin/{tool}")
        self.program("/usr/bin/fake-python")
        self.unit_states(self.all_units())
        self.says("/usr/bin/systemd-analyze", "→ Overall exposure level for the unit: 1.2 OK :-)")
        self._install()
        self._publish()
        for directory, mode in ((host.STATE, 0o700), (host.CACHE, 0o700), (host.HELPER, 0o711)):
            self.at(directory).chmod(mode)
        self.at(host.HELPER_SOCKET.parent).chmod(0o711)

    def _install(self) -> None:
        self.defaults()
        self.program(f"{PREFIX}/bin/banger")
        self.says("/usr/bin/python3.11", json.dumps([LIBC]))
        self.at(PREFIX / "bin/python").symlink_to("../../../../bin/python3.11")
        laid = releases.Releases(self.root)
        laid.write_units(self.at(PREFIX), self.account.pw_name, host.unit_sources())
        for link, target in laid.links().items():
            link.parent.mkdir(parents=True, exist_ok=True)
            laid.lead(link, target)
        laid.top.mkdir()
        laid.switch(self.at(PREFIX))
        hashes, record = {}, {}
        for name, said in (("firecracker", "Firecracker"), ("jailer", "Jailer")):
            path = self.program(str(host.RUNTIME / name), f"echo '{said} v1.12.1'")
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            record[name] = {"sha256": hashes[name], "version": "1.12.1", "source": "user"}
        self.write(host.RUNTIME / "runtime.json", json.dumps(record))
        self.write(host.INSTALL_TOML, self.settings_text(hashes))

    def settings_text(self, hashes: dict[str, str]) -> str:
        lines = [
            f"owner_uid = {self.account.pw_uid}",
            f"owner_gid = {self.account.pw_gid}",
            f'owner_name = "{self.account.pw_name}"',
            *(f'{name}_sha256 = "{sha256}"' for name, sha256 in hashes.items()),
        ]
        return "\n".join(lines) + "\n"

    def _publish(self) -> None:
        """The default image and its kernel."""
        rootfs = bytearray(4096)
        rootfs[1080:1082] = b"\x53\xef"
        now = "2026-01-01T00:00:00Z"
        image = images.Image(
            id="aaaaaaaaaaaa",
            name=IMAGE,
            arch="x86_64",
            size_bytes=len(rootfs),
            stored_bytes=len(rootfs),
            source="a test",
            guest_sha256="",
            has_init=True,
            kernel=KERNEL,
            created_at=now,
        )
        self.write(self.image_file("rootfs.ext4"), bytes(rootfs))
        self.write(self.image_file("image.json"), msgspec.json.encode(image))
        kernel = kernels.Kernel(
            id="bbbbbbbbbbbb",
            name=KERNEL,
            version="6.12.91",
            arch="x86_64",
            kind="direct",
            vmlinux_sha256=hashlib.sha256(b"a kernel").hexdigest(),
            vmlinux_bytes=8,
            source="a test",
            created_at=now,
        )
        self.write(self.kernel_file("vmlinux"), b"a kernel")
        self.write(self.kernel_file("kernel.json"), msgspec.json.encode(kernel))

    @staticmethod
    def image_file(name: str) -> str:
        return f"{host.STATE}/images/aaaaaaaaaaaa/{name}"

    @staticmethod
    def kernel_file(name: str) -> str:
        return f"{host.STATE}/kernels/bbbbbbbbbbbb/{name}"


class FakeHelper:
    """Says who it is; every other request closes the connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info = privileged.HostInfo(version=banger.__version__, protocol=privileged.PROTOCOL_VERSION)
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                (size,) = _LENGTH.unpack(self.rfile.read(_LENGTH.size))
                request = msgspec.json.decode(self.rfile.read(size), type=privileged.Envelope).request
                match request:
                    case privileged.GetHost():
                        reply = privileged.Reply(result=outer.info)
                    case _:
                        return
                data = msgspec.json.encode(reply)
                self.wfile.write(_LENGTH.pack(len(data)) + data)

        self._server = socketserver.ThreadingUnixStreamServer(str(path), Handler)

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def furnished() -> Iterator[FakeHost]:
    """Nobody answers at its sockets. A short path: a socket's may have 107 bytes."""
    root = Path(tempfile.mkdtemp(prefix="doctor-"))
    root.chmod(0o755)
    before = os.umask(0o022)
    try:
        yield FakeHost(root)
    finally:
        os.umask(before)
        shutil.rmtree(root, ignore_errors=True)
