# SPDX-License-Identifier: MIT
"""Writes docs/api.md from the API's OpenAPI document: `python -m banger.owner.reference > docs/api.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Final

from banger.owner import app, openapi

Part = dict[str, Any]  # a piece of the document

_HEAD: Final = """\
# API

HTTP and JSON over `/run/banger/bangerd.sock`, for its owner and root. This page is made from the OpenAPI
document that the daemon serves at `GET /v1/openapi.json` and `bangerd --openapi` prints.

`ref` is a name, an id, or the beginning of an id. Sizes are in the unit of the name, times are RFC 3339 in
UTC, ids are 12 hex digits. A body with a field that the daemon does not know is refused; a client ignores
fields that it does not know.

Long work answers 202 with an Operation. `GET /v1/operations/{operation_id}/events` streams its events from
the first on, as server-sent events; `DELETE /v1/operations/{operation_id}` cancels it and answers when
everything has been rolled back. With `?cancel_on_disconnect=true` the operation ends with the client that
watches it.

`/v1/vms/{ref}/exec` is a WebSocket: the client's first message is an ExecRequest, its later texts are
ExecControls, its binary messages are stdin and an empty one ends it. The daemon's binary messages are a
byte 1 (stdout) or 2 (stderr) and the data; its last message is an ExecEnd.

The other WebSockets carry JSON texts and streams: binary messages, ended by an empty one. The last message
is the daemon's, and has the error of what failed at any point before.
"""
_ERRORS: Final = """\
## Errors

An error is an ErrorBody. Its `op_id` greps in the journals of both services. A code that a client does not
know means `operation_failed`.
"""


def reference() -> str:
    """The page as it should be; a test compares it with the one in the tree."""
    document = openapi.document(app.ROUTES, app.STATUS, app.EXCHANGES)
    parts = [
        _HEAD,
        "## Routes\n",
        _table(("route", "", "body", "answer"), _routes(document)),
        _ERRORS,
        _table(("status", "codes"), _codes(document)),
        "## Types\n",
        *(_type(name, schema) for name, schema in document["components"]["schemas"].items()),
    ]
    return "\n".join(parts)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = tuple(head)
    lines = (columns, tuple("---" for _ in columns), *rows)
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


def _routes(document: Part) -> Iterator[tuple[str, ...]]:
    for path, methods in sorted(document["paths"].items()):
        for method, operation in sorted(methods.items()):
            verb = "WebSocket" if "x-websocket" in operation else method.upper()
            summary = " ".join(operation["description"].split())
            yield f"`{verb} {path}`", summary + _choices(operation), _body(operation), _answer(operation)


def _choices(operation: Part) -> str:
    """What may stand in the query, or where the path has a choice."""
    said = []
    for parameter in operation.get("parameters", []):
        schema = parameter["schema"]
        if parameter["in"] == "query":
            said.append(f"`?{parameter['name']}=` {_kind(schema)}, default {_json(schema['default'])}")
        elif "enum" in schema:
            said.append(f"`{parameter['name']}`: {_kind(schema)}")
    return "".join(f"<br>{each}" for each in said)


def _body(operation: Part) -> str:
    if "x-websocket" in operation:
        said = operation["x-websocket"]
        return ", ".join(_kind(said[which]) for which in ("first", "later") if which in said)
    return ", ".join(
        _kind(each["schema"]) for each in operation.get("requestBody", {}).get("content", {}).values()
    )


def _answer(operation: Part) -> str:
    if "x-websocket" in operation:
        said = operation["x-websocket"]
        return ", ".join(_kind(said[which]) for which in ("answers", "last") if which in said)
    [(status, answer)] = [(key, value) for key, value in operation["responses"].items() if key != "default"]
    for media_type, each in answer.get("content", {}).items():
        suffix = "" if media_type == "application/json" else f", {media_type}"
        return f"{status}: {_kind(each['schema'])}{suffix}"
    return str(status)


def _codes(document: Part) -> Iterator[tuple[str, str]]:
    for status, codes in document["components"]["responses"]["Failure"]["x-codes"].items():
        yield status, ", ".join(f"`{code}`" for code in codes)


def _type(name: str, schema: Part) -> str:
    lines = [f"### {name}", ""]
    if schema.get("description"):
        lines += [" ".join(schema["description"].split()), ""]
    if "enum" in schema:
        return "\n".join([*lines, f"One of {_kind(schema)}.", ""])
    rows = (
        (
            f"`{field}`",
            _kind(each),
            _default(field, each, schema),
            " ".join(each.get("description", "").split()),
        )
        for field, each in schema["properties"].items()
    )
    return "\n".join([*lines, _table(("field", "type", "default", ""), rows)])


def _default(field: str, schema: Part, parent: Part) -> str:
    return "required" if field in parent["required"] else f"`{_json(schema['default'])}`"


def _kind(schema: Part) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return f"[{', '.join(_kind(each) for each in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"map of {_kind(schema['additionalProperties'])}"
    return str(schema.get("type", "any")) + _range(schema)


def _range(schema: Part) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" {schema['minimum']}–{schema['maximum']}"
    return f" `{schema['pattern']}`" if "pattern" in schema else ""


def _json(value: object) -> str:
    return json.dumps(value)


if __name__ == "__main__":
    sys.stdout.write(reference())
