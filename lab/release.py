# SPDX-License-Identifier: MIT
"""Makes a release of banger from wheels: the signed list that `banger system upgrade` asks for."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from banger.system import signed
from lab import command

SIGN_LIMIT_S = 300
"""A key in a token wants to be touched."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.release", description=__doc__)
    parser.add_argument(
        "--key", type=Path, required=True, help="the private key, or the public one of an agent"
    )
    parser.add_argument("directory", type=Path, help="the release; its name should be banger-VERSION")
    parser.add_argument("wheels", type=Path, nargs="+", metavar="WHEEL")
    options = parser.parse_args(argv)
    made = make(options.directory, options.wheels, options.key)
    print(f"banger {made.version}, {len(made.wheels)} wheels, signed: {options.directory}")
    return 0


def make(directory: Path, wheels: Iterable[Path], key: Path) -> signed.Release:
    """A new directory with these wheels, one of which is banger's, their list, and its signature."""
    directory.mkdir()
    for wheel in wheels:
        shutil.copy(wheel, directory / wheel.name)
    return sign(directory, key)


def sign(directory: Path, key: Path) -> signed.Release:
    """Lists the wheels that lie in a directory, and signs the list."""
    found = sorted(directory.glob("*.whl"))
    (own,) = [wheel.name for wheel in found if wheel.name.startswith("banger-")]
    release = signed.Release(own.split("-")[1], tuple(map(_wheel, found)))
    text = directory / signed.LIST
    text.write_bytes(msgspec.json.format(msgspec.json.encode(release)) + b"\n")
    (directory / signed.SIGNATURE).unlink(missing_ok=True)
    argv = ["ssh-keygen", "-q", "-Y", "sign", "-n", signed.NAMESPACE, "-f", str(key), str(text)]
    command.run(argv, timeout_s=SIGN_LIMIT_S)
    return release


def _wheel(path: Path) -> signed.Wheel:
    return signed.Wheel(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


if __name__ == "__main__":
    sys.exit(main())
