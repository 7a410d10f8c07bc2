# SPDX-License-Identifier: MIT
"""The helper's units leave it what it was recorded to use, `make rights`, and a margin with a reason."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

from banger.helper.linux import caps
from lab import rights

TREE = Path(__file__).parents[2]
RECORD = rights.read(rights.KEPT)
VMM = {"jailer", "firecracker", "fc_api", "fc_vcpu"}
"""They are in the VMs' unit, the others in the helper's."""
ALWAYS_OPEN = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx"}
"""With DevicePolicy=closed, by systemd.resource-control(5)."""
LETTERS = {"read": "r", "write": "w", "mknod": "m"}


def recorded(kind: str) -> set[tuple[str, ...]]:
    """Who and what, of each fact of this kind."""
    return {tuple(words) for found, *words in map(str.split, RECORD) if found == kind}


def directives(unit: str, name: str) -> list[str]:
    text = (TREE / "units" / unit).read_text()
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)


def groups() -> dict[str, set[str]]:
    """systemd's groups of system calls, each with all that is in it."""
    argv = ["systemd-analyze", "--no-pager", "syscall-filter"]
    shown = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout
    listed: dict[str, set[str]] = {}
    name = ""
    for line in shown.splitlines():
        word = line.strip()
        if line.startswith("@"):
            name = word
            listed[name] = set()
        elif not line.startswith(" ") and word:
            name = ""
        elif name and word and not word.startswith("#"):
            listed[name].add(word)
    while any(word.startswith("@") for words in listed.values() for word in words):
        for words in listed.values():
            for group in [word for word in words if word.startswith("@")]:
                words.remove(group)
                words |= listed[group]
    return listed


def members(words: list[str], known: dict[str, set[str]]) -> set[str]:
    return {call for word in words for call in known.get(word, {word})}


def test_every_call_that_was_recorded_passes_and_none_that_is_taken_away_was_asked_for() -> None:
    """But for clone3(2): with RestrictNamespaces= it answers ENOSYS, and glibc then takes clone(2)."""
    known = groups()
    asked = {call for _, call in recorded("call")}
    refused = {call for (call,) in recorded("refused-call")}
    assert refused == {"clone3"}
    allowed: set[str] = set()
    for line in directives("bangerd-root.service", "SystemCallFilter"):
        words = members(line.removeprefix("~").split(), known)
        allowed = allowed - words if line.startswith("~") else allowed | words
    assert not asked - allowed
    (taken,) = [line for line in directives("bangerd-root.service", "SystemCallFilter") if line[0] == "~"]
    assert {word for word in taken[1:].split() if members([word], known) & (asked - refused)} == {"@ipc"}
    single = {
        word for line in directives("bangerd-root.service", "SystemCallFilter") for word in line.split()
    }
    single = {word.removeprefix("~") for word in single if not word.removeprefix("~").startswith("@")}
    assert single <= set().union(*known.values()), "these are no system calls"


def test_linux_capabilities_are_those_that_were_used() -> None:
    assert {name for _, name in recorded("capability")} == set(caps.CAPABILITIES)


def test_families_and_namespaces_are_those_that_were_made() -> None:
    (families,) = directives("bangerd-root.service", "RestrictAddressFamilies")
    assert {f"AF_{name.upper()}" for _, name in recorded("family")} == set(families.split())
    (namespaces,) = directives("bangerd-root.service", "RestrictNamespaces")
    assert {name for _, name in recorded("namespace")} == set(namespaces.split())


def test_devices_are_those_that_were_opened_or_made() -> None:
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for who, device, access in recorded("device"):
        unit = "banger-vms.service" if who in VMM else "bangerd-root.service"
        name = device if device.startswith("block-") else f"/dev/{device.removeprefix('char-')}"
        if name not in ALWAYS_OPEN:
            found[unit, name].add(LETTERS[access])
    written = {
        (unit, line.split()[0]): set(line.split()[1])
        for unit in ("banger-vms.service", "bangerd-root.service")
        for line in directives(unit, "DeviceAllow")
    }
    assert found == written
