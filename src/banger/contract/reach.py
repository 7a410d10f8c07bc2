# SPDX-License-Identifier: MIT
"""How a client reaches into a guest: connections to its ports, and SSH; goes on from `resources`."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from banger.contract import errors, resources


class Transport(enum.StrEnum):
    TCP = "tcp"
    UDP = "udp"


class ConnectRequest(resources.Body, frozen=True, kw_only=True):
    """First message on the connect WebSocket, as JSON text."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    address: str = ""
    """One of the guest's own; empty: its loopback."""
    protocol: Transport = Transport.TCP
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=120)] = 0.0
    """How long a guest that has not finished booting may take until something listens there."""


class ConnectEnd(resources.Resource, frozen=True, kw_only=True):
    """Last message from the daemon, as JSON text. Data are binary both ways; empty ends a direction."""

    error: errors.ErrorBody | None = None


class SshAccess(resources.Resource, frozen=True, kw_only=True):
    """What an ssh client on this host needs. Guests that banger made accept the key."""

    identity_file: str
    host_keys_dir: str
    """One file for each VM, named as it is (`NAME.vm`): its host key, pinned at the first connection."""
    public_key: str
