# SPDX-License-Identifier: MIT
"""A registry that does as it is told: right by default, wrong where a test says so. On a real socket.

It keeps what it was asked, headers and all, and how many bytes of each blob it sent.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import hashlib
import http.server
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
INDEX: Final = "application/vnd.oci.image.index.v1+json"
CONFIG: Final = "application/vnd.oci.image.config.v1+json"
LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]


Fault = Callable[["_Handler"], bool]
"""Answers in its own way, and says whether it did; False lets the request through as usual."""


class Registry:
    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.asked: list[Asked] = []
        self.sent: collections.Counter[str] = collections.Counter()
        self.faults: list[Fault] = []
        self.login = ""
        """`user:password`; empty lets everybody in."""
        self.bearer = False
        self.token = "granted"  # noqa: S105
        self.identity_token = ""
        self.ranges = True
        self.says_digest = True
        self.port = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add_blob(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return digest

    def add_manifest(self, tag: str, document: dict[str, Any], media_type: str = MANIFEST) -> str:
        data = json.dumps(document).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.manifests[tag] = self.manifests[digest] = (media_type, data)
        return digest

    def add_image(self, tag: str, *layers: bytes, run: dict[str, Any] | None = None, arch: str = "") -> str:
        """An image of these layers' bytes; their diff ids are made up."""
        config = {
            "architecture": arch or "amd64",
            "os": "linux",
            "config": run or {},
            "rootfs": {"type": "layers", "diff_ids": [_sha256(b"diff" + layer) for layer in layers]},
        }
        encoded = json.dumps(config).encode()
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": self.add_blob(encoded), "size": len(encoded)},
            "layers": [
                {"mediaType": LAYER, "digest": self.add_blob(layer), "size": len(layer)} for layer in layers
            ],
        }
        return self.add_manifest(tag, document)

    def count(self, method: str, part: str) -> int:
        return sum(1 for each in self.asked if each.method == method and part in each.path)


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    registry: Registry

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_GET(self) -> None:
        registry = self.registry
        headers = {name.lower(): value for name, value in self.headers.items()}
        registry.asked.append(Asked(self.command, self.path, headers))
        for fault in registry.faults:
            if fault(self):
                return
        if self.path.startswith("/token"):
            self._token()
        elif not self._is_let_in():
            self._ask_for_login()
        elif self.path == "/v2/":
            self.answer(200, b"{}")
        elif "/manifests/" in self.path:
            self._manifest(self.path.rpartition("/")[2])
        elif "/blobs/" in self.path:
            self._blob(self.path.rpartition("/")[2])
        else:
            self.answer(404, b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        registry = self.registry
        body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
        registry.asked.append(Asked("POST", self.path, {"body": body}))
        if f"refresh_token={registry.identity_token}" in body and "grant_type=refresh_token" in body:
            self.answer(200, json.dumps({"access_token": self.registry.token}).encode())
        else:
            self.answer(401, b"{}")

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("Content_Length", str(len(data))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True

    def _is_let_in(self) -> bool:
        given = self.headers.get("Authorization", "")
        if self.registry.bearer:
            return given == f"Bearer {self.registry.token}"
        return not self.registry.login or given == _basic(self.registry.login)

    def _ask_for_login(self) -> None:
        address = f"http://{self.registry.host}"
        how = (
            f'Bearer realm="{address}/token",service="tests"' if self.registry.bearer else 'Basic realm="x"'
        )
        self.answer(401, b'{"errors":[{"code":"UNAUTHORIZED"}]}', WWW_Authenticate=how)

    def _token(self) -> None:
        given = self.headers.get("Authorization", "")
        if self.registry.login and given != _basic(self.registry.login):
            self.answer(401, b"{}")
        else:
            self.answer(200, json.dumps({"token": self.registry.token}).encode())

    def _manifest(self, wanted: str) -> None:
        found = self.registry.manifests.get(wanted)
        if found is None:
            self.answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}')
            return
        digest = {"Docker_Content_Digest": _sha256(found[1])} if self.registry.says_digest else {}
        self.answer(200, found[1], Content_Type=found[0], **digest)

    def _blob(self, digest: str) -> None:
        data = self.registry.blobs.get(digest)
        if data is None:
            self.answer(404, b'{"errors":[{"code":"BLOB_UNKNOWN"}]}')
            return
        wanted = self.headers.get("Range", "")
        if wanted and self.registry.ranges:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            self.registry.sent[digest] += len(data) - start
            self.answer(206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.registry.sent[digest] += len(data)
            self.answer(200, data)


def _basic(login: str) -> str:
    return f"Basic {base64.b64encode(login.encode()).decode()}"


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    tls: ssl.SSLContext | None = None
    """With it the one port speaks both, as some web servers in front of a registry do."""

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, client = super().get_request()
        if self.tls is not None and connection.recv(1, socket.MSG_PEEK) == b"\x16":
            return self.tls.wrap_socket(connection, server_side=True), client
        return connection, client

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves early is what some tests are about."""


@contextlib.contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Registry]:
    registry = Registry()
    handler = type("Handler", (_Handler,), {"registry": registry})
    with _Server(("127.0.0.1", 0), handler) as server:
        registry.port, server.tls = server.server_address[1], tls
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()


# --- faults ---


def on(part: str, *, times: int = 1, then: Callable[[_Handler], None]) -> Fault:
    """The first requests whose path has this part get that answer."""
    left = [times]

    def fault(handler: _Handler) -> bool:
        if part not in handler.path or left[0] == 0:
            return False
        left[0] -= 1
        then(handler)
        return True

    return fault


def status(code: int, **headers: str) -> Callable[[_Handler], None]:
    return lambda handler: handler.answer(code, b"", **headers)


def breaks_after(count: int) -> Callable[[_Handler], None]:
    """Sends so many bytes of what was asked for, then hangs up."""

    def then(handler: _Handler) -> None:
        digest = handler.path.rpartition("/")[2]
        data = handler.registry.blobs[digest]
        start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        piece = data[start : start + count]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        handler.registry.sent[digest] += len(piece)
        handler.wfile.write(piece)
        handler.hang_up()

    return then


def gives(data: bytes) -> Callable[[_Handler], None]:
    """Other bytes than were asked for."""
    return lambda handler: handler.answer(200, data)


def leads_to_tls(handler: _Handler) -> bool:
    """A fault of all that comes without it."""
    if isinstance(handler.connection, ssl.SSLSocket):
        return False
    handler.answer(301, b"", Location=f"https://{handler.registry.host}{handler.path}")
    return True


def redirects(to: Callable[[_Handler], str]) -> Callable[[_Handler], None]:
    return lambda handler: handler.answer(307, b"", Location=to(handler))
