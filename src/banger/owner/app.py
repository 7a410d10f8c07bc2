# SPDX-License-Identifier: MIT
"""The HTTP application: routes over services, and one table from error codes to statuses."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Any, Final

import litestar
import msgspec
from litestar import di, exceptions, response

from banger.contract import errors
from banger.owner import openapi, operations, routes
from banger.owner.routes import commands, connections, host, machines, sources, streams, work

_log = logging.getLogger(__name__)

_MAX_BODY_BYTES: Final = 1024 * 1024
STATUS: Final = {
    "bad_request": 400,
    "unauthorized": 403,
    "not_found": 404,
    "already_exists": 409,
    "not_running": 409,
    "conflict": 409,
    "cancelled": 409,
    "missing_tool": 503,
    "refused": 503,
    "unavailable": 503,
    "timed_out": 504,
    "no_space": 507,
}


class _Request(litestar.Request[Any, Any, Any]):
    """What the framework takes for a fault of the server is one of the client's."""

    async def json(self) -> Any:
        try:
            return await super().json()
        except (UnicodeDecodeError, RecursionError) as error:
            raise errors.BadRequestError(f"the body is not JSON: {error}") from None


def create_app(services: routes.Services) -> litestar.Litestar:
    """One application over these services; nothing global."""
    return litestar.Litestar(
        route_handlers=list(ROUTES),
        dependencies={"services": di.Provide(lambda: services, sync_to_thread=False)},
        exception_handlers={Exception: _answer},
        openapi_config=None,
        request_class=_Request,
        request_max_body_size=_MAX_BODY_BYTES,
        logging_config=None,
    )


@litestar.get("/v1/openapi.json", media_type="application/json", responses=routes.answer(dict[str, Any]))
async def get_document() -> bytes:
    """This API's OpenAPI document."""
    return await asyncio.to_thread(document)


ROUTES: Final = (
    *work.HANDLERS,
    *machines.HANDLERS,
    *commands.HANDLERS,
    *connections.HANDLERS,
    *streams.HANDLERS,
    *sources.HANDLERS,
    *host.HANDLERS,
    get_document,
)
EXCHANGES: Final = {**commands.EXCHANGES, **connections.EXCHANGES, **streams.EXCHANGES}


@functools.cache
def document() -> bytes:
    """Made when first asked for: a daemon that is never asked does not pay for it."""
    return openapi.render(ROUTES, STATUS, EXCHANGES)


def _answer(
    request: litestar.Request[object, object, litestar.datastructures.State], error: Exception
) -> response.Response[bytes]:
    body = _body(error)
    status = STATUS.get(body.code, 500)
    fields = {"path": request.scope["path"], "code": body.code, "error": body.message}
    if status == 500:
        _log.error("request failed", exc_info=error, extra=fields)
    else:
        _log.info("request refused", extra=fields)
    return response.Response(msgspec.json.encode(body), status_code=status, media_type="application/json")


def _body(error: Exception) -> errors.ErrorBody:
    op_id = operations.current_op_id.get()
    if isinstance(error, exceptions.HTTPException) and error.status_code < 500:
        code = "not_found" if error.status_code == 404 else "bad_request"
        return errors.ErrorBody(code=code, message=_reason(error), op_id=op_id)
    return errors.to_body(error, op_id=op_id)


def _reason(error: exceptions.HTTPException) -> str:
    """Litestar puts the validation's own words into `extra`."""
    extra = error.extra
    if isinstance(extra, list):
        parts = [f"{part.get('key', '')}: {part.get('message', '')}".strip(": ") for part in extra]
        return "; ".join(parts) or error.detail
    return error.detail
