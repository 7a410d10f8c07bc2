# SPDX-License-Identifier: MIT
"""The main job, for real: an installed banger boots microVMs on Firecracker and runs commands in them."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Iterator

import pytest

from banger import guest_binary
from banger.contract import guest
from lab import artefacts, demo, limits, provision, resume
from lab.session import Lab
from tests.lab import user

pytestmark = pytest.mark.timeout(600)
ROOMY = (*user.ONE_CPU, "--memory", "256M", "--disk-size", "256M")

# How much a VM's processes take of the host, once they have taken two seconds of its processors.
_LOOK_AT_LIMITS = """
import json, os, sys, time
cgroup = f"/sys/fs/cgroup/banger.slice/banger-vms.service/{sys.argv[1]}"
read = lambda name: open(f"{cgroup}/{name}").read().split()
used_s = lambda: int(read("cpu.stat")[1]) / 1e6
began, before = time.monotonic(), used_s()
while used_s() < before + 2:
    time.sleep(0.1)
cpu = (used_s() - before) / (time.monotonic() - began)
most, period = map(int, read("cpu.max"))
print(json.dumps({
    "cpu": cpu,
    "cpu_max": most / period,
    "pids": int(read("pids.current")[0]),
    "pids_max": int(read("pids.max")[0]),
    "memory": int(read("memory.current")[0]),
    "memory_max": int(read("memory.max")[0]),
    "work_disk": os.stat(f"/var/lib/banger/vms/{sys.argv[1]}/work.ext4").st_blocks * 512,
}))
"""


@pytest.fixture(scope="module")
def web(installed_host: Lab) -> Iterator[Lab]:
    """The installed host with a VM named web running, for all tests here: its boot takes the longest."""
    user.banger(installed_host, "vm", "create", "web", *ROOMY)
    yield installed_host
    user.banger(installed_host, "vm", "delete", "web", check=False)


@pytest.mark.parametrize("kernel", artefacts.KERNELS)
def test_vm_run_gives_the_command_s_output_and_status(installed_host: Lab, kernel: str) -> None:
    script = "cat /etc/os-release; uname -r; grep -cwE 'svm|vmx' /proc/cpuinfo; exit 7"
    words = ("--rm", "--kernel", kernel, *ROOMY)
    result = user.banger(installed_host, "vm", "run", *words, "--", "sh", "-c", script, check=False)
    assert result.status == 7, result.error_text
    assert "Debian GNU/Linux 12" in result.text
    assert kernel.partition("-")[2] in result.text
    assert result.text.endswith("\n0\n"), "the lab's processor has SVM, and guests are not given it"
    assert "wait_vsock_agent" in result.error_text
    assert user.leftovers(installed_host) == ""
    assert json.loads(user.banger(installed_host, "vm", "list", "--json").text) == []


def test_make_run_shows_the_stages_and_what_the_guest_says(
    installed_host: Lab, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As far as it differs from here: the lab is this one, and its guest as small as these."""
    monkeypatch.setattr(demo, "COMMAND", (*demo.COMMAND[:4], *ROOMY, *demo.COMMAND[4:]))
    monkeypatch.setattr(provision, "installed", lambda name: contextlib.nullcontext(installed_host))
    assert demo.main([]) == 0
    out, err = capfd.readouterr()
    assert "Linux" in out
    assert 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"' in out
    stages = [err.find(stage) for stage in ("preflight", "boot_firecracker", "wait_vsock_agent", "finalize")]
    assert -1 < stages[0] < stages[1] < stages[2] < stages[3], err


def test_services_restarted_or_killed_leave_the_guest_running(web: Lab) -> None:
    before = user.shown(web, "web")
    for command in (
        ["systemctl", "restart", "bangerd"],
        ["systemctl", "stop", "bangerd-root.service"],
        ["systemctl", "kill", "-s", "KILL", "bangerd", "bangerd-root"],
    ):
        web.run(command, check=False)
        web.run(["systemctl", "start", "bangerd-root.socket", "bangerd"])
        after = user.shown(web, "web")
        assert (after["pid"], after["boot_id"]) == (before["pid"], before["boot_id"]), command
        assert user.banger(web, "vm", "exec", "web", "--", "echo", "alive").text == "alive\n"
    seen = user.banger(web, "vm", "exec", "web", "--", "cat", "/proc/sys/kernel/random/boot_id").text.strip()
    assert seen == before["boot_id"]


_WATCHED = """
mkdir -p /run/systemd/system/bangerd.service.d
printf '[Service]\\nWatchdogSec=6s\\n' >/run/systemd/system/bangerd.service.d/watchdog.conf
systemctl daemon-reload
systemctl restart bangerd
kill -STOP $(systemctl show -P MainPID bangerd)
"""
_UNWATCHED = "rm -r /run/systemd/system/bangerd.service.d; systemctl daemon-reload"


@pytest.mark.long
def test_a_daemon_that_hangs_is_ended_by_systemd_and_its_guest_goes_on(web: Lab) -> None:
    """Its watchdog is as in the unit, and only shorter."""
    before = user.shown(web, "web")
    looked = ["systemctl", "show", "-P", "NRestarts", "-P", "ActiveState", "bangerd"]
    web.run(["sh", "-ec", _WATCHED])
    try:
        deadline = time.monotonic() + limits.patient(120)
        while (said := sorted(web.run(looked).text.split())) != ["1", "active"]:
            assert time.monotonic() < deadline, said
    finally:
        web.run(["sh", "-ec", _UNWATCHED])
    assert "Watchdog timeout" in web.run(["journalctl", "-u", "bangerd", "-o", "cat"]).text
    (row,) = json.loads(user.banger(web, "vm", "list", "--json").text)
    assert (row["state"], row["pid"], row["boot_id"]) == ("running", before["pid"], before["boot_id"])
    seen = user.banger(web, "vm", "exec", "web", "--", "cat", "/proc/sys/kernel/random/boot_id").text.strip()
    assert seen == before["boot_id"]


def test_a_host_whose_clock_is_set_ends_no_vm_and_keeps_none_longer(web: Lab) -> None:
    """Two hours on, past the ends of both its times, and then four back; guests have what the host has."""
    user.banger(web, "vm", "set", "web", "--ttl", "90m", "--idle-stop", "60m")
    before = user.shown(web, "web")
    try:
        for step_h in (2, -4):
            web.run(["date", "-s", f"{step_h:+d} hours"])
            deadline = time.monotonic() + limits.patient(60)
            while abs(_now(web) - int(user.banger(web, "vm", "exec", "web", "--", "date", "+%s").text)) > 60:
                assert time.monotonic() < deadline
            row = user.shown(web, "web")
            assert (row["state"], row["pid"], row["boot_id"]) == (
                "running",
                before["pid"],
                before["boot_id"],
            )
            for name, whole_s in (("ttl_ends_at", 90 * 60), ("idle_stop_at", 60 * 60)):
                left_s = datetime.datetime.fromisoformat(row[name]).timestamp() - _now(web)
                assert whole_s - 600 < left_s <= whole_s + 1, (step_h, name, left_s)
    finally:
        resume.refresh(web.shell)
        user.banger(web, "vm", "set", "web", "--ttl", "off", "--idle-stop", "off")


def _now(host: Lab) -> int:
    return int(host.run(["date", "+%s"]).text)


def test_the_default_image_reaches_its_target(web: Lab) -> None:
    """With no unit that failed and no job that waits, for a device that never comes or anything else."""
    told = user.banger(web, "vm", "exec", "web", "--", "sh", "-c", user.BOOTED).text
    assert told == "running\ndebian 12\n"


def test_a_daemon_that_starts_sets_a_clock_that_is_wrong(web: Lab) -> None:
    def guest_s() -> int:
        return int(user.banger(web, "vm", "exec", "web", "--", "date", "+%s").text)

    user.banger(web, "vm", "exec", "web", "--", "date", "-s", "@1000000000")
    web.run(["systemctl", "restart", "bangerd"])
    deadline = time.monotonic() + limits.patient(60)
    while guest_s() < 1_100_000_000:
        assert time.monotonic() < deadline
    before = int(web.run(["date", "+%s"]).text)
    told = guest_s()
    assert before - 1 <= told <= int(web.run(["date", "+%s"]).text) + 1


def test_what_was_written_just_before_stop_is_there_after_start(web: Lab) -> None:
    """On a disk that has grown, which root's resize2fs does with what its unit leaves it."""
    write = "echo unsynced > /root/kept; echo unsynced > /var/kept"
    user.banger(web, "vm", "exec", "web", "--", "sh", "-c", write)
    first = user.shown(web, "web")["boot_id"]
    user.banger(web, "vm", "stop", "web")
    assert user.shown(web, "web")["state"] == "stopped"
    assert user.leftovers(web) == ""
    user.banger(web, "vm", "set", "web", "--disk-size", "260M")
    user.banger(web, "vm", "start", "web")
    read = user.banger(web, "vm", "exec", "web", "--", "cat", "/root/kept", "/var/kept").text
    assert read == "unsynced\nunsynced\n"
    assert user.shown(web, "web")["boot_id"] != first


def test_some_mebibytes_each_way_arrive_intact(web: Lab) -> None:
    """Through Firecracker's vsock. Natively it is 256 MiB, which would take minutes here."""
    sent = os.urandom(3 << 20)
    assert user.banger(web, "vm", "exec", "web", "--", "cat", stdin=sent).stdout == sent


def test_a_guest_killed_by_a_signal_gives_128_and_its_number(web: Lab) -> None:
    result = user.banger(web, "vm", "exec", "web", "--", "sh", "-c", "kill -KILL $$", check=False)
    assert result.status == 137


def test_another_user_is_refused_by_both_services(installed_host: Lab) -> None:
    installed_host.run(["sh", "-c", "id stranger 2>/dev/null || useradd stranger"])
    for path in (
        "/run/banger/bangerd.sock",
        "/run/banger-root/bangerd-root.sock",
        "/run/banger-build/bangerd-build.sock",
    ):
        connect = f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})"
        result = installed_host.run(["python3", "-c", connect], user="stranger", check=False)
        assert "PermissionError" in result.error_text, path


STRANGERS = """
import contextlib, socket, subprocess, time
agent = subprocess.Popen(["/root/agent", "agent"])
hello = bytes.fromhex("%s")
try:
    for port in (1023, 1021):
        deadline = time.monotonic() + 80
        while True:
            client = socket.socket(socket.AF_VSOCK)
            client.settimeout(80)
            try:
                client.connect((1, port))
                break
            except ConnectionError:
                assert agent.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        said = b""
        with contextlib.suppress(ConnectionError):
            client.sendall(hello)
            said = client.recv(100)
        print(port, said)
finally:
    agent.kill()
    agent.wait()
"""


def test_the_agent_hangs_up_on_whoever_is_not_its_host(installed_host: Lab) -> None:
    """Started here, where a program can connect by vsock as it could beside it in a guest: from CID 1."""
    installed_host.put(guest_binary.path("x86_64"), "/root/agent")
    installed_host.run(["modprobe", "vsock_loopback"])
    try:
        script = STRANGERS % guest.hello().hex()
        assert installed_host.run(["python3", "-c", script], timeout_s=60).text == "1023 b''\n1021 b''\n"
    finally:
        installed_host.run(["modprobe", "-r", "vsock_loopback"], check=False)
        installed_host.run(["rm", "/root/agent"])
    looked = ["journalctl", "-k", "-o", "cat", "-g", "refused a connection that is not"]
    assert installed_host.run(looked).text == "refused a connection that is not the host's\n" * 2


def test_a_guest_that_runs_wild_stays_within_its_limits(web: Lab) -> None:
    """It fills its disk, spins and forks without end; the host goes on. The next test takes it away."""
    vm_id = user.shown(web, "web")["id"]
    fill = "fallocate -l 180M /root/most; dd if=/dev/zero of=/root/full bs=1M; true"
    assert "No space left" in user.banger(web, "vm", "exec", "web", "--", "sh", "-c", fill).error_text
    bomb = "b() { b | b & }; while :; do :; done & b"
    wild = f"setsid sh -c '{bomb}' >/dev/null 2>&1 </dev/null &"
    user.banger(web, "vm", "exec", "web", "--", "sh", "-c", wild)
    looked = web.run(["python3", "-S", "-c", _LOOK_AT_LIMITS, vm_id]).text
    seen = json.loads(looked)
    assert seen["cpu"] <= seen["cpu_max"] * 1.05, seen
    assert seen["pids"] <= seen["pids_max"], seen
    assert seen["memory"] <= seen["memory_max"] < 512 << 20, seen
    assert seen["work_disk"] <= 260 << 20, seen
    assert [vm["name"] for vm in json.loads(user.banger(web, "vm", "list", "--json").text)] == ["web"]


def test_kill_and_delete_leave_nothing(web: Lab) -> None:
    """The last one: no VM is left."""
    user.banger(web, "vm", "kill", "web")
    assert user.leftovers(web) == ""
    user.banger(web, "vm", "delete", "web")
    assert web.run(["sh", "-c", "ls /var/lib/banger/vms /var/lib/banger-root/logs"]).text.split() == [
        "/var/lib/banger-root/logs:",
        "/var/lib/banger/vms:",
    ]
