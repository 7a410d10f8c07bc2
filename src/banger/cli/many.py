# SPDX-License-Identifier: MIT
"""What becomes of several names: each is worked on, each is reported, and one failure fails the command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import msgspec

from banger.cli import client, command, exits, output, progress, render
from banger.contract import errors, resources


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one of several names."""

    name: str
    ok: bool
    vm: resources.Vm | None = None
    error: errors.ErrorBody | None = None


def done(settings: command.Settings, name: str, vm: resources.Vm | None = None) -> Result:
    if not settings.json:
        output.text(name)
    return Result(name=name, ok=True, vm=vm)


def failed(settings: command.Settings, name: str, error: errors.BangerError) -> Result:
    if not settings.json:
        sys.stdout.flush()
        print(render.describe(error, sys.stderr), file=sys.stderr)
    return Result(name=name, ok=False, error=render.error_body(error))


def finish(settings: command.Settings, results: Sequence[Result]) -> None:
    if settings.json:
        output.json(results)
    if not all(result.ok for result in results):
        raise exits.SomeFailedError


def _wait(api: client.Client, operation: resources.Operation) -> None:
    progress.follow_one(api, lambda: operation, progress.Silent(), cancellable=False).require()


def delete(
    settings: command.Settings,
    collection: str,
    names: Sequence[str],
    *,
    resolve: Callable[[client.Client, str], str] | None = None,
) -> None:
    """Deletes members of a collection one after the other: each takes a moment."""
    api = settings.client()
    results = []
    for name in dict.fromkeys(names):
        try:
            ref = resolve(api, name) if resolve is not None else name
            operation = api.delete(f"{collection}/{client.segment(ref)}")
            if operation is not None:
                _wait(api, operation)
        except errors.UnavailableError:
            raise
        except errors.BangerError as error:
            results.append(failed(settings, name, error))
        else:
            results.append(done(settings, name))
    finish(settings, results)
