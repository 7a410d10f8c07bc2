# SPDX-License-Identifier: MIT
"""What people may call a VM: one grammar, in the command line and in the API alike.

A name becomes a host name, a word on the kernel's command line, and the name of a file.
"""

from __future__ import annotations

import msgspec
import pytest

from banger.contract import errors, given_names, resources

GOOD = ["a", "7", "web", "web-1", "0a", "a--b", "w" * 63]
BAD = [
    "", "-", "-web", "web-", "w" * 64, "Web", "web.vm", "we_b", "we b", "web\n", "\nweb", "web\0",
    "w\u00e9b", "\uff57eb", "\u0663", "../web", "web/..", "web=1", "web:80", "web,ro", "web;id", "web$x",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_name(name: str) -> None:
    assert given_names.parse_vm_name(name) == name
    assert msgspec.convert({"name": name}, resources.CreateVm).name == name


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_not_a_name(name: str) -> None:
    with pytest.raises(errors.BadRequestError) as caught:
        given_names.parse_vm_name(name)
    assert "lower-case letters, digits and hyphens" in caught.value.hint
    for kind in (resources.CreateVm, resources.SetVm):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"name": name}, kind)
