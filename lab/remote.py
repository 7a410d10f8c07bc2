# SPDX-License-Identifier: MIT
"""Runs commands in the lab and moves files, over one shared ssh connection. Used by session and cli."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shlex
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from lab import command, errors, limits

CONTROL = "ssh.sock"
SSH_OWN_FAILURE = 255
TIMED_OUT = (124, 128 + 9)
KILL_AFTER_S = 2
GRACE_S = 15
DEFAULT_TIMEOUT_S = 60
FIRST_TRY_S = 0.5
LAST_TRY_S = 120
LOOK_EVERY_S = 60


class RunError(errors.LabError):
    """A command in the lab that had to succeed did not."""

    def __init__(self, result: command.Result) -> None:
        shown = shlex.join(result.argv)
        super().__init__(
            f"in the lab: {shown}: status {result.status}", hint=result.error_text.strip()[-4000:]
        )
        self.result = result


class Shell:
    """The way into one lab. Its control socket lies in the lab's directory, which every ssh runs in."""

    def __init__(self, directory: Path, port: int, private_key: Path, known_hosts: Path) -> None:
        self._directory = directory
        self._port = port
        self._private_key = private_key
        self._known_hosts = known_hosts
        self._is_dead = False

    def ssh_argv(self, *options: str, user: str = "root") -> list[str]:
        """Give the ssh command up to the remote words; run it in the lab's directory."""
        settings = {
            "BatchMode": "yes",
            "Ciphers": "aes128-gcm@openssh.com",
            "ControlPath": CONTROL if user == "root" else "none",
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": "lab",
            "IdentitiesOnly": "yes",
            "IdentityFile": str(self._private_key),
            "KexAlgorithms": "curve25519-sha256",
            "LogLevel": "ERROR",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(self._known_hosts),
        }
        argv = ["ssh", "-F", "none", "-p", str(self._port)]
        for name, value in settings.items():
            argv += ["-o", f"{name}={value}"]
        return [*argv, *options, f"{user}@127.0.0.1"]

    def connect(self, *, deadline: float, check: Callable[[], None]) -> None:
        """Wait until the lab's sshd answers and open the connection that all commands share."""
        self.close()
        _wait_banner(self._port, deadline, check)
        left_s = max(5.0, deadline - time.monotonic())
        command.run(self.ssh_argv("-M", "-N", "-f"), timeout_s=left_s, cwd=self._directory)

    def close(self) -> None:
        """Close the shared connection, if it is open."""
        if (self._directory / CONTROL).exists():
            command.run(self.ssh_argv("-O", "exit"), timeout_s=10, cwd=self._directory, check=False)
            (self._directory / CONTROL).unlink(missing_ok=True)

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | None = None,
        user: str = "root",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        check: bool = True,
    ) -> command.Result:
        """Run a program in the lab; at the deadline it is killed there, with its process group.

        A lab that answers nothing meanwhile is asked nothing more: each try would take as long.
        """
        if self._is_dead:
            raise errors.HungError("the lab had stopped answering before")
        remote = remote_line(argv, user=user, cwd=cwd, env=env, timeout_s=timeout_s)
        done = self._run(remote, timeout_s + GRACE_S, stdin, self._check_answers)
        result = dataclasses.replace(done, argv=tuple(argv))
        if result.status in TIMED_OUT and result.elapsed_s >= timeout_s:
            message = f"in the lab: {shlex.join(argv)}: killed after {timeout_s:g} s"
            raise errors.RunTimeoutError(message, hint=(result.text + result.error_text)[-4000:])
        if check and result.status != 0:
            raise RunError(result)
        return result

    def _run(
        self,
        remote: str,
        timeout_s: float,
        stdin: bytes | None = None,
        look: Callable[[], None] | None = None,
    ) -> command.Result:
        return command.run(
            [*self.ssh_argv("-T"), remote],
            timeout_s=timeout_s,
            stdin=stdin,
            cwd=self._directory,
            check=False,
            look=look,
            look_every_s=LOOK_EVERY_S,
        )

    def _check_answers(self) -> None:
        try:
            self._run("true", LAST_TRY_S)
        except errors.CommandError as error:
            self._is_dead = True
            raise errors.HungError("the lab has stopped answering") from error

    @contextlib.contextmanager
    def open(
        self, argv: Sequence[str], *, user: str = "root", limit_s: float = 600
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Start a program in the lab and talk to it by pipes; it is killed when the block ends."""
        remote = remote_line(argv, user=user, timeout_s=limit_s)
        pipe = subprocess.PIPE
        with subprocess.Popen(
            [*self.ssh_argv("-T"), remote], stdin=pipe, stdout=pipe, stderr=pipe, cwd=self._directory
        ) as running:
            try:
                yield running
            finally:
                running.kill()

    def put(self, local: Path, remote: str, *, owner: str = "0:0", timeout_s: float = 300) -> None:
        """Copy a file or a tree to exactly this path; parents are made, modes kept."""
        uid, _, gid = owner.partition(":")

        def owned(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.uid, member.gid, member.uname, member.gname = int(uid), int(gid or uid), "", ""
            return member

        with self._unpacking(f"copying {local} to {remote}", timeout_s) as archive:
            archive.add(local, _relative(remote), filter=owned)

    def write(self, remote: str, content: bytes, *, mode: int = 0o644) -> None:
        """Write a file in the lab; parents are made."""
        member = tarfile.TarInfo(_relative(remote))
        member.size, member.mode, member.mtime = len(content), mode, int(time.time())
        with self._unpacking(f"writing {remote}", DEFAULT_TIMEOUT_S) as archive:
            archive.addfile(member, io.BytesIO(content))

    @contextlib.contextmanager
    def _unpacking(self, doing: str, timeout_s: float) -> Iterator[tarfile.TarFile]:
        """Give an archive that is unpacked at the lab's root while it is written."""
        with self.open(["tar", "-x", "-p", "-C", "/", "-f", "-"], limit_s=timeout_s) as receiving:
            assert receiving.stdin is not None
            assert receiving.stderr is not None
            with contextlib.suppress(BrokenPipeError):
                with tarfile.open(fileobj=receiving.stdin, mode="w|", bufsize=1 << 18) as archive:
                    yield archive
                receiving.stdin.close()
            problem = receiving.stderr.read().decode(errors="replace")
            if receiving.wait(timeout=limits.patient(timeout_s)) != 0:
                raise errors.LabError(f"{doing} failed", hint=problem.strip()[-2000:])

    def get(self, remote: str, local: Path, *, timeout_s: float = 300) -> None:
        """Copy a file or a tree from the lab to exactly this path, as the caller's own files."""
        source = PurePosixPath(remote)
        target = local.absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        sender = ["tar", "-c", "-C", str(source.parent), "-f", "-", source.name]
        with (
            tempfile.TemporaryDirectory(dir=target.parent) as stage,
            self.open(sender, limit_s=timeout_s) as sending,
        ):
            assert sending.stderr is not None
            unpack = ["tar", "-x", "--no-same-owner", "-C", stage, "-f", "-"]
            with subprocess.Popen(unpack, stdin=sending.stdout, stderr=subprocess.PIPE) as unpacking:
                _, unpack_problem = unpacking.communicate(timeout=limits.patient(timeout_s))
            problem = sending.stderr.read() + unpack_problem
            if sending.wait(timeout=limits.patient(GRACE_S)) != 0 or unpacking.returncode != 0:
                raise errors.LabError(
                    f"copying {remote} to {local} failed", hint=problem.decode(errors="replace")
                )
            Path(stage, source.name).rename(target)


def _wait_banner(port: int, deadline: float, check: Callable[[], None]) -> None:
    """Return when an sshd speaks on the port; QEMU accepts connections long before the lab does.

    Each try waits longer than the one before. Every one costs a busy lab a process that starts an sshd, and
    when none is given the time to speak, they keep it so busy that none ever does.
    """
    patience_s = FIRST_TRY_S
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=left_s) as probe:
                probe.settimeout(min(left_s, patience_s))
                if probe.recv(4) == b"SSH-":
                    return
        except TimeoutError:
            patience_s *= 1.5
        except OSError:
            pass
        check()
    raise errors.BootTimeoutError("the lab's sshd did not answer in time")


def remote_line(
    argv: Sequence[str],
    *,
    user: str = "root",
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float,
) -> str:
    """Write the one line that sshd hands to a shell, so that exactly this argv runs under a time limit."""
    words = ["timeout", "-k", str(KILL_AFTER_S), f"{timeout_s:g}"]
    if user != "root":
        words += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--reset-env"]
    if env or cwd:
        words += [
            "env",
            *([f"--chdir={cwd}"] if cwd else []),
            *(f"{name}={value}" for name, value in (env or {}).items()),
        ]
    # A trailing command keeps the shell as parent: it turns death by a signal into 128 + its number.
    return f"{shlex.join([*words, *argv])}; exit $?"


def _relative(remote: str) -> str:
    target = PurePosixPath(remote)
    if not target.is_absolute():
        raise ValueError(f"not an absolute path: {remote}")
    return str(target.relative_to("/"))
