# SPDX-License-Identifier: MIT
"""How things look in a terminal, as text; no command prints what a guest or a VM said without `safe`."""

from __future__ import annotations

import datetime
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Final, TextIO

import msgspec

from banger.contract import errors, sizes

# Control characters, and those that reorder the text around them.
_LATER: Final = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_UNSAFE: Final = re.compile(f"[\x00-\x1f{_LATER}]")
_UNSAFE_IN_JSON: Final = re.compile(f"[{_LATER}]")
_UNSAFE_IN_LOG: Final = re.compile(f"(?!\x1b\\[[0-9;]*m)[\x00-\x08\x0b-\x1f{_LATER}]")
_COLOUR: Final = re.compile("\x1b\\[([0-9;]*)m")
_SPANS: Final = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def safe(text: str) -> str:
    """One line of harmless text: a terminal would obey control characters."""
    return _UNSAFE.sub(lambda found: _escaped(found[0]), text)


def safe_log(text: str) -> str:
    """Lines of a log for a terminal: tabs, line ends and colours stay; no colour goes on behind them."""
    shown = _UNSAFE_IN_LOG.sub(lambda found: _escaped(found[0]), text.replace("\r\n", "\n"))
    colours = _COLOUR.findall(shown)
    if not colours or not colours[-1].strip("0"):
        return shown
    body = shown.rstrip("\n")
    return f"{body}\x1b[0m{shown[len(body) :]}"


def json_text(document: bytes) -> str:
    """The same document, with escapes where a terminal would obey: JSON leaves some of those as they are."""
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", document.decode())


def _escaped(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 0x100 else f"\\u{ord(character):04x}"


def has_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, code: str, stream: TextIO) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if has_colour(stream) else text


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, dispensable: Sequence[str] = ()) -> str:
    """Columns as wide as their widest cell; every cell is made safe.

    On a terminal that is too narrow, columns move together, and then `dispensable` ones are left out, the
    first first. In a pipe all of it is there.
    """
    cells = [list(headers), *([safe(cell) for cell in row] for row in rows)]
    widths = {header: max(len(row[at]) for row in cells) for at, header in enumerate(headers)}
    room = _columns() if sys.stdout.isatty() else sys.maxsize
    shown, gap = list(headers), 3
    for header in ("", *dispensable):
        shown = [each for each in shown if each != header]
        gap = next((gap for gap in (3, 2) if _is_within(room, [widths[each] for each in shown], gap)), 0)
        if gap:
            break
    places = [(headers.index(each), widths[each]) for each in shown]
    between = " " * (gap or 2)
    return "\n".join(between.join(row[at].ljust(width) for at, width in places).rstrip() for row in cells)


def fits(text: str) -> bool:
    """Whether no line of it goes on in the terminal's next one; a pipe takes any."""
    return not sys.stdout.isatty() or all(len(line) <= _columns() for line in text.splitlines())


def _columns() -> int:
    """As shutil.get_terminal_size() has it, without what it takes to load that."""
    said = os.environ.get("COLUMNS", "")
    if said.isdigit() and int(said) > 0:
        return int(said)
    from banger.cli import terminal

    return terminal.size(1)[1]


def _is_within(room: int, widths: Sequence[int], gap: int) -> bool:
    return sum(widths) + gap * (len(widths) - 1) <= room


def hanging(text: str, indent: int) -> str:
    """What stands `indent` columns from the left, and on a terminal goes on there in its next lines."""
    if not sys.stdout.isatty():
        return text
    import textwrap

    room = max(20, _columns() - indent)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * indent}".join(lines)


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A name and a value on each line, for `show`."""
    shown = [(name, safe(value)) for name, value in rows]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(f"{name + ':':<{width + 2}}{value}".rstrip() for name, value in shown)


def span(seconds: float) -> str:
    """`5 seconds`, `3 hours`: the largest unit that fits."""
    for size, unit in _SPANS:
        if seconds >= size:
            return sizes.counted(int(seconds // size), unit)
    return "0 seconds"


def whole_span(seconds: int) -> str:
    """`1 minute 30 seconds`: all of it, for what somebody asked for."""
    parts = []
    for size, _ in _SPANS:
        if seconds >= size:
            parts.append(span(seconds - seconds % size))
            seconds %= size
    return " ".join(parts) or span(0)


def age(moment: datetime.datetime | None) -> str:
    """How long ago; empty for never."""
    if moment is None:
        return ""
    return span((datetime.datetime.now(datetime.UTC) - moment).total_seconds())


def until(moment: datetime.datetime) -> str:
    """How long it is still: `1 hour 59 minutes`, for a last hour says little of a moment that comes."""
    left_s = (moment - datetime.datetime.now(datetime.UTC)).total_seconds()
    first = span(max(0.0, left_s))
    size = next((size for size, _ in _SPANS if left_s >= size), 1)
    rest_s = left_s % size if size > 60 else 0.0
    return f"{first} {span(rest_s)}" if rest_s >= 60 else first


def elapsed(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f}s" if milliseconds < 100_000 else f"{milliseconds / 1000:.0f}s"


def describe(error: errors.BangerError, stream: TextIO) -> str:
    """The lines of an error: what failed, what else did, what to do, and the id to grep for."""
    fields = dict(error.fields)
    operation, step = fields.pop("op_id", ""), fields.pop("step", "")
    lines = [f"{styled('banger: error:', '1;31', stream)} {safe(error.message)}"]
    if step:
        lines.append(f"  step: {safe(step)}")
    lines += [f"  also: {safe(note)}" for note in getattr(error, "__notes__", ())]
    if error.hint:
        lines.append(f"  hint: {safe(error.hint)}")
    if operation:
        lines.append(f"  operation: {safe(operation)}")
    return "\n".join(lines)


def error_body(error: errors.BangerError) -> errors.ErrorBody:
    fields = dict(error.fields)
    body = errors.to_body(error, op_id=fields.pop("op_id", ""), step=fields.pop("step", ""))
    return msgspec.structs.replace(body, fields=fields)


def error_json(error: errors.BangerError) -> str:
    """One line: `{"error": {code, message, hint, op_id, …}}`."""
    return json_text(msgspec.json.encode({"error": error_body(error)}))


def note(text: str) -> None:
    """A line of banger's own beside the output of what the user runs."""
    print(f"banger: {safe(text)}", file=sys.stderr, flush=True)
