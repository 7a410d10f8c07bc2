# SPDX-License-Identifier: MIT
"""`bangerd`: the owner daemon. Puts its parts together, starts all or nothing, ends in bounded time."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import fcntl
import hashlib
import ipaddress
import logging
import os
import platform
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import uvicorn

import banger
from banger import guest_binary
from banger.contract import errors, names, privileged
from banger.owner import (
    app,
    config,
    defaults,
    firecracker,
    guest,
    helper,
    images,
    kernels,
    logs,
    migrations,
    operations,
    reconcile,
    routes,
    runtime,
    store,
    views,
    vms,
)
from banger.vm import host
from banger.vm.capabilities import work_disk

_log = logging.getLogger(__name__)

_SHUTDOWN_S: Final = 5
_BACKLOG: Final = 128


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    logs.set_up(options.log_level)
    try:
        return _run(options)
    except errors.BangerError as error:
        _log.critical("cannot start", extra={"error": error.message, "hint": error.hint})
        return 1
    except OSError as error:
        _log.critical("cannot start", extra={"error": str(error)})
        return 1


def _run(options: argparse.Namespace) -> int:
    installation = config.load_installation(options.install)
    paths = _paths(options, installation)
    if options.check_migrations:
        return migrations.check(paths.database)
    asyncio.run(
        serve(config.load(options.config), installation, paths, in_process=options.in_process_helper)
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bangerd", description=__doc__)
    parser.add_argument("--version", action="version", version=banger.__version__)
    parser.add_argument("--config", type=Path, default=config.CONFIG_PATH, metavar="FILE")
    parser.add_argument("--install", type=Path, default=config.INSTALL_PATH, metavar="FILE")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="default: as installed")
    parser.add_argument("--cache-dir", type=Path, default=Path("/var/cache/banger"), metavar="DIR")
    parser.add_argument("--run-dir", type=Path, default=Path("/run/banger"), metavar="DIR")
    parser.add_argument("--helper-socket", type=Path, default=helper.SOCKET, metavar="SOCKET")
    parser.add_argument("--in-process-helper", action="store_true", help="development as root: no helper")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument(
        "--check-migrations",
        action="store_true",
        help="only look: exit 0 current, 1 will migrate, 2 newer than this program",
    )
    return parser


def _paths(options: argparse.Namespace, installation: config.Installation) -> config.Paths:
    return config.Paths(
        state=options.state_dir or Path(installation.state_dir),
        cache=options.cache_dir,
        run=options.run_dir,
        helper_socket=options.helper_socket,
        helper_dir=Path(installation.helper_dir),
        install=options.install,
    )


async def serve(
    settings: config.Config, installation: config.Installation, paths: config.Paths, *, in_process: bool
) -> None:
    """Until SIGTERM or SIGINT. VMs go on running."""
    async with AsyncExitStack() as stack:
        stack.enter_context(_only_daemon(paths.state))
        ops = _ops(paths, in_process=in_process)
        services = await stack.enter_async_context(
            compose(settings, config.prefix(installation), paths, ops, _guest_sha256())
        )
        listener = stack.enter_context(_listen(paths.socket))
        stack.callback(paths.socket.unlink, missing_ok=True)
        await _serve_http(services, listener)


def _ops(paths: config.Paths, *, in_process: bool) -> privileged.PrivilegedOps:
    if not in_process:
        return helper.Client(paths.helper_socket, operations.current_op_id.get)
    from banger import inprocess  # the helper's code must not be imported by an unprivileged daemon

    return inprocess.InProcess.from_file(paths.install)


@asynccontextmanager
async def compose(
    settings: config.Config,
    network: ipaddress.IPv4Network,
    paths: config.Paths,
    ops: privileged.PrivilegedOps,
    guest_sha256: str,
) -> AsyncIterator[routes.Services]:
    """Everything behind the routes, reconciled with the world; ended in reverse order."""
    rows = store.Store(paths.database)
    running = operations.Operations()
    image_service = images.ImageService(paths.state / "images", paths.cache, rows, running)
    kernel_service = kernels.KernelService(paths.state / "kernels", paths.cache, rows, running)
    image_service.sweep()
    kernel_service.sweep()
    layout = paths.layout

    def connect(vm_id: names.VmId) -> guest.GuestClient:
        return guest.GuestClient(guest.vsock_connector(layout.vsock_socket(vm_id)))

    machine = host.Host(
        ops=ops,
        records=rows,
        layout=layout,
        network=network,
        agent=connect,
        vmm_gone=lambda vm_id: firecracker.wait_gone(layout.api_socket(vm_id)),
        dns=settings.dns,
        guest_sha256=guest_sha256,
        limits=settings.limits,
    )
    vm_service = vms.VmService(
        host=machine,
        store=rows,
        operations=running,
        resolver=defaults.Defaults(settings, image_service, kernel_service),
        views=views.Views(layout, network, image_service.name, kernel_service.name),
        connect=connect,
        features=(work_disk.WorkDisk(),),
    )
    try:
        await reconcile.reconcile(rows, machine, vm_service)
        yield routes.Services(
            vms=vm_service,
            images=image_service,
            kernels=kernel_service,
            operations=running,
            ops=ops,
            runtime=runtime.RuntimeService(paths.helper_dir / "runtime", paths.cache, running),
            started_at=datetime.datetime.now(datetime.UTC),
        )
    finally:
        await running.close()
        await vm_service.close()
        rows.close()


async def _serve_http(services: routes.Services, listener: socket.socket) -> None:
    server = _Server(
        uvicorn.Config(
            app.create_app(services),
            lifespan="off",
            log_config=None,
            access_log=False,
            ws_per_message_deflate=False,
            ws_max_size=1024 * 1024,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    await server.serve(sockets=[listener])


class _Server(uvicorn.Server):
    """Says READY to systemd only once it accepts; leaves signals to us."""

    def stop(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _notify("READY=1")
        _log.info("ready", extra={"version": banger.__version__})

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal again at its end, and so end the process before its clean-up."""
        yield


def _notify(state: str) -> None:
    """The sd_notify protocol; nothing to do when not started by systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        sender.sendall(state.encode())


def _listen(path: Path) -> socket.socket:
    """A socket that is the owner's alone from its first instant on."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise errors.UnavailableError(f"cannot listen at {path}: {error}") from error
    finally:
        os.umask(before)
    listener.listen(_BACKLOG)
    return listener


@contextmanager
def _only_daemon(state: Path) -> Iterator[None]:
    """Two daemons on one state directory would tear down each other's VMs."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(state / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise errors.ConflictError(
            f"another bangerd uses {state}", hint="stop it first: `systemctl stop bangerd`"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def _guest_sha256() -> str:
    return hashlib.sha256(guest_binary.path(platform.machine()).read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
