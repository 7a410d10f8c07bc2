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
UNPROVEN = 0
"""Fewer is the aim: lower it with every promise that gets its test."""


def _promises() -> list[tuple[str, str]]:
    text = (tree.ROOT / "SPECIFICATION.md").read_text()
    return [(row["promise"], row["proof"]) for row in _ROW.finditer(text) if row["promise"] not in _HEAD]


def _functions(path: Path) -> set[str]:
    found = ast.walk(tree.parse(path))
    return {each.name for each in found if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("promise", "proof"), _promises())
def test_every_promise_names_tests_that_exist(promise: str, proof: str) -> None:
    if proof == "no test yet":
        return
    named = _TEST.findall(proof)
    assert named, f"{promise} names no test"
    assert _TEST.sub("", proof).strip(", ") == "", "only tests stand in the second column"
    for file, function in named:
        path = tree.ROOT / "tests" / file
        assert path.is_file(), file
        assert function in _functions(path), f"{file} has no {function}"


def test_unproven_promises_are_counted() -> None:
    assert sum(proof == "no test yet" for _, proof in _promises()) == UNPROVEN


def test_no_line_of_a_table_is_overlooked() -> None:
    lines = (tree.ROOT / "SPECIFICATION.md").read_text().splitlines()
    rows = [
        line
        for line in lines
        if line.startswith("|") and line not in ("| promise | enforced by |", "|---|---|")
    ]
    assert len(rows) == len(_promises())
