# SPDX-License-Identifier: MIT
"""A lab host with only the helper installed; who asks it here stands where the daemon stands."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from banger.contract import errors, names, privileged
from lab import artefacts, cache, rights
from lab.session import Lab
from tests.lab import helper_asked

TREE = Path(__file__).parents[2]
SITE = "/usr/local/lib/banger/lib/python3.11/site-packages"
PYTHON = "/usr/local/lib/banger/bin/python"
STATE, ROOT = "/var/lib/banger", "/var/lib/banger-root"
VM, OTHER = "0123456789ab", "fedcba987654"
IMAGE, KERNEL, INITRD_KERNEL = "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"
CGROUP = f"/sys/fs/cgroup/{names.CGROUP_PARENT}"
BOOT_ARGS = "console=ttyS0 quiet reboot=k panic=1 pci=off root=/dev/vda rw init=/.banger/guest"
AGENT = """
import socket, sys, time
path, deadline = sys.argv[1], time.monotonic() + float(sys.argv[2])
while time.monotonic() < deadline:
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(20)
        try:
            wire.connect(path)
            wire.sendall(b"CONNECT 1023\\n")
            if wire.recv(64).startswith(b"OK"):
                sys.exit(0)
        except OSError as error:
            if isinstance(error, PermissionError):
                sys.exit(2)
    time.sleep(0.2)
sys.exit(1)
"""
INSTALL = f"""
set -eu
useradd --user-group stranger
python3 -m venv --without-pip /usr/local/lib/banger
tar -x -m -C {SITE} -f /root/site.tar
# As pip does. Neither the helper nor who asks it may keep what it compiled, and that takes seconds here.
{PYTHON} -m compileall -q -l {SITE}/banger
{PYTHON} -m compileall -q {SITE}/banger/contract {SITE}/banger/helper {SITE}/banger/owner {SITE}/msgspec
chown -R root:root /usr/local/lib/banger
chmod -R go-w /usr/local/lib/banger
install -d -m 0711 {ROOT}
install -d -m 0755 {ROOT}/runtime
install -m 0755 /artefacts/runtime/firecracker /artefacts/runtime/jailer {ROOT}/runtime/
install -m 0644 /artefacts/runtime/runtime.json {ROOT}/runtime/
install -d -m 0700 {STATE}
install -d {STATE}/images/{IMAGE} {STATE}/kernels/{KERNEL} {STATE}/kernels/{INITRD_KERNEL}
cp /artefacts/kernels/generic-6.12/vmlinux {STATE}/kernels/{KERNEL}/
cd /artefacts/kernels/debian-6.1
cp vmlinux initrd {STATE}/kernels/{INITRD_KERNEL}/
mkdir -p /root/image
cd /root/image
mkdir -p proc dev sys etc root run tmp .banger
truncate -s 64M {STATE}/images/{IMAGE}/rootfs.ext4
mkfs.ext4 -q -d /root/image {STATE}/images/{IMAGE}/rootfs.ext4
chown -R dev:dev {STATE}
install -d /etc/banger
cat > /etc/banger/install.toml <<END
owner_uid = $(id -u dev)
owner_gid = $(id -g dev)
owner_name = "dev"
uid_base = {names.UID_BASE}
uid_count = 4000
bridge = "br-fc"
network = "{names.NETWORK}"
state_dir = "{STATE}"
helper_dir = "{ROOT}"
firecracker_sha256 = "$(sha256sum < {ROOT}/runtime/firecracker | cut -d ' ' -f 1)"
jailer_sha256 = "$(sha256sum < {ROOT}/runtime/jailer | cut -d ' ' -f 1)"
END
systemctl daemon-reload
systemctl start bangerd-root.socket
"""


class HelperHost:
    """A lab whose helper is installed; its daemon is this test."""

    def __init__(self, lab: Lab, asks: helper_asked.Ask) -> None:
        self.lab = lab
        self._asks = asks

    def sh(self, script: str, *, check: bool = True, timeout_s: float = 60) -> str:
        return self.lab.run(["sh", "-c", script], check=check, timeout_s=timeout_s).stdout.decode().strip()

    def ask(self, *requests: privileged.Request[Any], user: str = "dev") -> list[privileged.Reply]:
        """The replies, up to the first error."""
        if user == "dev":
            return self._asks(requests)
        with helper_asked.asked(self.lab, user) as ask:
            return ask(requests)

    def do(self, *requests: privileged.Request[Any]) -> list[privileged.AnyResult]:
        """The results; every request must succeed."""
        replies = self.ask(*requests)
        for reply in replies:
            assert reply.error is None, reply.error
        assert len(replies) == len(requests)
        return [reply.result for reply in replies if reply.result is not None]

    def refused(self, *requests: privileged.Request[Any]) -> errors.ErrorBody:
        """How the last of them failed."""
        replies = self.ask(*requests)
        assert len(replies) == len(requests), replies
        assert replies[-1].error is not None
        return replies[-1].error

    def world(self) -> privileged.World:
        (found,) = self.do(privileged.ListWorld())
        assert isinstance(found, privileged.World)
        return found

    def make_disks(self, vm_id: str, *, overlay_mib: int = 64) -> None:
        self.sh(
            f"d={STATE}/vms/{vm_id}; rm -rf $d; mkdir -p $d; truncate -s {overlay_mib}M $d/overlay.cow;"
            f"truncate -s 32M $d/work.ext4; mkfs.ext4 -q $d/work.ext4; chown -R dev:dev {STATE}/vms"
        )

    def start(self, vm_id: str = VM, slot: int = 1) -> privileged.Vmm:
        self.make_disks(vm_id)
        found = self.do(*start_requests(vm_id, slot), privileged.FindVmm(vm_id=vm_id))[-1]
        assert isinstance(found, privileged.Vmm)
        assert found.pid > 0
        return found

    def await_agent(self, vm_id: str = VM) -> None:
        """Fails with what the VM's logs and processor time tell, twice: does it still do something?"""
        if self.agent_listens(vm_id):
            return
        tell = (
            f"tail -n 20 {ROOT}/logs/{vm_id}/*; cd {CGROUP}/{vm_id}; cat cpu.stat memory.events;"
            "sleep 2; cat /proc/loadavg; top -b -n 1 -H -w 120 | head -n 25"
        )
        seen = [
            self.sh(f"{tell}; ls -l {ROOT}/jails/firecracker/{vm_id}/root", check=False) for _ in range(2)
        ]
        raise AssertionError("no agent answers:\n" + "\n\n".join(seen))

    def agent_listens(self, vm_id: str = VM, *, user: str = "dev", timeout_s: float = 120) -> bool:
        path = privileged.vsock_socket(f"{ROOT}/jails", vm_id)
        done = self.lab.run(
            ["python3", "-c", AGENT, path, str(timeout_s)], user=user, check=False, timeout_s=timeout_s + 30
        )
        return done.status == 0


def launch_request(vm_id: str, slot: int, **changes: object) -> privileged.LaunchVmm:
    request = privileged.LaunchVmm(
        vm_id=vm_id,
        slot=slot,
        kernel_id=KERNEL,
        initrd=False,
        vcpus=1,
        memory_mib=128,
        boot_args=BOOT_ARGS,
    )
    return msgspec.structs.replace(request, **changes)


def start_requests(vm_id: str, slot: int) -> list[privileged.Request[Any]]:
    """What the pipeline asks for a start, in its order."""
    requests: list[privileged.Request[Any]] = [
        privileged.TearDown(vm_id=vm_id),
        privileged.EnsureBridge(),
        privileged.CreateSnapshot(vm_id=vm_id, slot=slot, image_id=IMAGE),
        privileged.CheckSnapshot(vm_id=vm_id, slot=slot),
        privileged.PatchRoot(vm_id=vm_id, slot=slot),
        privileged.AttachWorkDisk(vm_id=vm_id, slot=slot),
        privileged.CreateTap(vm_id=vm_id, slot=slot),
        privileged.PrepareJail(vm_id=vm_id, slot=slot),
        privileged.CheckRuntime(),
        launch_request(vm_id, slot),
        privileged.GrantApiSocket(vm_id=vm_id, slot=slot),
        privileged.GrantVsock(vm_id=vm_id, slot=slot),
    ]
    return requests


def _pack(directory: Path) -> Path:
    """The package as it is, and msgspec as this venv has it: same Python, same architecture."""
    site = directory / "site"
    shutil.copytree(TREE / "src" / "banger", site / "banger", ignore=shutil.ignore_patterns("__pycache__"))
    found = Path(msgspec.__file__).parent
    shutil.copytree(found, site / "msgspec", ignore=shutil.ignore_patterns("__pycache__"))
    return Path(shutil.make_archive(str(directory / "site"), "tar", site))


@contextmanager
def installed(name: str, scratch: Path) -> Iterator[HelperHost]:
    """A host with the helper installed and confined by its units, one image and both kernels."""
    parcel = artefacts.ensure(cache.default_root())
    try:
        with Lab.up(name, artefacts=parcel.path) as lab:
            lab.put(_pack(scratch), "/root/site.tar")
            for unit in (TREE / "units").iterdir():
                lab.write(f"/etc/systemd/system/{unit.name}", unit.read_bytes().replace(b"@OWNER@", b"dev"))
            lab.run(["sh", "-c", INSTALL], timeout_s=120)
            helper_asked.bring(lab)
            with rights.asked_for(lab), helper_asked.asked(lab) as asks:
                yield HelperHost(lab, asks)
    finally:
        parcel.close()
