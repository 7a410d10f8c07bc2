# SPDX-License-Identifier: MIT
"""`banger vm create|start|stop|restart|kill|delete|set`. Several names are worked on at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import click
import msgspec

from banger.cli import client, command, exits, lifetime, many, output, params, progress, render, signals
from banger.contract import decoding, egress, errors, resources

_F = TypeVar("_F", bound=Callable[..., Any])
_MANY: Final = click.argument("names", metavar="NAME…", nargs=-1, required=True, type=params.VM)
_EGRESS: Final = command.together(
    click.option(
        "--egress",
        type=click.Choice([str(mode) for mode in egress.Egress]),
        help="Where NAT leads to: none (only what --allow names), internet, or all (private networks too) "
        "[default: internet].",
    ),
    click.option(
        "--allow",
        metavar="DEST[:PORT]",
        multiple=True,
        type=params.DESTINATION,
        help="A network or name it reaches besides, or alone without --nat and --egress.",
    ),
)


def _limits(default: str = "") -> Callable[[_F], _F]:
    """The options that say how long a VM runs."""
    return command.together(
        click.option(
            "--idle-stop",
            "idle_stop_s",
            metavar="TIME",
            type=params.LIMIT,
            help="Stop it after so long without use, such as 30m or 2h; a bare number is seconds; "
            f"off: never{default}.",
        ),
        click.option(
            "--ttl",
            "ttl_s",
            metavar="TIME",
            type=params.LIMIT,
            help="Stop it so long after its start, such as 8h or 2d; a bare number is seconds; "
            f"off: never{default}.",
        ),
    )


def size_options(function: _F) -> _F:
    """The options of `create` and `run` that say what VM to make."""
    options = command.together(
        click.option(
            "--image", type=params.IMAGE, help="Image to make it from [default: the configured one]."
        ),
        click.option("--kernel", type=params.KERNEL, help="Kernel to boot [default: the image's]."),
        click.option(
            "--vcpu",
            "vcpus",
            type=params.VCPUS,
            help="Number of virtual CPUs [default: as configured, else 2, or what a smaller host has].",
        ),
        click.option(
            "--memory",
            "memory_mib",
            type=params.MEMORY,
            help="Memory, such as 512M or 2G "
            "[default: as configured, else 1G, or a quarter of a small host's].",
        ),
        click.option(
            "--disk-size",
            "disk_size_mib",
            type=params.DISK,
            help="Size of the work disk, /root [default: as configured, else 8G].",
        ),
        click.option("--no-network", is_flag=True, help="Without a network interface."),
        click.option(
            "--ipv6/--no-ipv6", default=None, help="With an IPv6 address too [default: as configured]."
        ),
        click.option("--nat", is_flag=True, help="The guest reaches beyond this host."),
        _EGRESS,
        click.option(
            "--network",
            "peer_network",
            metavar="NAME",
            type=params.PEERS,
            default="",
            help="The guest and the others of this network reach each other.",
        ),
        click.option(
            "-p",
            "--publish",
            metavar="[ADDR:]HOSTPORT:GUESTPORT[/udp]",
            multiple=True,
            type=params.PUBLISH,
            help="Offer a port of the guest on this host, on loopback unless ADDR is given.",
        ),
        _limits(" [default: never]"),
        click.option(
            "--autostart",
            is_flag=True,
            help="Start it again with the host, when it ran as that went down.",
        ),
    )
    return options(function)


def request(name: str | None, chosen: dict[str, Any], **more: bool) -> resources.CreateVm:
    """The request of options as click gives them; ranges are checked as the daemon will."""
    chosen = dict(chosen)
    network = not chosen.pop("no_network")
    chosen["nat"] = chosen["nat"] or None
    for limit in ("idle_stop_s", "ttl_s"):
        chosen[limit] = chosen[limit] or 0
    try:
        return decoding.convert({"name": name, "network": network, **chosen, **more}, resources.CreateVm)
    except msgspec.ValidationError as error:
        raise errors.BadRequestError(f"cannot make such a VM: {error}") from error


def submit_create(
    api: client.Client, asked: resources.CreateVm, shown: progress.Display
) -> progress.Outcome:
    """Creates and waits. When it did not work out, or a signal ended it, says what is left of it."""
    begun: list[resources.Operation] = []

    def submit() -> resources.Operation:
        begun.append(api.post("/v1/vms", asked))
        return begun[0]

    try:
        outcome = progress.follow_one(api, submit, shown, cancellable=True)
    except exits.SignalledError:
        for operation in begun:
            render.note(what_is_left(api, operation.target))
        raise
    if outcome.operation.status is resources.OperationStatus.FAILED and not _was_made(outcome):
        render.note("no VM was made")
    elif outcome.operation.status is not resources.OperationStatus.SUCCEEDED:
        render.note(what_is_left(api, outcome.operation.target))
    return outcome


def _was_made(outcome: progress.Outcome) -> bool:
    """Whether its start had begun; before that, its image and its kernel are got."""
    return any(stage == resources.Stage.PREFLIGHT for stage, _ in outcome.timing.stages)


def what_is_left(api: client.Client, name: str) -> str:
    try:
        left = api.get(f"/v1/vms/{client.segment(name)}", resources.Vm)
    except errors.NotFoundError:
        return f"nothing is left of {name}"
    except errors.BangerError as error:
        return f"whether anything is left of {name} is unknown: {error.message}"
    verbs = f"`banger vm explain {name}`, `banger vm start {name}`, `banger vm delete {name}`"
    return f"{name} is kept, {left.state}; {verbs}"


def made_vm(ended: resources.Operation) -> resources.Vm:
    if ended.vm is None:
        raise errors.ProtocolError(f"bangerd did not say which VM {ended.kind} made")
    return ended.vm


def say_timing(outcome: progress.Outcome, *, json: bool) -> None:
    """How long each stage took, in one line on stderr."""
    if not json and outcome.timing.stages:
        total = sum(took for _, took in outcome.timing.stages)
        render.note(f"{outcome.operation.target}: {render.elapsed(total)} ({outcome.timing.text()})")


@command.make(
    "create",
    examples=[
        ("banger vm create", "a VM with a generated name"),
        ("banger vm create web --vcpu 2 --memory 2G", "a name and sizes"),
        ("banger vm create db --no-start", "without starting it"),
    ],
)
@click.argument("name", required=False, type=params.NEW_VM)
@click.option("--name", "name_option", type=params.NEW_VM, help="The same as the argument.")
@size_options
@click.option("--no-start", is_flag=True, help="Do not start it.")
@click.pass_obj
def create(
    settings: command.Settings, /, name: str | None, name_option: str | None, no_start: bool, **chosen: Any
) -> None:
    """Create a VM and start it.

    Prints the VM's name when its guest answers. Values that are not given come from the configuration, then
    from this host's size, then from a constant; `banger vm show` says which.
    """
    if name and name_option and name != name_option:
        raise errors.BadRequestError(f"two names were given: {name} and {name_option}")
    asked = request(name or name_option, chosen, start=not no_start)
    with signals.raised():
        outcome = submit_create(settings.client(), asked, progress.display(json=settings.json))
    vm = made_vm(outcome.require())
    say_timing(outcome, json=settings.json)
    if settings.json:
        output.json(vm)
    else:
        output.text(vm.name)


@command.make("start", examples=[("banger vm start web db", "several at once")])
@_MANY
@click.pass_obj
def start(settings: command.Settings, names: tuple[str, ...]) -> None:
    """Start VMs."""
    each(settings, names, "start", cancellable=True)


@command.make("stop", examples=[("banger vm stop web db", "several at once")])
@_MANY
@click.pass_obj
def stop(settings: command.Settings, names: tuple[str, ...]) -> None:
    """Stop VMs, losing nothing that they wrote."""
    each(settings, names, "stop", cancellable=False)


@command.make("restart", examples=[("banger vm restart web", "a new boot, the same disks")])
@_MANY
@click.pass_obj
def restart(settings: command.Settings, names: tuple[str, ...]) -> None:
    """Stop VMs and start them again."""
    each(settings, names, "restart", cancellable=True)


@command.make("kill", examples=[("banger vm kill web", "when it does not stop")])
@_MANY
@click.pass_obj
def kill(settings: command.Settings, names: tuple[str, ...]) -> None:
    """End VMs at once, as if their power failed."""
    each(settings, names, "kill", cancellable=False)


@command.make(
    "delete",
    examples=[
        ("banger vm delete web db", "several at once"),
        ("banger vm delete $(banger vm list -q)", "all of them"),
    ],
)
@_MANY
@command.habit("-f", "--force")
@click.pass_obj
def delete(settings: command.Settings, names: tuple[str, ...]) -> None:
    """Delete VMs and their disks, stopping them first."""
    each(settings, names, "delete", cancellable=False)


@command.make(
    "set",
    examples=[
        ("banger vm set web --memory 4G --vcpu 4", "takes effect at the next start"),
        ("banger vm set web --disk-size 20G", "a larger /root, with what is on it, at the next start"),
        ("banger vm set web --name shop", "another name"),
        ("banger vm set web --nat on", "the guest reaches the internet, at once"),
        ("banger vm set web --allow 10.1.0.0/16:443", "only that, at once"),
        ("banger vm set web --idle-stop 30m --ttl off", "how long it runs, at once"),
    ],
)
@click.argument("vm", metavar="NAME", type=params.VM)
@click.option("--name", type=params.NEW_VM, help="New name.")
@click.option("--vcpu", "vcpus", type=params.VCPUS, help="Number of virtual CPUs.")
@click.option("--memory", "memory_mib", type=params.MEMORY, help="Memory, such as 512M or 2G.")
@click.option(
    "--disk-size", "disk_size_mib", type=params.DISK, help="Size of the work disk, /root; it only grows."
)
@click.option("--kernel", type=params.KERNEL, help="Kernel to boot.")
@click.option(
    "--nat",
    type=click.Choice(["on", "off"]),
    help="The guest reaches the internet, or where --egress says; or nothing beyond this host.",
)
@_EGRESS
@_limits()
@click.option(
    "--autostart",
    type=click.Choice(["on", "off"]),
    help="Whether it starts again with the host, when it ran as that went down.",
)
@click.option("--allow-nothing", is_flag=True, help="Take back all that --allow gave.")
@click.pass_obj
def change(settings: command.Settings, /, vm: str, allow_nothing: bool, **chosen: Any) -> None:
    """Change a VM's name, size or kernel, what it reaches, or how long it runs.

    Name, sizes and kernel are for a VM that does not run; the rest changes at once.

    --nat on, --egress and --allow mean what they mean on create, whatever the VM reached before: --allow
    alone opens only what it names, in the place of what was allowed. --egress and --nat keep what was
    allowed.
    """
    if chosen["allow"] and allow_nothing:
        raise errors.BadRequestError("--allow and --allow-nothing exclude each other")
    for switch in ("nat", "autostart"):
        chosen[switch] = None if chosen[switch] is None else chosen[switch] == "on"
    chosen["allow"] = chosen["allow"] or (() if allow_nothing else None)
    if all(value is None for value in chosen.values()):
        raise errors.BadRequestError("nothing to change was given", hint="see `banger vm set --help`")
    try:
        asked = decoding.convert(chosen, resources.SetVm)
    except msgspec.ValidationError as error:
        raise errors.BadRequestError(f"cannot change {vm} like that: {error}") from error
    changed = settings.client().patch(f"/v1/vms/{client.segment(vm)}", asked, resources.Vm)
    if settings.json:
        output.json(changed)
    else:
        output.text(changed.name)


@command.make(
    "extend",
    examples=[
        ("banger vm extend web", "its time to live and its idleness begin anew"),
        ("banger vm extend web --by 2h", "two hours more than it would live"),
    ],
)
@_MANY
@click.option(
    "--by",
    "by_s",
    metavar="TIME",
    type=params.SPAN,
    help="So much more, such as 2h; a bare number is seconds.",
)
@click.pass_obj
def extend(settings: command.Settings, names: tuple[str, ...], by_s: float | None) -> None:
    """Give running VMs more time before --ttl or --idle-stop stops them."""
    api = settings.client()
    asked = resources.ExtendVm(by_s=None if by_s is None else max(1, round(by_s)))
    results = []
    for name in dict.fromkeys(names):
        try:
            vm = api.ask(f"/v1/vms/{client.segment(name)}/extend", asked, resources.Vm)
        except errors.UnavailableError:
            raise
        except errors.BangerError as error:
            results.append(many.failed(settings, name, error))
        else:
            results.append(many.done(settings, name, vm))
            if not settings.json:
                render.note(lifetime.extended(vm))
    many.finish(settings, results)


def each(
    settings: command.Settings,
    names: Sequence[str],
    verb: str,
    *,
    cancellable: bool,
    ids: Mapping[str, str] | None = None,
    **how: str,
) -> None:
    """Does it to every name, whatever becomes of the others; reports each.

    `ids` says whose the names were: what has such a name by now may be another.
    """
    refs = ids or {}
    api = settings.client()
    wanted = list(dict.fromkeys(names))
    submitted: dict[str, resources.Operation] = {}
    failed: dict[str, errors.BangerError] = {}

    def submit() -> list[resources.Operation]:
        for name in wanted:
            try:
                submitted[name] = submit_action(api, refs.get(name, name), verb, **how)
            except errors.UnavailableError:
                raise
            except errors.BangerError as error:
                failed[name] = error
        return list(submitted.values())

    with signals.raised():
        outcomes = progress.follow(
            api, submit, progress.display(json=settings.json), cancellable=cancellable
        )
    ended = dict(zip(submitted, outcomes, strict=True))
    many.finish(settings, [_result(settings, name, failed.get(name) or ended[name]) for name in wanted])


def submit_action(api: client.Client, name: str, verb: str, **how: str) -> resources.Operation:
    path = f"/v1/vms/{client.segment(name)}"
    if verb != "delete":
        return api.post(f"{path}/{verb}")
    operation = api.delete(client.query(path, **how))
    if operation is None:
        raise errors.ProtocolError("bangerd did not say how the deletion goes")
    return operation


def _result(
    settings: command.Settings, name: str, outcome: progress.Outcome | errors.BangerError
) -> many.Result:
    if isinstance(outcome, errors.BangerError):
        return many.failed(settings, name, outcome)
    try:
        ended = outcome.require()
    except errors.BangerError as error:
        return many.failed(settings, name, error)
    say_timing(outcome, json=settings.json)
    return many.done(settings, name, ended.vm)
