# SPDX-License-Identifier: MIT
"""The OpenAPI document: whole, consistent, and of the form that the standard prescribes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from litestar import handlers

from banger.contract import errors, reach, requests, resources
from banger.owner import app, openapi

DOCUMENT: dict[str, Any] = json.loads(app.document())
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
_TYPES = {"string", "integer", "number", "boolean", "array", "object", "null"}


def _inside(value: object) -> Iterator[dict[str, Any]]:
    """Every object of a JSON value, itself included."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _inside(each)


def _refs(value: object) -> set[str]:
    return {each["$ref"] for each in _inside(value) if isinstance(each.get("$ref"), str)}


def _resolve(ref: str) -> Any:
    found: Any = DOCUMENT
    for part in ref.removeprefix("#/").split("/"):
        found = found[part]
    return found


def test_it_says_what_it_is() -> None:
    assert set(DOCUMENT) == {"openapi", "info", "servers", "paths", "components"}
    assert re.fullmatch(r"3\.1\.\d+", DOCUMENT["openapi"])
    assert {"title", "version"} <= set(DOCUMENT["info"])


def test_the_program_prints_it() -> None:
    program = [sys.executable, "-m", "banger.owner.main", "--openapi"]
    printed = subprocess.run(program, capture_output=True, check=True, timeout=30)
    assert json.loads(printed.stdout) == DOCUMENT


def test_every_route_is_in_it() -> None:
    routes = set()
    for route in app.ROUTES:
        for path in route.paths:
            plain = re.sub(r":\w+}", "}", path)
            if isinstance(route, handlers.HTTPRouteHandler):
                routes |= {f"{method} {plain}" for method in route.http_methods}
            else:
                routes.add(f"GET {plain}")
    assert routes == set(OPERATIONS)
    assert "GET /v1/vms/{ref}/exec" in routes


def test_every_type_of_the_api_is_in_it() -> None:
    kinds = {
        name
        for module in (resources, requests, reach)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    }
    assert kinds - {"Resource", "Body"} <= set(SCHEMAS)


def test_every_code_of_an_error_is_in_it_with_its_status() -> None:
    codes = DOCUMENT["components"]["responses"]["Failure"]["x-codes"]
    assert {code for group in codes.values() for code in group} == errors.CODES
    assert all(app.STATUS.get(code, 500) == int(status) for status in codes for code in codes[status])
    assert set(SCHEMAS["ErrorBody"]["properties"]["code"]["examples"]) == errors.CODES


def test_every_reference_leads_somewhere() -> None:
    for ref in _refs(DOCUMENT):
        assert _resolve(ref), ref


def test_no_type_is_of_no_use() -> None:
    used, new = set(), _refs(DOCUMENT["paths"])
    while new:
        used |= new
        new = {ref for each in new for ref in _refs(_resolve(each))} - used
    assert {f"#/components/schemas/{name}" for name in SCHEMAS} <= used


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_operation_is_whole(name: str) -> None:
    operation = OPERATIONS[name]
    assert operation["summary"]
    assert "See " not in operation["summary"]
    assert [each for each in operation["responses"] if re.fullmatch(r"[12]\d\d", each)]
    assert operation["responses"]["default"] == {"$ref": "#/components/responses/Failure"}
    in_path = [each["name"] for each in operation.get("parameters", []) if each["in"] == "path"]
    assert sorted(in_path) == sorted(re.findall(r"{(\w+)}", name))
    for parameter in operation.get("parameters", []):
        assert parameter["in"] in {"path", "query"}
        assert parameter["required"] or parameter["in"] == "query"
        assert parameter["schema"]
    for response in operation["responses"].values():
        assert "$ref" in response or response["description"]
        assert all(each["schema"] for each in response.get("content", {}).values())


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_one(name: str) -> None:
    schema = SCHEMAS[name]
    assert set(schema.get("required", [])) <= set(schema.get("properties", {}))
    for each in schema.get("properties", {}).values():
        assert {"type", "$ref", "anyOf", "enum"} & set(each)
    types = [each["type"] for each in _inside(schema) if isinstance(each.get("type"), str)]
    assert set(types) <= _TYPES
    if "enum" not in schema:
        closed = schema.get("additionalProperties", True) is False
        kind = next(getattr(module, name) for module in openapi.MODULES if hasattr(module, name))
        assert closed == issubclass(kind, resources.Body)
