# SPDX-License-Identifier: MIT
"""Completion in the real shells, by real keys on a terminal: what was completed is then run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from banger.contract import resources
from tests.contract import cli_process
from tests.fakes import daemon

SHELLS = {
    "bash": (("bash", "--norc", "--noprofile", "-i"), 'eval "$(banger completion bash)"'),
    "zsh": (
        ("zsh", "-f", "-i"),
        'autoload -Uz compinit; compinit -D -u; eval "$(banger completion zsh)"',
    ),
    "fish": (("fish", "--no-config", "-i"), "banger completion fish | source"),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_a_command_and_the_name_of_a_vm(
    cli: cli_process.Cli, fake: daemon.FakeDaemon, tmp_path: Path, shell: str
) -> None:
    fake.add_vm("shop")
    program = tmp_path / "banger"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m banger.cli.start "$@"\n')
    program.chmod(0o755)
    argv, set_up = SHELLS[shell]
    argv = ("setsid", "--ctty", "--wait", *argv)  # fish has no job control without
    env = cli.environment(TERM="xterm", HOME=str(tmp_path))
    with cli_process.on_terminal(argv, env | {"PATH": f"{tmp_path}:{env['PATH']}"}) as terminal:
        terminal.type(f"{set_up}; echo re''ady\r".encode())
        terminal.read_until(b"ready\r\n")
        terminal.type(b"banger vm sto\tw\t\r")
        terminal.type(b"exit\r")
        terminal.wait()
    states = {vm.name: vm.state for vm in fake.vms.values()}
    assert states == {"web": resources.VmState.STOPPED, "shop": resources.VmState.RUNNING}, terminal.seen
