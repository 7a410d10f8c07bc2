# SPDX-License-Identifier: MIT
"""The lab keeps its promises: exact statuses and bytes, disks that survive power cuts, nothing left over."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import cache, errors, instance, process, qemu, remote
from lab.session import Lab

NewName = Callable[[str], str]
CLOCK_ERROR_S = 0.5


def test_has_what_the_product_needs(host: Lab) -> None:
    devices = ["/dev/kvm", "/dev/mapper/control", "/dev/loop-control", "/dev/net/tun", "/dev/vhost-vsock"]
    host.run(["ls", *devices])
    assert host.run(["stat", "-f", "-c", "%T", "/sys/fs/cgroup"]).text == "cgroup2fs\n"
    assert host.run(["systemctl", "is-system-running"]).text == "running\n"


def test_runs_loop_and_device_mapper_snapshot(host: Lab) -> None:
    script = """
    set -eu
    cd "$(mktemp -d)"
    truncate -s 64M base cow
    mkfs.ext4 -q base
    origin=$(losetup -f --show -r base)
    store=$(losetup -f --show cow)
    dmsetup create lab-test --table "0 $(blockdev --getsz "$origin") snapshot $origin $store P 8"
    mkdir m
    mount /dev/mapper/lab-test m
    echo written >m/file
    umount m
    dmsetup remove lab-test
    losetup -d "$origin" "$store"
    """
    host.run(["sh", "-c", script])


@pytest.mark.parametrize("status", [0, 1, 7, 124, 255])
def test_exit_status_is_exact(host: Lab, status: int) -> None:
    assert host.run(["sh", "-c", f"exit {status}"], check=False).status == status


def test_death_by_signal_is_128_and_its_number(host: Lab) -> None:
    assert host.run(["sh", "-c", "kill -9 $$"], check=False).status == 128 + signal.SIGKILL
    assert host.run(["sh", "-c", "kill -15 $$"], check=False).status == 128 + signal.SIGTERM


def test_failure_raises_with_what_the_command_said(host: Lab) -> None:
    with pytest.raises(remote.RunError, match="No such file"):
        host.run(["ls", "/nowhere"])


def test_arguments_arrive_exactly(host: Lab) -> None:
    words = ["", " ", "a b", "'", '"', "$HOME", "`id`", "a\nb", "*", "\\", "ü", ";exit 3", "-n"]
    result = host.run(["printf", "%s\\0", *words])
    assert result.stdout.decode().split("\0")[:-1] == words


def test_streams_are_bytes_and_apart(host: Lab) -> None:
    data = bytes(range(256)) * 1024
    result = host.run(["sh", "-c", "tee /dev/stderr"], stdin=data)
    assert result.stdout == data
    assert result.stderr == data


def test_user_directory_and_environment(host: Lab) -> None:
    script = 'id -un; pwd; echo "$WORD"; echo "$HOME"'
    result = host.run(["sh", "-c", script], user="dev", cwd="/tmp", env={"WORD": "a b"})
    assert result.text.splitlines() == ["dev", "/tmp", "a b", "/home/dev"]


def test_deadline_kills_the_remote_side(host: Lab) -> None:
    started = time.monotonic()
    with pytest.raises(errors.RunTimeoutError):
        host.run(["sh", "-c", "sleep 97 & sleep 97"], timeout_s=1)
    assert time.monotonic() - started < 10
    assert host.run(["pgrep", "-x", "sleep"], check=False).text == ""


def test_file_goes_in_and_comes_back(host: Lab, tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "in").write_bytes(content)
    (tmp_path / "in").chmod(0o751)
    host.put(tmp_path / "in", "/srv/deep/er/file")
    shown = host.run(["stat", "-c", "%a %u %s", "/srv/deep/er/file"]).text
    assert shown == f"751 0 {len(content)}\n"
    host.get("/srv/deep/er/file", tmp_path / "new" / "out")
    assert (tmp_path / "new" / "out").read_bytes() == content


def test_tree_goes_in_and_comes_back(host: Lab, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_text("text")
    (tree / "link").symlink_to("sub/file")
    host.put(tree, "/home/dev/tree", owner="1000:1000")
    assert host.run(["stat", "-c", "%U", "/home/dev/tree/sub/file"]).text == "dev\n"
    host.get("/home/dev/tree", tmp_path / "back")
    assert (tmp_path / "back" / "link").readlink() == Path("sub/file")
    assert (tmp_path / "back" / "sub" / "file").read_text() == "text"


def test_missing_file_cannot_be_copied_out(host: Lab, tmp_path: Path) -> None:
    with pytest.raises(errors.LabError, match="nowhere"):
        host.get("/nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_outside_can_be_reached(host: Lab) -> None:
    probe = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)"
    assert host.run(["python3", "-c", probe], check=False).status == 1


def test_restored_host_has_the_time_and_its_own_randomness(fresh_host: Lab, new_name: NewName) -> None:
    _expect_right_clock(fresh_host)
    read = ["head", "-c", "32", "/dev/urandom"]
    with Lab.up(new_name("twin")) as twin:
        assert fresh_host.run(read).stdout != twin.run(read).stdout


def test_two_labs_at_once_do_not_meet(fresh_host: Lab, new_name: NewName) -> None:
    with Lab.up(new_name("other")) as other:
        fresh_host.write("/root/name", b"first")
        other.write("/root/name", b"second")
        assert fresh_host.run(["cat", "/root/name"]).text == "first"
        assert other.machine.record.ssh_port != fresh_host.machine.record.ssh_port


@pytest.mark.long
def test_power_cut_keeps_what_was_flushed(fresh_host: Lab) -> None:
    content = os.urandom(1 << 20)
    fresh_host.write("/root/kept", content)
    fresh_host.run(["sync"])
    before = fresh_host.run(["cat", "/proc/sys/kernel/random/boot_id"]).text
    fresh_host.power_cut()
    with pytest.raises(errors.NotRunningError):
        fresh_host.run(["true"])
    fresh_host.start()
    assert fresh_host.run(["cat", "/proc/sys/kernel/random/boot_id"]).text != before
    digest = fresh_host.run(["sha256sum", "/root/kept"]).text.split()[0]
    assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.long
def test_reboot_and_artefacts(fresh_host: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("handed over")
    (tmp_path / "dir").mkdir()
    fresh_host.attach_artefacts(tmp_path)
    assert fresh_host.run(["ls", "/artefacts"]).text == "dir\nfile\n"
    before = fresh_host.run(["cat", "/proc/sys/kernel/random/boot_id"]).text
    fresh_host.reboot()
    assert fresh_host.run(["cat", "/proc/sys/kernel/random/boot_id"]).text != before
    assert fresh_host.run(["cat", "/artefacts/file"]).text == "handed over"
    assert fresh_host.run(["touch", "/artefacts/new"], check=False).status == 1


@pytest.mark.parametrize("with_state", [True, pytest.param(False, marks=pytest.mark.long)])
def test_layer_carries_on_where_it_was_kept(tmp_path: Path, with_state: bool, new_name: NewName) -> None:
    (tmp_path / "file").touch()
    key = new_name("layer")
    with Lab.up(new_name("maker"), artefacts=tmp_path) as maker:
        maker.write("/root/prepared", b"yes")
        maker.commit(key, with_state=with_state)
    try:
        with Lab.up(new_name("user"), layer_key=key, artefacts=tmp_path) as lab:
            assert lab.run(["cat", "/root/prepared"]).text == "yes"
            assert lab.run(["ls", "/artefacts"]).text == "file\n"
            _expect_right_clock(lab)
    finally:
        assert cache.Cache(cache.default_root(), "layer", 100).delete(key)


def test_evidence_is_saved(fresh_host: Lab, tmp_path: Path) -> None:
    fresh_host.write("/var/lib/banger-root/logs/0123456789ab/console.log", b"a guest's words")
    fresh_host.write("/var/lib/banger-root/jails/firecracker/x/root/vmlinux.config", b"a jail's file")
    fresh_host.evidence(tmp_path)
    saved = {path.name for path in tmp_path.iterdir()}
    assert {"console.log", "journal.txt", "nft.json", "ip-addr.json", "losetup.txt"} <= saved
    assert "problems.txt" not in saved
    assert b"a guest's words" in (tmp_path / "logs.tar").read_bytes()
    assert b"a jail's file" in (tmp_path / "jails.tar").read_bytes()


def test_evidence_of_a_dead_lab_says_so(fresh_host: Lab, tmp_path: Path) -> None:
    fresh_host.power_cut()
    fresh_host.evidence(tmp_path)
    assert "switched off" in (tmp_path / "problems.txt").read_text()


def test_name_in_use_is_refused(fresh_host: Lab) -> None:
    with pytest.raises(errors.BusyError):
        Lab.up(fresh_host.name)
    fresh_host.run(["true"])


def test_qemu_dies_with_the_session(tmp_path: Path, new_name: NewName) -> None:
    name = new_name("orphan")
    script = f"""
from lab.session import Lab
lab = Lab.up({name!r})
print(lab.machine.record.qemu.pid, flush=True)
import signal
signal.pause()
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    with owner:
        assert owner.stdout is not None
        qemu = process.identify(int(owner.stdout.readline()))
        assert qemu is not None
        owner.kill()
    process.wait_gone(qemu, timeout_s=10)
    deadline = time.monotonic() + 10
    while (gone := instance.delete(cache.default_root(), name)) is False and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone


def test_command_line_lab_outlives_its_command_until_down(new_name: NewName, tmp_path: Path) -> None:
    name = new_name("cli")
    sent, back = tmp_path / "sent", tmp_path / "back"
    sent.write_text("there and back")
    assert _lab("up", "--name", name).returncode == 0
    try:
        assert name in _lab("status").stdout
        done = _lab("run", "--name", name, "--", "sh", "-c", "echo out; echo err >&2; exit 9")
        assert (done.returncode, done.stdout, done.stderr) == (9, "out\n", "err\n")
        assert _lab("up", "--name", name).returncode == 1
        typed = _lab("ssh", "--name", name, "--user", "dev", typed="id -un; exit 5\n")
        assert (typed.returncode, typed.stdout.splitlines()[-1]) == (5, "dev")
        assert _lab("cp", "--name", name, str(sent), "lab:/root/there").returncode == 0
        assert _lab("cp", "--name", name, "lab:/root/there", str(back)).returncode == 0
        assert back.read_text() == "there and back"
        assert "one side must be in the lab" in _lab("cp", "--name", name, str(sent), str(back)).stderr
        assert "systemd" in _lab("logs", "--name", name, "--journal").stdout
        kept = cache.default_root() / "labs" / name
        for option, file in (("", qemu.CONSOLE), ("--qemu", qemu.QEMU_LOG)):
            (kept / file).write_text(f"what {file} says")
            assert _lab("logs", "--name", name, *option.split()).stdout == f"what {file} says"
    finally:
        assert _lab("down", "--name", name).returncode == 0
    assert _lab("run", "--name", name, "--", "true").returncode == 1


def _expect_right_clock(lab: Lab) -> None:
    before = time.time()
    told = float(lab.run(["date", "+%s.%N"]).text)
    assert before - CLOCK_ERROR_S < told < time.time() + CLOCK_ERROR_S


def _lab(*words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    argv, tree = [sys.executable, "-m", "lab", *words], Path(__file__).parents[2]
    return subprocess.run(
        argv, cwd=tree, input=typed, capture_output=True, text=True, timeout=120, check=False
    )
