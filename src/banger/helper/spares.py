# SPDX-License-Identifier: MIT
"""Taps made ahead, so that a start only takes one and names it.

A spare is a port of the bridge that is down and root's alone. It lives as long as this process has it open:
whatever ends the helper leaves none, and nobody else can attach to one meanwhile.
"""

from __future__ import annotations

import collections
import os
import threading
from typing import Final, NamedTuple

from banger.helper import tables
from banger.helper.linux import netlink

LIMIT: Final = 4
"""Each costs a helper that ends some 20 ms."""
ALIAS: Final = "banger/spare"
PREFIX: Final = "banger-tap"
_NAME: Final = f"{PREFIX}%d"
_ROOT: Final = 0


class Spare(NamedTuple):
    fd: int
    number: int


_ready: Final[collections.deque[Spare]] = collections.deque()
_room: Final = threading.BoundedSemaphore(LIMIT)


def make(bridge: netlink.Link, name: str = _NAME) -> Spare:
    fd, name = netlink.open_tap(name, owner=_ROOT)
    try:
        number = netlink.number_of(name)
        netlink.add_port(number, alias=ALIAS, master=bridge.number, group=tables.TAP_GROUP)
    except BaseException:
        os.close(fd)
        raise
    return Spare(fd, number)


def refill(bridge: netlink.Link) -> None:
    """Until there are LIMIT; several at once share the work."""
    while _room.acquire(blocking=False):
        try:
            _ready.append(make(bridge))
        except BaseException:
            _room.release()
            raise


def take(bridge: netlink.Link) -> Spare | None:
    """One that is as it was made; what somebody changed is not used."""
    while (spare := _next()) is not None:
        usable = False
        try:
            link = netlink.find_number(spare.number)
            usable = link is not None and is_spare(link) and link.master == bridge.number and not link.is_up
        finally:
            if not usable:
                os.close(spare.fd)
        if usable:
            return spare
    return None


def drain() -> None:
    while (spare := _next()) is not None:
        os.close(spare.fd)


def is_spare(link: netlink.Link) -> bool:
    return (
        link.kind == "tun"
        and link.tun_owner == _ROOT
        and link.alias == ALIAS
        and link.name.startswith(PREFIX)
    )


def _next() -> Spare | None:
    try:
        spare = _ready.popleft()
    except IndexError:
        return None
    _room.release()
    return spare
