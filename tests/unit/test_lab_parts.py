# SPDX-License-Identifier: MIT
"""The small parts of the lab: names, the remote line, the initrd, the processor probe, the command line."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from banger.system import kvm
from lab import (
    accel,
    cache,
    cli,
    command,
    demo,
    errors,
    image,
    initrd,
    instance,
    layer,
    provision,
    remote,
    setup,
)

AWKWARD_WORDS = ["", " ", "a b", "'", '"', "$HOME", "`id`", "a\nb", "*", "\\", ";exit 3", "-n"]


def _sh(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=10, check=False)


def test_remote_line_keeps_words_and_status() -> None:
    done = _sh(remote.remote_line(["printf", "%s\\0", *AWKWARD_WORDS], timeout_s=5))
    assert done.stdout.split("\0")[:-1] == AWKWARD_WORDS
    assert _sh(remote.remote_line(["sh", "-c", "exit 9"], timeout_s=5)).returncode == 9
    assert _sh(remote.remote_line(["sh", "-c", "kill -9 $$"], timeout_s=5)).returncode == 137


def test_remote_line_sets_directory_environment_and_limit() -> None:
    line = remote.remote_line(["sh", "-c", 'pwd; echo "$A"'], cwd="/", env={"A": "x y"}, timeout_s=5)
    assert _sh(line).stdout == "/\nx y\n"
    assert _sh(remote.remote_line(["sleep", "9"], timeout_s=0.2)).returncode in remote.TIMED_OUT


def test_command_says_what_is_missing_what_failed_and_what_hung() -> None:
    with pytest.raises(errors.CommandError, match="lab setup"):
        command.run(["no-such-program"], timeout_s=1)
    with pytest.raises(errors.CommandError, match="status 3"):
        command.run(["sh", "-c", "exit 3"], timeout_s=5)
    with pytest.raises(errors.CommandError, match="within"):
        command.run(["sleep", "9"], timeout_s=0.2)


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "-a", "a-", "a" * 33, "a b"])
def test_bad_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.LabError, match="not a lab's name"):
        instance.create(tmp_path, name)


def test_name_is_taken_until_let_go(tmp_path: Path) -> None:
    held = instance.create(tmp_path, "one")
    with pytest.raises(errors.BusyError):
        instance.create(tmp_path, "one")
    assert not instance.delete(tmp_path, "one")
    instance.prune(tmp_path)
    assert held.path.is_dir()
    held.close()
    instance.prune(tmp_path)
    assert not held.path.exists()


def test_layer_without_what_it_lies_on_is_not_found(tmp_path: Path) -> None:
    def save(stage: Path) -> None:
        (stage / "disk.qcow2").touch()
        (stage / "layer.json").write_text('{"image_key": "gone", "parent_key": null, "machine": ""}')

    cache.Cache(tmp_path, "layer", 2).ensure("key", save).close()
    assert layer.find(tmp_path, "key") is None
    with pytest.raises(errors.LabError, match="no layer"):
        layer.need(tmp_path, "key")


def test_initrd_loads_modules_after_what_they_need(tmp_path: Path) -> None:
    modules = tmp_path / "lib/modules/6.1"
    modules.mkdir(parents=True)
    depends = {
        "virtio_pci.ko": "virtio_ring.ko",
        "virtio_ring.ko": "",
        "virtio_blk.ko": "virtio_ring.ko",
        "virtio_net.ko": "",
        "virtio-rng.ko": "",
        "kvm-amd.ko": "kvm.ko",
        "kvm-intel.ko": "kvm.ko",
        "kvm.ko": "",
    }
    for name in depends:
        (modules / name).write_text(name)
    (modules / "modules.dep").write_text("".join(f"{name}: {need}\n" for name, need in depends.items()))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/busybox").write_text("busybox")
    files = _unpack(initrd.build(tmp_path, b"init"))
    order = [Path(line).name for line in files["modules"].decode().split()]
    assert order.index("virtio_ring.ko") < order.index("virtio_pci.ko")
    assert "kvm.ko" in order
    assert "kvm-amd.ko" not in order
    assert files["kvm/kvm_amd.ko"] == b"kvm-amd.ko"
    assert files["init"] == b"init"


def _unpack(archive: bytes) -> dict[str, bytes]:
    """Read the "newc" format as the kernel does."""
    files: dict[str, bytes] = {}
    offset = 0
    while True:
        assert archive[offset : offset + 6] == b"070701"
        size, name_size = (int(archive[offset + at : offset + at + 8], 16) for at in (54, 94))
        name = archive[offset + 110 : offset + 110 + name_size - 1].decode()
        start = (offset + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return files
        files[name] = archive[start : start + size]
        offset = (start + size + 3) & ~3


def test_image_key_is_stable_and_follows_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = image.recipe_key()
    assert image.recipe_key() == before
    (tmp_path / "packages.txt").write_text("other")
    monkeypatch.setattr(image, "RECIPE", tmp_path)
    assert image.recipe_key() != before


def test_accelerator_is_hardware_only_when_the_flags_say_so() -> None:
    chosen = accel.choose()
    assert chosen.name in ("kvm", "tcg")
    if not kvm.cpu_flags(Path("/proc/cpuinfo").read_text()) & {"svm", "vmx"}:
        assert chosen.name == "tcg"


def test_cpu_flags_are_whole_words() -> None:
    assert "vmx" not in kvm.cpu_flags("flags\t\t: fpu vmx_foo svm_lock\n")
    assert kvm.cpu_flags("model name: x\nflags : fpu svm\n") == {"fpu", "svm"}


def test_package_list_has_what_the_code_starts() -> None:
    assert {"mmdebstrap", "qemu-system-x86", "qemu-utils", "openssh-client"} <= set(setup._wanted())


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    assert "python -m lab up" in capsys.readouterr().out


def test_absent_lab_is_an_error_with_a_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BANGER_LAB_CACHE", os.fspath(tmp_path))
    assert cli.main(["run", "--name", "none", "--", "true"]) == 1
    assert "python -m lab up --name none" in capsys.readouterr().err
    assert cli.main(["down", "--name", "none"]) == 0


def test_this_machine_is_used_only_when_it_can_and_for_somebody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing is installed")

    monkeypatch.setattr(provision, "install", never)
    monkeypatch.setattr(demo, "missing_locally", lambda: ["no device-mapper"])
    assert demo.main(["--host", "local", "--owner", "me"]) == 1
    assert "no device-mapper" in capsys.readouterr().err
    monkeypatch.setattr(demo, "missing_locally", list)
    assert demo.main(["--host", "local", "--owner", ""]) == 1
    assert "OWNER=you" in capsys.readouterr().err


def shell_of_a_lab(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, answers: bool, says: str
) -> remote.Shell:
    """Whose lab says this to any command, and answers, or does not, when it is asked whether it is alive."""
    monkeypatch.setattr(remote, "LAST_TRY_S", 0.3)
    stub = f'case "$1" in true) exec sleep {0 if answers else 9};; *) {says};; esac'
    monkeypatch.setattr(remote.Shell, "ssh_argv", lambda *_: ["sh", "-c", stub, "ssh"])
    return remote.Shell(directory, 1, directory, directory)


@pytest.mark.parametrize("answers", [True, False])
def test_a_lab_that_stopped_answering_is_asked_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """And one that only ran out of time is: without this a whole suite waits for each of its commands."""
    monkeypatch.setattr(remote, "GRACE_S", 0.1)
    shell = shell_of_a_lab(tmp_path, monkeypatch, answers=answers, says="exec sleep 9")
    kind, again = (errors.CommandError, "within") if answers else (errors.HungError, "before")
    with pytest.raises(kind):
        shell.run(["anything"], timeout_s=0.1)
    with pytest.raises(kind, match=again):
        shell.run(["anything"], timeout_s=0.1)


@pytest.mark.parametrize("answers", [True, False])
def test_a_lab_that_stops_answering_is_seen_before_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """And one that goes on answering is waited for, and loses nothing of what it says."""
    monkeypatch.setattr(remote, "LOOK_EVERY_S", 0.1)
    says = "cat; sleep 0.5; echo end" if answers else "exec sleep 9"
    shell = shell_of_a_lab(tmp_path, monkeypatch, answers=answers, says=says)
    if answers:
        assert shell.run(["anything"], stdin=b"begin\n", timeout_s=30).text == "begin\nend\n"
    else:
        with pytest.raises(errors.HungError):
            shell.run(["anything"], timeout_s=3600)


def test_an_sshd_that_is_slow_to_speak_is_given_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that connects is answered late, as by a busy lab: waiting always as long would never end."""
    monkeypatch.setattr(remote, "FIRST_TRY_S", 0.02)
    late_s = 0.1

    def serve(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            time.sleep(late_s)
            client.sendall(b"SSH-2.0-late\r\n")

    def accept(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(server.accept()[0],)).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, args=(server,)).start()
        remote._wait_banner(server.getsockname()[1], time.monotonic() + 10, lambda: None)
        server.shutdown(socket.SHUT_RDWR)
