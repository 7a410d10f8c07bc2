# SPDX-License-Identifier: MIT
"""README, tutorial, and pages about what a user does: line by line in one shell, each where it belongs.

CLI, daemon and agent are the real ones. Only the machine is missing: the agent has a mount namespace for its
`/root`, and a name.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest

from bench import fake_host, served
from tests import oci_make
from tests.contract import conftest, publishing
from tests.lab import documents
from tests.root import rooted_agent
from tests.unit import kernel_samples

DOCS = Path(__file__).parents[2] / "docs"


async def _follow(script: str, top: Path, agent: Path) -> None:
    settings, network = conftest.answering(fake_host.SETTINGS, kernel="tiny"), conftest.own_network()
    async with served.running(agent=agent, settings=settings, network=network) as (_, address):
        served.program(top)
        (top / "home").mkdir()
        env = served.environment(address) | {
            "HOME": str(top / "home"),
            "PATH": f"{top}:{os.environ['PATH']}",
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        shell = await asyncio.create_subprocess_exec(
            "bash", "-c", script, env=env, cwd=top, stdin=asyncio.subprocess.DEVNULL
        )
        await shell.wait()


Lines = list[tuple[str, list[str]]]


def _workspaces(top: Path, guest: Path) -> Lines:
    """In a repository with changes. One guest is behind all VMs, so what `--rm` deletes is deleted here."""
    made = f"git init -q -b main {top}/project && cd {top}/project && git config user.name Ada"
    made += " && git config user.email ada@example.org && echo hello >README && git add README"
    made += f" && git commit -qm first && echo changed >README && rm -rf {guest}/repo"
    page = documents.console(DOCS / "workspace.md")
    lines = [(line.replace(" web:/tmp/", " web:/root/"), shown) for line, shown in page]
    renewed = [
        (f"{line} && rm -rf {guest}/repo" if " --rm " in line else line, shown) for line, shown in lines
    ]
    return [(made, []), *renewed]


def _kernels(top: Path) -> Lines:
    """Those about lifetimes in `sh` blocks: a kernel of ours for Debian's, and a log up to its end."""
    (top / "vmlinux").write_bytes(kernel_samples.vmlinux())
    stands_for = {
        "banger kernel pull debian-6.12": f"banger kernel import {top}/vmlinux --name debian-6.12",
        "banger vm logs -f web": "banger vm logs web",  # contract/test_cli_daemon.py follows one
    }
    lines = documents.commands(DOCS / "lifetime.md")
    assert set(stands_for) <= set(lines)
    here = [line for line in lines if not line.startswith(("banger doctor", "sudo "))]
    return [(stands_for.get(line, line), []) for line in here]


def _images(top: Path) -> Lines:
    """With a docker that has built what it saves."""
    oci_make.layout(top / "layout", "app:1", [oci_make.tar({"bin/sh": b"shell"})])
    with tarfile.open(top / "saved.tar", "w") as archive:
        archive.add(top / "layout", arcname="")
    docker = f'docker() {{ [ "$1" = build ] || cp {top}/saved.tar "$4"; }}'
    lines = documents.commands(DOCS / "images.md")
    return [(docker, []), *((line, []) for line in lines if line.startswith(("docker ", "banger ")))]


@pytest.mark.timeout(180)
def test_the_tutorial_and_other_pages_are_true() -> None:
    lines = [
        (line, shown)
        for name in ("tutorial.md", "agents.md")
        for line, shown in documents.console(DOCS / name)
        if not line.startswith("banger doctor")  # this machine has no installation
    ]
    # The guests' kernel and processors are this machine's.
    kernel = [platform.release(), str(len(os.sched_getaffinity(0)))]
    lines += [(line, kernel) for line, _ in documents.console(DOCS.parent / "README.md")]
    assert len(lines) > 25
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as name:
        top = Path(name)
        guest = top / "guest"
        guest.mkdir()
        lines += [
            (f"rm -rf {guest}/repo && printf 'test:\\n\\t@echo fine\\n' >Makefile && git add Makefile", [])
        ]
        lines += [(line, ["fine"]) for line, _ in documents.console(DOCS / "network.md")]
        lines += [(f"rm -rf {guest}/repo && banger vm prune --force", [])]
        lines += documents.console(DOCS / "lifetime.md")
        lines += _workspaces(top, guest)
        lines += _kernels(top)
        lines += _images(top)
        port = publishing.free_port()
        # This machine may use the port that a page has.
        lines = [
            (line.replace("8080:", f"{port}:"), [text.replace("8080:", f"{port}:") for text in shown])
            for line, shown in lines
        ]
        # There is one guest behind all VMs here, so what a new VM would not have is taken away.
        renewed = [f"{line}\nrm -rf {guest}/repo" if "vm delete" in line else line for line, _ in lines]
        with rooted_agent.running(top, {"/root": guest}) as agent:
            asyncio.run(_follow(documents.session(renewed, str(top / "out")), top, agent))
        for number, (line, shown) in enumerate(lines):
            status, said, complained = (
                (top / "out" / f"{number}.{what}").read_text() for what in ("status", "out", "err")
            )
            assert status == "0\n", (line, said, complained)
            assert documents.is_shown(shown, said), (line, shown, said)
        shutil.rmtree(guest)
