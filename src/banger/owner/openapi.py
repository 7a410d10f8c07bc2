# SPDX-License-Identifier: MIT
"""The API's OpenAPI document: paths as the routes have them, types as the codec has them.

`bangerd --openapi` prints it, GET /v1/openapi.json serves it, docs/api.md is generated from it.
"""

from __future__ import annotations

import ast
import inspect
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import litestar
import msgspec
from litestar import handlers, openapi
from litestar.types import Method

import banger
from banger.contract import egress, errors, inventory, ports, reach, requests, resources, transfers

Document = dict[str, Any]  # JSON
Routes = Sequence[handlers.BaseRouteHandler]

MODULES: Final = (resources, transfers, requests, reach, egress, ports, errors, inventory)
"""Where what the API speaks of is defined."""
_SCHEMA: Final = "#/components/schemas/"
_FAILURE: Final = "#/components/responses/Failure"
Exchanges = Mapping[str, Mapping[str, type[msgspec.Struct]]]
"""By handler: what travels in its WebSocket, which OpenAPI has no words for. `x-websocket` names it."""


def render(routes: Routes, statuses: Mapping[str, int], exchanges: Exchanges) -> bytes:
    return json.dumps(document(routes, statuses, exchanges), indent=1, sort_keys=True).encode() + b"\n"


def document(routes: Routes, statuses: Mapping[str, int], exchanges: Exchanges) -> Document:
    """OpenAPI 3.1. Litestar's schemas know neither docstrings nor closed structs: msgspec's do.

    `statuses` maps the codes of errors to HTTP statuses; every other code has 500.
    """
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
    made["components"] = {
        "schemas": _schemas(made["components"]["schemas"], exchanges),
        "responses": {"Failure": _failure(statuses)},
    }
    # A path of the socket is no URL; clients send any host.
    made["servers"] = [{"url": "/"}]
    for methods in made["paths"].values():
        for operation in methods.values():
            _complete(operation)
    for route in routes:
        if isinstance(route, handlers.WebsocketRouteHandler):
            for path in route.paths:
                made["paths"][path.replace(":str}", "}")] = {"get": _websocket(route, exchanges)}
    return made


def _operation_id(handler: handlers.HTTPRouteHandler, _: Method, __: Sequence[object]) -> str:
    return str(handler.fn.__name__)


def _complete(operation: Document) -> None:
    """Every request may fail in the one way that all do."""
    operation["summary"] = operation.get("description", "").partition("\n")[0]
    operation["responses"].pop("400", None)
    operation["responses"]["default"] = {"$ref": _FAILURE}


def _websocket(route: handlers.WebsocketRouteHandler, exchanges: Exchanges) -> Document:
    description = inspect.cleandoc(route.fn.__doc__ or "")
    return {
        "operationId": route.fn.__name__,
        "summary": description.partition("\n")[0],
        "description": description,
        "parameters": [
            {"name": "ref", "in": "path", "required": True, "schema": {"type": "string"}},
        ],
        "responses": {
            "101": {"description": "A WebSocket follows."},
            "default": {"$ref": _FAILURE},
        },
        "x-websocket": {
            which: {"$ref": _SCHEMA + kind.__name__} for which, kind in exchanges[route.fn.__name__].items()
        },
    }


def _failure(statuses: Mapping[str, int]) -> Document:
    """An answer that is not a success; which codes come with which status."""
    by_status: dict[str, list[str]] = {}
    for code in sorted(errors.CODES):
        by_status.setdefault(str(statuses.get(code, 500)), []).append(code)
    return {
        "description": "The request was refused or failed.",
        "content": {"application/json": {"schema": {"$ref": f"{_SCHEMA}ErrorBody"}}},
        "x-codes": dict(sorted(by_status.items())),
    }


def _kind(name: str) -> Any:
    """The type of the contract that a schema is named after."""
    return next(getattr(module, name) for module in MODULES if hasattr(module, name))


def _schemas(used: Document, exchanges: Exchanges) -> Document:
    kinds = {_kind(name) for name in used}
    told = {kind for exchange in exchanges.values() for kind in exchange.values()}
    _, components = msgspec.json.schema_components({*kinds, *told}, ref_template=_SCHEMA + "{name}")
    notes = {key: note for module in MODULES for key, note in _field_notes(module).items()}
    for name, schema in components.items():
        kind = _kind(name)
        schema["description"] = inspect.cleandoc(kind.__doc__ or "")
        if "enum" in schema:
            schema["enum"] = list(kind)  # msgspec sorts them, and the order may mean something
        for field, value in schema.get("properties", {}).items():
            if (name, field) in notes:
                value["description"] = notes[name, field]
    # Open on purpose: a client takes a code that it does not know for operation_failed.
    components["ErrorBody"]["properties"]["code"]["examples"] = sorted(errors.CODES)
    return dict(sorted(components.items()))


def _field_notes(module: types.ModuleType) -> dict[tuple[str, str], str]:
    """What is said below a field: a string that the program itself never sees."""
    tree = ast.parse(inspect.getsource(module))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {(each.name, field): text for each in classes for field, text in _notes_in(each)}


def _notes_in(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(node.body, node.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, inspect.cleandoc(text)
