# SPDX-License-Identifier: MIT
"""Trees with their real owners, recipes as data, images published whole; real e2fsprogs, no root needed."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Mapping
from pathlib import Path

import hypothesis
import msgspec
import pytest
from hypothesis import strategies

from banger import artefacts
from banger.contract import errors
from banger.images import ext4, publish, recipe, records
from banger.images import tree as trees


def member(name: str, content: bytes | None = None, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content or b"")
    info.mode = 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content or b""


def directory(name: str, mode: int = 0o755, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, None, type=tarfile.DIRTYPE, mode=mode, **fields)


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.SYMTYPE, linkname=target)


def hard_link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.LNKTYPE, linkname=target)


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    out.seek(0)
    return out


SYSTEM = (
    directory("."),
    directory("./usr"),
    directory("./usr/bin"),
    directory("./usr/lib/systemd"),
    directory("./root", 0o700),
    member("./root/.profile", b"umask 022\n"),
    member("./usr/bin/su", b"\x7fELF su", mode=0o4755),
    member("./usr/lib/systemd/systemd", b"\x7fELF init", mode=0o755),
    symlink("./sbin", "usr/bin"),
    symlink("./usr/bin/init", "/usr/lib/systemd/systemd"),
    member(
        "./usr/bin/ping",
        b"ping",
        mode=0o755,
        pax_headers={"SCHILY.xattr.security.capability": "\x01\0\0\x02"},
    ),
    member("./usr/mail", b"", mode=0o2660, uid=8, gid=70000),
    hard_link("./usr/bin/mail", "./usr/mail"),
    member("./usr/zero", type=tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=5),
    member("./usr/pipe", type=tarfile.FIFOTYPE, mode=0o600),
)


@pytest.fixture
def tree(tmp_path: Path) -> trees.Tree:
    """A small system, unpacked."""
    made = trees.Tree(tmp_path / "tree")
    made.unpack(archive(*SYSTEM))
    return made


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(b"\x7fELF guest")
    return path


@pytest.fixture
def images(tmp_path: Path) -> records.Images:
    return records.Images(tmp_path / "images")


def published(images: records.Images, tree: trees.Tree, guest: Path, name: str = "small") -> records.Image:
    return publish.publish(
        images,
        tree,
        name=name,
        arch="x86_64",
        source="test",
        guest_binary=guest,
        kernel="generic-6.12",
        headroom_mib=16,
    )


# --- trees ---


def test_everything_an_ordinary_user_cannot_make_arrives(tree: trees.Tree, tmp_path: Path) -> None:
    image = tmp_path / "root.ext4"
    tree.make_ext4(image, size_bytes=16 << 20)
    wanted: Mapping[str, tuple[int, int, int]] = {
        "/": (stat.S_IFDIR | 0o755, 0, 0),
        "/root": (stat.S_IFDIR | 0o700, 0, 0),
        "/usr/bin/su": (stat.S_IFREG | 0o4755, 0, 0),
        "/usr/mail": (stat.S_IFREG | 0o2660, 8, 70000),
        "/usr/bin/mail": (stat.S_IFREG | 0o2660, 8, 70000),
        "/usr/bin/init": (stat.S_IFLNK | 0o777, 0, 0),
        "/usr/zero": (stat.S_IFCHR | 0o666, 0, 0),
        "/usr/pipe": (stat.S_IFIFO | 0o600, 0, 0),
    }
    for path, expected in wanted.items():
        found = ext4.find(image, path)
        assert found is not None, path
        assert (found.mode, found.uid, found.gid) == expected, path
    first, second = ext4.find(image, "/usr/mail"), ext4.find(image, "/usr/bin/mail")
    assert first is not None
    assert second is not None
    assert first.inode == second.inode


def test_the_staged_tree_is_harmless(tree: trees.Tree) -> None:
    for path in tree.root.rglob("*"):
        mode = path.lstat().st_mode
        assert not mode & (stat.S_ISUID | stat.S_ISGID), path
        assert stat.S_IFMT(mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK), path
        assert path.lstat().st_uid == os.geteuid()


@pytest.mark.parametrize(
    "hostile",
    [
        (member("../escape", b"x"),),
        (member("a/../../escape", b"x"),),
        (symlink("link", "/tmp"), member("link/escape", b"x")),
        (symlink("link", ".."), member("link/escape", b"x")),
        (symlink("link", "/tmp"), directory("link/sub")),
        (hard_link("escape", "/etc/passwd"),),
        (hard_link("escape", "../../etc/passwd"),),
        (symlink("link", "/tmp"), hard_link("escape", "link/x")),
        (member("file", b"x"), member("file/below", b"x")),
        (member("strange", type=b"Z"),),
    ],
)
def test_hostile_members_are_refused(
    tmp_path: Path, hostile: tuple[tuple[tarfile.TarInfo, bytes], ...]
) -> None:
    (tmp_path / "deep").mkdir()
    made = trees.Tree(tmp_path / "deep" / "er")
    with pytest.raises(errors.BadRequestError):
        made.unpack(archive(*hostile))
    assert not list(tmp_path.rglob("escape"))


@pytest.mark.parametrize("cut", [600, 1024, 1500, -1024, -10240 + 512])
def test_a_cut_archive_is_no_short_one(tmp_path: Path, cut: int) -> None:
    data = archive(directory("a"), member("a/b", b"x" * 2000), member("c", b"y" * 10)).getvalue()
    whole = data.rstrip(b"\0")
    end = cut if cut > 0 else len(whole)
    made = trees.Tree(tmp_path / "tree")
    with pytest.raises(errors.BadRequestError):
        made.unpack(io.BytesIO(data[:end]))


def test_an_absolute_name_starts_at_the_tree(tmp_path: Path) -> None:
    made = trees.Tree(tmp_path / "tree")
    made.unpack(archive(member("/etc/x", b"1")))
    assert (tmp_path / "tree/etc/x").read_bytes() == b"1"


def test_a_later_member_replaces_an_earlier(tmp_path: Path) -> None:
    made = trees.Tree(tmp_path / "tree")
    made.unpack(
        archive(
            directory("a"), member("a/b", b"x"), member("a", b"file"), symlink("b", "a"), member("b", b"2")
        )
    )
    assert (tmp_path / "tree/a").read_bytes() == b"file"
    assert (tmp_path / "tree/b").read_bytes() == b"2"
    assert set(made.attributes) == {"/", "/a", "/b"}


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/sbin/init", "/usr/lib/systemd/systemd"),
        ("/usr/../usr/bin/su", "/usr/bin/su"),
        ("/", "/"),
        ("/missing", None),
        ("/loop", None),
        ("/up", "/usr"),
    ],
)
def test_links_are_followed_as_the_guest_would(tree: trees.Tree, path: str, found: str | None) -> None:
    tree.symlink("/loop", "loop")
    tree.symlink("/up", "../../../usr")
    assert tree.resolve(path) == found


@hypothesis.given(strategies.lists(strategies.sampled_from(["a", "b", "..", ".", ""]), max_size=6))
def test_no_name_leaves_the_tree(parts: list[str]) -> None:
    name = "/".join(parts)
    try:
        inside = trees._inside(name)
    except errors.BadRequestError:
        assert ".." in parts
        return
    assert inside.startswith("/")
    assert ".." not in inside


# --- recipes ---


def test_the_default_recipe_reads() -> None:
    found = recipe.load("debian-bookworm")
    assert recipe.available() == ["debian-bookworm"]
    assert {"systemd-sysv", "openssh-server", "git", "ca-certificates"} <= set(found.packages)


def test_an_unknown_recipe_names_the_known() -> None:
    with pytest.raises(errors.NotFoundError) as caught:
        recipe.load("../../etc/passwd")
    assert "debian-bookworm" in caught.value.hint


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(errors.BadRequestError, match="packagez"):
        recipe.parse(b'name="x"\npackagez=[]\n')


def test_tree_steps(tree: trees.Tree) -> None:
    tree.symlink("/usr/lib/systemd/dangling", "/nowhere")
    steps = recipe.TreeSteps(
        remove=("/usr/bin/s*", "/nothing*", "/usr/*/systemd/dangling"),
        file=(recipe.File("/etc/deep/conf", "\nline\n", 0o600),),
        link=(recipe.Link("/etc/alias", "/etc/deep"),),
        mask=("slow.service",),
    )
    steps.apply(tree)
    assert not tree.exists("/usr/bin/su")
    assert not tree.staged("/usr/lib/systemd/dangling").is_symlink()
    assert tree.staged("/etc/deep/conf").read_bytes() == b"line\n"
    assert tree.attributes["/etc/deep/conf"].mode == stat.S_IFREG | 0o600
    assert os.readlink(tree.staged("/etc/systemd/system/slow.service")) == "/dev/null"
    assert tree.resolve("/etc/alias/conf") == "/etc/deep/conf"


def test_only_what_the_packages_depend_on_names_the_cache() -> None:
    found = recipe.load("debian-bookworm")
    other = msgspec.structs.replace(found, tree=recipe.TreeSteps(), headroom_mib=1)
    more = msgspec.structs.replace(found, packages=(*found.packages, "gcc"))
    assert found.base_key("x86_64", "") == other.base_key("x86_64", "")
    assert (
        len({found.base_key("x86_64", ""), more.base_key("x86_64", ""), found.base_key("aarch64", "")}) == 3
    )


# --- images ---


def test_a_published_image(images: records.Images, tree: trees.Tree, guest: Path) -> None:
    made = published(images, tree, guest)
    rootfs = images.rootfs(made.id)
    assert rootfs.stat().st_size == made.size_bytes >= 16 << 20
    assert (made.has_init, made.kernel, made.name) == (True, "generic-6.12", "small")
    injected = ext4.find(rootfs, "/.banger/guest")
    assert injected is not None
    assert (injected.mode, injected.uid) == (stat.S_IFREG | 0o755, 0)
    assert ext4.read(rootfs, "/.banger/guest") == guest.read_bytes()
    home = ext4.find(rootfs, "/root")
    assert home is not None
    assert home.mode == stat.S_IFDIR | 0o700
    assert not ext4.exists(rootfs, "/root/.profile")
    with tarfile.open(images.work_seed(made.id)) as seed:
        assert seed.getnames() == [".", ".profile"]
        assert seed.getmember(".").mode == 0o700


def test_an_image_without_init_says_so(images: records.Images, tmp_path: Path, guest: Path) -> None:
    bare = trees.Tree(tmp_path / "bare")
    bare.unpack(archive(member("hello", b"\x7fELF", mode=0o755), symlink("sbin", "nowhere")))
    assert published(images, bare, guest).has_init is False


def test_an_image_made_elsewhere_is_registered(
    images: records.Images, tree: trees.Tree, guest: Path, tmp_path: Path
) -> None:
    made = published(images, tree, guest)
    elsewhere = records.Images(tmp_path / "elsewhere")
    moved = publish.register(elsewhere, images.path(made.id), name="moved")
    assert (moved.id, moved.name, moved.guest_sha256) == (made.id, "moved", made.guest_sha256)
    assert elsewhere.rootfs(moved.id).read_bytes() == images.rootfs(made.id).read_bytes()
    assert elsewhere.rootfs(moved.id).stat().st_blocks <= images.rootfs(made.id).stat().st_blocks + 16
    with pytest.raises(errors.AlreadyExistsError):
        publish.register(elsewhere, images.path(made.id))


def test_a_damaged_image_is_not_registered(
    images: records.Images, tree: trees.Tree, guest: Path, tmp_path: Path
) -> None:
    made = published(images, tree, guest)
    with images.rootfs(made.id).open("r+b") as file:
        file.seek(1024)
        file.write(bytes(64))
    elsewhere = records.Images(tmp_path / "elsewhere")
    with pytest.raises(errors.OperationFailedError):
        publish.register(elsewhere, images.path(made.id))
    assert elsewhere.records() == []
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_what_is_no_image_is_not_registered(images: records.Images, tmp_path: Path) -> None:
    with pytest.raises(errors.BadRequestError, match="not an image directory"):
        publish.register(images, tmp_path)


def test_a_failed_publication_leaves_nothing(
    images: records.Images, tree: trees.Tree, tmp_path: Path, guest: Path
) -> None:
    tree.symlink("/usr/bin/new\nline", "x")
    with pytest.raises(errors.BadRequestError):
        published(images, tree, guest)
    assert list((tmp_path / "images").iterdir()) == []


@hypothesis.given(
    strategies.lists(
        strategies.tuples(strategies.integers(0, 60), strategies.binary(min_size=1, max_size=50))
    )
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_sparse_copies_are_equal(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, bytes]]
) -> None:
    directory = tmp_path_factory.mktemp("sparse")
    source = directory / "source"
    with source.open("wb") as file:
        file.truncate(1 << 20)
        for position, data in writes:
            file.seek(position * 16384)
            file.write(data)
    publish.copy_sparse(source, directory / "copy")
    assert (directory / "copy").read_bytes() == source.read_bytes()


# --- published directories ---


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    name: str
    created_at: str


@pytest.fixture
def notes(tmp_path: Path) -> artefacts.Artefacts[Note]:
    return artefacts.Artefacts(tmp_path / "notes", "note", "note.json", Note)


def put(notes: artefacts.Artefacts[Note], note_id: str, name: str) -> Note:
    with notes.stage(note_id) as staged:
        return notes.publish(staged, Note(note_id, name, artefacts.now()))


def test_the_newest_of_a_name_is_meant(notes: artefacts.Artefacts[Note]) -> None:
    put(notes, "aaaaaaaaaaaa", "one")
    second = put(notes, "000000000000", "one")
    assert notes.find("one") == second
    assert [note.id for note in notes.records()] == ["aaaaaaaaaaaa", "000000000000"]
    with pytest.raises(errors.NotFoundError):
        notes.find("two")


@pytest.mark.parametrize("reference", ["..", "../x", "/etc", "", "."])
def test_a_reference_is_no_path(notes: artefacts.Artefacts[Note], reference: str) -> None:
    put(notes, "aaaaaaaaaaaa", "one")
    with pytest.raises(errors.NotFoundError):
        notes.find(reference)
    with pytest.raises(errors.BadRequestError):
        notes.delete(reference)


def test_an_unpublished_stage_disappears(notes: artefacts.Artefacts[Note], tmp_path: Path) -> None:
    with notes.stage("aaaaaaaaaaaa") as staged:
        (staged / "half").write_bytes(b"x")
    assert list((tmp_path / "notes").iterdir()) == []


def test_a_crash_is_swept_and_never_listed(notes: artefacts.Artefacts[Note], tmp_path: Path) -> None:
    put(notes, "aaaaaaaaaaaa", "one")
    for name in (".bbbbbbbbbbbb.new", ".cccccccccccc.gone", ".other"):
        (tmp_path / "notes" / name).mkdir()
    assert [note.id for note in notes.records()] == ["aaaaaaaaaaaa"]
    assert notes.sweep() == [".bbbbbbbbbbbb.new", ".cccccccccccc.gone"]
    assert notes.sweep() == []
    assert sorted(path.name for path in (tmp_path / "notes").iterdir()) == [".other", "aaaaaaaaaaaa"]


def test_a_broken_record_hides_nothing_else(notes: artefacts.Artefacts[Note], tmp_path: Path) -> None:
    put(notes, "aaaaaaaaaaaa", "one")
    put(notes, "bbbbbbbbbbbb", "two")
    (tmp_path / "notes/bbbbbbbbbbbb/note.json").write_text('{"id":')
    assert [note.name for note in notes.records()] == ["one"]
    assert list(notes.broken()) == ["bbbbbbbbbbbb"]
    with pytest.raises(errors.OperationFailedError) as caught:
        notes.find("bbbbbbbbbbbb")
    assert "delete the note" in caught.value.hint


def test_deleting_twice_is_fine(notes: artefacts.Artefacts[Note], tmp_path: Path) -> None:
    put(notes, "aaaaaaaaaaaa", "one")
    notes.delete("aaaaaaaaaaaa")
    notes.delete("aaaaaaaaaaaa")
    assert list((tmp_path / "notes").iterdir()) == []
