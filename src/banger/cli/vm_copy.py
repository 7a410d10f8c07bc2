# SPDX-License-Identifier: MIT
"""`banger vm cp`: files and directories into a VM and out of it, as a tar stream through the guest's agent.

Needs nothing in the guest. What comes out of it is a stranger's: nothing lands outside the target.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import posixpath
import shlex
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from banger.cli import (
    client,
    command,
    exchange,
    many,
    output,
    params,
    progress,
    render,
    signals,
    workspaces,
)
from banger.contract import errors, given_names, sizes, transfers

if TYPE_CHECKING:
    from banger import archive as archives

_PIPE: Final = "-"
_COPYING: Final = "copying"
_OF_AGENT: Final = "cannot pack "
"""What the guest's agent says of a path that is not there."""
_NOT_UNPACKED: Final = "cannot unpack "
_IS_DIRECTORY: Final = os.strerror(errno.EISDIR)
_NO_ARCHIVE: Final = "this is no tar archive"
_ROOT_DISK: Final = "tar -c --one-file-system -C / ."
_NO_DIRECTORY_THERE: Final = "choose another name, or delete what is there"
_LISTED_BYTES: Final = 4 << 20
"""What reads so little from a pipe of ours is a `tar -t`, whose lines are not to be written over."""


@dataclass(frozen=True, slots=True)
class Place:
    """One side of a copy. `vm` is empty on this host."""

    vm: str
    path: str

    @property
    def is_pipe(self) -> bool:
        return not self.vm and self.path == _PIPE

    @property
    def names_directory(self) -> bool:
        return self.path.endswith(("/", "/."))

    @property
    def names_content(self) -> bool:
        """`DIR/.` or `.`, as cp and docker have it: what lies in the directory, without itself."""
        return posixpath.basename(self.path) == "."

    @property
    def own_name(self) -> str:
        """What it is called in a directory that it is copied into; nothing for what lies in one."""
        if self.names_content:
            return ""
        if self.vm:
            return posixpath.basename(posixpath.normpath(self.path)) or self.vm
        path = Path(self.path)
        return path.resolve().name if path.name in {"", ".."} else path.name


class _NothingThereError(errors.NotFoundError):
    """The VM is there, and the path in it is not."""


class _Result(many.Result, frozen=True, omit_defaults=True):
    copied: transfers.Transferred | None = None


def parse_place(text: str) -> Place:
    """`NAME:PATH` in a VM; anything with a slash before its first colon is a path here."""
    vm, colon, path = text.partition(":")
    if not colon or "/" in vm or not vm:
        return Place("", text)
    if path == "~" or path.startswith("~/"):
        path = path[2:]
    if not path.startswith("/"):
        path = posixpath.join("/root", path)
    return Place(given_names.parse_vm_name(vm), path)


@command.make(
    "cp",
    examples=[
        ("banger vm cp notes.txt web:", "a file, into /root"),
        (
            "banger vm cp ./site web:/srv",
            "a directory: it becomes /srv/site, or /srv when that is not there",
        ),
        ("banger vm cp ./site/. web:/srv", "what lies in it, into /srv"),
        ("banger vm cp a.txt b.txt web:/srv", "several, into a directory that is there"),
        ("banger vm cp web:/var/log ./logs", "out of the VM"),
        ("banger vm cp web:/etc - | tar -t", "as a tar stream"),
    ],
)
@click.argument("sources", metavar="SOURCE…", nargs=-1, type=params.PLACE)
@click.argument("target", type=params.PLACE)
@command.habit("-r", "-R", "--recursive")
@click.option("-a", "--archive", is_flag=True, help="Keep owners, by number [default: root's in the guest].")
@click.option("-L", "--follow-link", is_flag=True, help="Copy what a symlink names, when SOURCE is one.")
@click.pass_obj
def copy(
    settings: command.Settings, sources: tuple[str, ...], target: str, archive: bool, follow_link: bool
) -> None:
    """Copy files and directories into a VM, or out of it.

    NAME:PATH is in a VM, where a relative PATH, or one from ~ on, is below /root; - is a tar stream on stdin
    or stdout. Modes, times, links and extended attributes are kept. A directory that is there is filled, a
    file replaced, neither by the other. DIR/. is what lies in a directory. Several sources go into a
    directory that is there.
    """
    if not sources:
        raise click.UsageError("Missing argument 'TARGET'.")
    froms, there = {source: parse_place(source) for source in sources}, parse_place(target)
    if any(bool(here.vm) == bool(there.vm) for here in froms.values()):
        raise errors.BadRequestError(
            "one side of a copy is in a VM and the other is not", hint=_sides(*sources, target)
        )

    def copy_one(here: Place, there: Place) -> transfers.Transferred:
        if there.vm:
            return _into(settings, here, there, archive=archive, follow_link=follow_link)
        return _out_of(settings, here, there, follow_link=follow_link)

    with signals.raised():
        if len(sources) > 1:
            _copy_each(settings, froms, there, copy_one)
            return
        done = copy_one(froms[sources[0]], there)
    if settings.json and not there.is_pipe:
        output.json(done)


def _sides(*words: str) -> str:
    for word in words:
        if ":" in word and os.path.lexists(word):
            return f"for the file {word} of this host write ./{word}"
    return "write the VM's side as NAME:PATH"


def _copy_each(
    settings: command.Settings,
    froms: Mapping[str, Place],
    there: Place,
    copy_one: Callable[[Place, Place], transfers.Transferred],
) -> None:
    """One after the other, whatever becomes of the others; into a directory that is there."""
    if there.is_pipe or any(here.is_pipe for here in froms.values()):
        raise errors.BadRequestError("- is one stream, and takes no other beside it")
    _refuse_same_names(froms)
    _require_directory(settings, there)
    directory = Place(there.vm, f"{there.path}/")
    results: list[many.Result] = []
    for word, here in froms.items():
        try:
            results.append(_Result(name=word, ok=True, copied=copy_one(here, directory)))
        except errors.BangerError as error:
            error.message = f"cannot copy {word}: {error.message}"
            if isinstance(error, errors.UnavailableError):
                raise
            results.append(many.failed(settings, word, error))
    many.finish(settings, results)


def _refuse_same_names(froms: Mapping[str, Place]) -> None:
    """As cp does: the second would replace what the first has just become."""
    words: dict[str, str] = {}
    for word, here in froms.items():
        if here.own_name and (before := words.setdefault(here.own_name, word)) != word:
            raise errors.BadRequestError(
                f"{before} and {word} would both be {here.own_name} there",
                hint="copy them one by one, each to a name of its own",
            )


def _require_directory(settings: command.Settings, there: Place) -> None:
    where = f" in {there.vm}" if there.vm else ""
    if there.vm:
        found = _is_directory(settings.client(), there.vm, posixpath.normpath(there.path))
        lack = "does not exist" if found is None else "" if found else "is not a directory"
    else:
        lack = params.lack_of(there.path) or ("" if os.path.isdir(there.path) else "is not a directory")
    if lack:
        hint = "several sources go into a directory that is there"
        if lack == "does not exist":
            where_made = f"banger vm exec --cwd / {there.vm} -- " if there.vm else ""
            hint += f": `{where_made}mkdir -p {shlex.quote(there.path)}`"
        raise errors.BadRequestError(f"{there.path}{where} {lack}", hint=hint)


def _into(
    settings: command.Settings, here: Place, there: Place, *, archive: bool, follow_link: bool
) -> transfers.Transferred:
    from banger import archive as archives

    api = settings.client()
    report, left_out = _report(settings, there.vm), archives.LeftOut()
    if here.is_pipe:
        directory, name, packed = there.path, "", None
    else:
        source = Path(here.path)
        if lack := params.lack_of(source):
            raise errors.BadRequestError(f"{source} {lack}")
        if follow_link or here.names_content:
            source = source.resolve()
        if here.names_content:
            directory, name = posixpath.normpath(there.path), ""
            if not source.is_dir():
                raise errors.BadRequestError(f"{source} is not a directory")
        else:
            directory, name = _place_in_guest(api, there, source, here.own_name)
        total = archives.content_bytes(archives.walk(source, name))
        packed = archives.packed(
            archives.walk(source, name), lambda count: report(_COPYING, count, total), left_out
        )
    owner = None if archive or here.is_pipe else 0
    try:
        with exchange.opened(api, f"/v1/vms/{client.segment(there.vm)}/put") as talk:
            talk.tell(transfers.PutRequest(path=directory, uid=owner, gid=owner))
            talk.send(packed or _counted(_piped(talk), report, total=_piped_bytes()))
            done = talk.hear(transfers.Transferred)
    except errors.BangerError as error:
        if _NO_ARCHIVE in error.message:
            error.hint = "a compressed one is unpacked on its way: `zcat FILE | banger vm cp - …`"
        elif error.message.endswith(_IS_DIRECTORY):
            error.hint = f"{_NO_DIRECTORY_THERE} in {there.vm}"
        elif error.message.startswith(_NOT_UNPACKED):
            error.hint = f"that is in {there.vm}: `banger vm exec {there.vm} -- df` shows its disks"
        raise
    finally:
        report.close()
    _say_left_out(left_out)
    files = sizes.counted(done.entries, "file")
    where = posixpath.join(directory, name)
    _say(settings, f"{files}, {sizes.text_of_bytes(done.content_bytes)}: {where} in {there.vm} now")
    return done


def _place_in_guest(api: client.Client, there: Place, source: Path, own_name: str) -> tuple[str, str]:
    """The directory in the guest, and the name that the source has in it."""
    path = posixpath.normpath(there.path)
    is_tree = source.is_dir() and not source.is_symlink()
    is_directory = there.names_directory or _is_directory(api, there.vm, path)
    if is_directory:
        path = posixpath.join(path, own_name)
        is_directory = _is_directory(api, there.vm, path) if is_tree else None
    if is_tree and is_directory is False:
        raise errors.BadRequestError(
            f"{path} in {there.vm} is not a directory, and {source} is one", hint=_NO_DIRECTORY_THERE
        )
    return posixpath.split(path)


def _is_directory(api: client.Client, vm: str, path: str) -> bool | None:
    """By the first member of its archive, which needs no program in the guest. None where nothing is."""
    from banger import archive as archives

    if path == "/":
        return True
    try:
        with _fetched(api, vm, path, follow_link=True) as pieces:
            return archives.begins_with_directory(pieces)
    except _NothingThereError:
        return None


def _out_of(
    settings: command.Settings, here: Place, there: Place, *, follow_link: bool
) -> transfers.Transferred:
    api = settings.client()
    if not posixpath.normpath(here.path).strip("/"):
        raise errors.BadRequestError(
            f"all of {here.vm} cannot be copied: it has what its kernel makes up, such as /proc",
            hint=f"its root disk is: `banger vm exec {here.vm} -- {_ROOT_DISK} > {here.vm}.tar`",
        )
    if there.is_pipe:
        if sys.stdout.isatty():
            raise errors.BadRequestError("a tar stream is not for terminals", hint="pipe it: `… - | tar -x`")
        report = _report(settings, here.vm)
        try:
            with _fetched(api, here.vm, here.path, follow_link=follow_link) as archive:
                for piece in _counted(archive, report, silent_bytes=_LISTED_BYTES):
                    output.raw(piece)
        finally:
            report.close()
        _refuse_shrunk(here.vm, archive.done)
        return transfers.Transferred()
    return _unpack(settings, api, here, there, follow_link=follow_link)


def _unpack(
    settings: command.Settings, api: client.Client, here: Place, there: Place, *, follow_link: bool
) -> transfers.Transferred:
    from banger import archive as archives

    target = Path(there.path)
    if here.names_content:
        directory, name = target, ""
    elif there.names_directory or target.is_dir():
        directory, name = target, here.own_name
    else:
        directory, name = target.parent, target.name
    is_new = not name and directory.parent.is_dir() and not os.path.lexists(directory)
    if not is_new and not directory.is_dir():
        raise errors.BadRequestError(f"there is no directory {directory}", hint="make it first")
    report = _report(settings, here.vm)
    try:
        with _fetched(api, here.vm, here.path, follow_link=follow_link) as archive:
            pieces = iter(archive)
            first = next(pieces, b"")  # or what refuses it, and then nothing is made
            if is_new:
                directory.mkdir()
            pieces = itertools.chain((first,), pieces)
            done = archives.unpack(
                pieces, directory, rename=name, report=lambda count: report(_COPYING, count)
            )
    finally:
        report.close()
    _say_left_out(done)
    if done.entries == done.skipped_count:
        raise errors.OperationFailedError(f"nothing of {here.path} was copied")
    _say_if_made_up(here, directory / (name or "."))
    _say(settings, f"{sizes.counted(done.entries, 'file')}: in {directory / name} now")
    _refuse_shrunk(here.vm, archive.done)
    return transfers.Transferred(entries=done.entries)


def _say_if_made_up(here: Place, copied: Path) -> None:
    """A kernel says of what it makes up that it is empty, and so it is packed."""
    if here.path.startswith(("/proc/", "/sys/")) and copied.is_file() and not copied.stat().st_size:
        render.note(f"{copied} is empty: `banger vm exec {here.vm} -- cat {here.path}` prints what is there")


def _fetched(
    api: client.Client, vm: str, path: str, *, follow_link: bool
) -> contextlib.AbstractContextManager[_Archive]:
    request = transfers.GetRequest(path=posixpath.normpath(path), follow_link=follow_link)
    return _stream(api, vm, request)


@contextlib.contextmanager
def _stream(api: client.Client, vm: str, request: transfers.GetRequest) -> Iterator[_Archive]:
    try:
        with exchange.opened(api, f"/v1/vms/{client.segment(vm)}/get") as talk:
            talk.tell(request)
            yield _Archive(talk)
    except errors.NotFoundError as error:
        if not error.message.startswith(_OF_AGENT):
            raise
        hint = "patterns are not expanded in the guest" if set("*?[") & set(request.path) else ""
        raise _NothingThereError(
            f"{request.path} does not exist in {vm}", hint=hint, **error.fields
        ) from error


class _Archive:
    """Pieces, to the daemon's word that the archive is complete, which is `done` then."""

    def __init__(self, talk: exchange.Exchange) -> None:
        self._talk = talk
        self.done = transfers.Transferred()

    def __iter__(self) -> Iterator[bytes]:
        yield from self._talk.pieces()
        self.done = self._talk.hear(transfers.Transferred)


def _refuse_shrunk(vm: str, done: transfers.Transferred) -> None:
    """As tar does once all is there: what was cut meanwhile is neither as it was nor as it is."""
    if not done.shrunk:
        return
    said = [f"{name} became shorter while it was read, and ends in zeros" for name in done.shrunk]
    if done.shrunk_count > len(said):
        said.append(f"and so did {done.shrunk_count - len(said)} more")
    error = errors.OperationFailedError(
        said[0], hint=f"stop what writes there in {vm}, and copy it again; the rest of it is as it was"
    )
    for each in said[1:]:
        error.add_note(each)
    raise error


def _say_left_out(left_out: archives.LeftOut) -> None:
    for skipped in left_out.skipped:
        render.note(f"left out: {skipped}")
    if left_out.skipped_count > len(left_out.skipped):
        render.note(f"left out: {left_out.skipped_count - len(left_out.skipped)} more")


def _piped(talk: exchange.Exchange) -> Iterable[bytes]:
    while piece := talk.read(0):
        yield piece


def _piped_bytes() -> int:
    """How much will come of stdin; 0 where nobody knows."""
    found = os.fstat(0)
    return found.st_size - os.lseek(0, 0, os.SEEK_CUR) if stat.S_ISREG(found.st_mode) else 0


def _counted(
    pieces: Iterable[bytes], report: workspaces.Report, *, total: int = 0, silent_bytes: int = 0
) -> Iterator[bytes]:
    count = 0
    for piece in pieces:
        count += len(piece)
        if count > silent_bytes:
            report(_COPYING, count, total)
        yield piece


def _report(settings: command.Settings, vm: str) -> workspaces.Report:
    return workspaces.Report("vm.cp", vm, progress.display(json=settings.json))


def _say(settings: command.Settings, text: str) -> None:
    if not settings.json and sys.stderr.isatty():
        render.note(text)
