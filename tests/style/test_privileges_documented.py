# SPDX-License-Identifier: MIT
"""docs/privileges.md and the units keep step with the code: operations, capabilities, absences."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from banger.contract import names, privileged
from banger.helper.linux import caps
from banger.system.doctor import services

TREE = Path(__file__).parents[2]
PAGE = (TREE / "docs" / "privileges.md").read_text()
UNIT = (TREE / "units" / "bangerd-root.service").read_text()


def test_every_operation_is_a_row_and_every_row_an_operation() -> None:
    section = PAGE.partition("## The operations")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z_]+)` \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    assert [row[0] for row in rows] == [each.__struct_config__.tag for each in privileged.REQUEST_TYPES]


def test_every_capability_is_named_and_bounded_by_the_unit() -> None:
    listed = re.search(r"^Linux capabilities: ((?:`[A-Z_]+`\s)+)", PAGE, re.MULTILINE)
    assert listed is not None
    assert {name.lower() for name in re.findall(r"`([A-Z_]+)`", listed[1])} == set(caps.CAPABILITIES)
    bounded = " ".join(re.findall(r"^CapabilityBoundingSet=(.+)$", UNIT, re.MULTILINE)).split()
    assert {name.removeprefix("CAP_").lower() for name in bounded} == set(caps.CAPABILITIES)


@pytest.mark.parametrize("unit", ["bangerd", "bangerd-root"])
def test_absences_in_the_unit_are_explained_in_both_places(unit: str) -> None:
    text = (TREE / "units" / f"{unit}.service").read_text()
    comment = text.partition("# Absent, and why:")[2]
    absent = set(re.findall(r"([A-Z][A-Za-z]+)=", comment))
    assert absent
    section = PAGE.partition("Directives that are absent")[2]
    missing = [name for name in absent if f"`{name}=" not in section]
    assert not missing, f"not in docs/privileges.md: {missing}"


def test_defaults_are_those_of_the_code() -> None:
    assert f"{names.UID_BASE:,}" in PAGE
    assert names.NETWORK in PAGE
    assert names.CGROUP_PARENT in PAGE


def test_doctor_keeps_the_limits_of_exposure() -> None:
    rows = re.findall(r"^\| `([a-z-]+\.service)` \| [0-9.]+ \| ([0-9.]+) \|$", PAGE, re.MULTILINE)
    assert {unit: float(limit) for unit, limit in rows} == services.EXPOSURE_LIMITS
