# SPDX-License-Identifier: MIT
"""`bangerd`: its options, and what it does with each of them. The daemon itself is in `composition.py`.

VMs wait for a daemon that starts again, so it starts with little. Most daemons make no image and import no
kernel before they end: what only that needs is imported by the functions that do it (`images.py`,
`pulls.py`, `kernels.py` and what they call). Who only asks something (`--check-migrations`) loads no daemon.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import fcntl
import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

import msgspec

import banger
from banger.contract import errors
from banger.owner import config, logs, migrations
from banger.system import host

_log = logging.getLogger(__name__)

# None of them is one of --check-migrations' own.
_CANNOT_START: Final = 3
_USAGE: Final = 64


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    logs.set_up(options.log_level)
    try:
        return _run(options)
    except errors.BangerError as error:
        _log.critical("cannot start", extra={"error": error.message, "hint": error.hint})
        return _CANNOT_START
    except OSError as error:
        _log.critical("cannot start", extra={"error": str(error)})
        return _CANNOT_START


def _run(options: argparse.Namespace) -> int:
    if options.openapi:
        from banger.owner import app

        sys.stdout.buffer.write(app.document())
        return 0
    if options.check_config:
        return _check_config(options.config)
    if options.check_migrations and options.state_dir:
        # Rows that an installation left which is gone.
        return migrations.check(options.state_dir / config.DATABASE)
    installation = config.load_installation(options.install)
    paths = _paths(options, installation)
    if options.check_migrations:
        return migrations.check(paths.database)
    if options.undo_migrations:
        with _only_daemon(paths.state):
            migrations.undo(paths.database)
        return 0
    if options.settle_migrations:
        migrations.settle(paths.database)
        return 0
    _serve(config.load(options.config), installation, paths, in_process=options.in_process_helper)
    return 0


def _serve(
    settings: config.Config, installation: config.Installation, paths: config.Paths, *, in_process: bool
) -> None:
    faulthandler.enable()  # systemd ends one that hangs by SIGABRT: the journal then has where it hung
    gc.disable()  # what is loaded stays: looking for garbage in it, again and again, finds none
    from banger.owner import composition

    gc.freeze()
    gc.enable()
    with _only_daemon(paths.state):
        asyncio.run(composition.serve(settings, installation, paths, in_process=in_process))


def _check_config(path: Path) -> int:
    """Prints the defaults, or the error as it crosses any wire: `doctor` reads it."""
    from banger.owner import defaults

    answer: dict[str, object]
    try:
        answer, status = {"values": defaults.effective(config.load(path))}, 0
    except errors.BangerError as error:
        answer, status = {"error": errors.to_body(error)}, _CANNOT_START
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse's own exit status, 2, is what --check-migrations says of a newer database."""
        self.print_usage(sys.stderr)
        self.exit(_USAGE, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bangerd", description=__doc__)
    parser.add_argument("--version", action="version", version=banger.__version__)
    parser.add_argument("--config", type=Path, default=host.CONFIG_TOML, metavar="FILE")
    parser.add_argument("--install", type=Path, default=host.INSTALL_TOML, metavar="FILE")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="default: as installed")
    parser.add_argument("--cache-dir", type=Path, default=host.CACHE, metavar="DIR")
    parser.add_argument("--run-dir", type=Path, default=host.API_SOCKET.parent, metavar="DIR")
    parser.add_argument("--helper-socket", type=Path, default=host.HELPER_SOCKET, metavar="SOCKET")
    parser.add_argument("--builder-socket", type=Path, default=host.BUILDER_SOCKET, metavar="SOCKET")
    parser.add_argument("--in-process-helper", action="store_true", help="development as root: no helper")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument(
        "--check-migrations",
        action="store_true",
        help="only look, and migrate a copy: exit 0 current, 1 will migrate, 2 newer than this program",
    )
    parser.add_argument(
        "--undo-migrations",
        action="store_true",
        help="put back the database that a newer program kept before it migrated, and exit",
    )
    parser.add_argument(
        "--settle-migrations",
        action="store_true",
        help="delete what was kept of the database before it was migrated, and exit",
    )
    parser.add_argument(
        "--check-config",
        action="store_true",
        help="only look: print what a VM gets by default and from where; exit 3 if the file is not valid",
    )
    parser.add_argument("--openapi", action="store_true", help="print the API's OpenAPI document and exit")
    return parser


def _paths(options: argparse.Namespace, installation: config.Installation) -> config.Paths:
    return config.Paths(
        state=options.state_dir or Path(installation.state_dir),
        cache=options.cache_dir,
        run=options.run_dir,
        helper_socket=options.helper_socket,
        builder_socket=options.builder_socket,
        helper_dir=Path(installation.helper_dir),
        install=options.install,
        image_catalog=options.config.with_name(config.CATALOG_NAME),
        kernel_catalogs=options.config.parent / "kernels.d",
    )


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


if __name__ == "__main__":
    sys.exit(main())
