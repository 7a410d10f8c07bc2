# SPDX-License-Identifier: MIT
"""What is made on this host by one operation: followed with its progress, cancelled by a signal."""

from __future__ import annotations

from banger.cli import command, output, progress, signals
from banger.contract import resources


def ended(settings: command.Settings, path: str, asked: resources.Body | None = None) -> resources.Operation:
    """The operation that this begins, once it has succeeded. Raises its error."""
    api = settings.client()
    with signals.raised():
        shown = progress.display(json=settings.json)
        outcome = progress.follow_one(api, lambda: api.post(path, asked), shown, cancellable=True)
    return outcome.require()


def show(
    settings: command.Settings,
    operation: resources.Operation,
    made: resources.Image | resources.Kernel | None,
) -> None:
    if settings.json:
        output.json(made)
    else:
        output.text(made.name if made is not None else operation.target)
