# SPDX-License-Identifier: MIT
"""A guest's work into branches here: that of a workspace, and of the repositories inside it before."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from banger.cli import client, render, signals, workspaces
from banger.contract import errors, resources, transfers

if TYPE_CHECKING:
    from banger.workspace import receiving, repository


@dataclass(frozen=True, slots=True)
class Asked:
    """From which VM, into which branch; `force` as the user said it."""

    api: client.Client
    vm: resources.Vm
    branch: str
    force: bool


@dataclass(frozen=True, slots=True)
class Brought:
    """`nested` names what landed in repositories inside, by their path below this one."""

    landed: receiving.Landed
    nested: tuple[tuple[str, receiving.Landed], ...]


def bring(asked: Asked, found: repository.Repository, request: transfers.ExportRequest) -> Brought:
    """The repositories inside come first, so that no commit names one that is not here.

    Raises ConflictError when nothing changed, or when what changed has no place here.
    """
    from banger.workspace import receiving, snapshot

    with (
        signals.raised(),
        snapshot.scratch(found) as scratch,
        workspaces.exported(asked.api, asked.vm.id, request) as (exported, pieces),
    ):
        aside = _aside(found, exported)
        if not exported.nested and exported.head in {"", exported.base}:
            raise _nothing(asked.vm.name, aside)
        if aside:
            render.note(f"not checked out in {asked.vm.name}, and so not brought: {', '.join(aside)}")
        receiving.check_base(found, exported.base)
        nested: list[tuple[str, receiving.Landed]] = []
        for path, inner in _places(asked, found, exported):
            brought = bring(asked, inner, _request(found, inner, exported, path))
            nested += [(path, brought.landed)]
            nested += [(posixpath.join(path, deeper), landed) for deeper, landed in brought.nested]
        landed = receiving.land(
            scratch,
            pieces,
            base=exported.base,
            head=exported.head,
            branch=asked.branch,
            force=asked.force,
        )
    return Brought(landed, tuple(nested))


def _aside(found: repository.Repository, exported: transfers.Exported) -> list[str]:
    """Branches with commits that are not here."""
    from banger.workspace import git

    here = git.present(found.git, [each.commit for each in exported.aside])
    return sorted(each.name for each in exported.aside if each.commit not in here)


def _nothing(name: str, aside: list[str]) -> errors.BangerError:
    if not aside:
        return errors.ConflictError(f"nothing was changed in {name}")
    return errors.ConflictError(
        f"nothing was changed in what {name} has checked out, but there is work in {', '.join(aside)}",
        hint="check it out there, with `git switch` or `git stash pop`, and pull again",
    )


def _places(
    asked: Asked, found: repository.Repository, exported: transfers.Exported
) -> list[tuple[str, repository.Repository]]:
    """Where the work of each repository inside goes: before any of it is brought, all have a place."""
    from banger.workspace import repository

    places = []
    for each in dict.fromkeys(exported.nested):
        inner = repository.inside(found, each.path)
        if inner is not None:
            places.append((each.path, inner))
        elif each.is_fetched:
            render.note(f"{each.path} stays where it was cloned from: only its commit is named")
        else:
            raise errors.ConflictError(
                f"{each.path} in {asked.vm.name} is a repository of its own, and {found.top} has none there",
                hint=f"make one for it, `git init {found.top}/{each.path}`, or have git ignore it there",
            )
    return places


def _request(
    found: repository.Repository, inner: repository.Repository, exported: transfers.Exported, path: str
) -> transfers.ExportRequest:
    """From the commit that the outer base names, as far as both sides know it; else all of it."""
    from banger.workspace import git

    since = found.gitlink(exported.base, path)
    return transfers.ExportRequest(
        form=transfers.ExportForm.PACK,
        path=posixpath.join(exported.path, path),
        base=since if git.present(inner.git, [since] if since else []) else None,
    )


def told(brought: Brought) -> dict[str, Any]:
    """For `--json`."""
    nested = [{"path": path, **msgspec.to_builtins(landed)} for path, landed in brought.nested]
    return {**msgspec.to_builtins(brought.landed), "nested": nested}
