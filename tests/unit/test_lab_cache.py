# SPDX-License-Identifier: MIT
"""The lab's cache: built once, never pruned while used, nothing half-made."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lab import cache


def _store(root: Path, keep: int = 2) -> cache.Cache:
    return cache.Cache(root, "thing", keep)


def _write(stage: Path) -> None:
    (stage / "file").write_text("content")


def test_key_depends_on_where_parts_end() -> None:
    assert cache.key_of(["ab", "c"]) != cache.key_of(["a", "bc"])
    assert cache.key_of(["a", b"b"]) == cache.key_of([b"a", "b"])


def test_entry_is_built_once_and_found_again(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(stage: Path) -> None:
        built.append(stage)
        _write(stage)

    for _ in range(2):
        entry = _store(tmp_path).ensure("key", build)
        assert (entry.path / "file").read_text() == "content"
        entry.close()
    assert len(built) == 1


def test_two_at_once_build_once(tmp_path: Path) -> None:
    both = threading.Barrier(2)
    built: list[Path] = []

    def build(stage: Path) -> None:
        built.append(stage)
        _write(stage)

    def use() -> None:
        both.wait()
        _store(tmp_path).ensure("key", build).close()

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(built) == 1


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(stage: Path) -> None:
        _write(stage)
        raise ValueError("no space")

    with pytest.raises(ValueError, match="no space"):
        _store(tmp_path).ensure("key", build)
    assert _store(tmp_path).open("key") is None
    assert [path.name for path in (tmp_path / "thing").iterdir()] == ["key.lock"]


def test_prune_keeps_the_last_used_and_what_is_in_use(tmp_path: Path) -> None:
    store = _store(tmp_path, keep=1)
    held = store.ensure("held", _write)
    store.ensure("old", _write).close()
    store.ensure("new", _write).close()
    assert {path.name for path in (tmp_path / "thing").iterdir() if path.is_dir()} == {"held", "new"}
    held.close()
    store.prune()
    assert store.open("held") is None


def test_prune_takes_what_a_dead_builder_left(tmp_path: Path) -> None:
    (tmp_path / "thing" / ".stage-key.999999").mkdir(parents=True)
    _store(tmp_path).prune()
    assert not list((tmp_path / "thing").glob(".stage-*"))


def test_entry_in_use_is_not_deleted(tmp_path: Path) -> None:
    store = _store(tmp_path)
    entry = store.ensure("key", _write)
    assert not store.delete("key")
    entry.close()
    assert store.delete("key")
    assert store.open("key") is None


def test_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BANGER_LAB_CACHE", str(tmp_path))
    assert cache.default_root() == tmp_path
    monkeypatch.delenv("BANGER_LAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_root() == tmp_path / "banger-lab"
