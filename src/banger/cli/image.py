# SPDX-License-Identifier: MIT
"""`banger image`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import click

from banger.cli import client, command, many, output, params, progress, render, signals
from banger.contract import errors, resources, sizes

group = command.Group(
    "image",
    help="Build and keep the images that VMs are made from.",
    no_args_is_help=True,
    examples=[
        ("banger image build debian-bookworm", "the default image"),
        ("banger image list", "what there is"),
    ],
)


def _make(settings: command.Settings, path: str, asked: resources.Body) -> None:
    api = settings.client()
    shown = progress.display(json=settings.json)
    with signals.raised():
        outcome = progress.follow_one(api, lambda: api.post(path, asked), shown, cancellable=True)
    ended = outcome.require()
    if settings.json:
        output.json(ended.image)
    else:
        output.text(ended.image.name if ended.image is not None else ended.target)


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
    if "/" in recipe or recipe.endswith(".toml"):
        asked = resources.BuildImage(definition=_text(recipe), name=name)
    else:
        asked = resources.BuildImage(recipe=recipe, name=name)
    _make(settings, "/v1/images/build", asked)


def _text(path: str) -> str:
    """A recipe file, read here: the daemon may not be able to."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(resources.RECIPE_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise errors.BadRequestError(f"the recipe {path} cannot be read: {error}") from error
    if len(text) > resources.RECIPE_CHARACTERS:
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
        settings, "/v1/images/register", resources.RegisterImage(path=os.path.abspath(directory), name=name)
    )


@command.make(
    "list", group=group, examples=[("banger image list", "a table"), ("banger image list -q", "names")]
)
@click.option("-q", "--quiet", is_flag=True, help="Print names only.")
@click.pass_obj
def list_images(settings: command.Settings, quiet: bool) -> None:
    """List images."""
    images = settings.client().get("/v1/images", list[resources.Image])
    if settings.json:
        output.json(images)
    elif quiet:
        output.text("".join(f"{render.safe(image.name)}\n" for image in images))
    else:
        headers = ("NAME", "ID", "ARCH", "SIZE", "CREATED", "USED BY")
        output.text(render.table(headers, map(_row, images)))


def _row(image: resources.Image) -> tuple[str, ...]:
    size = sizes.text_of_bytes(image.size_bytes)
    created = f"{render.age(image.created_at)} ago"
    return image.name, image.id, image.arch, size, created, ", ".join(image.used_by) or "-"


@command.make("show", group=group, examples=[("banger image show debian-bookworm", "everything about it")])
@click.argument("name", type=params.IMAGE)
@click.pass_obj
def show(settings: command.Settings, name: str) -> None:
    """Show everything about an image."""
    image = settings.client().get(f"/v1/images/{client.segment(name)}", resources.Image)
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
    yield "size", sizes.text_of_bytes(image.size_bytes)
    yield "source", image.source
    yield "created", f"{image.created_at:%Y-%m-%d %H:%M:%S} UTC, {render.age(image.created_at)} ago"
    yield "init", "its own" if image.has_init else "banger's"
    yield "kernel", image.default_kernel or "the configured default"
    yield "used by", ", ".join(image.used_by) or "no VM"


@command.make("delete", group=group, examples=[("banger image delete old older", "several at once")])
@click.argument("names", metavar="NAME…", nargs=-1, required=True, type=params.IMAGE)
@click.pass_obj
def delete(settings: command.Settings, names: tuple[str, ...]) -> None:
    """Delete images that no VM uses."""
    many.delete(settings, "/v1/images", names)
