# SPDX-License-Identifier: MIT
"""Reading what the lab's kernel counted, and comparing it with the record that is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import recorder, rights

HISTOGRAMS = """\
# event histogram
#
# trigger info: hist:keys=nr,comm:vals=hitcount:sort=hitcount:size=16384 [active]
#

{ nr:        257, comm: python                          } hitcount:         12
{ nr:         16, comm: fc_vcpu 0                       } hitcount:       1034
{ nr:          3, comm: sh                              } hitcount:          2

Totals:
    Hits: 1048
    Entries: 3
    Dropped: 0

# event histogram
#
# trigger info: hist:keys=nr,comm:vals=hitcount:sort=hitcount:size=2048 if nr == 1 && nr & 4 [active]
#

{ nr:          1, comm: banger-console-                 } hitcount:          7

Totals:
    Hits: 7
    Entries: 1
    Dropped: %d
"""


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernel shows the histograms of an event."""
    monkeypatch.setattr(recorder, "INSTANCE", tmp_path)
    path = tmp_path / "events" / "rights" / "call" / "hist"
    path.parent.mkdir(parents=True)
    return path


def test_each_entry_is_read_with_the_filter_of_its_histogram(counted: Path) -> None:
    counted.write_text(HISTOGRAMS % 0)
    found = [(when, keys["nr"], recorder.who(keys), n) for when, keys, n in recorder.entries("rights/call")]
    assert found == [
        ("", "257", "python", 12),
        ("", "16", "fc_vcpu", 1034),
        ("nr == 1 && nr & 4", "1", "banger-console", 7),
    ]


def test_a_count_that_is_not_whole_is_none(counted: Path) -> None:
    counted.write_text(HISTOGRAMS % 3)
    with pytest.raises(SystemExit, match="3 entries had no room"):
        list(recorder.entries("rights/call"))


def test_labs_are_put_together_and_compared_by_what_and_not_how_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept.txt"
    monkeypatch.setattr(rights, "TREE", tmp_path)
    monkeypatch.setattr(rights, "KEPT", kept)
    labs, result = tmp_path / "labs", tmp_path / "result.txt"
    labs.mkdir()
    (labs / "one.txt").write_text("call python close 3\nnamespace jailer pid 1\n")
    (labs / "two.txt").write_text("call python close 4\n")
    kept.write_text("# a comment\ncall python close 1\ncall python open 1\n")
    assert rights.main([str(labs), str(result)]) == 1
    said = capsys.readouterr().out
    assert "new: 1\n  namespace jailer pid\nnot this time: 1\n  call python open\n" in said
    assert rights.read(result) == {"call python close": 7, "namespace jailer pid": 1}
    kept.write_text(result.read_text())
    assert rights.main([str(labs), str(result)]) == 0
