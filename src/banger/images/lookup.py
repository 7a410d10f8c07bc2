# SPDX-License-Identifier: MIT
"""Which image somebody means: by id, name, reference as people write it, digest, or how an id begins.

And which one may be meant by a word that means none.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from banger.contract import errors
from banger.images import records, reference

_LEAST_PREFIX: Final = 4
_PREFIX: Final = re.compile(rf"[0-9a-f]{{{_LEAST_PREFIX},12}}")
_MOST_CLOSE: Final = 3
_SHORT_DIGEST: Final = re.compile(r"(sha256|sha512):[0-9a-f]{8,}")


def find(images: Sequence[records.Image], text: str) -> records.Image | None:
    """The newest of those that it means; `images` are the oldest first. None when there is none.

    A plain word is a name first. Only then may it be short for a reference: `alpine` for
    `docker.io/library/alpine:latest`.
    """
    for means in (_by_id(text), _by_name(text), _by_reference(text), _by_digest(text)):
        found = [image for image in images if means(image)]
        if found:
            return found[-1]
    return _by_prefix(images, text)


def close(names: Iterable[str], text: str) -> list[str]:
    """Names that are much like it, as a whole or in their main word: `debina` for `debian-bookworm`."""
    known = {name: {name, _main_word(name)} for name in names}
    words = difflib.get_close_matches(
        text, {word for each in known.values() for word in each}, n=_MOST_CLOSE
    )
    return [name for name, its in known.items() if not its.isdisjoint(words)][:_MOST_CLOSE]


def _main_word(name: str) -> str:
    """`app` of `ghcr.io/team/app:1.0`, `debian` of `debian-bookworm`."""
    return re.split("[-:@]", name.rpartition("/")[2])[0]


def _by_id(text: str) -> Callable[[records.Image], bool]:
    return lambda image: image.id == text


def _by_name(text: str) -> Callable[[records.Image], bool]:
    return lambda image: text == image.name


def _by_reference(text: str) -> Callable[[records.Image], bool]:
    """With a digest it is that digest of that repository, whatever tag it was pulled by."""
    with contextlib.suppress(errors.BadRequestError):
        wanted = reference.parse(text)
        if wanted.digest:
            return lambda image: (
                image.digest == wanted.digest and _repository(image.reference) == wanted.repository
            )
        return lambda image: image.reference == str(wanted)
    return lambda _: False


def _by_digest(text: str) -> Callable[[records.Image], bool]:
    is_digest = _SHORT_DIGEST.fullmatch(text) is not None
    return lambda image: is_digest and image.digest.startswith(text)


def _by_prefix(images: Sequence[records.Image], text: str) -> records.Image | None:
    """Only when it means one."""
    found = [image for image in images if _PREFIX.fullmatch(text) and image.id.startswith(text)]
    return found[0] if len(found) == 1 else None


def _repository(text: str) -> str:
    return reference.parse(text).repository if text else ""
