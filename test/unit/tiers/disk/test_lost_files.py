"""Segment files deleted or cut by somebody else while the store is open."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    disk_usage,
    read,
    readable,
    segment_files,
    wait_until,
    write,
)

from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]


@pytest.fixture
def store(open_store: OpenStore) -> DiskStore:
    return open_store(capacity_bytes=16 * MIB)


@pytest.fixture
def ns(store: DiskStore) -> DiskNamespace:
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    assert write(ns, range(100)) == 100
    assert len(segment_files(store.directory)) > 4
    return ns


def open_segments() -> int:
    """Descriptors of segments whose file has been deleted."""
    links = [str(p.readlink()) for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
    return sum(link.endswith(".seg (deleted)") for link in links)


def test_deleted_and_cut_segments_are_found_out(
    open_store: OpenStore,
    store: DiskStore,
    ns: DiskNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert read(ns, range(100)) == 100
    files = segment_files(store.directory)
    for i, path in enumerate(files[:-1]):
        if i % 2:
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 3)
    assert store.look_after_files()
    kept = readable(ns, range(100))
    assert 0 < len(kept) < 30, "those of the segment that nobody touched"
    assert len(kept) == len(ns) == store.stats().pages
    # Whose blocks would be taken as long as they are open.
    wait_until(lambda: open_segments() == 0)
    (told,) = caplog.messages
    assert f"{len(files) - 1} segment files" in told
    assert f"{100 - len(kept)} pages are forgotten" in told
    assert write(ns, range(100)) == 100 - len(kept)
    assert read(ns, range(100)) == 100
    assert disk_usage(store.directory) <= 16 * MIB
    store.close()
    assert read(open_store().namespace(NAMESPACE, PAGE_BYTES), range(100)) == 100


def test_the_segment_being_filled_is_lost(store: DiskStore, ns: DiskNamespace) -> None:
    """What is written next must not go into a file that nobody will find."""
    segment_files(store.directory)[-1].unlink()
    assert store.look_after_files()
    write(ns, range(100, 105))
    assert read(ns, range(100, 105)) == 5
    assert all(map(store._files.is_whole, store._catalog.segments.values()))


def test_drops_are_told(store: DiskStore, ns: DiskNamespace) -> None:
    for path in segment_files(store.directory):
        path.unlink()
    assert store.look_after_files()
    dropped = ns.drain_dropped()
    assert dropped is not None
    assert len(dropped) == 100


def test_a_look_finds_nothing_wrong_where_nothing_is(store: DiskStore, ns: DiskNamespace) -> None:
    before = segment_files(store.directory)
    assert store.look_after_files()
    assert segment_files(store.directory) == before
    assert read(ns, range(100)) == 100


def test_a_look_that_fails_forgets_nothing(open_store: OpenStore) -> None:
    class Blind(IoOps):
        code: int | None = None

        def size(self, path: Path) -> int:
            if self.code is not None:
                raise OSError(self.code, os.strerror(self.code))
            return super().size(path)

    io_ops = Blind()
    store = open_store(io_ops=io_ops)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(10))
    io_ops.code = errno.ESTALE
    assert store.look_after_files()
    io_ops.code = None
    assert read(ns, range(10)) == 10


@pytest.mark.parametrize("name", ["LOCK", "index.sqlite"])
def test_a_directory_that_is_not_ours_any_more(
    store: DiskStore, ns: DiskNamespace, name: str
) -> None:
    (store.directory / name).rename(store.directory / "elsewhere")
    assert not store.look_after_files()
    (store.directory / name).write_bytes(b"")
    assert not store.look_after_files(), "the name is there, the file is another"
