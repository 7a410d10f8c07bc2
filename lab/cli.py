# SPDX-License-Identifier: MIT
"""The lab's command line, `python -m lab`. The one place of the lab that prints and exits."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lab import cache, errors, instance, provision, qemu, remote, session, setup

DEFAULT_NAME = "lab"
IN_LAB = "lab:"
EXAMPLES = """examples:
  python -m lab setup                          install the Debian packages that the lab needs
  python -m lab build                          make what labs start from, which takes minutes
  python -m lab up                             bring up a lab named "lab" (image built on first use)
  python -m lab up --name b --artefacts DIR    a second one, with DIR's files at /artefacts
  python -m lab run -- uname -a                run a command in it; its exit status is yours
  python -m lab run --user dev -- id           the same as the unprivileged user
  python -m lab ssh                            a shell in it
  python -m lab cp build/dist lab:/root/dist   copy to exactly this path; the other way round likewise
  python -m lab logs --journal                 what its systemd journal says
  python -m lab down                           end it and delete its disk
"""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        status: int = options.handler(options)
    except errors.LabError as error:
        print(f"lab: {error}", *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab",
        description="The QEMU machine that plays the host.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, handler: object, text: str, *, named: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(handler=handler)
        if named:
            default = os.environ.get("BANGER_LAB", DEFAULT_NAME)
            command.add_argument("--name", default=default, help="which lab (default: %(default)s)")
        return command

    add("setup", _setup, "install the Debian packages that the lab needs", named=False)
    add("build", _build, "build the host image and install banger in it, if the cache has none", named=False)
    up = add("up", _up, "bring up a fresh lab, which stays until it is taken down")
    up.add_argument("--cpus", type=int, default=qemu.DEFAULT_CPUS, help="default: %(default)s")
    up.add_argument("--memory-mib", type=int, default=qemu.DEFAULT_MEMORY_MIB, help="default: %(default)s")
    up.add_argument("--artefacts", type=Path, metavar="DIR", help="directory to appear at /artefacts")
    up.add_argument("--layer", metavar="KEY", help="start from what `commit` kept")
    up.add_argument("--cold", action="store_true", help="boot, even if a saved state could be restored")
    commit = add("commit", _commit, "keep a lab as a layer that others start from; the lab itself ends")
    commit.add_argument("key")
    add("down", _down, "end a lab and delete its disk")
    add("status", _status, "list the labs of this user", named=False)
    ssh = add("ssh", _ssh, "open a shell in a lab")
    ssh.add_argument("--user", default="root", choices=("root", "dev"), help="default: %(default)s")
    run = add("run", _run, "run a command in a lab")
    run.add_argument("--user", default="root", help="default: %(default)s")
    run.add_argument(
        "--timeout-s", type=float, default=0, help="kill it there after so long (default: never)"
    )
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    copy = add("cp", _copy, "copy a file or tree into a lab or out of it; lab:/path names the lab's side")
    copy.add_argument("source")
    copy.add_argument("target")
    logs = add("logs", _logs, "show a lab's console")
    logs.add_argument("--journal", action="store_true", help="the systemd journal instead")
    logs.add_argument("--qemu", action="store_true", help="what QEMU said instead")
    return parser


def _setup(options: argparse.Namespace) -> int:
    setup.install()
    return 0


def _build(options: argparse.Namespace) -> int:
    provision.build()
    return 0


def _up(options: argparse.Namespace) -> int:
    hardware = qemu.Hardware(options.cpus, options.memory_mib)
    lab = session.Lab.up(
        options.name,
        hardware=hardware,
        artefacts=options.artefacts,
        layer_key=options.layer,
        cold=options.cold,
        detached=True,
    )
    print(f"lab {lab.name} is up after {lab.boot_s:.1f} s, ssh on port {lab.machine.record.ssh_port}")
    return 0


def _commit(options: argparse.Namespace) -> int:
    session.Lab.find(options.name).commit(options.key)
    return 0


def _down(options: argparse.Namespace) -> int:
    if not session.take_down(options.name):
        print(f"there was no lab named {options.name}")
    return 0


def _status(options: argparse.Namespace) -> int:
    root = cache.default_root()
    for name in instance.names(root):
        running = qemu.Machine.find(root / "labs" / name)
        state = (
            f"running  ssh port {running.record.ssh_port}  {running.record.accelerator}"
            if running
            else "ended"
        )
        print(f"{name:32}{state}")
    return 0


def _ssh(options: argparse.Namespace) -> int:
    lab = session.Lab.find(options.name)
    os.chdir(lab.directory)
    argv = lab.shell.ssh_argv("-t", user=options.user)
    os.execvp(argv[0], argv)  # noqa: S606


def _run(options: argparse.Namespace) -> int:
    words = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not words:
        raise errors.LabError("no command given", hint="example: python -m lab run -- uname -a")
    lab = session.Lab.find(options.name)
    line = remote.remote_line(words, user=options.user, timeout_s=options.timeout_s)
    os.chdir(lab.directory)
    argv = [*lab.shell.ssh_argv("-T"), line]
    os.execvp(argv[0], argv)  # noqa: S606


def _copy(options: argparse.Namespace) -> int:
    lab = session.Lab.find(options.name)
    if options.target.startswith(IN_LAB):
        lab.put(Path(options.source), options.target.removeprefix(IN_LAB))
    elif options.source.startswith(IN_LAB):
        lab.get(options.source.removeprefix(IN_LAB), Path(options.target))
    else:
        raise errors.LabError(
            "one side must be in the lab", hint="example: python -m lab cp file lab:/root/file"
        )
    return 0


def _logs(options: argparse.Namespace) -> int:
    if options.journal:
        lab = session.Lab.find(options.name)
        sys.stdout.write(lab.run(["journalctl", "--no-pager", "-b"]).text)
        return 0
    place = instance.find(cache.default_root(), options.name)
    log = place.path / (qemu.QEMU_LOG if options.qemu else qemu.CONSOLE)
    sys.stdout.write(log.read_text(errors="replace"))
    return 0
