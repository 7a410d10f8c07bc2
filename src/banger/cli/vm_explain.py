# SPDX-License-Identifier: MIT
"""`banger vm explain`: where the time of a VM's last start went, and why a VM does not run."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator
from typing import Final

import click
import msgspec

from banger.cli import client, command, lifetime, output, params, render, timeline
from banger.contract import errors, guest, resources, sizes

_TAIL_LINES: Final = 8
_TAIL_BYTES: Final = 64 * 1024
_BAR: Final = 24
_INDENT: Final = 2
_LOW_BYTES: Final = 256 << 20
_ROOM: Final = (
    "make room there: `banger image cache prune`, `banger vm prune`, `banger image delete`; "
    "`banger doctor` says which disk"
)


class Explanation(msgspec.Struct, frozen=True):
    """For `--json`."""

    name: str
    state: resources.VmState
    summary: str
    next: str
    """What to do about it; empty when nothing needs to be done."""
    total_ms: float
    """Of the last start, from its first step to its last."""
    steps: tuple[resources.StepTiming, ...]
    console: tuple[str, ...]
    """The last the guest printed, when the VM does not run."""
    vmm: tuple[str, ...] = ()
    """The last its VMM said, when the VM failed and its console tells nothing of the guest."""
    error: errors.ErrorBody | None = None
    idle_stop_at: datetime.datetime | None = None
    ttl_ends_at: datetime.datetime | None = None
    limits: tuple[str, ...] = ()
    """When time will stop it."""


@command.make(
    "explain",
    examples=[
        ("banger vm explain web", "why it does not run, and what its last start did"),
        ("banger vm explain web --json", "for programs"),
    ],
)
@click.argument("name", type=params.VM)
@click.pass_obj
def explain(settings: command.Settings, name: str) -> None:
    """Say how a VM is, why, and where the time of its last start went."""
    api = settings.client()
    vm = api.get(f"/v1/vms/{client.segment(name)}", resources.Vm)
    found = _explained(api, vm)
    if settings.json:
        output.json(found)
    else:
        output.text("\n".join(_lines(found)))


def _explained(api: client.Client, vm: resources.Vm) -> Explanation:
    summary, remedy = _running(api, vm) if vm.has_vmm else _not_running(vm)
    runs = vm.has_vmm and vm.silent_since is None
    has_said = not runs and vm.state is not resources.VmState.CREATED
    printed = tuple(_printed(api, vm)) if has_said else ()
    is_silent = has_said and not printed and vm.last_error is not None
    return Explanation(
        name=vm.name,
        state=vm.state,
        summary=summary,
        next=remedy,
        total_ms=timeline.total_ms(vm.last_start),
        steps=vm.last_start,
        console=printed,
        vmm=tuple(_tail(api, vm, "vmm")) if is_silent else (),
        error=vm.last_error,
        idle_stop_at=vm.idle_stop_at,
        ttl_ends_at=vm.ttl_ends_at,
        limits=tuple(f"{name}: {value}" for name, value in lifetime.facts(vm)),
    )


def _running(api: client.Client, vm: resources.Vm) -> tuple[str, str]:
    """By asking its agent now, unless it is known not to answer."""
    if vm.silent_since is not None and vm.last_error is not None:
        return (
            f"{vm.name} runs, but its agent does not answer: silent for {render.age(vm.silent_since)}, "
            f"since {vm.silent_since:%Y-%m-%d %H:%M:%S} UTC",
            vm.last_error.hint,
        )
    if vm.last_error is not None:
        return f"{vm.name} runs, but {vm.last_error.message}", vm.last_error.hint
    try:
        stats = api.get(f"/v1/vms/{client.segment(vm.id)}/stats", resources.VmStats)
    except (errors.UnavailableError, errors.DeadlineError) as error:
        return (
            f"{vm.name} runs, but its agent does not answer: {error.message}",
            f"see `banger vm logs {vm.name}`; `banger vm restart {vm.name}` begins anew",
        )
    has_run = f"{vm.name} has run for {render.span(stats.uptime_ms / 1000)}, and its agent answers"
    if stats.host_free_bytes < _LOW_BYTES:
        left = sizes.text_of_bytes(stats.host_free_bytes)
        return f"{has_run}, but the host's disk has {left} left: without any, what it writes is lost", _ROOM
    return has_run, ""


def _not_running(vm: resources.Vm) -> tuple[str, str]:
    again = f"`banger vm start {vm.name}` starts it"
    if vm.last_error is not None:
        at = f" (in step {vm.last_error.step})" if vm.last_error.step else ""
        why = vm.last_error.message.removeprefix(f"{vm.name} is no longer running: ")
        return f"{vm.name} does not run: {why}{at}", vm.last_error.hint or again
    if vm.state is resources.VmState.CREATED:
        return f"{vm.name} has never been started", again
    if vm.stopped_with_host:
        always = f"`banger vm set {vm.name} --autostart on` has it started with its host from now on"
        return f"{vm.name} was stopped with its host, which went down", f"{again}; {always}"
    if vm.stopped_because:
        return f"{vm.name} was stopped by time: it {vm.stopped_because}", again
    return f"{vm.name} was stopped, or its guest powered off or reset", again


def _printed(api: client.Client, vm: resources.Vm) -> Iterator[str]:
    """What the guest itself said on its console."""
    return (line for line in _tail(api, vm, "console") if line not in guest.AGENT_LINES)


def _tail(api: client.Client, vm: resources.Vm, source: str) -> Iterator[str]:
    with api.stream(client.query(f"/v1/vms/{client.segment(vm.id)}/logs", source=source)) as answer:
        kept = b""
        for data in answer.pieces():
            kept = (kept + data)[-_TAIL_BYTES:]
    lines = [line for line in kept.decode(errors="replace").splitlines() if line.strip()]
    yield from (render.safe_log(line) for line in lines[-_TAIL_LINES:])


def _lines(found: Explanation) -> Iterator[str]:
    yield render.safe(found.summary)
    if found.error is not None:
        yield from (f"  also: {render.safe(note)}" for note in found.error.also)
    if found.next:
        yield f"  next: {render.safe(found.next)}"
    yield from (f"  {limit}" for limit in found.limits)
    if found.console:
        yield ""
        yield "the last it printed:"
        yield from (f"  {line}" for line in found.console)
    if found.vmm:
        yield ""
        yield (
            "nothing of its kernel is on its console: the default one has no serial console, "
            "a kernel such as debian-6.12 has"
        )
        yield "the last its VMM said:"
        yield from (f"  {line}" for line in found.vmm)
    if found.steps:
        yield ""
        yield f"its last start took {render.elapsed(found.total_ms)}:"
        yield from _timeline(found)


def _timeline(found: Explanation) -> Iterator[str]:
    """Stage by stage, step by step, parts below their step; the bar shows when in the start it ran."""
    shown = list(timeline.shown(found.steps))
    width = max(len(each.step.name) for each in shown) + _INDENT
    for stage, group in itertools.groupby(shown, key=lambda each: each.stage):
        of_stage = list(group)
        yield f"  {render.safe(stage)}: {render.elapsed(timeline.took_ms(of_stage))}"
        for each in of_stage:
            step = each.step
            share = 100 * step.elapsed_ms / found.total_ms if found.total_ms else 0.0
            figures = f"{step.elapsed_ms:9.1f} ms  {share:4.0f} %  {_bar(step, found.total_ms)}"
            name = " " * _INDENT * each.is_part + render.safe(step.name)
            yield f"    {name.ljust(width)}  {figures}".rstrip()
    between = found.total_ms - timeline.took_ms(shown)
    if between > 0:
        yield f"  between steps: {render.elapsed(between)}"


def _bar(step: resources.StepTiming, total_ms: float) -> str:
    if not total_ms:
        return ""
    begin = int(_BAR * step.started_ms / total_ms)
    length = max(1, round(_BAR * step.elapsed_ms / total_ms))
    return " " * min(begin, _BAR - 1) + "█" * min(length, _BAR - min(begin, _BAR - 1))
