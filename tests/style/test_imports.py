# SPDX-License-Identifier: MIT
"""Who may import whom. The directory a module lies in says which process runs it; this keeps it true."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.style import tree

_SHARED = {
    "archive",
    "artefacts",
    "contract",
    "debian",
    "guest_binary",
    "pinned",
    "proxy_address",
    "run",
    "steps",
    "tarstream",
    "toml_file",
    "workers",
}
_PLANNING = _SHARED | {"images", "kernels", "net", "storage"}

MAY_IMPORT: dict[str, set[str]] = {
    "contract": set(),
    "helper": {"contract"},
    "cli": {"contract"},
    "builder": {"artefacts", "contract", "images", "run", "systemd"},
    "proxy_address": set(),
    "steps": set(),
    "systemd": set(),
    "run": {"contract"},
    "archive": {"contract", "tarstream"},
    "artefacts": {"contract", "run"},
    "debian": {"contract", "run"},
    "pinned": {"artefacts", "contract", "proxy_address", "run"},
    "guest_binary": {"contract"},
    "tarstream": {"contract", "run"},
    "toml_file": {"contract"},
    "workers": {"contract"},
    "images": _SHARED,
    "kernels": _SHARED,
    "net": _SHARED,
    "storage": _SHARED | {"images"},
    "vm": _PLANNING,
    "system": _PLANNING,
    "workspace": {"archive", "contract", "run"},
    "owner": _PLANNING | {"inprocess", "system", "systemd", "vm"},
    "inprocess": {"contract", "helper"},
}
MAY_IMPORT_LAZILY: dict[str, set[str]] = {"cli": {"archive", "system", "workspace"}}
"""Within a function: `system install` and `doctor` do the work themselves, as the root who calls them;
repositories are read by the user's own process, which may read what the daemon may not."""

ROOT_LOADS = {"audit", "decoding", "egress", "errors", "names", "peer", "privileged"}
"""Of the contract. What root does not need, such as reading what people write, it does not load."""

# `banger` itself holds the version; importing it imports nothing else.
_VERSION = {"__version__"}


def test_every_part_of_the_package_has_its_rule() -> None:
    parts = {tree.unit_of(path) for path in tree.shipped_modules()} - {"__init__"}
    assert parts - MAY_IMPORT.keys() == set()


@pytest.mark.parametrize("path", tree.shipped_modules(), ids=tree.name_of)
def test_imports_go_one_way(path: Path) -> None:
    unit = tree.unit_of(path)
    if unit == "__init__":
        assert not list(tree.imports(path))
        return
    allowed = MAY_IMPORT[unit] | {unit} | _VERSION
    lazily = allowed | MAY_IMPORT_LAZILY.get(unit, set())
    wrong = [found for found in tree.imports(path) if found.part not in (lazily if found.lazy else allowed)]
    assert wrong == []


def test_the_rules_see_what_they_forbid(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text("import banger.helper.main\ndef late():\n    from banger.system import install\n")
    assert [(found.part, found.lazy) for found in tree.imports(sample)] == [
        ("helper", False),
        ("system", True),
    ]


@pytest.mark.parametrize("name", ["banger.helper.main", "banger.cli.main", "banger.builder.main"])
def test_starting_a_process_loads_only_what_it_may_use(name: str) -> None:
    """What static reading misses: what is loaded by way of others."""
    script = f"import sys, {name}; print(*(m for m in sys.modules if m.startswith('banger.')))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tree.ROOT, check=True, capture_output=True, timeout=30
    )
    unit = name.split(".")[1]
    modules = [module.split(".")[1:] for module in done.stdout.decode().split()]
    assert {module[0] for module in modules} <= MAY_IMPORT[unit] | {unit}
    if unit == "helper":
        assert {module[1] for module in modules if module[0] == "contract" and module[1:]} == ROOT_LOADS


def test_what_is_installed_along_is_used() -> None:
    """A dependency that nothing imports is code that root owns and nobody looks at."""
    project = tomllib.loads((tree.ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split("[<>=]", each)[0] for each in project["dependencies"]}
    used = {
        name.split(".")[0]
        for path in tree.shipped_modules()
        for node in ast.walk(tree.parse(path))
        for name in _imported(node)
    }
    # uvicorn's own adapter to it is used, which has it of nobody.
    assert wanted - used == {"websockets"}


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_every_module_can_be_imported_alone() -> None:
    """In this process, one after the other: a module that only works once another is loaded is a cycle."""
    for path in tree.shipped_modules():
        name = ".".join(path.relative_to(tree.ROOT / "src").with_suffix("").parts)
        importlib.import_module(name.removesuffix(".__init__"))
