"""Pages of which the files hold two copies, as after a kill while reclaim was carrying them over,
and an index that is lost as well: the newer copy counts, unless it is torn."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_builders import NAMESPACE, PAGE_BYTES, read, segment_files, write

from tiered_kv.core.errors import DiskStateError
from tiered_kv.tiers.disk.index import PageIndex, index_files
from tiered_kv.tiers.disk.record import BLOCK_BYTES, pack_record, unpack_record
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]
RECORD_BYTES = BLOCK_BYTES + PAGE_BYTES
FREE_SLOT = 40
KEY = bytes(range(32))
WHOLE = RECORD_BYTES
TORN = [BLOCK_BYTES, 2 * BLOCK_BYTES, RECORD_BYTES - BLOCK_BYTES]
"""So many bytes of the copy were written when the process was killed."""


def copy_record(directory: Path, slot: int, to: int, n_bytes: int, *, newer_by: int) -> None:
    """The first bytes of a record of the first segment in another slot of it."""
    with segment_files(directory)[0].open("r+b") as file:
        file.seek(BLOCK_BYTES + slot * RECORD_BYTES)
        record = bytearray(file.read(RECORD_BYTES))
        header = unpack_record(record)
        assert header is not None
        header = dataclasses.replace(header, sequence=header.sequence + newer_by)
        pack_record(memoryview(record), header)
        file.seek(BLOCK_BYTES + to * RECORD_BYTES)
        file.write(record[:n_bytes])


def lose_index(directory: Path) -> None:
    for file in index_files(directory):
        file.unlink(missing_ok=True)


@pytest.fixture(params=[None, KEY], ids=["plain", "encrypted"])
def key(request: pytest.FixtureRequest) -> bytes | None:
    found: bytes | None = request.param
    return found


@pytest.fixture
def written(open_store: OpenStore, directory: Path, key: bytes | None) -> Path:
    """Pages 0 to 29 in slots 0 to 29."""
    store = open_store(key=key)
    write(store.namespace(NAMESPACE, PAGE_BYTES), range(30))
    store.close()
    return directory


def check_all_there(open_store: OpenStore, key: bytes | None) -> None:
    store = open_store(key=key)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    assert len(ns) == store.stats().pages == 30
    assert read(ns, range(30)) == 30
    assert store.stats().checksum_failures == 0
    store.close()


@pytest.mark.parametrize("newer_by", [1000, 0, -1])
@pytest.mark.parametrize("n_bytes", TORN)
def test_a_torn_copy_does_not_count(
    open_store: OpenStore, written: Path, key: bytes | None, n_bytes: int, newer_by: int
) -> None:
    copy_record(written, 3, FREE_SLOT, n_bytes, newer_by=newer_by)
    lose_index(written)
    check_all_there(open_store, key)
    # From the index that was rebuilt.
    check_all_there(open_store, key)


def test_the_copy_counts_when_the_original_is_overwritten(
    open_store: OpenStore, written: Path, key: bytes | None
) -> None:
    copy_record(written, 3, FREE_SLOT, WHOLE, newer_by=0)
    copy_record(written, 3, 3, BLOCK_BYTES, newer_by=1000)
    with segment_files(written)[0].open("r+b") as file:
        file.seek(BLOCK_BYTES + 3 * RECORD_BYTES + BLOCK_BYTES)
        file.write(bytes(PAGE_BYTES))
    lose_index(written)
    check_all_there(open_store, key)
    check_all_there(open_store, key)


def test_of_many_copies_one_that_is_whole_counts(
    open_store: OpenStore, written: Path, key: bytes | None
) -> None:
    for n, newer_by in enumerate([20, -1, 50, 0, 40, 30]):
        copy_record(written, 3, FREE_SLOT + n, TORN[n % 3], newer_by=newer_by)
    lose_index(written)
    check_all_there(open_store, key)
    check_all_there(open_store, key)


@pytest.mark.parametrize("key", [None], indirect=True)
def test_of_two_whole_copies_one_counts(open_store: OpenStore, written: Path) -> None:
    copy_record(written, 3, FREE_SLOT, WHOLE, newer_by=0)
    lose_index(written)
    check_all_there(open_store, None)
    check_all_there(open_store, None)


def test_a_rebuild_that_ends_before_it_has_chosen(
    open_store: OpenStore, written: Path, key: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index that it leaves is not trusted: the torn copy may be in it."""
    copy_record(written, 3, FREE_SLOT, BLOCK_BYTES, newer_by=1000)
    lose_index(written)

    def fail(self: PageIndex, pages: object) -> None:
        raise sqlite3.OperationalError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(PageIndex, "delete_pages", fail)
        with pytest.raises(DiskStateError):
            open_store(key=key)
    check_all_there(open_store, key)
