# SPDX-License-Identifier: MIT
"""A developer's repository in a real microVM without network: in, worked on, and out again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import command
from lab.session import Lab
from tests.lab import documents, user

TREE = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)

REPO = "/home/dev/project"
_MAKE = r"""
set -e
rm -rf "$1"; mkdir "$1"; cd "$1"
git config --file /home/dev/.gitconfig user.name 'Ada at home'
git config --file /home/dev/.gitconfig user.email home@example.org
git init -q -b main
git config user.name Ada; git config user.email ada@example.org
printf 'hello\n' >README
printf '#!/bin/sh\necho built\n' >build.sh; chmod 755 build.sh
head -c 3000000 /dev/urandom >large.bin
ln -s build.sh link
printf '.env\n' >.gitignore
mkdir "d
ir"; printf 'odd\n' >"d
ir/-f"
git add -A; git commit -qm first
printf 'TOKEN=1\n' >.env
printf 'changed\n' >README
printf 'staged\n' >added; git add added
printf 'loose\n' >untracked
"""


def banger(host: Lab, *words: str, check: bool = True) -> command.Result:
    return user.banger(host, *words, check=check)


def on_host(host: Lab, *words: str) -> str:
    return host.run(["git", "-C", REPO, *words], user=user.NAME).text


def in_guest(host: Lab, *words: str) -> str:
    return banger(host, "vm", "exec", "work", "--", *words).text


@pytest.fixture(scope="module")
def repository(installed_host: Lab) -> Iterator[Lab]:
    """The installed host, and a repository of its user's with every kind of change."""
    installed_host.run(["sh", "-c", _MAKE, "make", REPO], user=user.NAME)
    yield installed_host
    installed_host.run(["rm", "-rf", REPO, "/home/dev/.gitconfig"], user=user.NAME)


@pytest.fixture(scope="module")
def work(repository: Lab) -> Iterator[Lab]:
    """A VM, `work`, without network, that the repository went into."""
    words = ("-d", "--name", "work", "--no-network", *user.SMALL[:2], "--disk-size", "256M")
    banger(repository, "vm", "run", *words, REPO)
    yield repository
    banger(repository, "vm", "delete", "work", check=False)


def test_a_command_in_a_vm_of_its_own(repository: Lab) -> None:
    script = "pwd; ./build.sh; cat README; git status --porcelain; ls -A; exit 7"
    words = ("--rm", "--no-network", *user.SMALL[:2], "--disk-size", "128M", REPO)
    done = banger(repository, "vm", "run", *words, "--", "sh", "-c", script, check=False)
    assert done.status == 7, done.error_text
    lines = done.text.splitlines()
    assert lines[:3] == ["/root/repo", "built", "changed"]
    assert {"A  added", " M README"} <= set(lines)
    assert ".env" not in lines
    assert "untracked" not in lines
    assert user.leftovers(repository) == ""


def test_the_guest_has_what_the_host_has(work: Lab) -> None:
    status = ("status", "--porcelain=v2", "--branch", "--untracked-files=no")
    assert in_guest(work, "git", *status) == on_host(work, *status)
    assert in_guest(work, "git", "log", "--format=%H") == on_host(work, "log", "--format=%H")
    hashes = ("hash-object", "README", "added", "large.bin", "build.sh", "d\nir/-f")
    assert in_guest(work, "git", *hashes) == on_host(work, *hashes)


def test_again_only_what_changed_and_never_over_the_guests_work(work: Lab) -> None:
    work.write(f"{REPO}/README", b"newer\n")
    sent = json.loads(banger(work, "vm", "workspace", "prepare", "work", "--json").text)
    assert sent["sent_bytes"] < 20_000
    assert in_guest(work, "cat", "README") == "newer\n"
    in_guest(work, "sh", "-c", "echo mine >build.sh")
    refused = banger(work, "vm", "workspace", "prepare", "work", check=False)
    assert "changes of its own" in refused.error_text
    in_guest(work, "git", "checkout", "build.sh")


def test_the_guests_work_comes_out(work: Lab) -> None:
    script = (
        "echo more >more; git add -A; git commit -qm 'in the guest'; head -c 100000 /dev/urandom >raw.bin"
        "; git -C / var GIT_AUTHOR_IDENT"  # of a repository that has no identity of its own
    )
    assert in_guest(work, "sh", "-c", script).startswith("Ada at home <home@example.org> ")
    before = on_host(work, "status", "--porcelain=v2")
    assert banger(work, "vm", "workspace", "pull", "work").text == "banger/work\n"
    assert on_host(work, "status", "--porcelain=v2") == before
    assert on_host(work, "rev-parse", "banger/work:raw.bin") == in_guest(
        work, "git", "hash-object", "raw.bin"
    )
    patch = banger(work, "vm", "workspace", "export", "work").stdout
    assert b"GIT binary patch" in patch
    assert b"+++ b/more" in patch


def test_files_go_in_and_come_back(work: Lab) -> None:
    banger(work, "vm", "cp", f"{REPO}/large.bin", "work:/var/tmp/")
    banger(work, "vm", "cp", "work:/var/tmp/large.bin", "/home/dev/back.bin")
    work.run(["cmp", f"{REPO}/large.bin", "/home/dev/back.bin"], user=user.NAME)
    work.run(["rm", "/home/dev/back.bin"], user=user.NAME)


def test_a_workspace_survives_a_stop_and_is_read_only_until_it_is_prepared_otherwise(work: Lab) -> None:
    banger(work, "vm", "workspace", "prepare", "work", "--discard", "--readonly")
    banger(work, "vm", "stop", "work")
    banger(work, "vm", "start", "work")
    assert in_guest(work, "pwd") == "/root/repo\n"
    refused = banger(work, "vm", "exec", "work", "--", "touch", "/root/repo/x", check=False)
    assert "Read-only" in refused.error_text
    banger(work, "vm", "workspace", "prepare", "work")
    in_guest(work, "touch", "/root/repo/x")


@pytest.mark.long
def test_the_page_about_workspaces_is_true(repository: Lab) -> None:
    """Its commands, in its order; of what it shows, the lines in theirs."""
    work = "/home/dev/page"
    repository.run(["cp", "-a", REPO, work], user=user.NAME)
    repository.run(["sh", "-c", f"echo changed > {work}/README"], user=user.NAME)
    try:
        for line, shown in documents.console(TREE / "docs" / "workspace.md"):
            done = repository.run(
                ["bash", "-c", f"cd {work} && {line}"], user=user.NAME, check=False, timeout_s=240
            )
            assert done.status == 0, (line, done.error_text)
            assert documents.is_shown(shown, done.text), (line, shown, done.text)
    finally:
        banger(repository, "vm", "delete", "web", check=False)
        repository.run(["rm", "-rf", work])


@pytest.mark.long
def test_configured_files_of_the_home_are_in_every_vm(repository: Lab) -> None:
    repository.run(["git", "config", "--global", "user.name", "Ada"], user=user.NAME)
    with user.configured(repository, '[[file_sync]]\nsource = "~/.gitconfig"'):
        words = ("--rm", "--no-network", *user.SMALL)
        done = banger(repository, "vm", "run", *words, "--", "git", "config", "user.name")
        assert done.text == "Ada\n"
        repository.run(["rm", "/home/dev/.gitconfig"], user=user.NAME)
        refused = banger(repository, "vm", "run", *words, "--", "true", check=False)
    assert "file_sync: ~/.gitconfig cannot go into the VM: no such file" in refused.error_text
