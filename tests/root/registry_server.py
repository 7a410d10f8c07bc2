# SPDX-License-Identifier: MIT
"""Debian's docker-registry on loopback, with the logins it can ask for; a token service; a line to break."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

USER: Final = "dev"
PASSWORD: Final = "s3cret-of-the-tests"  # noqa: S105
# bcrypt of the password, at its least cost: docker-registry takes nothing else.
HTPASSWD: Final = f"{USER}:$2b$04$CI8taKQy7/vq6ESgtDXsZOE21fhizUSR9crktxiRGp1LL6w2SX.bS\n"
_LISTENS: Final = re.compile(r"listening on 127\.0\.0\.1:(\d+)")
_START_S: Final = 20.0


class Registry:
    """A docker-registry process over a directory; may be killed and started again at the same address."""

    def __init__(self, root: Path, auth: str = "", tls: str = "") -> None:
        self.root = root
        self.port = 0
        self._auth = auth
        self._tls = tls
        self._process: subprocess.Popen[str] | None = None
        root.mkdir(exist_ok=True)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        config = self.root / "config.yml"
        config.write_text(
            f"version: 0.1\nlog: {{level: info}}\nhttp: {{addr: '127.0.0.1:{self.port}'{self._tls}}}\n"
            f"storage: {{filesystem: {{rootdirectory: {self.root}/data}}}}\n{self._auth}"
        )
        argv = ["docker-registry", "serve", str(config)]
        self._process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert self._process.stderr is not None
        deadline = threading.Timer(_START_S, self._process.kill)
        deadline.start()
        for line in self._process.stderr:
            if found := _LISTENS.search(line):
                self.port = int(found[1])
                break
        deadline.cancel()
        assert self.port, "docker-registry did not start"
        threading.Thread(target=_drain, args=(self._process.stderr,), daemon=True).start()

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            if self._process.stderr is not None:
                self._process.stderr.close()
            self._process = None

    def push(self, layout: Path, tag: str, name: str, *options: str) -> None:
        """By skopeo, as somebody who may."""
        argv = ["skopeo", "copy", "-q", "--dest-tls-verify=false", f"--dest-creds={USER}:{PASSWORD}"]
        if not self._auth:
            argv.pop()
        argv += [*options, f"oci:{layout}:{tag}", f"docker://{self.host}/{name}"]
        subprocess.run(argv, check=True, timeout=180)


def _drain(stream: IO[str]) -> None:
    with contextlib.suppress(ValueError):
        for _ in stream:
            pass


@contextlib.contextmanager
def registry(root: Path, auth: str = "", tls: str = "") -> Iterator[Registry]:
    made = Registry(root, auth, tls)
    made.start()
    try:
        yield made
    finally:
        made.kill()


def make_certificate(certificate: Path, key: Path) -> None:
    """Of the loopback, signed by itself."""
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tests"]
    argv += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)


def with_tls(root: Path) -> tuple[str, Path]:
    """What makes it speak TLS, and its certificate."""
    root.mkdir(exist_ok=True)
    certificate, key = root / "cert.pem", root / "key.pem"
    make_certificate(certificate, key)
    return f", tls: {{certificate: {certificate}, key: {key}}}", certificate


def with_passwords(root: Path) -> str:
    root.mkdir(exist_ok=True)
    (root / "htpasswd").write_text(HTPASSWD)
    return f"auth: {{htpasswd: {{realm: tests, path: {root}/htpasswd}}}}\n"


# --- tokens ---


class Tokens:
    """A token service as registries use one: who logs in gets a signed token for what was asked."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self._key = root / "key.pem"
        self.certificate = root / "cert.pem"
        make_certificate(self.certificate, self._key)
        self.port = 0
        self.asked: list[str] = []

    @property
    def auth(self) -> str:
        return (
            f"auth: {{token: {{realm: 'http://127.0.0.1:{self.port}/token', service: tests, "
            f"issuer: tests, rootcertbundle: {self.certificate}}}}}\n"
        )

    def token(self, scope: str) -> str:
        kind, name, actions = scope.split(":")
        now = int(time.time())
        claims = {"iss": "tests", "aud": "tests", "sub": USER, "iat": now, "nbf": now - 9, "exp": now + 300}
        access = [{"type": kind, "name": name, "actions": actions.split(",")}]
        lines = self.certificate.read_text().splitlines()
        head = {"typ": "JWT", "alg": "RS256", "x5c": ["".join(lines[1:-1])]}
        text = ".".join(_encoded(json.dumps(each).encode()) for each in (head, {**claims, "access": access}))
        argv = ["openssl", "dgst", "-sha256", "-sign", str(self._key)]
        signed = subprocess.run(argv, input=text.encode(), check=True, capture_output=True, timeout=60)
        return f"{text}.{_encoded(signed.stdout)}"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@contextlib.contextmanager
def tokens(root: Path) -> Iterator[Tokens]:
    service = Tokens(root)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            service.asked.append(self.path)
            login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            if self.headers.get("Authorization") != f"Basic {login}":
                self.send_error(401)
                return
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            data = json.dumps({"token": service.token(query["scope"][0])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield service
        finally:
            server.shutdown()
            thread.join()


# --- a line that counts and breaks ---


class Line:
    """Passes connections on and counts what comes back; when so much has, calls `at_limit` once and breaks.

    It breaks, as the kernel would go on handing over what a killed server had sent, which can be all of it.
    """

    def __init__(self, target: Registry) -> None:
        self.target = target
        self.received = 0
        self.limit = 0
        self.at_limit: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _pass_on(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), self._onward() as server:
            threading.Thread(target=_copy, args=(client, server), daemon=True).start()
            while data := server.recv(1 << 16):
                client.sendall(data)
                if self._has_come(len(data)):
                    self.at_limit()
                    return

    def _onward(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.target.port))

    def _has_come(self, count: int) -> bool:
        with self._lock:
            self.received += count
            reached = 0 < self.limit <= self.received
            if reached:
                self.limit = 0
            return reached


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def line(target: Registry) -> Iterator[Line]:
    made = Line(target)
    threading.Thread(target=made.serve, daemon=True).start()
    try:
        yield made
    finally:
        made.close()
