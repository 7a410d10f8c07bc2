# SPDX-License-Identifier: MIT
"""The wire to root is closed: every text in a request is bounded and has no line feed in it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec
import pytest

from banger.contract import privileged
from banger.helper import policy as policies


def texts(kind: msgspec.inspect.Type) -> Iterator[msgspec.inspect.StrType]:
    """Every string type within a type."""
    if isinstance(kind, msgspec.inspect.StrType):
        yield kind
    elif isinstance(kind, msgspec.inspect.StructType):
        for field in kind.fields:
            yield from texts(field.type)
    elif isinstance(kind, msgspec.inspect.VarTupleType):
        yield from texts(kind.item_type)
    else:
        plain = (msgspec.inspect.IntType, msgspec.inspect.BoolType, msgspec.inspect.EnumType)
        assert isinstance(kind, plain), f"{kind} is not a type that a request may have"


@pytest.mark.parametrize("request_type", privileged.REQUEST_TYPES, ids=lambda each: each.__name__)
def test_every_text_has_a_pattern_that_no_line_feed_passes(request_type: type) -> None:
    for text in texts(msgspec.inspect.type_info(request_type)):
        assert text.pattern, "a text without a pattern could be anything"
        assert text.pattern.startswith("^")
        assert text.pattern.endswith(r"$(?!\n)")
        for sample in ("a\n", "0123456789ab\n", "1.2.3.4\n", "\n"):
            assert not re.search(text.pattern, sample)


def test_requests_are_closed() -> None:
    closed: tuple[type[msgspec.Struct], ...]
    closed = (*privileged.REQUEST_TYPES, privileged.Envelope, policies.Policy)
    for request_type in closed:
        assert request_type.__struct_config__.forbid_unknown_fields, request_type
        assert request_type.__struct_config__.frozen, request_type


def test_no_request_names_a_path_a_device_or_a_process() -> None:
    forbidden = re.compile(r"path|file|dir|device|pid|uid|gid|interface|command|argv|env")
    for request_type in privileged.REQUEST_TYPES:
        named = [name for name in request_type.__struct_fields__ if forbidden.search(name)]
        assert not named, (request_type, named)
