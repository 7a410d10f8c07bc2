# SPDX-License-Identifier: MIT
"""SPECIFICATION.md is true: each promise names tests that exist, or says that it has none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.style import tree

_ROW = re.compile(r"^\| (?P<promise>[^|]+) \| (?P<proof>[^|]+) \|$", re.MULTILINE)
_TEST = re.compile(r"`([^`]+\.py)::(\w+)`")
_HEAD = ("promise", "---")
_MEASURED = re.compile(r"no test: measured by `python -m bench (\w+)`")
_LONG_ONLY = ", only by `make long`"
UNPROVEN = 0
"""Fewer is the aim: lower it with every promise that gets its test."""
MEASURED = 5
"""Promises of time alone."""


def _promises() -> list[tuple[str, str]]:
    text = (tree.ROOT / "SPECIFICATION.md").read_text()
    return [(row["promise"], row["proof"]) for row in _ROW.finditer(text) if row["promise"] not in _HEAD]


def _functions(path: Path) -> dict[str, bool]:
    """Each by name, and whether it runs in `make test`."""
    parsed = tree.parse(path)
    whole = [ast.unparse(each) for each in parsed.body if isinstance(each, ast.Assign)]
    is_long = any(each.startswith("pytestmark") and ".long" in each for each in whole)
    return {
        each.name: not is_long and "pytest.mark.long" not in map(ast.unparse, each.decorator_list)
        for each in ast.walk(parsed)
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@pytest.mark.parametrize(("promise", "proof"), _promises())
def test_every_promise_names_tests_that_exist(promise: str, proof: str) -> None:
    if proof == "no test yet":
        return
    if measured := _MEASURED.fullmatch(proof):
        assert (tree.ROOT / "bench" / f"{measured[1]}.py").is_file(), measured[1]
        return
    is_long_only = proof.endswith(_LONG_ONLY)
    proof = proof.removesuffix(_LONG_ONLY)
    named = _TEST.findall(proof)
    assert named, f"{promise} names no test"
    assert _TEST.sub("", proof).strip(", ") == "", "only tests stand in the second column"
    ordinary = False
    for file, function in named:
        path = tree.ROOT / "tests" / file
        assert path.is_file(), file
        found = _functions(path)
        assert function in found, f"{file} has no {function}"
        ordinary |= found[function]
    assert ordinary is not is_long_only, f"`make test` has {'a' if ordinary else 'no'} test of: {promise}"


def test_unproven_promises_are_counted() -> None:
    proofs = [proof for _, proof in _promises()]
    assert proofs.count("no test yet") == UNPROVEN
    assert sum(_MEASURED.fullmatch(proof) is not None for proof in proofs) == MEASURED


def test_no_line_of_a_table_is_overlooked() -> None:
    lines = (tree.ROOT / "SPECIFICATION.md").read_text().splitlines()
    rows = [
        line
        for line in lines
        if line.startswith("|") and line not in ("| promise | enforced by |", "|---|---|")
    ]
    assert len(rows) == len(_promises())
