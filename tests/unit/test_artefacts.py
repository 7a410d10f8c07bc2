# SPDX-License-Identifier: MIT
"""Directories that are published whole: seen complete or not at all."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from banger import artefacts
from banger.contract import errors


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


@pytest.mark.parametrize("before", ["2038-01-19T03:14:07.000000Z", "2038-01-19T03:14:07Z", "unknown"])
def test_the_last_one_made_is_the_newest_whatever_the_clock_says(
    notes: artefacts.Artefacts[Note], before: str
) -> None:
    """A host whose clock was ahead would go on with what was made then, for years."""
    for note_id, name in (("aaaaaaaaaaaa", "one"), ("bbbbbbbbbbbb", "two")):
        with notes.stage(note_id) as staged:
            notes.publish(staged, Note(note_id, name, before))
    second = put(notes, "000000000000", "one")
    third = put(notes, "999999999999", "one")
    assert notes.find("one") == third
    assert [note.id for note in notes.records() if note.name == "one"] == [
        "aaaaaaaaaaaa",
        second.id,
        third.id,
    ]
    other = put(notes, "cccccccccccc", "three")
    assert other.created_at < "2038"


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


def test_what_a_crash_left_is_found_and_never_listed(
    notes: artefacts.Artefacts[Note], tmp_path: Path
) -> None:
    put(notes, "aaaaaaaaaaaa", "one")
    for name in (".bbbbbbbbbbbb.new", ".cccccccccccc.gone", ".other"):
        (tmp_path / "notes" / name).mkdir()
    assert [note.id for note in notes.records()] == ["aaaaaaaaaaaa"]
    found = artefacts.half_made(tmp_path / "notes")
    assert [path.name for path in found] == [".bbbbbbbbbbbb.new", ".cccccccccccc.gone"]


def test_a_broken_record_hides_nothing_else(notes: artefacts.Artefacts[Note], tmp_path: Path) -> None:
    put(notes, "aaaaaaaaaaaa", "one")
    put(notes, "bbbbbbbbbbbb", "two")
    (tmp_path / "notes/bbbbbbbbbbbb/note.json").write_text('{"id":')
    assert [note.name for note in notes.records()] == ["one"]
    assert list(notes.broken()) == ["bbbbbbbbbbbb"]
    with pytest.raises(errors.OperationFailedError) as caught:
        notes.find("bbbbbbbbbbbb")
    assert "note delete bbbbbbbbbbbb" in caught.value.hint


def test_a_record_that_cannot_be_read_hides_nothing_else(
    notes: artefacts.Artefacts[Note], tmp_path: Path
) -> None:
    """A bad block, say; a directory answers as wrongly, to root too."""
    put(notes, "aaaaaaaaaaaa", "one")
    put(notes, "bbbbbbbbbbbb", "two")
    record = tmp_path / "notes/bbbbbbbbbbbb/note.json"
    record.unlink()
    record.mkdir()
    assert [note.name for note in notes.records()] == ["one"]
    assert list(notes.broken()) == ["bbbbbbbbbbbb"]
    with pytest.raises(errors.OperationFailedError, match="Is a directory") as caught:
        notes.read("bbbbbbbbbbbb")
    assert "note delete bbbbbbbbbbbb" in caught.value.hint


def test_deleting_twice_is_fine(notes: artefacts.Artefacts[Note], tmp_path: Path) -> None:
    put(notes, "aaaaaaaaaaaa", "one")
    notes.delete("aaaaaaaaaaaa")
    notes.delete("aaaaaaaaaaaa")
    assert list((tmp_path / "notes").iterdir()) == []
