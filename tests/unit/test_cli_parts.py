# SPDX-License-Identifier: MIT
"""The CLI's parts that need no daemon: sizes, what a terminal is shown, WebSocket frames, help."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import click
import hypothesis
import msgspec
import pytest
from hypothesis import strategies
from websockets import frames, streams

import banger
from banger.cli import attach, bootstrap, command, exits, gc, main, render, vm_workspace, websocket
from banger.contract import egress, errors, inventory, resources, sizes
from banger.owner import config, defaults

# --- sizes ---


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("512", 512),
        ("512M", 512),
        ("2G", 2048),
        ("2GiB", 2048),
        ("1.5g", 1536),
        ("1T", 1 << 20),
        ("1024K", 1),
    ],
)
def test_sizes_parse(text: str, mib: int) -> None:
    assert sizes.parse_mib(text) == mib


@pytest.mark.parametrize(
    "text", ["", "M", "-1G", "1X", "1e3", "0x10", "1 000", "1K", "100B", "1..5G", "٣G", "9" * 12]
)
def test_sizes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(errors.BadRequestError):
        sizes.parse_mib(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1 KiB"), (1536, "1.5 KiB"), (5 << 30, "5 GiB"), (1 << 50, "1024 TiB")],
)
def test_sizes_are_shown(size: int, text: str) -> None:
    assert sizes.text_of_bytes(size) == text


def test_one_of_something_is_not_some() -> None:
    assert [sizes.counted(count, "file") for count in (0, 1, 2)] == ["0 files", "1 file", "2 files"]


@hypothesis.given(strategies.integers(0, 1 << 24))
def test_sizes_round_trip(mib: int) -> None:
    assert sizes.parse_mib(f"{mib}M") == mib
    assert sizes.parse_bytes(f"{mib}B") == mib


# --- text ---


@hypothesis.given(strategies.text())
def test_safe_text_is_one_harmless_line(text: str) -> None:
    shown = render.safe(text)
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)
    assert len(shown.splitlines()) <= 1


TERMINAL_TEXT = strategies.text() | strategies.text(
    strategies.sampled_from("a\n\r\t\x07\x1b[]0;31m\x7f\x85\x9b\u061c\u200f\u2028\u202e\u2066")
)
BIDI = "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@hypothesis.given(TERMINAL_TEXT)
def test_safe_log_keeps_only_colours(text: str) -> None:
    shown = render.safe_log(text)
    for piece in shown.split("\x1b")[1:]:
        assert piece.startswith("[")
        assert piece[1:].lstrip("0123456789;").startswith("m")
    assert not set(shown) & {*BIDI, *map(chr, range(0x7F, 0xA0))}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[8mhidden\n", "\x1b[8mhidden\x1b[0m\n"),
        ("\x1b[31mred\x1b[0m\n", "\x1b[31mred\x1b[0m\n"),
        ("\x1b[31mred\x1b[m", "\x1b[31mred\x1b[m"),
        ("\x1b[10m\n\n", "\x1b[10m\x1b[0m\n\n"),
        ("plain\n", "plain\n"),
    ],
)
def test_no_colour_of_a_log_goes_on_behind_it(text: str, shown: str) -> None:
    assert render.safe_log(text) == shown


@hypothesis.given(TERMINAL_TEXT)
def test_json_is_the_same_and_harmless(text: str) -> None:
    shown = render.json_text(msgspec.json.encode({text: [text]}))
    assert json.loads(shown) == {text: [text]}
    assert not set(shown) & {*BIDI, *map(chr, [*range(32), *range(0x7F, 0xA0)])}
    shown = render.error_json(errors.NotFoundError(text, hint=text))
    assert json.loads(shown)["error"]["message"] == text
    assert not set(shown) & {*BIDI, *map(chr, range(0x7F, 0xA0))}


def test_table_is_aligned() -> None:
    assert render.table(("A", "LONG"), [("xxxx", "1"), ("y", "")]) == "A      LONG\nxxxx   1\ny"


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (0, "NAME   AGE      WHO\nweb    5 days   dev"),
        (20, "NAME   AGE      WHO\nweb    5 days   dev"),
        (18, "NAME  AGE     WHO\nweb   5 days  dev"),
        (12, "NAME   WHO\nweb    dev"),
        (5, "NAME  WHO\nweb   dev"),
    ],
)
def test_a_table_fits_a_terminal_and_is_whole_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, columns: int, shown: str
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: columns > 0)
    monkeypatch.setenv("COLUMNS", str(columns))
    found = render.table(["NAME", "AGE", "WHO"], [["web", "5 days", "dev"]], dispensable=["AGE"])
    assert found == shown


def test_what_gc_names_is_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands behind a path, and banger breaks none: so it can be copied, however long it is."""
    path = "/var/lib/banger/images/0123456789ab/rootfs.ext4"
    why = "kept while web exists, which needs it"
    thing = inventory.Thing(inventory.Kind.IMAGE, path, why, owner="base")
    found = inventory.Inventory((thing,))
    assert f"image   {path}   base    {why}" in gc._shown(found, (), explain=True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    shown = gc._shown(found, (), explain=True).split("\n")
    assert shown[:3] == [f"image  {path}", "       base: kept while web exists,", "       which needs it"]


def test_a_long_text_goes_on_below_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one two /a/long/path three four five six"
    assert render.hanging(text, 10) == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "34")
    assert render.hanging(text, 10) == f"one two /a/long/path\n{' ' * 10}three four five six"


def test_span_uses_the_largest_unit() -> None:
    shown = [render.span(seconds) for seconds in (0, 1, 59, 60, 3599, 7200, 200_000)]
    assert shown == ["0 seconds", "1 second", "59 seconds", "1 minute", "59 minutes", "2 hours", "2 days"]


def test_a_span_that_somebody_asked_for_is_said_whole() -> None:
    shown = [render.whole_span(seconds) for seconds in (0, 90, 7200, 90_061)]
    assert shown == ["0 seconds", "1 minute 30 seconds", "2 hours", "1 day 1 hour 1 minute 1 second"]


def test_every_error_code_has_an_exit_status() -> None:
    statuses = {
        code: exits.status_of(errors.from_body(errors.ErrorBody(code=code, message="")))
        for code in errors.CODES
    }
    assert statuses.pop("bad_request") == 2
    assert statuses.pop("cancelled") == 130
    assert set(statuses.values()) == {1}


# --- WebSocket frames, against another implementation ---


@contextlib.contextmanager
def linked() -> Iterator[tuple[websocket.WebSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with contextlib.closing(websocket.WebSocket(ours)) as made, theirs:
        yield made, theirs


def theirs_of(opcode: frames.Opcode, data: bytes, *, fin: bool = True) -> bytes:
    return frames.Frame(opcode, data, fin=fin).serialize(mask=False)


def read_frame(data: bytes) -> frames.Frame:
    """As a server parses it."""
    reader = streams.StreamReader()
    reader.feed_data(data)
    parser = frames.Frame.parse(reader.read_exact, mask=True, max_size=None)
    try:
        next(parser)
    except StopIteration as stop:
        frame: frames.Frame = stop.value
        return frame
    raise AssertionError("not a whole frame")


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 125, 126, 65535, 65536, 70001])
def test_frames_we_send_are_masked_and_whole(size: int) -> None:
    data = os.urandom(size)
    with linked() as (ours, theirs):
        ours.send(websocket.Opcode.BINARY, data)
        received = bytearray()
        while ours.pending_bytes:
            ours.flush()
            received += theirs.recv(1 << 20)
        frame = read_frame(bytes(received))
    assert received[1] & 0x80
    assert (frame.opcode, bytes(frame.data)) == (frames.Opcode.BINARY, data)


@hypothesis.given(
    messages=strategies.lists(strategies.binary(max_size=70_000), max_size=4),
    cut=strategies.integers(1, 5000),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_messages_arrive_however_they_are_cut(messages: list[bytes], cut: int) -> None:
    stream = b"".join(theirs_of(frames.Opcode.BINARY, data) for data in messages)
    received: list[bytes] = []
    with linked() as (ours, theirs):
        for start in range(0, len(stream), cut):
            theirs.sendall(stream[start : start + cut])
            received += [message.data for message in ours.receive()]
    assert received == messages


def test_fragments_are_joined_and_pings_answered() -> None:
    with linked() as (ours, theirs):
        theirs.sendall(
            theirs_of(frames.Opcode.TEXT, b"one ", fin=False)
            + theirs_of(frames.Opcode.PING, b"there?")
            + theirs_of(frames.Opcode.CONT, b"two")
            + theirs_of(frames.Opcode.CLOSE, b"")
        )
        received = list(ours.receive())
        ours.flush()
        pong = read_frame(theirs.recv(1000))
    assert [(message.opcode.name, message.data) for message in received] == [
        ("TEXT", b"one two"),
        ("CLOSE", b""),
    ]
    assert (pong.opcode, bytes(pong.data)) == (frames.Opcode.PONG, b"there?")


@pytest.mark.parametrize(
    "frame", [b"\xc2\x00", b"\x82\x80\0\0\0\0", b"\x83\x00", b"\x82\x7f" + (1 << 40).to_bytes(8, "big")]
)
def test_frames_that_were_not_agreed_on_are_refused(frame: bytes) -> None:
    with linked() as (ours, theirs):
        theirs.sendall(frame)
        with pytest.raises(errors.ProtocolError):
            list(ours.receive())


def test_end_of_the_connection_is_seen_after_what_came_before() -> None:
    with linked() as (ours, theirs):
        theirs.sendall(theirs_of(frames.Opcode.TEXT, b"last"))
        theirs.close()
        assert [message.data for message in ours.receive()] == [b"last"]
        assert list(ours.receive()) == []
        assert ours.at_end


# --- commands ---


def commands(group: click.Group, path: str = "banger") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        assert found is not None
        yield f"{path} {name}", found
        if isinstance(found, click.Group):
            yield from commands(found, f"{path} {name}")


ALL = dict(commands(main.root))


@pytest.mark.parametrize("path", ALL)
def test_every_help_page_has_examples_of_itself(path: str) -> None:
    found = ALL[path]
    assert isinstance(found, command.Command | command.Group | command.LazyGroup)
    assert found.examples
    assert any(path in line for line, _ in found.examples) or isinstance(found, click.Group)


@pytest.mark.parametrize("path", ALL)
def test_tables_of_lazy_groups_say_what_the_commands_say(path: str) -> None:
    parent_path, _, name = path.rpartition(" ")
    parent = main.root if parent_path == "banger" else ALL[parent_path]
    if isinstance(parent, command.LazyGroup):
        assert ALL[path].get_short_help_str(limit=200) == parent.nouns[name].summary


@pytest.mark.parametrize("path", ALL)
def test_a_value_is_called_what_it_is(path: str) -> None:
    """Not `TEXT` or `INTEGER RANGE`, which are click's own words."""
    context = click.Context(ALL[path])
    options = (each for each in ALL[path].params if isinstance(each, click.Option) and not each.is_flag)
    named = [each.make_metavar(context) for each in options]
    assert [name for name in named if re.search("TEXT|INTEGER|FLOAT|RANGE", name)] == []


def test_the_help_says_what_sizes_a_vm_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sysconf", lambda _: 1 << 20)
    sized = defaults.sizes(resources.CreateVm(), config.Config())
    helps = {each.name: getattr(each, "help", "") for each in ALL["banger vm create"].params}
    assert f"else {sized['vcpus'].value}," in helps["vcpus"]
    for name in ("memory_mib", "disk_size_mib"):
        (said,) = re.findall(r"else (\w+)", helps[name])
        assert sizes.parse_mib(said) == sized[name].value


@pytest.mark.parametrize("path", [path for path, found in ALL.items() if not isinstance(found, click.Group)])
def test_json_and_socket_are_options_of_every_command(path: str) -> None:
    names = {option for parameter in ALL[path].params for option in parameter.opts}
    assert {"--json", "--socket"} <= names


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["vm", "list", "--json", "--nope"], "banger vm list"),
        (["vm", "list", "--nope", "--json"], "banger vm list"),
        (["vm", "lits", "--json"], "banger vm"),
        (["--json", "vm", "create", "web", "--vcpu", "0"], "banger vm create"),
        (["vm", "show", "--json"], "banger vm show"),
        (["vm", "run", "--json", "--nope", "--", "true"], "banger vm run"),
    ],
)
def test_a_command_line_that_cannot_be_is_told_to_programs_too(
    words: list[str], where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(words) == 2
    said = capsys.readouterr()
    error = json.loads(said.err)["error"]
    assert (error["code"], error["hint"], said.out) == ("bad_request", f"see `{where} --help`", "")


def test_json_that_is_the_user_s_own_word_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["vm", "run", "--nope", "--", "jq", "--json"]) == 2
    assert capsys.readouterr().err.startswith("banger: error: ")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"banger {banger.__version__}\n"


def test_the_module_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "banger.cli.main", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"banger {banger.__version__}\n"


# --- vm create, set, run ---


@pytest.mark.parametrize("verb", ["create", "set"])
@pytest.mark.parametrize(
    ("option", "value", "wrong"),
    [
        ("--memory", "2", "2M is too little; at least 64M; a bare number is in MiB"),
        ("--memory", "63M", "63M is too little; at least 64M"),
        ("--memory", "2T", "2T is too much; at most 1T"),
        ("--disk-size", "15", "15M is too little; at least 16M; a bare number is in MiB"),
        ("--disk-size", "0G", "0M is too little; at least 16M"),
        ("--disk-size", "17T", "17T is too much; at most 16T"),
        ("--vcpu", "0", "0 is too little; at least 1"),
        ("--vcpu", "33", "33 is too much; at most 32"),
    ],
)
def test_a_size_outside_its_limits_says_them(
    verb: str, option: str, value: str, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["vm", verb, "web", option, value]) == 2
    assert capsys.readouterr().err.splitlines()[0].endswith(f"Invalid value for '{option}': {wrong}")


@pytest.mark.parametrize(
    ("options", "can"),
    [
        ({}, False),
        ({"nat": True}, True),
        ({"egress": egress.Egress.INTERNET}, True),
        ({"egress": egress.Egress.ALL}, True),
        ({"egress": egress.Egress.NONE}, False),
        ({"nat": True, "egress": egress.Egress.NONE}, False),
        ({"allow": ("mise.example.org:443",)}, True),
        ({"egress": egress.Egress.NONE, "allow": ("mise.example.org",)}, True),
    ],
)
def test_tools_are_for_a_vm_that_reaches_something(options: dict[str, Any], can: bool) -> None:
    asked = resources.CreateVm(**options)
    with contextlib.nullcontext() if can else pytest.raises(errors.BadRequestError, match="mise"):
        bootstrap.require_network(asked)


@pytest.mark.timeout(20)
def test_a_timeout_ends_also_when_the_guest_does_not_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "_GRACE_S", 0.05)
    ours, theirs = socket.socketpair()
    woken, waker = socket.socketpair()
    with theirs, woken, waker, contextlib.closing(websocket.WebSocket(ours)) as channel:
        session = attach._Session(channel, woken, tty=False)
        session.end_after(0.05)
        end = session.run()
        said = theirs.recv(4096)
    frame = read_frame(said)
    asked = [
        json.loads(bytes(frame.data))["signal"],
        json.loads(bytes(read_frame(said[6 + len(frame.data) :]).data))["signal"],
    ]
    assert asked == [signal.SIGTERM, signal.SIGKILL]
    assert (end.exit_status, session.has_timed_out, session.has_given_up) == (attach.TIMED_OUT, True, True)
    assert "may still run" in attach._timed_out("sleep", 0.05, may_run=True)


def test_a_full_disk_is_no_fault_in_banger(capsys: pytest.CaptureFixture[str]) -> None:
    assert main._failed(OSError(errno.ENOSPC, "No space left on device", "/srv/x"), json=False) == 1
    assert "no space left: /srv/x" in capsys.readouterr().err


def test_what_cannot_be_written_to_is_no_fault_in_banger(capsys: pytest.CaptureFixture[str]) -> None:
    assert main._failed(OSError(errno.EROFS, "Read-only file system", "/etc/banger"), json=False) == 1
    said = capsys.readouterr().err
    assert "the file system is read-only: /etc/banger" in said
    assert "remount" in said


@pytest.mark.timeout(20)
def test_a_line_without_end_is_shown_in_parts() -> None:
    """Of 64 MiB in pieces of 64 bytes, nothing is moved again and again."""
    sizes = [len(part) for part, _ in vm_workspace._lines(bytes(64) for _ in range(1 << 20))]
    assert (sum(sizes), max(sizes)) == (64 << 20, (64 << 10) + 64)
    assert list(vm_workspace._lines([b"a\n\nb", b"c", b"\nd"])) == [
        (b"a\n", True),
        (b"\n", True),
        (b"bc\n", True),
        (b"d", True),
    ]
    long = [b"+" * (1 << 17), b"+\n+whole\n"]
    assert [is_whole for _, is_whole in vm_workspace._lines(long)] == [False, False, True]
