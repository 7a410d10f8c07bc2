# SPDX-License-Identifier: MIT
"""The row of the default image on a host where nothing was pulled or built yet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from banger.system.doctor import report
from tests.fakes import host as fakes


@pytest.fixture
def host() -> Iterator[fakes.FakeHost]:
    with fakes.furnished() as made:
        made.at(made.image_file("image.json")).unlink()
        yield made


def wants(host: fakes.FakeHost, image: str) -> report.Row:
    host.defaults(image={"value": image, "source": "config"})
    return host.ask("image")


def test_what_the_first_vm_gets_is_no_failure(host: fakes.FakeHost) -> None:
    row = wants(host, "debian-bookworm")
    assert (row.status, row.remedy) == (report.Status.WARN, "banger image build debian-bookworm")
    assert "the first VM gets it" in row.detail


def test_what_nobody_can_get_is_one(host: fakes.FakeHost) -> None:
    assert wants(host, "other").status is report.Status.FAIL
    host.at("/usr/bin/mmdebstrap").unlink()
    assert wants(host, "debian-bookworm").status is report.Status.FAIL


def test_a_catalog_that_cannot_be_read_promises_nothing(host: fakes.FakeHost) -> None:
    host.write("/etc/banger/images.toml", "nonsense")
    assert wants(host, "debian-bookworm").status is report.Status.FAIL
