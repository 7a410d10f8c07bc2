# SPDX-License-Identifier: MIT
"""The rows on a real SQLite file: races, refusals, corruption, migrations."""

from __future__ import annotations

import contextlib
import datetime
import json
import random
import sqlite3
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import msgspec
import pytest

from banger.contract import errors, names, resources
from banger.owner import main, migrations, store
from banger.vm import record

IMAGE, OTHER_IMAGE = names.ImageId("aaaaaaaaaaaa"), names.ImageId("bbbbbbbbbbbb")
KERNEL = names.KernelId("cccccccccccc")
WORKSPACE = resources.Workspace(
    path="/root/repo",
    source="/home/ada/shop",
    head="1" * 40,
    branch="",
    worktree="2" * 40,
    index="2" * 40,
    prepared_at=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    options=("read_only",),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "banger.db"


@pytest.fixture
def empty_store(path: Path) -> Iterator[store.Store]:
    made = store.Store(path)
    yield made
    made.close()


def draft(slot: int, *, name: str = "", vm_id: str = "", image: names.ImageId = IMAGE) -> record.VmRecord:
    return record.VmRecord(
        id=names.VmId(vm_id or names.new_id()),
        name=names.VmName(name or f"vm-{slot}"),
        slot=slot,
        image_id=image,
        kernel_id=KERNEL,
        vcpus=2,
        memory_mib=512,
        disk_size_mib=1024,
        network=True,
        state=resources.VmState.CREATED,
        created_at=datetime.datetime.now(datetime.UTC),
    )


def test_a_row_comes_back_as_it_was_also_after_reopening(path: Path, empty_store: store.Store) -> None:
    vm = empty_store.reserve(draft)
    changed = msgspec.structs.replace(
        vm,
        state=resources.VmState.ERROR,
        last_error=errors.ErrorBody("timed_out", "no answer", also=("rollback_tap: busy",)),
        sources={"vcpus": resources.SizeSource.HOST},
        last_start=(resources.StepTiming(name="tap", stage="", started_ms=1.0, elapsed_ms=2.0),),
    )
    empty_store.save(changed)
    assert empty_store.get(vm.id) == changed
    empty_store.close()
    again = store.Store(path)
    assert again.list() == [changed]
    again.close()


def test_the_lowest_free_slot_is_leased(empty_store: store.Store) -> None:
    vms = [empty_store.reserve(draft) for _ in range(4)]
    assert [vm.slot for vm in vms] == [1, 2, 3, 4]
    empty_store.delete(vms[1].id)
    assert empty_store.reserve(lambda slot: draft(slot, name="new")).slot == 2


def test_a_hundred_reservations_at_once_get_distinct_slots(path: Path, empty_store: store.Store) -> None:
    other = store.Store(path)  # as another process would have it

    def reserve(number: int) -> int:
        target = empty_store if number % 2 else other
        return target.reserve(lambda slot: draft(slot, name=f"vm-{number}")).slot

    with futures.ThreadPoolExecutor(16) as pool:
        slots = list(pool.map(reserve, range(100)))
    assert sorted(slots) == list(range(1, 101))
    assert len(empty_store.list()) == 100
    other.close()


def test_slots_leased_and_given_back_in_random_order_under_faults(
    path: Path, empty_store: store.Store
) -> None:
    """Many at a time, some drafts failing, some rows gone twice, the store opened anew now and then."""
    choose, held, leased = random.Random(5), empty_store, dict[names.VmId, int]()
    for number in range(900):
        if leased and choose.random() < max(0.3, len(leased) / 250):
            vm_id = choose.choice(sorted(leased))
            held.delete(vm_id)
            held.delete(vm_id)
            del leased[vm_id]
        elif choose.random() < 0.2:
            with pytest.raises(errors.BadRequestError):
                held.reserve(_fail)
        else:
            vm = held.reserve(lambda slot: draft(slot, name=f"vm-{number}"))  # noqa: B023 - called at once
            assert vm.slot == min(set(range(1, 250)) - set(leased.values()))
            leased[vm.id] = vm.slot
        if number % 100 == 0:
            held.close()
            held = store.Store(path)
    assert {vm.id: vm.slot for vm in held.list()} == leased
    assert len(set(leased.values())) == len(leased) > 60
    held.close()


def _fail(slot: int) -> record.VmRecord:
    raise errors.BadRequestError("no")


def test_of_two_with_one_name_one_is_refused_and_leaves_nothing(empty_store: store.Store) -> None:
    gate = threading.Barrier(8)

    def reserve(_: int) -> bool:
        gate.wait(5)
        try:
            empty_store.reserve(lambda slot: draft(slot, name="web"))
        except errors.AlreadyExistsError:
            return False
        return True

    with futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(reserve, range(8))) == 1
    assert [vm.slot for vm in empty_store.list()] == [1]


def test_a_draft_that_fails_leaves_nothing(empty_store: store.Store) -> None:
    with pytest.raises(errors.BadRequestError):
        empty_store.reserve(_fail)
    assert empty_store.list() == []
    assert empty_store.reserve(draft).slot == 1


def test_no_slot_is_left(empty_store: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_SLOTS", 2)  # 4000 reservations say no more than two
    empty_store.reserve(draft)
    empty_store.reserve(draft)
    with pytest.raises(errors.ConflictError):
        empty_store.reserve(draft)


def test_saving_a_deleted_row_does_not_bring_it_back(empty_store: store.Store) -> None:
    vm = empty_store.reserve(draft)
    empty_store.delete(vm.id)
    empty_store.delete(vm.id)
    with pytest.raises(errors.NotFoundError):
        empty_store.save(vm)
    with pytest.raises(errors.NotFoundError):
        empty_store.get(vm.id)


def test_renaming_to_a_taken_name_is_refused(empty_store: store.Store) -> None:
    first, second = empty_store.reserve(draft), empty_store.reserve(draft)
    with pytest.raises(errors.AlreadyExistsError):
        empty_store.save(msgspec.structs.replace(second, name=first.name))
    assert empty_store.get(second.id) == second


def test_a_vm_is_found_by_name_id_and_beginning_of_its_id(empty_store: store.Store) -> None:
    web = empty_store.reserve(lambda slot: draft(slot, name="web", vm_id="abcd11112222"))
    api = empty_store.reserve(lambda slot: draft(slot, name="api", vm_id="abcd33334444"))
    assert empty_store.find("web") == web
    assert empty_store.find("abcd33334444") == api
    assert empty_store.find("abcd1") == web
    with pytest.raises(errors.BadRequestError):
        empty_store.find("abcd")
    for unknown in ("abc", "%", "", "abce", "WEB"):
        with pytest.raises(errors.NotFoundError):
            empty_store.find(unknown)


def test_an_id_comes_before_a_name_that_looks_like_it(empty_store: store.Store) -> None:
    web = empty_store.reserve(lambda slot: draft(slot, name="web", vm_id="abcd11112222"))
    empty_store.reserve(lambda slot: draft(slot, name="abcd11112222"))
    assert empty_store.find("abcd11112222") == web


def test_what_is_not_found_is_answered_with_close_names(empty_store: store.Store) -> None:
    empty_store.reserve(lambda slot: draft(slot, name="frontend"))
    with pytest.raises(errors.NotFoundError) as caught:
        empty_store.find("fronted")
    assert "frontend" in caught.value.hint


def test_images_and_kernels_know_who_uses_them(empty_store: store.Store) -> None:
    empty_store.reserve(lambda slot: draft(slot, name="b"))
    empty_store.reserve(lambda slot: draft(slot, name="a"))
    empty_store.reserve(lambda slot: draft(slot, name="other", image=OTHER_IMAGE))
    assert empty_store.names_using_image(IMAGE) == ("a", "b")
    assert empty_store.names_using_kernel(KERNEL) == ("a", "b", "other")
    assert empty_store.names_using_kernel("dddddddddddd") == ()


@pytest.mark.parametrize("text", ["", "{", '{"id": 3}', '{"unknown": true}', "null", "of another", b"{\xff"])
def test_a_corrupt_row_is_shown_with_what_to_do(
    path: Path, empty_store: store.Store, text: str | bytes
) -> None:
    broken = empty_store.reserve(lambda slot: draft(slot, name="broken"))
    sound = empty_store.reserve(lambda slot: draft(slot, name="sound"))
    outside = sqlite3.connect(path)
    if text == "of another":
        text = msgspec.json.encode(sound)
    change = "UPDATE vms SET record = CAST(? AS TEXT), created_at = 'never' WHERE id = ?"
    outside.execute(change, (text, broken.id))
    outside.commit()
    outside.close()
    seen = {vm.name: vm for vm in empty_store.list()}
    assert seen[sound.name] == sound
    shown = seen[broken.name]
    assert (shown.id, shown.slot, shown.state) == (broken.id, broken.slot, resources.VmState.ERROR)
    assert shown.last_error is not None
    assert "banger vm delete broken" in shown.last_error.hint
    empty_store.delete(broken.id)
    assert empty_store.list() == [sound]


def test_a_file_that_is_no_database_is_refused_with_what_to_do(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(errors.OperationFailedError) as caught:
        store.Store(path)
    assert "put banger.db back" in caught.value.hint
    with pytest.raises(errors.OperationFailedError):
        migrations.check(path)


def test_a_full_disk_is_said_and_the_store_goes_on(path: Path, empty_store: store.Store) -> None:
    kept = empty_store.reserve(draft)
    connection = empty_store._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    large = {str(number): resources.SizeSource.HOST for number in range(5000)}
    with pytest.raises(errors.NoSpaceError):
        empty_store.save(msgspec.structs.replace(kept, sources=large))
    assert empty_store.get(kept.id) == kept
    connection.execute("PRAGMA max_page_count = 1000000")
    assert empty_store.reserve(draft).slot == 2


def test_which_vms_there_are_is_on_the_disk_before_it_is_said(empty_store: store.Store) -> None:
    """SQLite waits for the disk at a commit only while `synchronous` is FULL, which takes its time."""
    said: list[str] = []
    empty_store._connection.set_trace_callback(said.append)

    def waits() -> list[bool]:
        """Of each commit since the last time."""
        full, found = False, []
        for text in said:
            if text.startswith("PRAGMA synchronous"):
                full = text.endswith("FULL")
            if text == "COMMIT":
                found.append(full)
        said.clear()
        return found

    vm = empty_store.reserve(draft)
    assert waits() == [True]
    empty_store.save(vm)
    empty_store.set_throw_away(vm.id, throw_away=True)
    assert waits() == [False, False]
    empty_store.set_throw_away(vm.id, throw_away=False, lasts=True)
    empty_store.delete(vm.id)
    assert waits() == [True, True]


def test_every_connection_has_every_pragma(path: Path) -> None:
    for _ in range(2):
        connection = store.connect(path)
        values = [
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("busy_timeout", "journal_mode", "synchronous", "foreign_keys")
        ]
        connection.close()
        assert values == [5000, "wal", 1, 1]


def _at_version(path: Path, version: int) -> None:
    """A file as the program of that time left it."""
    connection = store.connect(path)
    for number, statement in enumerate(migrations.MIGRATIONS[:version], start=1):
        connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {number}")
    connection.close()


@pytest.mark.parametrize("version", range(len(migrations.MIGRATIONS) + 1))
def test_every_earlier_file_becomes_current(path: Path, version: int) -> None:
    _at_version(path, version)
    latest = len(migrations.MIGRATIONS)
    verdict = migrations.Verdict.CURRENT if version == latest else migrations.Verdict.WILL_MIGRATE
    assert migrations.check(path) is verdict
    store.Store(path).close()
    assert migrations.check(path) is migrations.Verdict.CURRENT


def test_rows_of_the_first_schema_come_through(path: Path) -> None:
    _at_version(path, 1)
    vm = draft(1)
    connection = store.connect(path)
    marks = ",".join("?" * 8)
    connection.execute(f"INSERT INTO vms VALUES ({marks})", store._row(vm))  # noqa: S608
    connection.close()
    migrated = store.Store(path)
    assert (migrated.list(), migrated.throw_aways()) == ([vm], frozenset())
    migrated.close()


@pytest.mark.parametrize("known", [(), (WORKSPACE,)], ids=["none", "one"])
def test_the_workspace_of_a_row_is_the_first_of_its_workspaces(
    path: Path, known: tuple[resources.Workspace, ...]
) -> None:
    _at_version(path, 6)
    vm = draft(1)
    columns = store._row(vm)[:-1]
    said = json.loads(msgspec.json.encode(vm))
    assert said.pop("workspaces") == []
    said["workspace"] = msgspec.to_builtins(known[0]) if known else None
    connection = store.connect(path)
    marks = ",".join("?" * 9)
    connection.execute(f"INSERT INTO vms VALUES ({marks})", (*columns, json.dumps(said), 0))  # noqa: S608
    connection.close()
    migrated = store.Store(path)
    assert migrated.list() == [msgspec.structs.replace(vm, workspaces=known)]
    migrated.close()


def test_a_throw_away_stays_one_until_told_otherwise(path: Path, empty_store: store.Store) -> None:
    kept = empty_store.reserve(draft)
    thrown = empty_store.reserve(draft, throw_away=True)
    empty_store.save(msgspec.structs.replace(thrown, state=resources.VmState.ERROR))
    again = store.Store(path)
    assert again.throw_aways() == {thrown.id}
    empty_store.set_throw_away(thrown.id, throw_away=False)
    empty_store.set_throw_away(kept.id, throw_away=True)
    empty_store.set_throw_away(names.VmId("ffffffffffff"), throw_away=True)
    assert again.throw_aways() == {kept.id}
    again.close()


def test_a_file_that_is_not_there_will_be_migrated_and_is_not_made_by_looking(path: Path) -> None:
    assert migrations.check(path) is migrations.Verdict.WILL_MIGRATE
    assert not path.exists()


def test_a_newer_file_is_refused_untouched(path: Path) -> None:
    store.Store(path).close()
    connection = store.connect(path)
    connection.execute("PRAGMA user_version = 1000")
    connection.close()
    before = path.read_bytes()
    assert migrations.check(path) is migrations.Verdict.TOO_NEW
    with pytest.raises(errors.ConflictError):
        store.Store(path)
    assert path.read_bytes() == before


def test_a_migration_that_fails_leaves_the_version_before(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.Store(path).close()
    latest = len(migrations.MIGRATIONS)
    broken = (*migrations.MIGRATIONS, "CREATE TABLE more (id TEXT) STRICT", "ALTER TABLE nothing ADD x")
    monkeypatch.setattr(migrations, "MIGRATIONS", broken)  # shipped migrations do not fail
    with pytest.raises(errors.OperationFailedError):
        store.Store(path)
    connection = store.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (latest + 1,)
    assert connection.execute("SELECT count(*) FROM more").fetchone() == (0,)
    connection.close()


def test_a_migration_is_tried_on_a_copy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.Store(path).close()
    before = path.read_bytes()
    more = (*migrations.MIGRATIONS, "CREATE TABLE more (id TEXT) STRICT")
    monkeypatch.setattr(migrations, "MIGRATIONS", more)  # a newer program's
    assert migrations.check(path) is migrations.Verdict.WILL_MIGRATE
    monkeypatch.setattr(migrations, "MIGRATIONS", (*more, "ALTER TABLE none_such ADD x"))
    with pytest.raises(errors.OperationFailedError, match="cannot be read or migrated: no such table"):
        migrations.check(path)
    assert path.read_bytes() == before


def test_a_newer_program_s_migration_is_undone(
    path: Path, empty_store: store.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = empty_store.reserve(draft)
    empty_store.close()
    assert not migrations.undo(path)  # nothing to undo
    ours = migrations.MIGRATIONS
    monkeypatch.setattr(migrations, "MIGRATIONS", (*ours, "ALTER TABLE vms RENAME TO machines"))
    store.Store(path).close()
    monkeypatch.setattr(migrations, "MIGRATIONS", ours)
    assert migrations.check(path) is migrations.Verdict.TOO_NEW
    assert migrations.undo(path)
    with contextlib.closing(store.Store(path)) as again:
        assert [vm.id for vm in again.list()] == [kept.id]
    assert migrations.check(path) is migrations.Verdict.CURRENT


@pytest.mark.parametrize("readable", [True, False])
def test_rows_that_were_made_since_are_not_given_up(
    path: Path, empty_store: store.Store, monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    """The older program would delete the disks of a VM that it has no row of."""
    empty_store.close()
    ours = migrations.MIGRATIONS
    monkeypatch.setattr(migrations, "MIGRATIONS", (*ours, "ALTER TABLE vms ADD COLUMN more TEXT"))
    with contextlib.closing(store.Store(path)) as newer:
        made = newer.reserve(draft)
    (path.parent / "vms" / made.id).mkdir(parents=True)
    if not readable:
        with contextlib.closing(store.connect(path)) as connection:
            connection.execute("ALTER TABLE vms RENAME TO machines")
    monkeypatch.setattr(migrations, "MIGRATIONS", ours)
    with pytest.raises(errors.ConflictError, match=f"lost: {made.name if readable else made.id}$"):
        migrations.undo(path)
    assert migrations.check(path) is migrations.Verdict.TOO_NEW


def test_what_was_kept_goes_when_the_newer_program_has_held(
    path: Path, empty_store: store.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_store.close()
    ours = migrations.MIGRATIONS
    monkeypatch.setattr(migrations, "MIGRATIONS", (*ours, "ALTER TABLE vms ADD COLUMN more TEXT"))
    store.Store(path).close()
    kept = path.with_name(f"{path.name}.v{len(ours)}")
    assert kept.exists()
    migrations.settle(path)
    assert (kept.exists(), path.exists()) == (False, True)
    monkeypatch.setattr(migrations, "MIGRATIONS", ours)
    with pytest.raises(errors.NotFoundError, match="is not there"):
        migrations.undo(path)


def test_what_check_migrations_says_also_where_nothing_is_installed(path: Path) -> None:
    asked = ["--check-migrations", f"--state-dir={path.parent}", f"--install={path.parent / 'gone.toml'}"]
    assert main.main(asked) == 1
    store.Store(path).close()
    assert main.main(asked) == 0
    with contextlib.closing(store.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 1000")
    assert main.main(asked) == 2, "rows of a newer banger"


def test_without_what_was_kept_nothing_is_undone(path: Path) -> None:
    store.Store(path).close()
    with contextlib.closing(store.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 1000")
    with pytest.raises(errors.NotFoundError, match="is not there"):
        migrations.undo(path)
    assert migrations.check(path) is migrations.Verdict.TOO_NEW
