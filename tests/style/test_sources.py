# SPDX-License-Identifier: MIT
"""Rules for source files that a tool can check: heads, sizes, names, forbidden calls, hosts."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from tests.style import tree

MAX_LINES = 500
TO_BE_SPLIT: set[str] = set()
"""Too long today. Nothing joins this list, and what is split leaves it."""
HEAD = "SPDX-License-Identifier: MIT"
SUFFIXES = (".py", ".c", ".h", ".sh", ".nft", ".service", ".socket", ".slice")
NAMED = ("Makefile", ".ci/run", "requirements/refresh")

SLEEPS: dict[str, str] = {
    "builder/main.py": "a disk that fills up announces nothing: it is looked at now and then",
    "helper/linux/devmapper.py": "the kernel tells nobody when the last opener of a device lets go",
    "helper/linux/loop.py": "the kernel tells nobody when the last opener of a device lets go",
    "images/blobs.py": "a line that broke is tried again, and time is all that mends it",
    "images/registry.py": "a registry that asks for patience says how long, or is given more each time",
    "owner/leftovers.py": "a device that is busy is asked for again: nobody is told when it no longer is",
    "owner/live.py": "a root helper that does not answer is asked again: its return is announced to nobody",
    "owner/published.py": "a port that another program had is tried again: nobody is told when it is free",
    "owner/routes/machines.py": "a followed log is a file on disk that another process appends to",
    "owner/claims.py": "a client that is gone announces nothing; others are heard of at once",
    "owner/clocks.py": "a clock that drifts announces nothing: it is looked at now and then",
    "owner/lifetimes.py": "time itself is what is waited for",
    "owner/silence.py": "a guest that has fallen silent announces nothing: it is asked now and then",
    "system/machine.py": "a service that starts is asked until it answers, or a deadline is over",
    "owner/tunnels.py": "nothing announces that a service in the guest listens",
    "vm/readiness.py": "a guest cannot announce itself to an unprivileged process of the host",
}
"""Where the product may sleep, and why nothing there could be waited for."""

# Put together here so that the lists are not found by the tests they feed.
_DOT = "."
REGISTRY_HOSTS = [
    _DOT.join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("deb", "debian", "org"),
        ("security", "debian", "org"),
        ("snapshot", "debian", "org"),
        ("archive", "ubuntu", "com"),
        ("registry", "npmjs", "org"),
        ("crates", "io"),
        ("proxy", "golang", "org"),
        ("repo", "maven", "apache", "org"),
    )
]
_MACHINE_SETTINGS = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX")


def _sources() -> list[Path]:
    named = [tree.ROOT / name for name in NAMED]
    units = [path for path in tree.files() if path.parent == tree.ROOT / "units"]
    return sorted({*tree.with_suffix(*SUFFIXES), *named, *units})


@pytest.mark.parametrize("path", _sources(), ids=tree.name_of)
def test_the_licence_stands_at_the_head(path: Path) -> None:
    assert any(HEAD in line for line in path.read_text().splitlines()[:2])


@pytest.mark.parametrize("path", tree.with_suffix(".py", ".c", ".h", ".sh"), ids=tree.name_of)
def test_no_module_is_too_long_to_hold_in_the_head(path: Path) -> None:
    too_long = len(path.read_text().splitlines()) > MAX_LINES
    assert too_long == (tree.name_of(path) in TO_BE_SPLIT)


@pytest.mark.parametrize("path", tree.with_suffix(".py"), ids=tree.name_of)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    if tree.parse(path).body:
        assert ast.get_docstring(tree.parse(path))


def test_no_module_is_a_dumping_ground() -> None:
    names = re.compile(r"^(utils?|helpers|common|misc|shared|tools)$")
    assert [tree.name_of(path) for path in tree.files() if names.match(path.stem)] == []


def test_nothing_is_given_to_a_shell() -> None:
    shells = {"os.system", "os.popen", "subprocess.getoutput", "asyncio.create_subprocess_shell"}
    found = [
        f"{tree.name_of(path)}:{call.lineno}"
        for path in tree.with_suffix(".py")
        for name, call in tree.calls(path)
        if name in shells or any(keyword.arg == "shell" for keyword in call.keywords)
    ]
    assert found == []


def test_programs_are_started_by_the_doors_alone() -> None:
    # `vm ssh` becomes ssh, which needs the user's own terminal and environment.
    doors = {"run.py", "helper/program.py", "helper/process.py", "cli/ssh.py"}
    started = re.compile(
        r"^(subprocess\.\w+|os\.(exec|spawn|fork|posix_spawn)\w*|asyncio\.create_subprocess\w+)$"
    )
    found = {
        str(path.relative_to(tree.PACKAGE))
        for path in tree.shipped_modules()
        for name, _ in tree.calls(path)
        if started.match(name)
    }
    assert found <= doors


def test_decoders_are_made_by_one_door_alone() -> None:
    """Two threads that make them for the same struct end the interpreter: contract/decoding.py."""
    made = re.compile(r"^msgspec\.(convert|(\w+\.)(decode|Decoder))$")
    found = {
        str(path.relative_to(tree.PACKAGE))
        for path in tree.shipped_modules()
        for name, _ in tree.calls(path)
        if made.match(name)
    }
    assert found == {"contract/decoding.py"}


def test_the_product_sleeps_only_where_nothing_can_be_waited_for() -> None:
    found = {
        str(path.relative_to(tree.PACKAGE))
        for path in tree.shipped_modules()
        for name, call in tree.calls(path)
        if name.endswith("sleep") and ast.unparse(call.args[0]) != "0"
    }
    assert found == SLEEPS.keys()


def test_no_file_names_a_package_registry() -> None:
    """Which one is used is each machine's own setting; a name here would be wrong on the next."""
    own = {
        host
        for setting in _MACHINE_SETTINGS
        for host in re.findall(r"https?://(?:[^/@\s]*@)?([^/:\s]+)", os.environ.get(setting, ""))
    }
    hosts = re.compile("|".join(map(re.escape, [*REGISTRY_HOSTS, *sorted(own)])))
    found = [
        f"{tree.name_of(path)}: {match.group()}"
        for path in tree.files()
        for match in hosts.finditer(path.read_text(errors="replace"))
    ]
    assert found == []


@pytest.mark.parametrize("name", ["run.txt", "build.txt", "dev.txt"])
def test_requirements_are_pinned_by_hash_and_name_no_host(name: str) -> None:
    text = (tree.ROOT / "requirements" / name).read_text()
    joined = text.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert lines
    for line in lines:
        assert re.match(r"^[A-Za-z0-9._-]+(\[[a-z,]+\])?==\S+", line), line
        assert "--hash=sha256:" in line, line
    assert "://" not in text


def test_nothing_is_skipped_without_a_reason_found_by_trying() -> None:
    """Whether a test can run is asked of the machine by a call; what the machine is named proves nothing."""
    never = {"pytest.skip", "pytest.mark.skip", "pytest.importorskip", "unittest.skip"}
    found = [
        f"{tree.name_of(path)}:{call.lineno}"
        for path in tree.with_suffix(".py")
        for name, call in tree.calls(path)
        if name in never or (name == "pytest.mark.skipif" and not _asks_the_machine(call))
    ]
    assert found == []


def _asks_the_machine(skipif: ast.Call) -> bool:
    has_reason = any(keyword.arg == "reason" for keyword in skipif.keywords)
    asked = [node for node in ast.walk(skipif.args[0]) if isinstance(node, ast.Call)]
    return has_reason and bool(asked) and "environ" not in ast.unparse(skipif.args[0])
