# SPDX-License-Identifier: MIT
"""`banger vm run` and `banger vm exec`: the user's command in a guest.

Its exit status is ours. Whatever else goes wrong ends with 125 and a message, so the two cannot be mixed up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, NoReturn, TypeVar

import click

from banger.cli import (
    attach,
    bootstrap,
    client,
    command,
    exits,
    output,
    params,
    progress,
    render,
    signals,
    terminal,
    vm_life,
    workspaces,
)
from banger.contract import errors, resources

_EXEC_FIELDS: Final = ("user", "cwd", "env", "tty", "stdin", "timeout")
_ENDS: Final = frozenset({"vm.stop", "vm.kill", "vm.restart", "vm.delete"})
_IMAGE_LIKE: Final = r"[a-z0-9][a-z0-9._/@:-]*"
_F = TypeVar("_F", bound=Callable[..., Any])

# The user's login shell in the guest, else the best there is. The agent sets SHELL from the guest's passwd.
_NOT_FOUND: Final = 127
_SHELL: Final = (
    "/bin/sh",
    "-c",
    'for shell in "$SHELL" /bin/bash; do [ -x "$shell" ] && exec "$shell" -l; done; exec /bin/sh -l',
)


def _exec_options(function: _F) -> _F:
    options = command.together(
        click.option("-u", "--user", metavar="USER", default="", help="User in the guest [default: root]."),
        click.option(
            "--cwd",
            metavar="DIR",
            default="",
            help="Directory in the guest [default: the workspace, else home].",
        ),
        click.option(
            "-e",
            "--env",
            metavar="NAME[=VALUE]",
            multiple=True,
            type=params.VARIABLE,
            help="Set a variable; without a value, the one it has here.",
        ),
        click.option(
            "-t/-T",
            "--tty/--no-tty",
            default=None,
            help="With a terminal in the guest [default: when stdin and stdout are terminals].",
        ),
        click.option(
            "-i/-n",
            "--stdin/--no-stdin",
            default=True,
            help="Pass on our input, or give the command none [default: pass it on].",
        ),
        click.option(
            "--timeout",
            metavar="TIME",
            type=params.SPAN,
            help="End it after 90s, 5m or 2h; a bare number is seconds; the status is 124.",
        ),
    )
    return options(function)


def _exec_request(
    argv: tuple[str, ...], chosen: dict[str, Any], *, remove: bool, hold: bool = False
) -> resources.ExecRequest:
    tty = chosen["tty"]
    if tty is None:
        tty = chosen["stdin"] and terminal.is_terminal(0) and terminal.is_terminal(1)
    env = tuple(chosen["env"])
    if tty and "TERM" in os.environ and not any(item.startswith("TERM=") for item in env):
        env += (f"TERM={os.environ['TERM']}",)
    rows, columns = terminal.size(1 if terminal.is_terminal(1) else 0) if tty else (0, 0)
    return resources.ExecRequest(
        argv=argv,
        env=env,
        cwd=chosen["cwd"],
        user=chosen["user"],
        tty=tty,
        rows=rows,
        cols=columns,
        remove=remove,
        hold=hold,
    )


@command.make(
    "exec",
    cls=command.TailCommand,
    examples=[
        ("banger vm exec web -- make check", "a command; its exit status is yours"),
        ("banger vm exec web -- sh -c 'cd /srv && ls'", "arguments arrive exactly as given"),
        ("banger vm exec web", "a shell"),
        ("banger vm exec --auto-prepare web -- make check", "with the repository as it is here now"),
        ("tar -c . | banger vm exec web -- tar -x -C /srv", "stdin and stdout are binary clean"),
        ("banger vm exec -u www-data -e DEBUG=1 web -- id", "as another user, with a variable"),
    ],
)
@click.argument("name", type=params.VM)
@click.argument("words", metavar="[-- CMD…]", nargs=-1, type=click.UNPROCESSED)
@_exec_options
@workspaces.guest_path("Another workspace in the guest than the last one.")
@click.option("--auto-prepare", is_flag=True, help="First send what changed in the repository here.")
@click.pass_context
def execute(
    ctx: click.Context,
    /,
    name: str,
    words: tuple[str, ...],
    argv: tuple[str, ...],
    guest_path: str | None,
    auto_prepare: bool,
    **chosen: Any,
) -> NoReturn:
    """Run a command in a running VM.

    It begins in the workspace when the VM has one; when the repository here has changed since it was sent, a
    line on stderr says so.

    Options end at `--` or at the first word of the command. On a terminal Ctrl-C is a key for the command;
    otherwise SIGINT, SIGTERM, SIGHUP and SIGQUIT are passed on to it. Ends with the command's exit status,
    128 + n after signal n, or 125 when banger itself failed.
    """
    if words and ctx.meta["banger.has_tail"]:
        raise click.UsageError(f"{words[0]!r} stands between the VM's name and --", ctx)
    if words and words[0].startswith("-"):
        raise click.UsageError(
            f"put options before {name!r}, or -- before the command{_flags(ctx, words)}", ctx
        )
    settings = ctx.ensure_object(command.Settings)
    with exits.failures_as(exits.BEFORE_COMMAND):
        api = settings.client()
        with signals.raised():
            workspaces.keep_up(settings, api, name, path=guest_path, send_changes=auto_prepare)
        chosen["cwd"] = chosen["cwd"] or guest_path or ""
        request = _exec_request(words or argv or _SHELL, chosen, remove=False)
        status = attach.run(api, name, request, stdin=chosen["stdin"], timeout_s=chosen["timeout"])
    _say_if_for_a_shell(request.argv, status)
    raise exits.CommandEnd(status)


def _flags(ctx: click.Context, words: tuple[str, ...]) -> str:
    """The line as it was meant, where what stands behind the name can only be options without a value."""
    at = next((at for at, word in enumerate(words) if not re.fullmatch("-[itTn]+", word)), len(words))
    if at == 0:
        return ""
    return f": `{ctx.command_path} {shlex.join((*words[:at], ctx.params['name'], *words[at:]))}`"


@command.make(
    "run",
    cls=command.PathCommand,
    examples=[
        ("banger vm run", "a shell in a new VM, which stays"),
        ("banger vm run .", "a shell with this repository at /root/repo"),
        ("banger vm run --rm . -- make check", "a command in it; the VM is gone afterwards"),
        ("banger vm run . --dry-run", "which files would go in"),
        ("banger vm run --rm -- uname -a", "a command in a VM that is gone afterwards"),
        ("banger vm run --image nginx:1.27", "what that image runs; pulled when it is not here"),
        ("banger vm run -d --name web --memory 2G", "start it and come back"),
        ("echo hi | banger vm run --rm -- wc -c", "stdin reaches the command"),
    ],
)
@click.argument("words", metavar="[PATH] [-- CMD…]", nargs=-1, type=params.DIRECTORY)
@click.option("--rm", "remove", is_flag=True, help="Delete the VM when the command ends.")
@click.option("-d", "--detach", is_flag=True, help="Start the VM, print its name, and run nothing.")
@click.option("--name", type=params.NEW_VM, help="Name of the VM [default: a generated one].")
@vm_life.size_options
@_exec_options
@workspaces.repository_options("With PATH: ")
@click.option("--dry-run", is_flag=True, help="With PATH: list the files that would go in; make nothing.")
@click.option("--no-bootstrap", is_flag=True, help="With PATH: do not install the tools that it declares.")
@click.pass_obj
def run(
    settings: command.Settings,
    /,
    words: tuple[str, ...],
    argv: tuple[str, ...],
    remove: bool,
    detach: bool,
    name: str | None,
    dry_run: bool,
    no_bootstrap: bool,
    **chosen: Any,
) -> None:
    """Create and start a VM and run a command in it.

    Without a command it is the image's own, as the image's user, or a shell where the image names none. An
    image that is not here is pulled when it is a reference, or built when the catalog knows it.

    With PATH, the git repository there is at /root/repo, with its history and its files as they are, and the
    command begins there. Tools that it declares for mise are installed first.

    The stages are shown on stderr, then the command has the terminal. Ends with the command's exit status,
    128 + n after signal n, or 125 when banger itself failed. Ctrl-C while the VM starts takes back what
    that start made. Without --rm the VM stays, also then: `banger vm start` starts it.
    """
    wanted = workspaces.wanted(words, chosen)
    _refuse_what_cannot_be(words, argv, detach=detach, remove=remove, dry_run=dry_run, image=chosen["image"])
    if remove and chosen["autostart"]:
        raise errors.BadRequestError("--rm and --autostart exclude each other: the VM ends with its command")
    with exits.failures_as(exits.BEFORE_COMMAND), signals.raised(), contextlib.ExitStack() as stack:
        client.require_text(*argv, *chosen["env"], chosen["cwd"], chosen["user"])
        ready = stack.enter_context(workspaces.taken(wanted)) if wanted is not None else None
        if dry_run and ready is not None:
            workspaces.show_files(settings, ready)
            return
        tools = ready is not None and not no_bootstrap and bootstrap.is_wanted(ready.files)
        exec_fields = {field: chosen.pop(field) for field in _EXEC_FIELDS}
        needs_git = ready is not None and ready.snapshot is not None
        asked = vm_life.request(
            name,
            chosen,
            remove_on_failure=remove,
            for_command=remove,
            needs_git=needs_git,
            needs_mise=tools,
        )
        if tools:
            bootstrap.require_network(asked)
        api = settings.client()
        outcome = vm_life.submit_create(api, asked, progress.display(json=settings.json))
        vm = vm_life.made_vm(outcome.require())
        vm_life.say_timing(outcome, json=settings.json)

        def prepare() -> None:
            if ready is not None:
                workspaces.send_into(settings, api, vm, ready)
                stack.close()
            if tools and wanted is not None:
                bootstrap.install(api, vm, wanted.path)

        if detach:
            _detached(settings, api, vm, prepare)
            return
        with _Made(api, vm, remove=remove) as made:
            default = _SHELL if argv or ready is not None else _default_command(api, vm)
            request = _exec_request(argv or default, exec_fields, remove=remove, hold=ready is not None)
            status = attach.run(
                api,
                vm.id,
                request,
                stdin=exec_fields["stdin"],
                on_begin=made.hand_over,
                before=prepare if ready is not None else None,
                timeout_s=exec_fields["timeout"],
            )
    _say_if_for_a_shell(request.argv, status)
    raise exits.CommandEnd(status)


def _say_if_for_a_shell(argv: Sequence[str], status: int) -> None:
    """ssh hands a line to a shell, and no program is called like one."""
    if status == _NOT_FOUND and len(argv) == 1 and re.search(r"[\s|&;<>$]", argv[0]):
        render.note(f"no shell reads that; to have one: `-- sh -c {shlex.quote(argv[0])}`")


def _default_command(api: client.Client, vm: resources.Vm) -> tuple[str, ...]:
    """What the image runs, which is for the daemon to fill in; a shell where it says nothing."""
    image = api.get(f"/v1/images/{vm.image_id}", resources.Image)
    if image.run.entrypoint or image.run.command:
        return ()
    if image.has_shell:
        return _SHELL
    raise errors.NotFoundError(
        f"the image {image.name} has no shell, and does not say what it runs",
        hint=f"name a program of it: `banger vm run --image {image.name} -- /the/program`",
    )


def _refuse_what_cannot_be(
    words: tuple[str, ...],
    argv: tuple[str, ...],
    *,
    detach: bool,
    remove: bool,
    dry_run: bool,
    image: str | None,
) -> None:
    if len(words) > 1:
        raise errors.BadRequestError(
            f"vm run takes one repository, not {len(words)}",
            hint=_meant(words, remove=remove, image=image),
        )
    if words and not os.path.isdir(words[0]):
        what = params.lack_of(words[0]) or "is not a directory"
        raise errors.BadRequestError(
            f"repository {words[0]} {what}",
            hint=_meant(words, remove=remove, image=image),
        )
    if dry_run and not words:
        raise errors.BadRequestError("--dry-run lists the files of a repository", hint="name one: `.`")
    if detach and remove:
        raise errors.BadRequestError(
            "-d and --rm exclude each other: nothing would tell when to delete the VM",
            hint="leave out --rm and run `banger vm delete` when you are done",
        )
    if detach and argv:
        raise errors.BadRequestError(
            "-d runs no command", hint="start the VM with -d, then use `banger vm exec NAME -- CMD`"
        )


def _meant(words: tuple[str, ...], *, remove: bool, image: str | None) -> str:
    """What words that are no directory can have been: a command, or an image with or without one."""
    word, *more = words
    begun = "banger vm run --rm" if remove else "banger vm run"
    if "://" in word or word.startswith("git@"):
        return "a repository is taken from this host: `git clone` it first"
    if image is not None:
        return f"for a command put -- before it: `{begun} --image {image} -- {shlex.join(words)}`"
    command_line = f"for a command put -- before it: `{begun} -- {shlex.join(words)}`"
    if not re.fullmatch(_IMAGE_LIKE, word) or os.path.isdir(word):
        return command_line
    with_command = f" -- {shlex.join(more)}" if more else ""
    return f"for an image: `{begun} --image {word}{with_command}`; {command_line}"


def _detached(
    settings: command.Settings, api: client.Client, vm: resources.Vm, prepare: Callable[[], None]
) -> None:
    try:
        prepare()
    except BaseException as error:
        _say_kept(api, vm, error)
        raise
    if settings.json:
        output.json(vm)
    else:
        output.text(vm.name)


def _say_kept(api: client.Client, vm: resources.Vm, error: BaseException | None) -> None:
    """As it is now: meanwhile somebody else may have ended it, or its guest itself."""
    try:
        runs = api.get(f"/v1/vms/{vm.id}", resources.Vm).has_vmm
        if runs and (isinstance(error, errors.UnavailableError) or _ending(api, vm, _ENDS)):
            return  # who works in it was told, or the error says how to see
    except errors.NotFoundError:
        runs = False
    except errors.BangerError:
        runs = True  # VMs outlive their daemon
    if runs:
        render.note(f"{vm.name} goes on; `banger vm exec {vm.name}`, `banger vm delete {vm.name}`")
    else:
        render.note(vm_life.what_is_left(api, vm.name))


@dataclasses.dataclass(slots=True)
class _Made:
    """The VM that was made, while its command is looked for, waited for and runs.

    With `remove` it is gone when the block ends, else it is named, in whatever way that is.
    """

    api: client.Client
    vm: resources.Vm
    remove: bool
    is_handed_over: bool = False
    """The daemon knows the command, and deletes the VM when its connection ends."""

    def hand_over(self) -> None:
        self.is_handed_over = True

    def __enter__(self) -> _Made:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not self.remove:
            _say_kept(self.api, self.vm, error)
        elif _wait_until_gone(self.api, self.vm, deletes_itself=self.is_handed_over) and isinstance(
            error, (KeyboardInterrupt, exits.SignalledError)
        ):
            render.note(f"nothing is left of {self.vm.name}")


def _wait_until_gone(api: client.Client, vm: resources.Vm, *, deletes_itself: bool) -> bool:
    """The daemon deletes the VM when the command's connection ends; without one, that is ours to do.

    False, and said, when that failed.
    """
    try:
        deletion = _ending(api, vm, {"vm.delete"}) if deletes_itself else None
        found = deletion or vm_life.submit_action(api, vm.id, "delete")
        progress.follow_one(api, lambda: found, progress.Silent(), cancellable=False).require()
    except errors.NotFoundError:
        pass
    except errors.UnavailableError as error:
        render.note(f"bangerd deletes {vm.name} as soon as it can: {error.message}")
        return False
    except errors.BangerError as error:
        render.note(f"{vm.name} may not be deleted: {error.message}; `banger vm delete {vm.name}`")
        return False
    return True


def _ending(api: client.Client, vm: resources.Vm, kinds: Collection[str]) -> resources.Operation | None:
    """The operation that ends it now, and not one that ended another VM of that name."""
    for operation in api.get("/v1/operations", list[resources.Operation]):
        known = operation.kind in kinds and operation.target in {vm.name, vm.id}
        if known and operation.status is resources.OperationStatus.RUNNING:
            return operation
    return None
