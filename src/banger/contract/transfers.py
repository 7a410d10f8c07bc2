# SPDX-License-Identifier: MIT
"""What travels as JSON in the WebSockets of workspaces and files, shared by daemon and CLI."""

from __future__ import annotations

import enum
import re
from typing import Annotated, Final, Literal

import msgspec

from banger.contract import errors, resources

GuestPath = Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*$", max_length=4096)]
ObjectId = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")]
ObjectIdOrNone = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})?$")]
"""Empty for none."""
BranchRef = Annotated[str, msgspec.Meta(pattern=r"^refs/heads/[^\0\n]+$", max_length=4096)]
Revision = Annotated[str, msgspec.Meta(pattern=r"^[^\0\-][^\0]*$", max_length=4096)]

_OBJECT_ID: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def is_object_id(text: str) -> bool:
    """Exactly, and nothing else that git would take for a revision: what a guest says is asked this."""
    return _OBJECT_ID.fullmatch(text) is not None


class PrepareRequest(resources.Body, frozen=True, kw_only=True):
    """First message on the prepare WebSocket."""

    path: GuestPath = "/root/repo"
    discard: bool = False
    """Replace what was changed in the guest since the last time."""
    full_copy: bool = False
    """A tree as it is, for guests without git and repositories with submodules."""
    notices: bool = False
    """While another prepare has its turn, hear whose, in a WorkspaceState of its own."""


class PreparePlan(resources.Body, frozen=True, kw_only=True):
    """The client's second message; binary streams follow, each ended by an empty message.

    A full copy is one tar. Otherwise, when the workspace exists: ids of objects, one a line, answered by a
    line for each, `<id> missing` for those to send. Then a pack, and a tar of small files: `refs`, `sent`,
    `config` and what the index needs besides.
    """

    source: str
    object_format: Literal["sha1", "sha256"] = "sha1"
    head: ObjectId | None = None
    branch: BranchRef | None = None
    worktree: ObjectId | None = None
    index: ObjectId | None = None
    read_only: bool = False
    has: ObjectId | None = None
    """The head of the guest's `work`, when all of it is on this side already."""
    options: tuple[str, ...] = ()


class Prepared(resources.Resource, frozen=True, kw_only=True):
    """The daemon's last message on the prepare WebSocket."""

    workspace: resources.Workspace | None = None
    error: errors.ErrorBody | None = None


class ExportForm(enum.StrEnum):
    """`patch`: as `git diff --binary`; `pack`: commits and their objects; `head`: what they would be."""

    PATCH = "patch"
    PACK = "pack"
    HEAD = "head"


class ExportRequest(resources.Body, frozen=True, kw_only=True):
    """The only message of the client on the export WebSocket."""

    form: ExportForm = ExportForm.PATCH
    path: GuestPath | None = None
    """Absent: the workspace."""
    base: Revision | None = None
    """Absent: the commit that the workspace was made from."""


class Nested(resources.Resource, frozen=True, kw_only=True):
    """A repository inside the one that is exported, with work that the outer one's objects do not hold."""

    path: str
    """Below the outer one's `path`. It is exported by itself."""
    is_fetched: bool = False
    """All of it is committed, and what it was cloned from has these commits."""


class Aside(resources.Resource, frozen=True, kw_only=True):
    """A branch, or the last stash, with commits that what is checked out has not: it is not exported."""

    name: str
    commit: ObjectId


class Exported(resources.Resource, frozen=True, kw_only=True):
    """What the binary stream that follows holds: everything from `base` to `head`."""

    base: ObjectIdOrNone
    head: ObjectIdOrNone
    """A commit of everything, also of what the guest has not committed. Equal to `base`: nothing changed."""
    path: str = ""
    """The repository's own directory in the guest."""
    nested: tuple[Nested, ...] = ()
    """Empty for a patch, which holds their changes too. While there are any, something changed."""
    aside: tuple[Aside, ...] = ()
    """For commits only."""


class WorkspaceState(resources.Resource, frozen=True, kw_only=True):
    """The daemon's answer: what the guest has already. The VM's workspace is held from then on."""

    exists: bool
    """There is a workspace of ours; what it has is only added to."""
    waiting_for: str = ""
    """Not empty: another has its turn, this client. Nothing else is said, and another state follows."""
    tips: tuple[ObjectId, ...] = ()
    """Commits that the guest was sent before."""
    work: Exported | None = None
    """Absent: nothing was changed there since. Else what an export would hold: it is replaced only for a
    client that names its `head`, as one that has all of it, or where it is to be discarded."""


class PutRequest(resources.Body, frozen=True, kw_only=True):
    """First message on the put WebSocket; a tar follows, in binary messages up to an empty one."""

    path: GuestPath
    """A directory, made when it is missing."""
    uid: int | None = None
    gid: int | None = None
    """Absent: the archive's own."""


class GetRequest(resources.Body, frozen=True, kw_only=True):
    """The only message of the client on the get WebSocket; a tar comes back."""

    path: GuestPath
    follow_link: bool = False


class Transferred(resources.Resource, frozen=True, kw_only=True):
    """The daemon's last message on the put, get and export WebSockets."""

    entries: int = 0
    content_bytes: int = 0
    shrunk: tuple[str, ...] = ()
    """Of what came out: files that became shorter while they were read, and so end in zeros; the first."""
    shrunk_count: int = 0
    """All of them."""
    error: errors.ErrorBody | None = None
