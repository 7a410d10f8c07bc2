# SPDX-License-Identifier: MIT
"""The API's OpenAPI document: paths as the routes have them, types as the codec has them.

`bangerd --openapi` prints it, GET /v1/openapi.json serves it, docs/api.md is generated from it.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Sequence
from typing import Any, Final

import litestar
import msgspec
from litestar import handlers, openapi
from litestar.types import Method

import banger
from banger.contract import errors, resources

Document = dict[str, Any]  # JSON

_REF: Final = "#/components/schemas/{name}"
# They travel in streams and WebSockets, which OpenAPI has no words for.
_STREAMED: Final = (resources.Event, resources.ExecRequest, resources.ExecControl, resources.ExecEnd)


def render(routes: Sequence[handlers.BaseRouteHandler]) -> bytes:
    return json.dumps(document(routes), indent=1, sort_keys=True).encode() + b"\n"


def document(routes: Sequence[handlers.BaseRouteHandler]) -> Document:
    """OpenAPI 3.1. Litestar's schemas know neither docstrings nor closed structs: msgspec's do."""
    app = litestar.Litestar(
        route_handlers=list(routes),
        dependencies={"services": litestar.di.Provide(lambda: None, sync_to_thread=False)},
        openapi_config=openapi.OpenAPIConfig(
            title="banger",
            version=banger.__version__,
            description="bangerd's API, on its unix socket.",
            use_handler_docstrings=True,
            operation_id_creator=_operation_id,
        ),
        logging_config=None,
    )
    made: Document = app.openapi_schema.to_schema()
    made["components"]["schemas"] = _schemas(made["components"]["schemas"])
    # A path of the socket is no URL; clients send any host.
    made["servers"] = [{"url": "/"}]
    for methods in made["paths"].values():
        for operation in methods.values():
            _complete(operation)
    return made


def _operation_id(handler: handlers.HTTPRouteHandler, _: Method, __: Sequence[object]) -> str:
    return str(handler.fn.__name__)


def _schemas(used: Document) -> Document:
    types = [getattr(resources, name, None) or getattr(errors, name) for name in sorted(used)]
    _, components = msgspec.json.schema_components({*types, *_STREAMED}, ref_template=_REF)
    for name, schema in components.items():
        kind = getattr(resources, name, None) or getattr(errors, name)
        schema["description"] = inspect.cleandoc(kind.__doc__ or "")
    return dict(sorted(components.items()))


def _complete(operation: Document) -> None:
    """Every request may fail in the one way that all do."""
    operation["summary"] = operation.get("description", "").partition("\n")[0]
    operation["responses"].pop("400", None)
    operation["responses"]["default"] = {
        "description": "The request was refused or failed.",
        "content": {"application/json": {"schema": {"$ref": _REF.format(name="ErrorBody")}}},
    }


@functools.cache
def cached(routes: tuple[handlers.BaseRouteHandler, ...]) -> bytes:
    """Made when first asked for: a daemon that is never asked does not pay for it."""
    return render(routes)
