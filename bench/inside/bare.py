# SPDX-License-Identifier: MIT
"""A bare Firecracker: no jailer, no cgroup, no device-mapper, no work disk, no bridge, no rows, no daemon.

It makes a tap, starts Firecracker, tells it over its API socket of kernel, root disk, tap and vsock, starts
the instance and waits for the agent. The root disk is a plain copy, made and configured before any clock
runs. `python -m bench.inside.bare` is one whole life as one process: the rival of the whole CLI process.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from banger.contract import names
from bench.inside import agent

DIRECTORY: Final = Path("/var/tmp/bench-bare")
FIRECRACKER: Final = "/var/lib/banger-root/runtime/firecracker"
MASTER: Final = DIRECTORY / "master.ext4"
DISK: Final = DIRECTORY / "rootfs.ext4"
KERNEL: Final = DIRECTORY / "vmlinux"
TAP: Final = "tap-bare"
MEMORY_MIB: Final = 256
AGENT_S: Final = 60.0
BOOT_ARGS: Final = (
    "console=ttyS0 quiet reboot=k panic=1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd "
    "cryptomgr.notests root=/dev/vda rw "
    f"ip=10.99.0.2::10.99.0.1:255.255.255.0:bare:eth0:off init={names.GUEST_BINARY}"
)
# linux/if_tun.h, linux/sockios.h, linux/if.h
_TUNSETIFF, _TUNSETPERSIST, _SIOCSIFFLAGS = 0x400454CA, 0x400454CB, 0x8914
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_UP = 0x2, 0x1000, 0x4000, 0x1
_POLL_S: Final = 0.001
_SHOWN_BYTES: Final = 2000
# Hardware virtualisation costs a guest's kernel time when it starts, and banger's guests are not given it.
_CPU: Final = [
    {"leaf": leaf, "subleaf": "0x0", "flags": 0, "modifiers": [{"register": "ecx", "bitmap": bits}]}
    for leaf, bits in (("0x1", "0b0xxxxx"), ("0x80000001", "0b0xx"))
]


@dataclass(slots=True)
class Times:
    """Seconds since the epoch, of one life."""

    began: float = 0.0
    instance_start: float = 0.0
    init: float = 0.0
    agent: float = 0.0
    command: float = 0.0


def prepare(image: Path, kernel: Path) -> None:
    """Once: the image's file system, with what banger would write into each VM's."""
    DIRECTORY.mkdir(exist_ok=True)
    _copy(image, MASTER)
    _copy(kernel, KERNEL)
    config = DIRECTORY / "config"
    config.write_text("hostname=bare\n")
    script = f"rm {names.GUEST_DIR}/config\ncd {names.GUEST_DIR}\nwrite {config} config\n"
    subprocess.run(
        ["debugfs", "-w", "-f", "-", MASTER], input=script.encode(), check=True, capture_output=True
    )


def renew_disk() -> None:
    """Before each life, with nothing left to write when it begins."""
    _copy(MASTER, DISK)
    os.sync()


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


def live(look: Callable[[int, agent.Agent], None] | None = None) -> Times:
    """From nothing to `true` in a guest, a look at the VMM (its pid) and the guest, and nothing again."""
    times = Times(began=time.time())
    with _tap(), _firecracker(DIRECTORY / "api.sock") as (process, api):
        api.put("/boot-source", kernel_image_path=str(KERNEL), boot_args=BOOT_ARGS)
        api.put("/machine-config", vcpu_count=1, mem_size_mib=MEMORY_MIB)
        api.put("/cpu-config", cpuid_modifiers=_CPU)
        api.put(
            "/drives/rootfs",
            drive_id="rootfs",
            path_on_host=str(DISK),
            is_root_device=False,
            is_read_only=False,
        )
        api.put("/network-interfaces/eth0", iface_id="eth0", host_dev_name=TAP)
        vsock = DIRECTORY / "vsock.sock"
        vsock.unlink(missing_ok=True)
        api.put("/vsock", guest_cid=3, uds_path=str(vsock))
        times.instance_start = time.time()
        api.put("/actions", action_type="InstanceStart")
        inside = agent.Agent(str(vsock))
        inside.wait(AGENT_S)
        times.agent = time.time()
        inside.run("true")
        times.command = time.time()
        if look is not None:
            look(process, inside)
    return times


class _Api(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)

    def put(self, path: str, **body: object) -> None:
        self.request("PUT", path, body=json.dumps(body), headers={"Content-Type": "application/json"})
        answer = self.getresponse()
        said = answer.read()
        if answer.status != http.client.NO_CONTENT:
            raise RuntimeError(f"PUT {path}: {answer.status} {said.decode(errors='replace')}")


@contextlib.contextmanager
def _firecracker(path: Path) -> Iterator[tuple[int, _Api]]:
    path.unlink(missing_ok=True)
    with (DIRECTORY / "console.log").open("wb") as log:
        process = subprocess.Popen(
            [FIRECRACKER, "--api-sock", path, "--id", "bare"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        api = _Api(path)
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                api.connect()
                break
            time.sleep(_POLL_S)
        yield process.pid, api
        api.close()
    except Exception as error:
        said = (DIRECTORY / "console.log").read_bytes()[-_SHOWN_BYTES:].decode(errors="replace")
        error.add_note(f"Firecracker's status is {process.poll()}, and it said last: {said}")
        raise
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _tap() -> Iterator[None]:
    request = struct.pack("16sH22x", TAP.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tun, _TUNSETIFF, request)
        fcntl.ioctl(tun, _TUNSETPERSIST, 1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", TAP.encode(), _IFF_UP))
    finally:
        os.close(tun)
    try:
        yield
    finally:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(tun, _TUNSETIFF, request)
        fcntl.ioctl(tun, _TUNSETPERSIST, 0)
        os.close(tun)


if __name__ == "__main__":
    live()
