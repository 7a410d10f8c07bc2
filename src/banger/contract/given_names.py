# SPDX-License-Identifier: MIT
"""Names that people give to VMs, images and kernels, and ids that they type: parsed once, at the edge.

Root is asked by ids alone, so it loads none of this.
"""

from __future__ import annotations

import re
from typing import Final

from banger.contract import errors, names

# As in `names`: a `$` alone also matches before a last line feed.
VM_NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$(?!\n)"
ARTEFACT_NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$(?!\n)"


def parse_id(text: str, what: str = "id") -> str:
    """Raises BadRequestError unless `text` is 12 lower-case hex digits."""
    if not names.is_id(text):
        raise errors.BadRequestError(f"{what} {text!r} is not 12 hex digits")
    return text


def parse_vm_name(text: str, what: str = "a VM name") -> names.VmName:
    """Raises BadRequestError unless `text` is 1–63 characters of a-z, 0-9 and inner hyphens."""
    if not re.fullmatch(VM_NAME_PATTERN, text):
        raise errors.BadRequestError(
            f"{text!r} is not {what}",
            hint="use 1 to 63 lower-case letters, digits and hyphens, with no hyphen at the ends",
        )
    return names.VmName(text)


def parse_artefact_name(text: str, what: str) -> str:
    """A name for an image or kernel: like a VM's, dots and underscores inside allowed."""
    if not re.fullmatch(ARTEFACT_NAME_PATTERN, text):
        raise errors.BadRequestError(
            f"{text!r} is not a name for {what}",
            hint="use 1 to 63 lower-case letters, digits, dots, underscores and hyphens",
        )
    return text
