# SPDX-License-Identifier: MIT
"""The installed helper plays every case that the fake plays: here device-mapper and VMMs are real."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.contract import privileged
from lab import provision
from lab.session import Lab
from tests.contract import privileged_cases, vmm_cases
from tests.lab import helper_asked

pytestmark = pytest.mark.without_rows
STATE = "/var/lib/banger"
PLACEHOLDER_IMAGE, PLACEHOLDER_KERNEL = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
DISKS = """
set -eu
for id in "$@"; do
  mkdir -p $STATE/vms/$id
  : > $STATE/vms/$id/overlay.cow
  truncate -s 64M $STATE/vms/$id/overlay.cow
  work=$STATE/vms/$id/work.ext4
  rm -f $work
  truncate -s 16M $work
  /usr/sbin/mkfs.ext4 -q $work
done
"""


class Sources:
    """Stand-ins while the cases are collected; the host says later what it really has."""

    image = PLACEHOLDER_IMAGE
    kernel = PLACEHOLDER_KERNEL
    initrd = False


@pytest.fixture(scope="module")
def ask(installed_host: Lab) -> Iterator[helper_asked.Ask]:
    """Asks the installed helper as the owner."""
    lab = installed_host
    image = lab.run(["sh", "-c", f"ls {STATE}/images"]).stdout.decode().split()[0]
    found = f'grep -lE \'"kind": *"direct"\' {STATE}/kernels/*/kernel.json'
    kernel = Path(lab.run(["sh", "-c", found]).stdout.decode().split()[0]).parent.name
    helper_asked.bring(lab)
    with helper_asked.asked(lab) as there:

        def batch(requests: Sequence[privileged.Request[Any]]) -> list[privileged.Reply]:
            said = msgspec.json.encode(requests)
            said = said.replace(PLACEHOLDER_IMAGE.encode(), image.encode())
            said = said.replace(PLACEHOLDER_KERNEL.encode(), kernel.encode())
            return there(msgspec.json.decode(said, type=list[privileged.AnyRequest]))

        yield batch


@pytest.fixture
def disks(installed_host: Lab) -> Iterator[None]:
    """Two VMs to be have an empty overlay and a work disk."""
    script = DISKS.replace("$STATE", STATE)
    ids = [privileged_cases.VM, privileged_cases.OTHER]
    installed_host.run(["sh", "-c", script, "disks", *ids], user=provision.OWNER)
    yield
    installed_host.run(["rm", "-r", *(f"{STATE}/vms/{vm_id}" for vm_id in ids)])


@pytest.mark.parametrize("case", privileged_cases.cases(Sources()), ids=str)
def test_case(
    disks: None,
    ask: helper_asked.Ask,
    case: privileged_cases.Case,
) -> None:
    privileged_cases.judge(case, ask)


def test_firecracker_behaves_at_its_sockets_as_the_fake_does(
    disks: None,
    ask: helper_asked.Ask,
    installed_host: Lab,
) -> None:
    vm_id, jails = privileged_cases.VM, "/var/lib/banger-root/jails"
    probe = Path(vmm_cases.__file__).read_bytes()
    installed_host.write("/usr/local/lib/banger/vmm_cases.py", probe)
    sockets = [privileged.vsock_socket(jails, vm_id), privileged.api_socket(jails, vm_id)]
    try:
        replies = ask(privileged_cases.start(Sources()))
        assert [reply.error for reply in replies if reply.error] == []
        program = ["python3", "/usr/local/lib/banger/vmm_cases.py", *sockets]
        said = json.loads(installed_host.run(program, user=provision.OWNER, timeout_s=150).stdout)
    finally:
        ask([privileged.TearDown(vm_id=vm_id), privileged.PurgeLogs(vm_id=vm_id)])
    assert said["handshakes"] == {name: joins for name, (_, joins) in vmm_cases.HANDSHAKES.items()}
    assert said["api_held_open"]
