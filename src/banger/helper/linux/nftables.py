# SPDX-License-Identifier: MIT
"""nftables by libnftables, the library inside nft: one atomic change goes in, JSON comes out.

Nothing is parsed as text, and no program is started: that would take most of the time. The JSON is
libnftables-json(5), the calls libnftables(3). Whoever calls composes it from checked values.
"""

from __future__ import annotations

import ctypes
import functools
import json
import threading
from collections.abc import Sequence
from typing import Any, Final

from banger.contract import errors

# Any: JSON, whose shape libnftables-json(5) says.
Json = dict[str, Any]
NFT_CTX_DEFAULT: Final = 0
NFT_CTX_OUTPUT_JSON: Final = 1 << 4
_LIBRARY: Final = "libnftables.so.1"
_lock: Final = threading.Lock()
"""The library promises nothing about threads."""


class RefusedError(errors.OperationFailedError):
    """The kernel, or the library, did not take a change; nothing of it holds."""


def load(text: str) -> None:
    """Loads a ruleset in nft's own language, all or nothing."""
    _run(text.encode(), flags=0)


def change(commands: Sequence[Json]) -> None:
    """Does all of them or none."""
    _run(json.dumps({"nftables": list(commands)}).encode(), flags=NFT_CTX_OUTPUT_JSON)


def query(kind: str, **fields: str) -> list[Json]:
    """What `list <kind>` finds, each object as `{kind: fields}`. What is named and not there is an error.

    One at a time: version 1.0.6 reads only what the first of several asks for.
    """
    command = {"list": {kind: fields or None}}
    text = _run(json.dumps({"nftables": [command]}).encode(), flags=NFT_CTX_OUTPUT_JSON)
    return [found for found in json.loads(text)["nftables"] if "metainfo" not in found]


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise errors.MissingToolError(f"{_LIBRARY}: {error}", hint="install the package nftables") from None
    found.nft_ctx_new.restype = ctypes.c_void_p
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(found, name).restype = ctypes.c_char_p
    return found


def _run(given: bytes, *, flags: int) -> bytes:
    """A context of its own for each call: it holds a socket of the calling thread's network."""
    library = _library()
    with _lock:
        context = ctypes.c_void_p(library.nft_ctx_new(NFT_CTX_DEFAULT))
        if context.value is None:
            raise errors.OperationFailedError("libnftables gave no context")
        try:
            library.nft_ctx_output_set_flags(context, ctypes.c_uint(flags))
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            if library.nft_run_cmd_from_buffer(context, given):
                raise _refused(library.nft_ctx_get_error_buffer(context))
            return library.nft_ctx_get_output_buffer(context) or b""
        finally:
            library.nft_ctx_free(context)


def _refused(said: bytes | None) -> RefusedError:
    why = next(iter((said or b"").decode(errors="replace").split("\n")), "") or "no reason given"
    hint = "does this kernel have nftables (nf_tables, nft_ct, nft_masq)?"
    return RefusedError(f"nftables refused a change: {why[:300]}", hint=hint)
