# SPDX-License-Identifier: MIT
"""Pluggable features of a VM: each joins the start pipeline at two places and cleans up after itself.

The order of the tuple in `owner/composition.py` is that of preparation; clean-up runs in reverse. Preparing
is itself a pipeline, so a capability that fails takes back the ones before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from banger import steps
from banger.vm import host as hosts
from banger.vm import record


@dataclass(slots=True)
class Context:
    """One VM's start, for its capabilities. `created` names what this start made and may delete again."""

    host: hosts.Host
    vm: record.VmRecord
    created: set[str] = field(default_factory=set)


class Capability(Protocol):
    """A feature such as the work disk, later DNS and NAT."""

    @property
    def name(self) -> str: ...

    async def check(self, context: Context, /) -> None:
        """Prerequisites, before anything is made. Raises with what the user can mend."""

    async def uncheck(self, context: Context, /) -> None:
        """Gives back what `check` took for itself, if it takes anything; idempotent."""

    async def prepare(self, context: Context, /) -> None:
        """Makes what the VMM needs on the host."""

    async def after_start(self, context: Context, /) -> None:
        """The agent answers."""

    async def clean_up(self, context: Context, /) -> None:
        """Takes back what `prepare` made; idempotent, and safe when it made nothing."""


async def check_all(capabilities: Sequence[Capability], context: Context) -> None:
    for capability in capabilities:
        await capability.check(context)


async def uncheck_all(capabilities: Sequence[Capability], context: Context) -> None:
    for capability in reversed(capabilities):
        await capability.uncheck(context)


async def prepare_all(
    capabilities: Sequence[Capability], context: Context, observer: steps.Observer
) -> None:
    await steps.run([_as_step(capability, context) for capability in capabilities], observer)


async def after_start_all(capabilities: Sequence[Capability], context: Context) -> None:
    for capability in capabilities:
        await capability.after_start(context)


async def clean_up_all(capabilities: Sequence[Capability], context: Context) -> None:
    """Every capability gets its turn; the first failure is raised at the end, with the others as notes."""
    first: Exception | None = None
    for capability in reversed(capabilities):
        try:
            await capability.clean_up(context)
        except Exception as error:
            if first is None:
                first = error
            else:
                first.add_note(f"cleaning up {capability.name}: {error}")
    if first is not None:
        raise first


def _as_step(capability: Capability, context: Context) -> steps.Step:
    return steps.Step(
        name=f"prepare_{capability.name}",
        run=lambda: capability.prepare(context),
        undo=lambda: capability.clean_up(context),
    )
