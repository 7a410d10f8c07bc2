# SPDX-License-Identifier: MIT
"""What the style tests look at: the files git knows (or would add), and what each Python module imports."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "banger"


@functools.cache
def files() -> tuple[Path, ...]:
    """Tracked ones, and new ones that nothing ignores; without those deleted but not yet committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=30,
    )
    names = sorted(set(listed.stdout.decode().split("\0")) - {""})
    return tuple(path for path in (ROOT / name for name in names) if path.is_file())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def with_suffix(*suffixes: str) -> list[Path]:
    return [path for path in files() if path.suffix in suffixes]


def shipped_modules() -> list[Path]:
    return [path for path in with_suffix(".py") if PACKAGE in path.parents]


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module of ours. `lazy`: inside a function, so that importing the module does not."""

    part: str
    """What comes after `banger.`: a package, or a module beside them."""
    line: int
    lazy: bool


def unit_of(path: Path) -> str:
    """The part of the package a module belongs to: its directory, or itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[Import]:
    """Every import of ours, at any depth."""
    yield from _imports(parse(path), lazy=False)


def _imports(node: ast.AST, *, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"a relative import in line {child.lineno}"
            found = [f"{child.module}.{alias.name}" for alias in child.names]
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _is_for_types(child)
            yield from _imports(child, lazy=lazy or inside)
            continue
        for name in found:
            parts = name.split(".")
            if parts[0] == "banger" and len(parts) > 1:
                yield Import(parts[1], child.lineno, lazy)


def _is_for_types(node: ast.AST) -> bool:
    """What stands below it is never imported when the program runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call, by the dotted name it is written with."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node
