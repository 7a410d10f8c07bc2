# SPDX-License-Identifier: MIT
"""`banger vm list|show|logs|stats` and `banger ps`."""

from __future__ import annotations

import contextlib
import fnmatch
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import click

from banger.cli import client, command, connection, exits, lifetime, output, params, render, timeline
from banger.contract import egress, errors, resources, sizes

_CHUNK: Final = 1 << 16
_OF_AGENT: Final = b"banger: "
"""What a guest's agent says on a console that its kernel does not have: `contract.guest`."""
_SOURCES: Final = {
    resources.SizeSource.REQUEST: "as asked",
    resources.SizeSource.CONFIG: "from the configuration",
    resources.SizeSource.HOST: "from this host's size",
    resources.SizeSource.DEFAULT: "default",
}
_HEADERS: Final = ("NAME", "STATE", "IMAGE", "CPU", "MEMORY", "ADDRESS", "CREATED", "UPTIME")
_STOPS: Final = "STOPS"
_DISPENSABLE: Final = ("CREATED", "CPU", "MEMORY", "IMAGE", "ADDRESS")
_WIDE: Final = ("ID", "KERNEL", "DISK", "WORKSPACE", _STOPS)
_FORMAT: Final = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "wide", "json"]),
    default="table",
    show_default=True,
    help="How to print it.",
)
_QUIET: Final = click.option("-q", "--quiet", is_flag=True, help="Print names only.")


@command.make(
    "list",
    examples=[
        ("banger vm list", "a table"),
        ("banger vm list -q", "names only"),
        ("banger vm list web db", "only these"),
        ("banger vm list --state running --name 'web*'", "only those"),
        ("banger vm list --format wide", "with kernels, disks and workspaces"),
    ],
)
@click.argument("names", metavar="[NAME]…", nargs=-1, type=params.VM)
@_QUIET
@command.habit("-a", "--all")
@click.option("--state", type=click.Choice([str(state) for state in resources.VmState]), help="Only these.")
@click.option(
    "--name", "pattern", metavar="PATTERN", default="*", help="Only names like this, such as 'web*'."
)
@click.option("--image", type=params.IMAGE, help="Only those made from this image.")
@_FORMAT
@click.pass_obj
def list_vms(
    settings: command.Settings,
    names: tuple[str, ...],
    quiet: bool,
    state: str | None,
    pattern: str,
    image: str | None,
    form: str,
) -> None:
    """List VMs, or only those that are named.

    On a narrow terminal some columns are left out; `--format wide` has them all.
    """

    def is_meant(vm: resources.Vm) -> bool:
        fits = fnmatch.fnmatchcase(vm.name, pattern) and image in {None, vm.image, vm.image_id}
        return fits and state in {None, vm.state}

    _list(settings, is_meant, names=names, quiet=quiet, form=form)


@command.make(
    "ps",
    examples=[("banger ps", "what runs"), ("banger ps -a", "the same as `banger vm list`")],
)
@click.option("-a", "--all", "everything", is_flag=True, help="Also those that do not run.")
@_QUIET
@_FORMAT
@click.pass_obj
def ps(settings: command.Settings, everything: bool, quiet: bool, form: str) -> None:
    """List the VMs that are running."""

    def is_meant(vm: resources.Vm) -> bool:
        return everything or vm.has_vmm

    _list(settings, is_meant, quiet=quiet, form=form)


def _list(
    settings: command.Settings,
    is_meant: Callable[[resources.Vm], bool],
    *,
    names: Sequence[str] = (),
    quiet: bool,
    form: str,
) -> None:
    api = settings.client()
    found = api.get("/v1/vms", list[resources.Vm])
    vms = [vm for vm in client.named(found, names, lambda name: _look_up(api, name)) if is_meant(vm)]
    if settings.json or form == "json":
        output.json(vms)
    elif quiet:
        output.text("".join(f"{render.safe(vm.name)}\n" for vm in vms))
    elif form == "wide":
        output.text(render.table((*_HEADERS, *_WIDE), map(_wide_row, vms)))
    elif any(map(lifetime.next_end, vms)):
        rows = ((*_row(vm), lifetime.next_end(vm) or "-") for vm in vms)
        output.text(render.table((*_HEADERS, _STOPS), rows, dispensable=_DISPENSABLE))
    else:
        output.text(render.table(_HEADERS, map(_row, vms), dispensable=_DISPENSABLE))


def _look_up(api: client.Client, name: str) -> resources.Vm:
    return api.get(f"/v1/vms/{client.segment(name)}", resources.Vm)


def _wide_row(vm: resources.Vm) -> Sequence[str]:
    source = vm.workspace.source if vm.workspace is not None else "-"
    disk = sizes.text_of_mib(vm.disk_size_mib) if vm.is_known else "?"
    stops = lifetime.next_end(vm) or "-"
    return (*_row(vm), vm.id, vm.kernel, disk, source, stops)


def _row(vm: resources.Vm) -> Sequence[str]:
    return (
        vm.name,
        _state(vm),
        vm.image,
        *_sizes(vm),
        f"{render.age(vm.created_at)} ago",
        render.age(vm.started_at) or "?" if vm.has_vmm else "-",
    )


def _sizes(vm: resources.Vm) -> Sequence[str]:
    if not vm.is_known:
        return ("?", "?", "?")
    return (str(vm.vcpus), sizes.text_of_mib(vm.memory_mib), vm.address or "-")


def _state(vm: resources.Vm) -> str:
    return vm.state if vm.silent_since is None else f"{vm.state}: silent for {render.age(vm.silent_since)}"


@command.make("show", examples=[("banger vm show web", "sizes, where they come from, the last error")])
@click.argument("names", metavar="NAME…", nargs=-1, required=True, type=params.VM)
@click.pass_obj
def show(settings: command.Settings, names: tuple[str, ...]) -> None:
    """Show everything about VMs.

    Of several, those that there are, before the error about the others.
    """
    api = settings.client()
    vms, missing = [], []
    for name in names:
        try:
            vms.append(_look_up(api, name))
        except errors.NotFoundError as error:
            missing.append(error)
    if vms and settings.json:
        output.json(vms[0] if len(names) == 1 else vms)
    elif vms:
        output.text("\n\n".join(render.facts(_facts(vm)) for vm in vms))
    if missing:
        raise errors.NotFoundError("; ".join(error.message for error in missing), hint=missing[0].hint)


def _facts(vm: resources.Vm) -> Iterator[tuple[str, str]]:
    yield "name", vm.name
    yield "id", vm.id
    yield "state", _state(vm)
    yield "image", f"{vm.image} ({vm.image_id})"
    yield "kernel", f"{vm.kernel} ({vm.kernel_id})"
    if vm.is_known:
        yield "cpus", _sourced(vm, str(vm.vcpus), "vcpus")
        yield "memory", _sourced(vm, sizes.text_of_mib(vm.memory_mib), "memory_mib")
        yield "work disk", _sourced(vm, sizes.text_of_mib(vm.disk_size_mib), "disk_size_mib")
        yield "address", vm.address or ("none yet" if vm.network else "no network")
    if vm.address6:
        yield "IPv6 address", vm.address6
    if vm.network:
        yield "reaches", _reach(vm)
    if vm.peer_network:
        yield "peers", f"the VMs of network {vm.peer_network}"
    yield from _published(vm)
    yield "created", f"{vm.created_at:%Y-%m-%d %H:%M:%S} UTC, {render.age(vm.created_at)} ago"
    if vm.started_at is not None:
        yield "started", f"{vm.started_at:%Y-%m-%d %H:%M:%S} UTC, {render.age(vm.started_at)} ago"
    yield from lifetime.facts(vm)
    if vm.autostart:
        yield "autostart", "with its host, when it runs as that goes down"
    if vm.stopped_because:
        yield "stopped", f"by time: it {vm.stopped_because}"
    if vm.stopped_with_host:
        yield "stopped", "with its host, which went down"
    if vm.pid:
        yield "VMM", f"pid {vm.pid}"
    if vm.boot_id:
        yield "boot id", vm.boot_id
    for each in vm.all_workspaces:
        yield "workspace", f"{each.path}, from {each.source}, {render.age(each.prepared_at)} ago"
    if vm.last_error is not None:
        yield from _error_facts(vm.last_error)
    if vm.last_start:
        total_ms = timeline.total_ms(vm.last_start)
        yield "last start", f"{total_ms:.1f} ms; `banger vm explain {vm.name}` shows its steps"
        for stage, took_ms in timeline.by_stage(vm.last_start):
            yield f"  {render.safe(stage)}", f"{took_ms:.1f} ms"


def _published(vm: resources.Vm) -> Iterator[tuple[str, str]]:
    """What is served now, what is not, and what will be."""
    if vm.publish and not vm.has_vmm:
        yield "publishes", f"{', '.join(vm.publish)}, while it runs"
        return
    if served := [each for each in vm.publish if each not in vm.unpublished]:
        yield "published", ", ".join(served)
    for each, why in vm.unpublished.items():
        yield "not published", f"{each}, tried again every few seconds: {why}"


_REACH: Final = {
    egress.Egress.NONE: "",
    egress.Egress.INTERNET: "the internet",
    egress.Egress.ALL: "the internet and private networks",
}


def _reach(vm: resources.Vm) -> str:
    if not vm.nat:
        return "this host only"
    return ", ".join(filter(None, (_REACH[vm.egress], *vm.allow))) or "this host only"


def _sourced(vm: resources.Vm, text: str, field: str) -> str:
    source = vm.sources.get(field)
    return text if source is None else f"{text} ({_SOURCES[source]})"


def _error_facts(error: errors.ErrorBody) -> Iterator[tuple[str, str]]:
    yield "last error", error.message
    if error.step:
        yield "  step", error.step
    for note in error.also:
        yield "  also", note
    if error.hint:
        yield "  hint", error.hint
    if error.op_id:
        yield "  operation", error.op_id


@command.make(
    "logs",
    examples=[
        ("banger vm logs web", "what the guest printed on its console"),
        ("banger vm logs -f web", "and what it prints from now on"),
        ("banger vm logs -f -n 20 web", "the same from its last 20 lines on"),
        ("banger vm logs --previous web", "what it printed before it was started again"),
        ("banger vm logs --source vmm web", "what Firecracker says"),
    ],
)
@click.argument("name", type=params.VM)
@click.option("-f", "--follow", is_flag=True, help="Go on until interrupted.")
@click.option(
    "-n",
    "--tail",
    "lines",
    metavar="N",
    type=click.IntRange(min=0),
    help="Of what is there only the last N lines.",
)
@click.option("--previous", is_flag=True, help="What came before: by the start before, or long ago.")
@click.option(
    "--source",
    type=click.Choice(["console", "vmm"]),
    default="console",
    show_default=True,
    help="The guest's console, or the VMM's own log.",
)
@click.pass_obj
def logs(
    settings: command.Settings, name: str, follow: bool, lines: int | None, previous: bool, source: str
) -> None:
    """Show a VM's console, or what its VMM says.

    In a pipe it is written as it is; on a terminal control characters are shown, not obeyed. The default
    kernel, generic-6.12, has no serial console, so the log of its VMs only tells that they go down: see
    `banger vm logs --source vmm NAME`, or boot `--kernel debian-6.12`.
    """
    if follow and previous:
        raise errors.BadRequestError("--previous and -f exclude each other: nothing is added to the past")
    chosen = {"source": source, "follow": str(follow).lower(), "previous": str(previous).lower()}
    if lines is not None:
        chosen["tail"] = str(lines)
    is_console = source == "console" and not previous and lines is None
    if follow:
        _follow(settings.client(), name, chosen, console_of=name if is_console else "")
        return
    asked = client.query(f"/v1/vms/{client.segment(name)}/logs", **chosen)
    with settings.client().stream(asked) as answer:
        _show(answer, console_of=name if is_console else "")


@command.make("console", examples=[("banger vm console web", "what the guest prints, until Ctrl-C")])
@click.argument("name", type=params.VM)
@click.pass_obj
def console(settings: command.Settings, name: str) -> None:
    """Watch a VM's serial console.

    Only for reading: a jailed Firecracker takes no input on it. `banger vm exec NAME` gives a shell.
    The default kernel, generic-6.12, has no serial console, and only tells here that it goes down: see
    `banger vm logs --source vmm NAME`, or boot `--kernel debian-6.12`.
    """
    if sys.stderr.isatty():
        render.note(f"watching the console of {name}, which takes no input; Ctrl-C ends it")
    _follow(settings.client(), name, {"source": "console", "follow": "true"}, console_of=name)


def _follow(api: client.Client, name: str, chosen: dict[str, str], *, console_of: str) -> None:
    """Until interrupted, or there is no such VM any more. Raises when it is the daemon that ended it."""
    with _goes_on(True):
        path = f"/v1/vms/{_look_up(api, name).id}"
        with api.stream(client.query(f"{path}/logs", **chosen)) as answer:
            _show(answer, console_of=console_of)
        with contextlib.suppress(errors.NotFoundError):
            api.get(path, resources.Vm)
            raise errors.UnavailableError(
                f"bangerd was started again, and nobody follows the log of {name} any more",
                hint="do so again: VMs go on",
            )


def _goes_on(is_endless: bool) -> contextlib.AbstractContextManager[None]:
    return exits.on_until_interrupted() if is_endless else contextlib.nullcontext()


def _show(answer: connection.Answer, *, console_of: str) -> None:
    """Says why, when a console showed nothing up to its end or Ctrl-C; of another log nothing is said."""
    is_silent = True
    try:
        for data in _pieces(answer, by_line=sys.stdout.isatty()):
            is_silent = is_silent and data.startswith(_OF_AGENT)
            output.raw(data)
    finally:
        if is_silent and console_of:
            render.note(
                f"nothing of the kernel of {console_of} is on its console; the default one has no serial "
                f"console: see `banger vm logs --source vmm {console_of}`, or boot `--kernel debian-6.12`"
            )


def _pieces(answer: connection.Answer, *, by_line: bool) -> Iterator[bytes]:
    """Lines made safe for a terminal, or whatever comes as it comes."""
    if not by_line:
        return answer.pieces()
    lines = answer.lines(_CHUNK)
    return (render.safe_log(line.decode(errors="replace")).encode() for line in lines)


@command.make(
    "stats",
    examples=[
        ("banger vm stats", "of all that run"),
        ("banger vm stats --watch web", "again every 2 seconds"),
    ],
)
@click.argument("names", metavar="[NAME]…", nargs=-1, type=params.VM)
@click.option("-w", "--watch", is_flag=True, help="Show it again every 2 seconds, until interrupted.")
@click.pass_obj
def stats(settings: command.Settings, names: tuple[str, ...], watch: bool) -> None:
    """Show what running VMs use.

    CPU is the time used since the start; with --watch, the share of one CPU since the last look.
    """
    api = settings.client()
    before: dict[str, resources.VmStats] = {}
    pause = threading.Event()
    with _goes_on(watch):
        while True:
            began = time.monotonic()
            found = [_figures(api, name) for name in names] if names else list(_figures_of_all(api))
            if settings.json:
                output.json(found[0] if len(names) == 1 else found)
            else:
                clear = "\x1b[H\x1b[J" if watch and sys.stdout.isatty() else ""
                output.text(clear + _stats_table(found, before if watch else None))
            if not watch:
                return
            sys.stdout.flush()
            before = {item.id: item for item in found}
            pause.wait(max(0.0, began + 2.0 - time.monotonic()))


def _figures(api: client.Client, name: str) -> resources.VmStats:
    return api.get(f"/v1/vms/{client.segment(name)}/stats", resources.VmStats)


def _figures_of_all(api: client.Client) -> Iterator[resources.VmStats]:
    """Of those that run. One that ends meanwhile, or does not answer, hides none of the others."""
    vms = api.get("/v1/vms", list[resources.Vm])
    for vm in (each for each in vms if each.state is resources.VmState.RUNNING):
        try:
            yield _figures(api, vm.name)
        except (errors.NotRunningError, errors.NotFoundError):
            continue
        except (errors.UnavailableError, errors.DeadlineError) as error:
            if "op_id" not in error.fields:
                raise  # it is the daemon that does not answer
            render.note(f"{vm.name}: {error.message}")


def _stats_table(found: Sequence[resources.VmStats], before: dict[str, resources.VmStats] | None) -> str:
    headers = (
        "NAME",
        "CPU",
        "MEMORY",
        "GUEST MEMORY",
        "NET IN/OUT",
        "DISK READ/WRITE",
        "OVERLAY",
        "WORK DISK",
    )
    rows = []
    for item in found:
        used = item.guest_memory_total_bytes - item.guest_memory_available_bytes
        rows.append(
            (
                item.name,
                _cpu(item, before.get(item.id) if before is not None else None),
                sizes.text_of_bytes(item.memory_bytes),
                f"{sizes.text_of_bytes(used)} / {sizes.text_of_bytes(item.guest_memory_total_bytes)}",
                f"{sizes.text_of_bytes(item.rx_bytes)} / {sizes.text_of_bytes(item.tx_bytes)}",
                f"{sizes.text_of_bytes(item.read_bytes)} / {sizes.text_of_bytes(item.write_bytes)}",
                sizes.text_of_bytes(item.overlay_bytes),
                sizes.text_of_bytes(item.work_disk_bytes),
            )
        )
    return render.table(headers, rows, dispensable=("OVERLAY", "WORK DISK", "MEMORY"))


def _cpu(now: resources.VmStats, before: resources.VmStats | None) -> str:
    """A share needs two looks at one run of the VM."""
    if before is None or before.pid != now.pid or now.uptime_ms <= before.uptime_ms:
        return f"{now.cpu_usec / 1e6:.1f}s"
    return f"{(now.cpu_usec - before.cpu_usec) / (now.uptime_ms - before.uptime_ms) / 10:.0f}%"
