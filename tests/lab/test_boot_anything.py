# SPDX-License-Identifier: MIT
"""Images of every kind: each boots, answers the agent and runs what it was made for, without network.

The default image, with systemd, boots in every other test here.
"""

from __future__ import annotations

import platform
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from banger import guest_binary
from banger.images import publish
from banger.images import recipe as recipes
from banger.images import records as image_records
from lab import cache, provision
from lab.session import Lab
from tests import oci_make
from tests.lab import user

HOME: Final = f"/home/{user.NAME}"
OPENRC: Final = b"""
name = "openrc"
summary = "OpenRC as process 1, over BusyBox, with one service"
suite = "bookworm"
variant = "extract"
kernel = "generic-6.12"
headroom_mib = 16
packages = ["busybox-static", "openrc"]

[tree]
remove = ["/usr/share/doc", "/usr/share/man", "/usr/share/perl5", "/usr/share/locale", "/var/cache/apt"]

[[tree.file]]
path = "/etc/passwd"
content = "root:x:0:0::/root:/bin/sh\\n"

[[tree.file]]
path = "/etc/init.d/greeter"
mode = 0o755
content = '''
#!/sbin/openrc-run
start() {
    ebegin "Greeting"
    echo "$RC_SVCNAME in $RC_RUNLEVEL" > /run/greeting
    eend 0
}
'''

[[tree.link]]
path = "/etc/runlevels/default/greeter"
target = "/etc/init.d/greeter"

[[tree.link]]
path = "/sbin/init"
target = "openrc-init"

[[tree.links]]
directory = "/bin"
target = "busybox"
names = ["cat", "chmod", "chown", "cp", "dmesg", "grep", "hostname", "kill", "ln", "ls", "mkdir", "mount",
         "mv", "rm", "sed", "sh", "sleep", "stat", "sync", "touch", "uname", "umount"]
"""


def _base(recipe: recipes.Recipe) -> Path:
    downloads = cache.default_root() / "downloads"
    return recipes.base_archive(recipe, arch=platform.machine(), cache_dir=downloads)


@pytest.fixture(scope="module")
def busybox() -> bytes:
    """A static program that is a shell, `id` or `echo`, by the name it is called."""
    with tarfile.open(_base(recipes.load("busybox"))) as archive:
        for name in ("./bin/busybox", "./usr/bin/busybox"):
            try:
                member = archive.extractfile(name)
            except KeyError:
                continue
            if member is not None:
                return member.read()
    raise AssertionError("busybox-static has no busybox")


@pytest.fixture(scope="module")
def layout(busybox: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with an image of one static program, and one of a shell without init."""
    root = tmp_path_factory.mktemp("oci") / "layout"
    alone = {"Entrypoint": ["/busybox", "echo"], "Cmd": ["all", "alone"]}
    oci_make.layout(root, "static", [oci_make.tar({"busybox": busybox})], alone)
    programs = oci_make.tar({"bin/sh": busybox, "bin/id": busybox, "srv/file": b"content\n"})
    passwd = oci_make.tar({"etc/passwd": b"root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/srv:/bin/sh\n"})
    shell: dict[str, Any] = {
        "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": ['echo "$COLOUR $PWD $(id -u):$(id -g) $$"; read line < file; echo $line; exit 7'],
        "Env": ["COLOUR=green", "PATH=/bin"],
        "User": "web",
        "WorkingDir": "/srv",
    }
    oci_make.layout(root, "shell", [programs, passwd], shell)
    return root


def _build(images: image_records.Images, recipe: recipes.Recipe) -> image_records.Image:
    """Here and not in the lab, where it would take ten times as long."""
    arch = platform.machine()
    return publish.build(
        images,
        recipe,
        arch=arch,
        cache_dir=cache.default_root() / "downloads",
        guest_binary=guest_binary.path(arch),
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Image directories by name: that of a recipe of one's own, with OpenRC."""
    images = image_records.Images(tmp_path_factory.mktemp("images"))
    made = [_build(images, recipes.parse(OPENRC))]
    return {image.name: images.path(image.id) for image in made}


@pytest.fixture(scope="module")
def machine(installed_host: Lab, layout: Path, built: dict[str, Path]) -> Iterator[Lab]:
    """The installed host with images imported from the layout, and with those built here."""
    imported = ("static", "shell")
    installed_host.put(layout, f"{HOME}/layout", owner="1000:1000")
    for name in imported:
        user.banger(installed_host, "image", "import", f"{HOME}/layout", "--image", name, "--name", name)
    for name, directory in built.items():
        installed_host.put(directory, f"{HOME}/{name}", owner="1000:1000")
        user.banger(installed_host, "image", "register", f"{HOME}/{name}")
    yield installed_host
    user.banger(installed_host, "image", "delete", *imported, *built)
    installed_host.run(["rm", "-r", *(f"{HOME}/{name}" for name in ("layout", *built))])
    assert user.leftovers(installed_host) == ""


def test_a_single_static_program(machine: Lab) -> None:
    ended = user.banger(machine, "vm", "run", "--rm", "--image", "static", *user.SMALL)
    assert ended.text == "all alone\n"


def test_a_shell_without_init_runs_as_its_author_meant(machine: Lab) -> None:
    ended = user.banger(machine, "vm", "run", "--rm", "--image", "shell", *user.SMALL, check=False)
    first, second = ended.text.splitlines()
    assert (first.split()[:3], second, ended.status) == (["green", "/srv", "1000:1001"], "content", 7)


def _told(machine: Lab, image: str, script: str) -> str:
    words = ("vm", "run", "--rm", "--image", image, *user.SMALL, "--", "sh", "-c", script)
    return user.banger(machine, *words).text


def test_the_smallest_recipe_is_a_machine(machine: Lab) -> None:
    assert _told(machine, "busybox", "id -un; readlink /bin/sh; uname -m") == (
        f"root\nbusybox\n{platform.machine()}\n"
    )


def test_openrc_takes_over(machine: Lab) -> None:
    """It is process 1 after the hand-over, reaches its last runlevel, starts what belongs there, ends."""
    script = "until [ -s /run/greeting ]; do sleep 0.2; done; cat /run/greeting /proc/1/comm; rc-status -r"
    words = ("--name", "own-init", "--image", "openrc", *user.SMALL)
    told = user.banger(machine, "vm", "run", *words, "--", "sh", "-c", script).text
    assert told == "greeter in default\ninit\ndefault\n"
    user.banger(machine, "vm", "exec", "own-init", "--", "openrc-shutdown", "-r", "now", check=False)
    row = user.ended(machine, "own-init")
    assert (row["state"], row["last_error"]) == ("stopped", None)
    user.banger(machine, "vm", "delete", "own-init")


# --- Debian 13 ---


@pytest.fixture
def handed_trixie(new_name: Callable[[str], str], tmp_path: Path, no_lab_left: None) -> Iterator[Lab]:
    """An installed host of the test's own, with an image of Debian 13 at /artefacts."""
    images = image_records.Images(tmp_path)
    made = _build(images, recipes.load("debian-trixie"))
    for part in images.path(made.id).iterdir():
        part.chmod(0o644)  # the lab's owner is another user
    with provision.installed(new_name("trixie"), artefacts=images.path(made.id)) as lab:
        yield lab


@pytest.mark.long
def test_debian_13_reaches_its_target(handed_trixie: Lab) -> None:
    """With no unit that failed and no job that waits."""
    user.banger(handed_trixie, "image", "register", "/artefacts")
    assert _told(handed_trixie, "debian-trixie", user.BOOTED) == "running\ndebian 13\n"
