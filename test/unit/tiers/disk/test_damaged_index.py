"""A damaged or missing index, alone or together with segments: the store opens, and what the
segments hold is found again, never as another page."""

from __future__ import annotations

import hashlib
import logging
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    flip,
    read,
    readable,
    record_offset,
    reopen,
    segment_files,
    write,
)

from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]


def damage_header(path: Path) -> None:
    flip(path, 0, 16)


def damage_schema(path: Path) -> None:
    flip(path, 100, 400)


def damage_everything(path: Path) -> None:
    path.write_bytes(random.Random(3).randbytes(path.stat().st_size))


def truncate_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


def truncate_in_the_middle(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2 + 100)


def delete(path: Path) -> None:
    path.unlink()


def write_text_over_it(path: Path) -> None:
    path.write_text("this is not a database, but it is long enough to look like one" * 300)


@pytest.mark.parametrize(
    "damage",
    [damage_header, damage_schema, damage_everything, truncate_in_the_middle, write_text_over_it],
)
def test_damaged_index_is_rebuilt(
    open_store: OpenStore,
    written: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(written / "index.sqlite")
    with caplog.at_level(logging.WARNING, logger="tiered_kv"):
        store, ns = reopen(open_store)
    assert [
        r for r in caplog.messages if "damaged" in r and "set aside as index.sqlite.corrupt" in r
    ]
    assert (written / "index.sqlite.corrupt").exists()
    assert read(ns, range(30)) == 30
    assert write(ns, range(25, 35)) == 5
    store.close()
    _, ns = reopen(open_store)
    assert read(ns, range(35)) == 35


@pytest.mark.parametrize("damage", [truncate_to_nothing, delete])
def test_empty_or_missing_index_is_rebuilt(
    open_store: OpenStore, written: Path, damage: Callable[[Path], None]
) -> None:
    damage(written / "index.sqlite")
    _, ns = reopen(open_store)
    assert read(ns, range(30)) == 30


def test_index_damaged_anywhere_never_crashes(open_store: OpenStore, written: Path) -> None:
    """Flips at random places: the store opens, returns no wrong page, and takes new ones."""
    index = written / "index.sqlite"
    pristine = index.read_bytes()
    for seed in range(16):
        choose = random.Random(seed)
        index.write_bytes(pristine)
        for _ in range(choose.choice([1, 1, 3, 20])):
            flip(index, choose.randrange(len(pristine)), choose.choice([1, 1, 4, 100]))
        store, ns = reopen(open_store)
        readable(ns, range(30))
        write(ns, range(1000, 1005))
        assert readable(ns, range(1000, 1005)) == list(range(1000, 1005)), seed
        assert not store.stats().degraded
        store.close()


def damaged_run(db: sqlite3.Connection, **changes: object) -> None:
    """Replace the only row of pages 0 to 29 by one with other values."""
    row = dict(
        zip(
            ("location", "namespace", "hashes", "accesses"),
            db.execute("SELECT * FROM runs").fetchone(),
            strict=True,
        )
    )
    assert len(row["hashes"]) == 30 * 32, "one row holds all 30 pages"
    db.execute("DELETE FROM runs")
    db.execute("INSERT INTO runs VALUES (?, ?, ?, ?)", tuple({**row, **changes}.values()))


@pytest.mark.parametrize(
    "changes",
    [
        {"namespace": 99},
        {"hashes": b"too short"},
        {"hashes": b""},
        {"accesses": bytes(29 * 8)},
        {"accesses": bytes(30 * 8)},
        {"accesses": b"\xff" * 240},
        {"location": 16_777_215},
        {"location": 5 << 24},
        {"location": -7},
    ],
    ids=str,
)
def test_wrong_values_in_the_index(
    open_store: OpenStore, written: Path, changes: dict[str, object]
) -> None:
    """Well-formed rows that make no sense: their pages are misses, and can be stored again."""
    with sqlite3.connect(written / "index.sqlite") as db:
        damaged_run(db, **changes)
        db.execute(
            "INSERT INTO segments VALUES (9, 1, 1, 0, 0, x''), (10, 69632, -4, 0, 0, x''), "
            "(11, 69632, 1 << 60, 0, 0, x''), (12, 69632, 4, 0, 0, x'')"
        )
    db.close()
    _, ns = reopen(open_store)
    assert readable(ns, range(30)) == []
    assert write(ns, range(30)) == 30
    assert read(ns, range(30)) == 30


def test_rows_that_overlap(open_store: OpenStore, written: Path) -> None:
    """Of two that claim a slot one counts; nothing wrong is returned, and nothing counted twice."""
    with sqlite3.connect(written / "index.sqlite") as db:
        db.execute(
            "INSERT INTO runs SELECT location + 3, namespace, hashes, accesses FROM runs LIMIT 1"
        )
    db.close()
    store, ns = reopen(open_store)
    assert readable(ns, range(30)) == list(range(30))
    assert store.stats().pages == len(ns) == 30


@pytest.mark.parametrize("value", ["'text'", "NULL", "-5", "x'00'", "9e99"])
@pytest.mark.parametrize("column", ["hashes", "accesses", "namespace"])
def test_values_of_wrong_type_in_the_index(
    open_store: OpenStore, written: Path, column: str, value: str
) -> None:
    with sqlite3.connect(written / "index.sqlite") as db:
        db.execute("CREATE TABLE loose AS SELECT * FROM runs")
        db.execute("DROP TABLE runs")
        db.execute("CREATE TABLE runs (location INTEGER PRIMARY KEY, namespace, hashes, accesses)")
        db.execute("INSERT INTO runs SELECT * FROM loose")
        db.execute(f"UPDATE runs SET {column} = {value}")
    db.close()
    _, ns = reopen(open_store)
    assert readable(ns, range(30)) in ([], list(range(30)))
    write(ns, range(30))
    assert read(ns, range(30)) == 30


def test_namespace_row_with_another_page_size(open_store: OpenStore, written: Path) -> None:
    """Must not lock the owner of the namespace out."""
    with sqlite3.connect(written / "index.sqlite") as db:
        db.execute("UPDATE namespaces SET page_bytes = 4096")
    db.close()
    _, ns = reopen(open_store)
    assert read(ns, range(30)) == 30


def test_index_damaged_while_running_is_written_anew(open_store: OpenStore, written: Path) -> None:
    """The next write notices; after the pause the store takes pages again, and forgot none."""
    store, ns = reopen(open_store)
    store._gate._now = lambda: 0.0  # time stands still, so that the pause can be watched
    store._index.fold_log()
    damage_everything(written / "index.sqlite")
    # SQLite would go on with the blocks it has cached.
    store._index._db.execute("PRAGMA shrink_memory")
    assert write(ns, [100]) == 0
    assert store.stats().degraded
    assert read(ns, range(30)) == 30
    store._gate._now = lambda: 100.0
    assert write(ns, [200]) == 1
    assert not store.stats().degraded
    store.close()
    _, ns = reopen(open_store)
    assert readable(ns, range(300)) == [*range(30), 200]


# -- index and segments both


def test_rebuild_with_damaged_segment_headers(open_store: OpenStore, written: Path) -> None:
    """Without the index and without a segment's own header, its records tell its geometry."""
    (written / "index.sqlite").unlink()
    for path in segment_files(written):
        flip(path, 0, 64)
    flip(segment_files(written)[0], record_offset(0), 8)
    _, ns = reopen(open_store)
    assert readable(ns, range(30)) == list(range(1, 30))


def test_damaged_segment_header_alone_is_harmless(open_store: OpenStore, written: Path) -> None:
    for path in segment_files(written):
        flip(path, 0, 64)
    _, ns = reopen(open_store)
    assert read(ns, range(30)) == 30


def test_rebuild_after_random_flips(open_store: OpenStore, written: Path) -> None:
    (written / "index.sqlite").unlink()
    choose = random.Random(2)
    for path in segment_files(written):
        for _ in range(200):
            flip(path, choose.randrange(path.stat().st_size), 8)
    _, ns = reopen(open_store)
    readable(ns, range(30))
    assert write(ns, range(100, 110)) == 10
    assert read(ns, range(100, 110)) == 10


def test_rebuild_finds_every_namespace(open_store: OpenStore, directory: Path) -> None:
    store = open_store(capacity_bytes=128 * MIB)
    other_id = hashlib.sha256(b"other").digest()
    write(store.namespace(NAMESPACE, PAGE_BYTES), range(20))
    write(store.namespace(other_id, 23_040), range(20))
    store.close()
    (directory / "index.sqlite").unlink()
    store = open_store(capacity_bytes=128 * MIB)
    assert read(store.namespace(other_id, 23_040), range(20)) == 20
    assert read(store.namespace(NAMESPACE, PAGE_BYTES), range(20)) == 20
