"""The index stays small and quick to load: packed rows, and a file that really shrinks."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_builders import MIB, NAMESPACE, aligned, page_hash, read, readable, write

from tiered_kv.tiers.disk.index import NamespaceRow, PageIndex, SegmentRow
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.segment import PageRun, location
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]
PAGE_BYTES = 1000


def wait_until(is_so: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def index_bytes(directory: Path) -> int:
    return (directory / "index.sqlite").stat().st_size


def write_many(ns: DiskNamespace, n_pages: int) -> None:
    buffers = [aligned(PAGE_BYTES)] * 50
    for first in range(0, n_pages, 50):
        hashes = [page_hash(seed) for seed in range(first, first + 50)]
        assert ns.write_pages(hashes, buffers) == 50


@pytest.fixture
def index(tmp_path: Path) -> PageIndex:
    return PageIndex(tmp_path, wal_blocks=100, sync_commits=False)


def run_of(first: int, n_pages: int, number: int = 0) -> PageRun:
    hashes = b"".join(page_hash(first + n) for n in range(n_pages))
    accesses = b"".join((2 * (first + n) + 2).to_bytes(8, "little") for n in range(n_pages))
    return PageRun(location(number, first), 1, hashes, accesses)


def pages_in(index: PageIndex) -> dict[int, tuple[bytes, int]]:
    """By location: what it is called, and when it was used."""
    return {
        run.location + n: (
            run.hashes[32 * n : 32 * n + 32],
            int.from_bytes(run.accesses[8 * n : 8 * n + 8], "little"),
        )
        for run in index.runs()
        for n in range(run.n_pages)
    }


# -- rows


def test_pages_are_deleted_out_of_the_middle_of_runs(index: PageIndex) -> None:
    index.put_runs([run_of(0, 10), run_of(10, 1), run_of(20, 5)])
    before = pages_in(index)
    doomed = [0, 3, 4, 9, 10, 22, 24]
    index.delete_pages([(n, page_hash(n)) for n in doomed])
    assert pages_in(index) == {n: page for n, page in before.items() if n not in doomed}
    # Nobody is there, or somebody else is.
    index.delete_pages(
        [(3, page_hash(3)), (15, page_hash(15)), (5, page_hash(6)), (999, bytes(32))]
    )
    assert pages_in(index) == {n: page for n, page in before.items() if n not in doomed}
    index.delete_pages([(n, page_hash(n)) for n in before])
    assert pages_in(index) == {}


def test_a_forgotten_segment_takes_its_neighbours_not_along(index: PageIndex) -> None:
    for number in (6, 7, 8):
        index.put_segment(SegmentRow(number, 8192, 100, generation=0))
        index.put_runs([run_of(0, 5, number), run_of(50, 50, number)])
    index.forget_segment(7)
    assert {loc >> 24 for loc in pages_in(index)} == {6, 8}
    assert [row.number for row in index.segments()] == [6, 8]
    index.replace_runs(8, [run_of(3, 4, 8)])
    assert [loc & 0xFFFFFF for loc in pages_in(index) if loc >> 24 == 8] == [3, 4, 5, 6]


def test_an_index_of_another_version_is_not_taken_for_ours(
    index: PageIndex, tmp_path: Path
) -> None:
    index.put_runs([], [NamespaceRow(1, NAMESPACE, PAGE_BYTES, "")])
    index.close()
    with sqlite3.connect(tmp_path / "index.sqlite") as db:
        db.execute("PRAGMA user_version=1")
    db.close()
    with pytest.raises(sqlite3.DatabaseError, match="version 1, not 2"):
        PageIndex(tmp_path, wal_blocks=100, sync_commits=False)


def test_an_index_of_an_older_version_is_rebuilt(open_store: OpenStore, directory: Path) -> None:
    """Its segments are as they were: no page is lost."""
    store = open_store()
    write(store.namespace(NAMESPACE, PAGE_BYTES), range(50))
    store.close()
    with sqlite3.connect(directory / "index.sqlite") as db:
        db.execute("PRAGMA user_version=0")
        db.execute("DROP TABLE runs")
        db.execute("CREATE TABLE pages (location, namespace, page_hash, access)")
    db.close()
    assert read(open_store().namespace(NAMESPACE, PAGE_BYTES), range(50)) == 50


def test_full_segments_are_packed(open_store: OpenStore, directory: Path) -> None:
    """Pages that came one by one: as many rows, until their segment is full."""
    store = open_store(capacity_bytes=16 * MIB)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    other = store.namespace(bytes(32), PAGE_BYTES)
    for seed in range(200):
        write(ns, [seed])
        if seed in (20, 30):
            write(other, [seed])
    n_segments = store.stats().segments
    assert n_segments > 2
    wait_until(lambda: not store._space.to_pack)
    store.close()
    with sqlite3.connect(directory / "index.sqlite") as db:
        per_segment = db.execute(
            "SELECT location >> 24, count(*), sum(length(hashes)) / 32 FROM runs GROUP BY 1"
        ).fetchall()
    db.close()
    # The first holds two namespaces, in five stretches.
    assert [n_rows for _, n_rows, _ in per_segment[:-1]] == [5] + [1] * (len(per_segment) - 2)
    assert sum(n_pages for *_, n_pages in per_segment) == 202
    store = open_store(capacity_bytes=16 * MIB)
    assert readable(store.namespace(NAMESPACE, PAGE_BYTES), range(200)) == list(range(200))
    assert readable(store.namespace(bytes(32), PAGE_BYTES), range(200)) == [20, 30]


def test_pages_that_are_there_twice_count_once(open_store: OpenStore, directory: Path) -> None:
    """A crash came after a page was moved, and before the place that it came from was forgotten."""
    store = open_store(capacity_bytes=16 * MIB)
    write(store.namespace(NAMESPACE, PAGE_BYTES), range(150))
    store.close()
    with sqlite3.connect(directory / "index.sqlite") as db:
        first, second = db.execute("SELECT location, hashes FROM runs LIMIT 2").fetchall()
        db.execute(
            "UPDATE runs SET hashes = ? WHERE location = ?",
            (first[1][: 32 * 10] + second[1][32 * 10 :], second[0]),
        )
    db.close()
    store = open_store(capacity_bytes=16 * MIB)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    assert store.stats().pages == len(ns) == len(ns.hashes()) == 140
    assert sum(segment.live for segment in store._catalog.segments.values()) == 140
    assert sum(sum(segment.counts) for segment in store._catalog.segments.values()) == 140


# -- size


def test_unused_blocks_are_given_back(index: PageIndex, tmp_path: Path) -> None:
    index.put_segment(SegmentRow(0, 8192, 100_000, generation=0))
    index.put_runs(run_of(first, 7) for first in range(0, 70_000, 8))
    index.fold_log()
    full = index_bytes(tmp_path)
    index.forget_segment(0)
    before = index.unused_blocks()
    assert before > 500
    index.give_back(100)
    assert index.unused_blocks() == before - 100, "as many as were asked for"
    while index.unused_blocks():
        index.give_back(100)
    index.fold_log()
    assert index_bytes(tmp_path) < 40_000 < full / 50
    assert index.n_bytes == sum(
        path.stat().st_size for path in tmp_path.iterdir() if path.name.startswith("index.sqlite")
    )


def test_the_index_shrinks_after_a_clear(open_store: OpenStore, directory: Path) -> None:
    """Behind, while the store goes on."""
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write_many(ns, 10_000)
    store._index.fold_log()
    assert index_bytes(directory) > 400_000
    store.clear()
    assert write(ns, range(5)) == 5
    wait_until(lambda: index_bytes(directory) < 100_000)
    assert read(ns, range(5)) == 5


def test_the_index_shrinks_after_gc(open_store: OpenStore, directory: Path) -> None:
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write_many(ns, 10_000)
    ns.drop_pages(ns.hashes()[100:])
    assert store.collect_garbage() > 300_000
    assert index_bytes(directory) < 100_000
    assert len(ns) == 100


def test_the_index_shrinks_with_the_budget(open_store: OpenStore, directory: Path) -> None:
    store = open_store()
    write_many(store.namespace(NAMESPACE, PAGE_BYTES), 10_000)
    store.close()
    full = index_bytes(directory)
    store = open_store(capacity_bytes=8 * MIB)
    assert store.stats().pages < 1000
    wait_until(lambda: index_bytes(directory) < full / 5)


def test_the_index_shrinks_at_the_end(open_store: OpenStore, directory: Path) -> None:
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write_many(ns, 10_000)
    ns.drop_pages(ns.hashes()[100:])
    store.close()
    assert index_bytes(directory) < 100_000
    assert not (directory / "index.sqlite-wal").exists()
    store = open_store()
    assert len(store.namespace(NAMESPACE, PAGE_BYTES)) == 100
