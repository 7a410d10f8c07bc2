# SPDX-License-Identifier: MIT
"""`banger image`."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from typing import Final

import click

from banger.cli import client, command, making, many, output, params, render
from banger.contract import errors, requests, resources, sizes

group = command.Group(
    "image",
    help="Get, build and keep the images that VMs are made from.",
    no_args_is_help=True,
    examples=[
        ("banger image pull alpine:3.20", "of a registry"),
        ("banger image build debian-bookworm", "the default image"),
        ("banger image list --available", "what there is, and what the catalog knows"),
    ],
)


def _make(settings: command.Settings, path: str, asked: resources.Body) -> None:
    ended = making.ended(settings, path, asked)
    making.show(settings, ended, ended.image)


_SIZE_OPTION: Final = click.option(
    "--size",
    "disk_size_mib",
    type=params.SIZE,
    help="Size of the root disk [default: its content and room to grow].",
)


@command.make(
    "pull",
    group=group,
    examples=[
        ("banger image pull debian:bookworm", "of Docker Hub, as docker would call it"),
        ("banger image pull ghcr.io/team/app:1.0", "of another registry, with your own login to it"),
        ("banger image pull debian-trixie", "what the catalog knows by that name"),
    ],
)
@click.argument("reference", type=params.CATALOG_IMAGE)
@click.option("--name", type=params.NEW_IMAGE, help="Name of the image [default: the reference].")
@_SIZE_OPTION
@click.pass_obj
def pull(settings: command.Settings, reference: str, name: str | None, disk_size_mib: int | None) -> None:
    """Get an image of a registry, or what the catalog knows by a name.

    Layers that are here already are not fetched again, and a pull that broke goes on where it was. Logins
    are those of docker and podman, read by the daemon as its owner.
    """
    asked = requests.PullImage(reference=reference, name=name, disk_size_mib=disk_size_mib)
    _make(settings, "/v1/images/pull", asked)


@command.make(
    "import",
    group=group,
    examples=[
        ("banger image import ./app.tar --name app", "what `docker save` wrote, or an OCI layout in a tar"),
        ("banger image import ./layout --image v1 --name app", "one of the images of an OCI layout"),
        ("banger image import rootfs.tar.zst --name mine", "a root file system"),
    ],
)
@click.argument("path", type=click.Path(exists=True))
@click.option("--name", required=True, type=params.NEW_IMAGE, help="Name of the image.")
@click.option("--image", metavar="NAME", default="", help="Which one, where there are several.")
@_SIZE_OPTION
@click.pass_obj
def import_image(
    settings: command.Settings, path: str, name: str, image: str, disk_size_mib: int | None
) -> None:
    """Make an image of what lies on this host.

    Takes an OCI layout as a directory or tar, what `docker save` writes, or the tar of a root file system;
    tars may be compressed with gzip or zstd. The daemon's owner must be able to read it.
    """
    asked = requests.ImportImage(
        path=os.path.abspath(path), name=name, image=image, disk_size_mib=disk_size_mib
    )
    _make(settings, "/v1/images/import", asked)


@command.make(
    "build",
    group=group,
    examples=[
        ("banger image build debian-bookworm", "from a recipe that comes with banger"),
        ("banger image build ./mine.toml", "from one of your own"),
    ],
)
@click.argument("recipe")
@click.option("--name", type=params.NEW_IMAGE, help="Name of the image [default: the recipe's].")
@click.pass_obj
def build(settings: command.Settings, recipe: str, name: str | None) -> None:
    """Build an image from a recipe.

    RECIPE is the name of one that comes with banger, or the path of a TOML file, with a slash in it or
    ending in .toml. The packages come from the distribution's signed archive.
    """
    if recipe in {".", ".."} or os.path.basename(recipe).startswith("Dockerfile"):
        raise errors.BadRequestError(
            f"{recipe} is no recipe: Dockerfiles are built by docker, podman or buildah",
            hint="`docker build -t app .`, `docker save app -o app.tar`, `banger image import --name app`",
        )
    if "/" in recipe or recipe.endswith(".toml"):
        asked = requests.BuildImage(definition=_text(recipe), name=name)
    else:
        asked = requests.BuildImage(recipe=recipe, name=name)
    _make(settings, "/v1/images/build", asked)


def _text(path: str) -> str:
    """A recipe file, read here: the daemon may not be able to."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(requests.RECIPE_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        hint = "`banger image list --available` names the recipes that come with banger"
        raise errors.BadRequestError(f"the recipe {path} cannot be read: {why}", hint=hint) from error
    if len(text) > requests.RECIPE_CHARACTERS:
        raise errors.BadRequestError(f"{path} is too large to be a recipe")
    return text


@command.make(
    "register",
    group=group,
    examples=[
        ("banger image register ./my-image --name mine", "rootfs.ext4 and image.json are in ./my-image")
    ],
)
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.option("--name", type=params.NEW_IMAGE, help="Name of the image [default: the one in image.json].")
@click.pass_obj
def register(settings: command.Settings, directory: str, name: str | None) -> None:
    """Copy a built image in.

    The directory holds rootfs.ext4 and image.json, and the daemon's owner must be able to read it.
    """
    _make(
        settings, "/v1/images/register", requests.RegisterImage(path=os.path.abspath(directory), name=name)
    )


@command.make(
    "promote",
    group=group,
    examples=[("banger image promote alpine:3.20 --name base", "whatever alpine:3.20 is next week")],
)
@click.argument("image", type=params.IMAGE)
@click.option("--name", required=True, type=params.NEW_IMAGE, help="Name of the copy.")
@click.pass_obj
def promote(settings: command.Settings, image: str, name: str) -> None:
    """Give an image a name of its own.

    The copy stays what it is when the old name is pulled or built again, and when the old image is deleted.
    """
    ref = client.segment(_ref(settings.client(), image))
    _make(settings, f"/v1/images/{ref}/promote", requests.PromoteImage(name=name))


@command.make(
    "list",
    group=group,
    examples=[
        ("banger image list", "a table"),
        ("banger image list alpine:3.20", "only this one"),
        ("banger image list --available", "and what the catalog knows"),
        ("banger image list -q", "names"),
    ],
)
@click.argument("names", metavar="[NAME]…", nargs=-1, type=params.IMAGE)
@command.habit("-a", "--all")
@click.option("--available", is_flag=True, help="Also those that the catalog could get.")
@click.option("-q", "--quiet", is_flag=True, help="Print names only.")
@click.pass_obj
def list_images(settings: command.Settings, names: tuple[str, ...], available: bool, quiet: bool) -> None:
    """List images, or only those that are named."""
    api = settings.client()
    found = api.get(client.query("/v1/images", available=str(available).lower()), list[resources.Image])
    images = client.named(found, names, lambda name: _look_up(api, name))
    if settings.json:
        output.json(images)
    elif quiet:
        output.text("".join(f"{render.safe(image.name)}\n" for image in images))
    else:
        headers = ("NAME", "ID", "DIGEST", "ARCH", "SIZE", "ON DISK", "CREATED", "USED BY")
        output.text(
            render.table(headers, map(_row, images), dispensable=("ARCH", "CREATED", "DIGEST", "SIZE"))
        )


def _row(image: resources.Image) -> tuple[str, ...]:
    if image.available:
        return image.name, "-", "-", image.arch, "-", "-", "not here", "-"
    return (
        image.name,
        image.id,
        image.digest.partition(":")[2][:12] or "-",
        image.arch,
        sizes.text_of_bytes(image.size_bytes),
        sizes.text_of_bytes(image.stored_bytes),
        f"{render.age(image.created_at)} ago" if image.created_at is not None else "-",
        ", ".join(image.used_by) or "-",
    )


def _ref(api: client.Client, name: str) -> str:
    """A reference has slashes, which a path of the API has not: such an image goes by its id."""
    if "/" not in name:
        return name
    found = api.get(client.query("/v1/images", ref=name), list[resources.Image])
    if not found:
        hint = f"pull it: `banger image pull {name}`; what there is: `banger image list`"
        raise errors.NotFoundError(f"there is no image {name!r}", hint=hint)
    return found[0].id


def _look_up(api: client.Client, name: str) -> resources.Image:
    return api.get(f"/v1/images/{client.segment(_ref(api, name))}", resources.Image)


@command.make("show", group=group, examples=[("banger image show debian-bookworm", "everything about it")])
@click.argument("name", type=params.IMAGE)
@click.pass_obj
def show(settings: command.Settings, name: str) -> None:
    """Show everything about an image."""
    image = _look_up(settings.client(), name)
    if settings.json:
        output.json(image)
    else:
        output.text(render.facts(_facts(image)))


def _facts(image: resources.Image) -> Iterator[tuple[str, str]]:
    yield "name", image.name
    yield "id", image.id
    if image.tags:
        yield "tags", ", ".join(image.tags)
    yield "architecture", image.arch
    yield (
        "size",
        f"{sizes.text_of_bytes(image.size_bytes)}, {sizes.text_of_bytes(image.stored_bytes)} on disk",
    )
    yield "source", image.source
    if image.digest:
        yield "digest", image.digest
    if image.layers_bytes:
        yield "layers", sizes.text_of_bytes(image.layers_bytes)
    if image.created_at is not None:
        yield "created", f"{image.created_at:%Y-%m-%d %H:%M:%S} UTC, {render.age(image.created_at)} ago"
    yield from _run_facts(image.run)
    yield "init", "its own" if image.has_init else "banger's"
    yield "kernel", image.default_kernel or "the configured default"
    yield "used by", ", ".join(image.used_by) or "no VM"
    if image.is_default:
        yield "default", "yes: of VMs for which no image is named"


def _run_facts(run: resources.ImageRun) -> Iterator[tuple[str, str]]:
    if run.entrypoint or run.command:
        yield "runs", shlex.join(run.entrypoint + run.command)
    if run.user:
        yield "user", run.user
    if run.working_dir:
        yield "directory", run.working_dir
    if run.exposed_ports:
        yield "ports", ", ".join(run.exposed_ports)


@command.make("delete", group=group, examples=[("banger image delete old older", "several at once")])
@command.habit("-f", "--force")
@click.argument("names", metavar="NAME…", nargs=-1, required=True, type=params.IMAGE)
@click.pass_obj
def delete(settings: command.Settings, names: tuple[str, ...]) -> None:
    """Delete images that no VM uses."""
    api = settings.client()
    before = _default_image(api)
    try:
        many.delete(settings, "/v1/images", names, resolve=_ref)
    finally:
        if before is not None and not settings.json:
            _say_if_gone(api, before.name)


def _default_image(api: client.Client) -> resources.Image | None:
    return next((image for image in api.get("/v1/images", list[resources.Image]) if image.is_default), None)


def _say_if_gone(api: client.Client, name: str) -> None:
    with contextlib.suppress(errors.BangerError):  # it goes over nothing that went wrong before
        if _default_image(api) is None:
            render.note(
                f"VMs for which no image is named are made from {name}: the next one gets it again, "
                "or fails where it cannot be had"
            )


cache = command.Group(
    "cache",
    help="Layers and packages that were fetched, kept for the next pull or build.",
    no_args_is_help=True,
    examples=[("banger image cache prune --dry-run", "what it would free")],
)
group.add_command(cache)


@command.make(
    "prune",
    group=cache,
    examples=[
        ("banger image cache prune --dry-run", "what it would free"),
        ("banger image cache prune", "free it"),
    ],
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.pass_obj
def prune(settings: command.Settings, dry_run: bool) -> None:
    """Remove layers that no pull is using, and the packages of recipes.

    Images and VMs do not need them. The next pull of something like them takes longer; the next build of a
    recipe takes today's packages.
    """
    asked = requests.PruneCache(dry_run=dry_run)
    found = settings.client().ask("/v1/images/cache/prune", asked, requests.PrunedCache)
    if settings.json:
        output.json(found)
    else:
        verb = "would free" if dry_run else "freed"
        blobs, recipes = (
            sizes.counted(len(found.blobs), "blob"),
            sizes.counted(len(found.packages), "recipe"),
        )
        output.text(f"{blobs}, packages of {recipes}, {verb} {sizes.text_of_bytes(found.size_bytes)}")
