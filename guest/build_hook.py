# SPDX-License-Identifier: MIT
"""Builds the guest binary and the programs of the host, static, for every architecture, with `zig cc`.

Run by hatchling when it builds the wheel, and by make; what is up to date is left. The tests also have the
agent and the fuzz targets built for this machine by clang, with its sanitizers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent
TREE = SOURCES.parent
OUTPUT = TREE / "src" / "banger" / "_guest"
ARCHITECTURES = ("x86_64", "aarch64")
# Each a program of the host's; all other sources make the guest binary.
HOST_PROGRAMS = ("console.c",)
NOT_SHIPPED = ("fuzz",)
LANGUAGE = ("-std=c11", "-D_GNU_SOURCE")
WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wformat=2",
    "-Wvla",
    "-Wundef",
    "-Wimplicit-fallthrough",
    "-Wstrict-prototypes",
    "-Wmissing-prototypes",
    "-Werror",
)
FLAGS = (
    *LANGUAGE,
    "-Os",
    "-static",
    "-s",
    "-fstack-protector-strong",
    "-ffunction-sections",
    "-fdata-sections",
    "-Wl,--gc-sections",
    *WARNINGS,
)
SANITIZED_OUTPUT = TREE / "build" / "guest"
FUZZ_TARGETS = ("fuzz_proto", "fuzz_tar", "fuzz_text")


def version() -> str:
    """Read, not imported: the package cannot be imported while it is being built."""
    text = (TREE / "src" / "banger" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("src/banger/__init__.py states no version")
    return found[1]


def programs() -> dict[str, list[Path]]:
    """Each program with its sources."""
    sources = sorted(path for path in SOURCES.glob("*.c") if not path.stem.startswith(NOT_SHIPPED))
    return {
        "banger-guest": [path for path in sources if path.name not in HOST_PROGRAMS],
        **{f"banger-{Path(name).stem}": [SOURCES / name] for name in HOST_PROGRAMS},
    }


def build() -> list[Path]:
    """Compiles what is older than its inputs; every output appears by rename. Returns all outputs."""
    OUTPUT.mkdir(exist_ok=True)
    newest = _newest_input()
    outputs: list[Path] = []
    for arch in ARCHITECTURES:
        for name, sources in programs().items():
            output = OUTPUT / f"{name}-{arch}"
            outputs.append(output)
            if not output.exists() or output.stat().st_mtime < newest:
                _compile(output, sources, arch)
    return outputs


def build_sanitized() -> Path:
    """The guest binary with AddressSanitizer and UndefinedBehaviorSanitizer."""
    return _build_sanitized("banger-guest", programs()["banger-guest"], ("-fsanitize=address,undefined",))


def build_fuzzer(name: str) -> Path:
    """One of FUZZ_TARGETS, as a libFuzzer program with the same sanitizers."""
    shared = [path for path in programs()["banger-guest"] if path.name != "main.c"]
    flags = ("-fsanitize=fuzzer,address,undefined", "-DFUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION")
    return _build_sanitized(name, [*shared, SOURCES / f"{name}.c"], flags)


def _newest_input() -> float:
    return max(path.stat().st_mtime for path in (*SOURCES.glob("*.[ch]"), Path(__file__)))


def _build_sanitized(name: str, sources: list[Path], sanitizers: tuple[str, ...]) -> Path:
    SANITIZED_OUTPUT.mkdir(parents=True, exist_ok=True)
    output = SANITIZED_OUTPUT / f"{name}-sanitized"
    if not output.exists() or output.stat().st_mtime < _newest_input():
        flags = (*sanitizers, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1")
        _run_compiler(["clang", *LANGUAGE, *WARNINGS, *flags], output, sources)
    return output


def _compile(output: Path, sources: list[Path], arch: str) -> None:
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-musl"]
    _run_compiler([*compiler, *FLAGS], output, sources)


def _run_compiler(command: list[str], output: Path, sources: list[Path]) -> None:
    staged = output.with_name(f".{output.name}.{os.getpid()}")
    defines = [f'-DBANGER_VERSION="{version()}"']
    subprocess.run(
        [*command, *defines, "-o", str(staged), *map(str, sources)],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    staged.rename(output)


def _hook() -> type:
    """Only where hatchling is: make needs no more than the compiler."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class GuestBuildHook(BuildHookInterface[Any]):
        """Puts the binaries into the wheel, which works on every Linux of these architectures."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            del version
            for path in build():
                build_data["force_include"][str(path)] = f"banger/_guest/{path.name}"

    return GuestBuildHook


def get_build_hook() -> type:
    """What hatchling looks for."""
    return _hook()


if __name__ == "__main__":
    for made in build():
        print(f"{made.relative_to(TREE)}: {made.stat().st_size} bytes")
