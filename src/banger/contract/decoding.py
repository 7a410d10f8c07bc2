# SPDX-License-Identifier: MIT
"""The one door to what msgspec makes of bytes and of plain values: it makes no two decoders at once.

msgspec 0.22 hangs what it knows of a struct on its class before it knows all of it. A thread that decodes
the class meanwhile reads what is not there yet, and the interpreter ends by SIGSEGV; once all is known, any
number of threads may decode. So whoever makes one is alone.
"""

from __future__ import annotations

import threading
from typing import Any, Final, TypeVar

import msgspec

T = TypeVar("T")
_making: Final = threading.RLock()
_made: Final[dict[object, msgspec.json.Decoder[Any]]] = {}


def decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    """The decoder for JSON of this kind; there is one of each, for all threads."""
    found = _made.get(kind)
    if found is None:
        with _making:
            found = _made[kind] = msgspec.json.Decoder(kind)
    return found


def json(data: bytes | str, kind: type[T]) -> T:
    """Raises msgspec.DecodeError, or its ValidationError."""
    try:
        return decoder(kind).decode(data)
    except RecursionError:  # also of what is passed over: a stranger may send brackets without end
        raise msgspec.DecodeError("it is nested too deeply") from None


def toml(data: bytes | str, kind: type[T]) -> T:
    """Raises msgspec.DecodeError, or its ValidationError."""
    decoder(kind)
    return msgspec.toml.decode(data, type=kind)


def convert(value: object, kind: type[T]) -> T:
    """Of what TOML, or a dictionary of ours, holds. Raises msgspec.ValidationError."""
    decoder(kind)
    return msgspec.convert(value, kind)
