# SPDX-License-Identifier: MIT
"""The daemon's API as a target: requests of any method, path and body against the real application.

Its operations are closed, so that whatever passes the checks ends there; nothing is ever started.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import tempfile
from pathlib import Path
from typing import Any
from urllib import parse

import msgspec

from banger.contract import errors
from banger.owner import app, composition
from tests.contract import conftest
from tests.fakes import world as worlds
from tests.fuzz.engine import Target

_SOCKET = b"WS"
_PRINTABLE = bytes(range(0x21, 0x7F)).decode()
"""All that the server in front lets through in a request's target."""


class _Served:
    """The application over an empty host, in a loop that runs while it is asked."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stack = contextlib.AsyncExitStack()
        self.application: Any = self._loop.run_until_complete(self._start())
        atexit.register(self._close)

    async def _start(self) -> Any:
        top = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-", dir="/tmp")))
        paths = conftest.laid_out(top)
        conftest.furnish(paths)
        helper = paths.helper_dir
        world = worlds.World(state=paths.state, jails=helper / "jails", logs=helper / "logs")
        composed = composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64)
        services = await self._stack.enter_async_context(composed)
        services.operations._closing = True
        return app.create_app(services)

    def _close(self) -> None:
        self._loop.run_until_complete(self._stack.aclose())
        self._loop.close()

    def ask(self, method: bytes, path: bytes, body: bytes) -> None:
        self._loop.run_until_complete(self._ask(method, path, body))

    async def _ask(self, method: bytes, path: bytes, body: bytes) -> None:
        raw, _, query = parse.quote_from_bytes(path, _PRINTABLE).encode().partition(b"?")
        is_socket = method == _SOCKET
        scope = {
            "type": "websocket" if is_socket else "http",
            "method": method.decode(errors="replace"),
            "path": parse.unquote(raw.decode("latin-1")),
            "raw_path": raw,
            "query_string": query,
            "headers": [(b"host", b"banger"), (b"content-type", b"application/json")],
            "state": {},
            "http_version": "1.1",
            "scheme": "http",
            "root_path": "",
            "subprotocols": [],
            "asgi": {"version": "3.0"},
        }
        messages = iter(_socket_messages(body) if is_socket else [{"type": "http.request", "body": body}])
        gone = "websocket.disconnect" if is_socket else "http.disconnect"
        said: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return next(messages, {"type": gone, "code": 1000})

        async def send(message: dict[str, Any]) -> None:
            said.append(message)

        async with asyncio.timeout(20):
            await self.application(scope, receive, send)
        if not is_socket:
            _judge(said)


def _socket_messages(body: bytes) -> list[dict[str, Any]]:
    first, *more = body.decode(errors="replace").split("\n")
    texts = [{"type": "websocket.receive", "text": text} for text in (first, *more)]
    return [{"type": "websocket.connect"}, *texts]


def _judge(said: list[dict[str, Any]]) -> None:
    """An answer that is a refusal is one of ours, with a code and a reason."""
    status = said[0]["status"]
    body = b"".join(message.get("body", b"") for message in said[1:])
    assert status != 500, body
    if status >= 400:
        error = msgspec.json.decode(body, type=errors.ErrorBody)
        assert error.code, body
        assert error.message, body


def target() -> Target:
    served: list[_Served] = []

    def run(data: bytes) -> None:
        if not served:
            served.append(_Served())
        head, _, body = data.partition(b"\n\n")
        method, _, path = head.partition(b" ")
        served[0].ask(method[:16], path, body)

    return Target("api", run, _seeds(), (), (b'"', b"{}", b"null", b"[", b"%2e%2e/", b"?", b"0123456789ab"))


def _seeds() -> list[bytes]:
    bodies = {
        "POST /v1/vms": b'{"name":"web","vcpus":2,"publish":["8080:80"],"allow":["a.b:443"],"ttl_s":60}',
        "PATCH /v1/vms/web": b'{"memory_mib":512,"name":"x"}',
        "POST /v1/vms/web/start": b"",
        "POST /v1/vms/web/extend": b'{"by_s":60}',
        "POST /v1/images/pull": b'{"reference":"alpine:3","name":"a"}',
        "POST /v1/images/import": b'{"path":"/nowhere","name":"a"}',
        "POST /v1/images/build": b'{"recipe":"debian-bookworm","definition":"name = \\"a\\""}',
        "POST /v1/kernels/import": b'{"path":"/nowhere","name":"k"}',
        "POST /v1/images/cache/prune": b'{"dry_run":true}',
        "GET /v1/operations/0123456789ab/events?cancel_on_disconnect=true": b"",
        "GET /v1/vms/web/logs?source=console&follow=true": b"",
        "WS /v1/vms/web/exec": b'{"argv":["a"],"env":["A=b"],"tty":true,"rows":2}\n{"resize":[1,2]}',
        "WS /v1/vms/web/connect": b'{"port":22,"host":"::1"}',
    }
    known = [f"{head}\n\n".encode() + body for head, body in bodies.items()]
    routes = app.ROUTES
    for handler in routes:
        for path in handler.paths:
            method = next(iter(getattr(handler, "http_methods", ("WS",))))
            filled = path.replace("{ref:str}", "web").replace("{name:str}", "web")
            known.append(f"{getattr(method, 'value', method)} {filled}\n\n{{}}".encode())
    return known
