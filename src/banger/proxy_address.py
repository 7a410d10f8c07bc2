# SPDX-License-Identifier: MIT
"""How the address of a proxy is said. Whoever names one in a message, a hint or a log asks here."""

from __future__ import annotations


def shown(proxy: str) -> str:
    """`http://proxy.example:3128`: without the name and the password that may be in it, whatever they hold.

    Never raises: what is shown is often what is wrong.
    """
    scheme, separator, rest = proxy.partition("://")
    if not separator or not scheme.isalnum():
        scheme, separator, rest = "", "", proxy
    place = rest.rpartition("@")[2].partition("/")[0]
    return f"{scheme}{separator}{place}"
