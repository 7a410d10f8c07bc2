# SPDX-License-Identifier: MIT
"""The loop's part that moves bytes between a descriptor and a WebSocket."""

from __future__ import annotations

import os
import socket

from banger.cli import link, websocket


def test_input_that_another_process_took_has_not_ended() -> None:
    """Who shares a descriptor that does not block finds nothing where there was something a moment ago."""
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    with ours, theirs, os.fdopen(reader, "rb"), os.fdopen(writer, "wb"):
        os.set_blocking(reader, False)
        joined = link.Link(websocket.WebSocket(ours), lambda _: None, input=reader)
        joined.move({reader})
        assert joined.input == reader
        assert not joined.channel.pending_bytes
        os.write(writer, b"x")
        joined.move({reader})
        assert joined.channel.pending_bytes


def test_output_for_which_another_process_left_no_room_waits() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as taken, os.fdopen(writer, "wb"):
        os.set_blocking(writer, False)
        full = os.write(writer, bytes(1 << 20))
        held = bytearray(b"more")
        link.write(writer, held)
        assert held == b"more"
        taken.read(full)
        link.write(writer, held, 3)
        assert (taken.read(9), bytes(held)) == (b"mor", b"e")
