# SPDX-License-Identifier: MIT
"""Starts that fail for real reasons: each says why, leaves nothing, and works once that is mended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from banger.kernels import elf
from lab import artefacts
from lab.session import Lab
from tests.lab import user

pytestmark = pytest.mark.timeout(300)
GOOD_KERNEL, INITRD_KERNEL = artefacts.KERNELS
STATE = "/var/lib/banger"
BARE_KERNEL = f"/artefacts/kernels/{INITRD_KERNEL}/vmlinux"
HUNG_KERNEL = "/home/dev/hung-vmlinux"
# Leaves room for a row of the database, but not for a VM.
FILL = f"""
cd {STATE}
fallocate -l $(($(stat -f -c '%a*%S' .) - (32 << 20))) filler
"""
FILL_UP = f"cat /dev/zero 2>/dev/null > {STATE}/filler-rest; test $(stat -f -c %a {STATE}) = 0"


@pytest.fixture
def idle_host(installed_host: Lab) -> Iterator[Lab]:
    """The installed host without any VM, before the test and after it."""
    assert _names(installed_host) == []
    yield installed_host
    for name in _names(installed_host):
        user.banger(installed_host, "vm", "delete", name)


def test_no_space_on_the_host(idle_host: Lab) -> None:
    try:
        _as_owner(idle_host, FILL)
        said = _fails(idle_host, "vm", "create", "web", *user.TINY, step="preflight")
        assert f"no space left in {STATE}" in said
        assert "delete VMs or images" in said
        _expect_row(idle_host, "web", step="preflight", code="no_space")
        _as_owner(idle_host, FILL_UP)
        said = user.banger(idle_host, "vm", "create", "other", *user.TINY, check=False).error_text
        assert "no space left for banger's database" in said
        assert _names(idle_host) == ["web"]
    finally:
        _as_owner(idle_host, f"rm -f {STATE}/filler*")
    _expect_start(idle_host, "web")


def test_deleting_a_vm_helps_when_the_host_has_no_space_at_all(idle_host: Lab) -> None:
    user.banger(idle_host, "vm", "create", "old", *user.TINY)
    user.banger(idle_host, "vm", "stop", "old")
    try:
        _as_owner(idle_host, FILL + FILL_UP)
        user.banger(idle_host, "vm", "delete", "old")
    finally:
        _as_owner(idle_host, f"rm -f {STATE}/filler*")
    assert _names(idle_host) == []
    assert _as_owner(idle_host, f"ls {STATE}/vms") == ""


def test_missing_kernel_file(idle_host: Lab) -> None:
    path = f"{STATE}/kernels/{_kernel_id(idle_host, GOOD_KERNEL)}/vmlinux"
    with _aside(idle_host, path):
        said = _fails(idle_host, "vm", "create", "web", *user.TINY, step="preflight")
        assert path in said
        assert "import the kernel again" in said
        _expect_row(idle_host, "web", step="preflight", code="not_found")
        words = ("vm", "run", "--rm", "--name", "gone", *user.TINY, "--", "true")
        said = _fails(idle_host, *words, step="preflight", status=125)
        assert "nothing is left of gone" in said
        assert _names(idle_host) == ["web"]
    _expect_start(idle_host, "web")


def test_image_cut_short(idle_host: Lab) -> None:
    path = _rootfs(idle_host, "busybox")
    with _aside(idle_host, path):
        _as_owner(idle_host, f"head -c 32M {path}.aside > {path}")
        said = _fails(idle_host, "vm", "create", "web", *user.TINY, step="preflight")
        assert f"{path} has {32 << 20} bytes" in said
        _expect_row(idle_host, "web", step="preflight", code="operation_failed")
    _expect_start(idle_host, "web")


def test_foreign_link_with_the_tap_s_name_is_left_alone(idle_host: Lab) -> None:
    user.banger(idle_host, "vm", "create", "web", *user.TINY)
    user.banger(
        idle_host, "vm", "exec", "web", "--", "sh", "-c", "echo mine > /root/kept; echo mine > /kept"
    )
    user.banger(idle_host, "vm", "stop", "web")
    tap = f"tap-{user.shown(idle_host, 'web')['id'][:8]}"
    for add in (["ip", "link", "add", tap, "type", "dummy"], ["ip", "tuntap", "add", tap, "mode", "tap"]):
        idle_host.run(add)
        try:
            before = idle_host.run(["ip", "-d", "link", "show", tap]).text
            said = _fails(idle_host, "vm", "start", "web", step="tap")
            assert f"interface {tap} exists" in said
            assert "rename or delete it" in said
            assert idle_host.run(["ip", "-d", "link", "show", tap]).text == before
        finally:
            idle_host.run(["ip", "link", "delete", tap])
        _expect_row(idle_host, "web", step="tap", code="conflict")
    _expect_start(idle_host, "web")
    kept = user.banger(idle_host, "vm", "exec", "web", "--", "cat", "/root/kept", "/kept").text
    assert kept == "mine\nmine\n"


def test_kernel_that_cannot_boot_is_refused_at_import(idle_host: Lab) -> None:
    """A distribution's kernel without its initrd has no driver for the root disk."""
    said = user.banger(idle_host, "kernel", "import", BARE_KERNEL, "--name", "bare", check=False)
    assert said.status != 0
    assert "it cannot boot under Firecracker" in " ".join(said.error_text.split())
    listed = json.loads(user.banger(idle_host, "kernel", "list", "--json").text)
    assert "bare" not in {each["name"] for each in listed}


def test_kernel_that_panics(idle_host: Lab) -> None:
    """What cannot boot is refused at import, so it takes the place of one that can."""
    with _in_place(idle_host, BARE_KERNEL, "bare"):
        words = ("vm", "create", "web", "--kernel", "bare", *user.TINY)
        said = _fails(idle_host, *words, step="wait_vsock_agent")
        assert "the guest kernel of web panicked: VFS: Unable to mount root fs" in said
        assert "does the kernel suit the image?" in said
        _expect_row(idle_host, "web", step="wait_vsock_agent", code="operation_failed")
        assert "Kernel panic" in user.banger(idle_host, "vm", "logs", "web").text
        user.banger(idle_host, "vm", "set", "web", "--kernel", GOOD_KERNEL)
    _expect_start(idle_host, "web")
    # This one has no console to say so: its VMM ends as if its guest had powered off.
    script = "echo 2 > /proc/sys/vm/panic_on_oom && exec tail /dev/zero"
    user.banger(idle_host, "vm", "exec", "web", "--", "sh", "-c", script, check=False)
    row = user.ended(idle_host, "web")
    assert row["state"] == "error"
    assert "its guest was reset without going down first" in row["last_error"]["message"]


def test_image_without_our_init(idle_host: Lab) -> None:
    """The image still says that it holds the guest binary, so the start does not put it there."""
    path = _rootfs(idle_host, "debian-bookworm")
    _move_in_image(idle_host, path, "/.banger/guest", "/.banger/aside")
    try:
        words = ("vm", "create", "web", "--kernel", INITRD_KERNEL, *user.SMALL)
        said = _fails(idle_host, *words, step="wait_vsock_agent")
        assert "cannot execute /.banger/guest of the root disk" in said
        _expect_row(idle_host, "web", step="wait_vsock_agent", code="operation_failed")
    finally:
        _move_in_image(idle_host, path, "/.banger/aside", "/.banger/guest")
    _expect_start(idle_host, "web")


def test_agent_that_never_answers(idle_host: Lab) -> None:
    """A kernel that halts its processor for good: the VMM goes on, and nothing ever happens in it."""
    halt = b"\xfa\xf4\xeb\xfd Linux version 6.12.0-hung "  # cli; hlt; and again
    image = elf.wrap(halt.ljust(4096, b"\0"), load_address=0x1000000, entry_address=0x1000000)
    idle_host.write(HUNG_KERNEL, image)
    with _in_place(idle_host, HUNG_KERNEL, "hung"):
        with user.configured(idle_host, "agent_deadline_s = 5"):
            words = ("vm", "create", "web", "--kernel", "hung", *user.TINY)
            said = _fails(idle_host, *words, step="wait_vsock_agent")
        assert "the agent of web did not answer within 5 s" in said
        assert "agent_deadline_s" in said
        _expect_row(idle_host, "web", step="wait_vsock_agent", code="timed_out")
        user.banger(idle_host, "vm", "set", "web", "--kernel", GOOD_KERNEL)
    _expect_start(idle_host, "web")


def _fails(host: Lab, *words: str, step: str, status: int = 1) -> str:
    """What a command said that failed in this step; nothing of its VM may be left on the host."""
    result = user.banger(host, *words, check=False)
    assert result.status == status, result.error_text
    assert f"step: {step}\n" in result.error_text
    assert "also: " not in result.error_text, "an undo failed"
    assert user.leftovers(host) == ""
    if "create" in words:
        assert _as_owner(host, f"ls {STATE}/vms 2>/dev/null || true") == ""
    return result.error_text


def _expect_row(host: Lab, name: str, *, step: str, code: str) -> None:
    row = user.shown(host, name)
    assert row["state"] == "error"
    assert (row["last_error"]["step"], row["last_error"]["code"]) == (step, code)
    assert row["pid"] == 0


def _expect_start(host: Lab, name: str) -> None:
    user.banger(host, "vm", "start", name)
    row = user.shown(host, name)
    assert (row["state"], row["last_error"]) == ("running", None)
    assert user.banger(host, "vm", "exec", name, "--", "echo", "alive").text == "alive\n"


def _names(host: Lab) -> list[str]:
    return [vm["name"] for vm in json.loads(user.banger(host, "vm", "list", "--json").text)]


def _as_owner(host: Lab, script: str) -> str:
    return host.run(["sh", "-c", script], user=user.NAME).text


def _rootfs(host: Lab, name: str) -> str:
    image = json.loads(user.banger(host, "image", "show", name, "--json").text)
    return f"{STATE}/images/{image['id']}/rootfs.ext4"


@contextmanager
def _aside(host: Lab, path: str) -> Iterator[None]:
    _as_owner(host, f"mv {path} {path}.aside")
    try:
        yield
    finally:
        _as_owner(host, f"mv {path}.aside {path}")


@contextmanager
def _in_place(host: Lab, path: str, name: str) -> Iterator[None]:
    """A kernel is there inside the block, unchecked; at the end no VM may boot with it any more."""
    user.banger(host, "kernel", "import", f"/artefacts/kernels/{GOOD_KERNEL}", "--name", name)
    try:
        kept = f"{STATE}/kernels/{_kernel_id(host, name)}/vmlinux"
        _as_owner(host, f"chmod u+w {kept} && cat {path} > {kept}")
        yield
    except BaseException:
        user.banger(host, "vm", "delete", "web", check=False)
        raise
    finally:
        user.banger(host, "kernel", "delete", name)


def _kernel_id(host: Lab, name: str) -> str:
    kernels = json.loads(user.banger(host, "kernel", "list", "--json").text)
    return str(next(each["id"] for each in kernels if each["name"] == name))


def _move_in_image(host: Lab, path: str, source: str, target: str) -> None:
    """debugfs counts no links, so a link and an unlink are a rename."""
    for request in (f"link {source} {target}", f"unlink {source}"):
        host.run(["/usr/sbin/debugfs", "-w", "-R", request, path], user=user.NAME)
