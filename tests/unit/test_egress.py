# SPDX-License-Identifier: MIT
"""What a user may write for a destination, and what a request for a VM comes to."""

from __future__ import annotations

import datetime
import itertools

import msgspec
import pytest

from banger.contract import destinations, egress, errors, names, resources
from banger.owner import changes
from banger.vm import create, record

CREATE = resources.CreateVm
SET = resources.SetVm
ALL, INTERNET, NONE = egress.Egress.ALL, egress.Egress.INTERNET, egress.Egress.NONE
_ONE, _OTHER = ("a.org",), ("b.org",)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("10.1.0.0/16", egress.Destination("10.1.0.0/16")),
        ("10.1.2.3", egress.Destination("10.1.2.3/32")),
        ("10.1.2.3:443", egress.Destination("10.1.2.3/32", 443)),
        ("0.0.0.0/0:53", egress.Destination("0.0.0.0/0", 53)),
        ("api.example.org", destinations.NamedDestination("api.example.org")),
        ("API.Example.org.:443", destinations.NamedDestination("api.example.org", 443)),
        ("*.example.org", destinations.NamedDestination("*.example.org")),
        ("intranet", destinations.NamedDestination("intranet")),
        ("2001:DB8::/32", egress.Destination("2001:db8::/32")),
        ("2001:db8::1", egress.Destination("2001:db8::1/128")),
        ("[2001:db8::1]:443", egress.Destination("2001:db8::1/128", 443)),
        ("[2001:db8::/32]:443", egress.Destination("2001:db8::/32", 443)),
        ("[::/0]", egress.Destination("::/0")),
    ],
)
def test_a_destination(text: str, parsed: object) -> None:
    assert destinations.parse(text) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":443",
        "10.1.2.3/16",
        "2001:db8::1/32",
        "2001:db8::/129",
        "[2001:db8::1",
        "2001:db8::1]:443",
        "[2001:db8::1]443",
        "[2001:db8::1]:0",
        "[10.1.2.3]:443",
        "a::example.org",
        "10.1.2.300",
        "10.1.2.3:0",
        "10.1.2.3:65536",
        "a.org:" + "9" * 5000,
        "10.1.2.3:",
        "a..b",
        "a.org:x",
    ],
)
def test_not_a_destination(text: str) -> None:
    with pytest.raises(errors.BadRequestError, match=r"destination|port"):
        destinations.parse(text)


@pytest.mark.parametrize(
    ("url", "instead"),
    [
        ("https://GitHub.com/a/b?c", "github.com:443"),
        ("http://a.org", "a.org:80"),
        ("http://me@a.org:8080/", "a.org:8080"),
        ("https://[2001:db8::1]/", "[2001:db8::1]:443"),
        ("gopher://a.org", "a.org"),
    ],
)
def test_of_a_url_is_said_what_to_write_instead(url: str, instead: str) -> None:
    with pytest.raises(errors.BadRequestError, match="is a URL") as raised:
        destinations.parse(url)
    assert raised.value.hint.startswith(f"write {instead}: ")
    destinations.parse(instead)


@pytest.mark.parametrize(
    "text", ["-a.org", "a b", "a.org\n;", "fd00::g", "*.", "a.*.org", "x" * 254, "1.2.3.4/33", "a.org:4 3"]
)
def test_not_a_name_either(text: str) -> None:
    with pytest.raises(errors.BadRequestError, match=r"destination|port"):
        destinations.parse(text)


@pytest.mark.parametrize(
    ("asked", "access"),
    [
        (CREATE(), create.Access()),
        (CREATE(nat=True), create.Access(nat=True)),
        (CREATE(egress=egress.Egress.ALL), create.Access(nat=True, egress=egress.Egress.ALL)),
        (CREATE(allow=("10.0.0.1",)), create.Access(True, egress.Egress.NONE, ("10.0.0.1",))),
        (CREATE(nat=True, allow=("10.0.0.1",)), create.Access(True, egress.Egress.INTERNET, ("10.0.0.1",))),
        (CREATE(nat=False, allow=("A.org", "a.org")), create.Access(False, egress.Egress.NONE, ("a.org",))),
        (CREATE(network=False), create.Access()),
        (CREATE(peer_network="shop"), create.Access(peers="shop")),
    ],
)
def test_what_a_request_comes_to(asked: resources.CreateVm, access: create.Access) -> None:
    assert create.access(asked) == access


@pytest.mark.parametrize(
    "asked",
    [
        CREATE(network=False, nat=True),
        CREATE(network=False, allow=("10.0.0.1",)),
        CREATE(network=False, peer_network="shop"),
        CREATE(allow=("10.0.0.1/8",)),
        CREATE(allow=tuple(f"10.0.0.{n}" for n in range(65))),
    ],
)
def test_what_cannot_be(asked: resources.CreateVm) -> None:
    with pytest.raises(errors.BadRequestError):
        create.access(asked)


def test_ipv6_is_as_asked_then_as_configured_and_never_without_network() -> None:
    assert not create.access(CREATE()).ipv6
    assert create.access(CREATE(), ipv6=True).ipv6
    assert create.access(CREATE(ipv6=True)).ipv6
    assert not create.access(CREATE(ipv6=False), ipv6=True).ipv6
    assert not create.access(CREATE(network=False), ipv6=True).ipv6
    with pytest.raises(errors.BadRequestError, match="no IPv6"):
        create.access(CREATE(network=False, ipv6=True))


def test_an_ipv6_destination_needs_a_guest_with_ipv6() -> None:
    assert create.access(CREATE(ipv6=True, allow=("2001:db8::/32",))).allow == ("2001:db8::/32",)
    with pytest.raises(errors.BadRequestError, match="2001:db8::/32") as caught:
        create.access(CREATE(allow=("2001:db8::/32",)))
    assert "--ipv6" in caught.value.hint


def vm_with(nat: bool, mode: egress.Egress, allow: tuple[str, ...]) -> record.VmRecord:
    size = create.Sized(1, resources.SizeSource.DEFAULT)
    resolved = create.Resolved(
        names.ImageId("0" * 12),
        names.KernelId("1" * 12),
        size,
        size,
        size,
        network=True,
        access=create.Access(nat, mode, allow),
    )
    return create.draft(
        names.VmId("2" * 12), names.VmName("web"), 1, resolved, datetime.datetime.now(datetime.UTC)
    )


MADE = [
    (False, INTERNET, ()),
    (True, INTERNET, ()),
    (True, INTERNET, _ONE),
    (False, INTERNET, _ONE),
    (True, NONE, _ONE),
    (False, NONE, _ONE),
    (True, NONE, ()),
    (True, ALL, ()),
    (True, ALL, _ONE),
    (False, ALL, ()),
]
"""NAT, mode, allowed: all that options of `create`, and `--nat off` after them, can make."""


@pytest.mark.parametrize("made", MADE)
def test_set_means_what_the_same_words_mean_on_create(
    made: tuple[bool, egress.Egress, tuple[str, ...]],
) -> None:
    vm = vm_with(*made)
    for nat, mode, allow in itertools.product((None, True, False), (None, *egress.Egress), (None, _OTHER)):
        if not (nat or mode or allow):
            continue
        if nat and mode is None and allow is None and made[1:] == (NONE, _ONE):
            continue
        fresh = create.access(CREATE(nat=nat, egress=mode, allow=allow or ()))
        changed = changes.at_once(vm, SET(nat=nat, egress=mode, allow=allow))
        assert (changed.nat, changed.egress) == (fresh.nat, fresh.egress), (nat, mode, allow)
        assert changed.allow == (allow or made[2])


@pytest.mark.parametrize("made", MADE)
def test_taking_away_opens_nothing(made: tuple[bool, egress.Egress, tuple[str, ...]]) -> None:
    vm = vm_with(*made)
    nat, mode, allow = made
    for asked, left in (
        (SET(), made),
        (SET(nat=False), (False, mode, allow)),
        (SET(allow=()), (nat, mode, ())),
        (SET(nat=False, allow=()), (False, mode, ())),
    ):
        changed = changes.at_once(vm, asked)
        assert (changed.nat, changed.egress, changed.allow) == left


@pytest.mark.parametrize("nat", [True, False])
def test_nat_alone_does_not_widen_a_list(nat: bool) -> None:
    vm = vm_with(nat, NONE, _ONE)
    with pytest.raises(errors.BadRequestError, match=r"only a\.org") as caught:
        changes.at_once(vm, SET(nat=True))
    for way, mode in (("--egress none", NONE), ("--egress internet", INTERNET)):
        assert way in caught.value.hint
        changed = changes.at_once(vm, SET(egress=mode))
        assert (changed.nat, changed.egress, changed.allow) == (True, mode, _ONE)
    emptied = changes.at_once(vm, SET(nat=True, allow=()))
    assert (emptied.nat, emptied.egress, emptied.allow) == (True, INTERNET, ())


def test_nothing_is_opened_without_a_network() -> None:
    vm = msgspec.structs.replace(vm_with(False, INTERNET, ()), network=False)
    for asked in (SET(nat=True), SET(egress=INTERNET), SET(allow=_ONE)):
        with pytest.raises(errors.BadRequestError, match="no network"):
            changes.at_once(vm, asked)
