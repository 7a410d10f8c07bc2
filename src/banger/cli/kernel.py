# SPDX-License-Identifier: MIT
"""`banger kernel`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import click

from banger.cli import client, command, making, many, output, params, render
from banger.contract import errors, requests, resources, sizes

group = command.Group(
    "kernel",
    help="Get and keep the kernels that VMs boot.",
    no_args_is_help=True,
    examples=[
        ("banger kernel list --available", "what can be pulled"),
        ("banger kernel pull generic-6.12", "the default kernel"),
    ],
)


def _make(settings: command.Settings, path: str, asked: resources.Body) -> None:
    ended = making.ended(settings, path, asked)
    making.show(settings, ended, ended.kernel)


@command.make(
    "list",
    group=group,
    examples=[
        ("banger kernel list", "those on this host"),
        ("banger kernel list --available", "and those in the catalog"),
    ],
)
@click.argument("names", metavar="[NAME]…", nargs=-1, type=params.KERNEL)
@click.option("--available", is_flag=True, help="Also those that can be pulled.")
@click.option("-q", "--quiet", is_flag=True, help="Print names only.")
@click.pass_obj
def list_kernels(settings: command.Settings, names: tuple[str, ...], available: bool, quiet: bool) -> None:
    """List kernels, or only those that are named."""
    api = settings.client()
    found = api.get(client.query("/v1/kernels", available=str(available).lower()), list[resources.Kernel])
    kernels = client.named(found, names, lambda name: _look_up(api, name))
    if settings.json:
        output.json(kernels)
    elif quiet:
        output.text("".join(f"{render.safe(kernel.name)}\n" for kernel in kernels))
    else:
        headers = ("NAME", "VERSION", "KIND", "ARCH", "SIZE", "HERE", "USED BY")
        output.text(render.table(headers, map(_row, kernels), dispensable=("ARCH", "SIZE", "KIND")))


def _row(kernel: resources.Kernel) -> tuple[str, ...]:
    return (
        kernel.name,
        kernel.version,
        kernel.kind,
        kernel.arch,
        sizes.text_of_bytes(kernel.size_bytes) if kernel.size_bytes else "-",
        "no" if kernel.available else "yes",
        ", ".join(kernel.used_by) or "-",
    )


@command.make("pull", group=group, examples=[("banger kernel pull generic-6.12", "from the catalog")])
@click.argument("name", type=params.CATALOG_KERNEL)
@click.pass_obj
def pull(settings: command.Settings, name: str) -> None:
    """Get a kernel of the catalog, verified by its sha256 or the distribution's signature."""
    _make(settings, "/v1/kernels/pull", requests.PullKernel(name=name))


@command.make(
    "import",
    group=group,
    examples=[
        ("banger kernel import ./vmlinux --name mine", "a kernel file, compressed or not"),
        ("banger kernel import linux-image.deb --name deb", "a distribution's package"),
        ("banger kernel import ./host --name host", "its boot/vmlinuz-VERSION, and lib/modules/VERSION"),
    ],
)
@click.argument("path", type=click.Path(exists=True))
@click.option("--name", required=True, type=params.NEW_KERNEL, help="Name of the kernel.")
@click.pass_obj
def import_kernel(settings: command.Settings, path: str, name: str) -> None:
    """Copy a kernel of yours in.

    Takes a vmlinux, a vmlinuz, an arm64 Image, a distribution's kernel package, or a directory: of a kernel
    with its modules, configuration or initrd, or of packages. A kernel that cannot boot is refused with the
    reason. The daemon's owner must be able to read it.
    """
    _make(settings, "/v1/kernels/import", requests.ImportKernel(path=os.path.abspath(path), name=name))


def _look_up(api: client.Client, name: str) -> resources.Kernel:
    return api.get(f"/v1/kernels/{client.segment(name)}", resources.Kernel)


@command.make("show", group=group, examples=[("banger kernel show generic-6.12", "everything about it")])
@click.argument("name", type=params.KERNEL)
@click.pass_obj
def show(settings: command.Settings, name: str) -> None:
    """Show everything about a kernel."""
    kernel = _look_up(settings.client(), name)
    if settings.json:
        output.json(kernel)
    else:
        output.text(render.facts(_facts(kernel)))


def _facts(kernel: resources.Kernel) -> Iterator[tuple[str, str]]:
    yield "name", kernel.name
    yield "id", kernel.id
    yield "version", kernel.version
    yield "kind", "boots directly" if kernel.kind == "direct" else "boots through an initrd"
    yield "architecture", kernel.arch
    yield "size", sizes.text_of_bytes(kernel.size_bytes)
    if kernel.modules:
        yield "modules", ", ".join(kernel.modules)
    yield "checked by", kernel.checked_by or "nothing: import it again to have it checked"
    if kernel.lacks:
        yield "lacks", ", ".join(kernel.lacks)
    if kernel.unknown:
        yield "unknown", ", ".join(kernel.unknown)
    yield "source", kernel.source
    if kernel.created_at is not None:
        yield "created", f"{kernel.created_at:%Y-%m-%d %H:%M:%S} UTC, {render.age(kernel.created_at)} ago"
    yield "used by", ", ".join(kernel.used_by) or "no VM"


@command.make("delete", group=group, examples=[("banger kernel delete old older", "several at once")])
@command.habit("-f", "--force")
@click.argument("names", metavar="NAME…", nargs=-1, required=True, type=params.KERNEL)
@click.pass_obj
def remove(settings: command.Settings, names: tuple[str, ...]) -> None:
    """Delete kernels that no VM uses."""
    try:
        many.delete(settings, "/v1/kernels", names)
    finally:
        if not settings.json:
            _say_what_wants_them(settings.client(), names)


def _say_what_wants_them(api: client.Client, names: Sequence[str]) -> None:
    """Of images that are here, and boot by default what is not any more."""
    with contextlib.suppress(errors.BangerError):  # it goes over nothing that went wrong before
        here = {kernel.name for kernel in api.get("/v1/kernels", list[resources.Kernel])}
        images = api.get("/v1/images", list[resources.Image])
        for gone in (name for name in dict.fromkeys(names) if name not in here):
            wanting = ", ".join(image.name for image in images if image.default_kernel == gone)
            if wanting:
                render.note(
                    f"VMs of {wanting} boot {gone} where no other kernel is named: the next one gets it "
                    "again, or fails where it cannot be had"
                )
