"""Damaged segment files: flipped bytes, truncated or missing ones. Never a wrong page, never a
crash: what cannot be read back, equal, is a miss."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from disk_builders import (
    RECORD_BYTES,
    aligned,
    flip,
    page_hash,
    read,
    readable,
    record_offset,
    reopen,
    segment_files,
    write,
)

from tiered_kv.forest.node import Node
from tiered_kv.tiers.cold.local_pages import LocalStore
from tiered_kv.tiers.cold.read_queue import ColdRead, read_stretch
from tiered_kv.tiers.context import Epoch, TierContext
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.store import DiskStore
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.slots import PageIds

OpenStore = Callable[..., DiskStore]


def test_pages_behind_a_damaged_one_are_written_anew(open_store: OpenStore, written: Path) -> None:
    """Each stretch of a read finds the first damaged page only; whoever computes the prompt again
    writes what is not there."""
    hashes = [page_hash(seed) for seed in range(9)]
    for seed in (1, 6):
        flip(segment_files(written)[0], record_offset(seed) + BLOCK_BYTES)
    _, ns = reopen(open_store)
    host = SimpleNamespace(views=lambda pages: [aligned(ns.page_bytes) for _ in pages])
    read_pages = read_stretch(cast(TierContext, SimpleNamespace(host=host, timeline=None)))
    store = LocalStore(ns, cast(PageFormat, None))
    job = ColdRead(0, store, cast(Node, None), hashes, cast(PageIds, range(9)), cast(Epoch, None))
    assert read_pages(job, slice(0, 1)) == 1
    assert ns.count_prefix(hashes) == 9, "nobody has looked"
    assert read_pages(job, slice(1, 2)) == 0
    assert [ns.contains(name) for name in hashes] == [True] + 8 * [False]
    assert write(ns, range(9)) == 8
    assert read_pages(job, slice(0, 9)) == 9
    assert readable(ns, range(9, 30)) == list(range(9, 30)), "other prompts keep theirs"


# -- records


@pytest.mark.parametrize(
    "offset",
    [0, 8, 16, 30, 70, 100, 120, BLOCK_BYTES, BLOCK_BYTES + 12_345, RECORD_BYTES - 1],
)
def test_flipped_byte_is_a_miss(
    open_store: OpenStore, written: Path, io_mode: IoMode, offset: int
) -> None:
    """Header fields, header checksum, first, middle and last byte of the payload."""
    flip(segment_files(written)[0], record_offset(3) + offset)
    store, ns = reopen(open_store, io_mode=io_mode)
    assert read(ns, range(30)) == 3
    assert not ns.contains(page_hash(3))
    assert ns.count_prefix([page_hash(seed) for seed in range(30)]) == 3
    assert readable(ns, range(30)) == [seed for seed in range(30) if seed != 3]
    assert store.stats().checksum_failures == 1
    assert write(ns, [3]) == 1
    assert read(ns, range(30)) == 30


def test_damage_is_remembered(open_store: OpenStore, written: Path) -> None:
    flip(segment_files(written)[0], record_offset(3) + BLOCK_BYTES)
    store, ns = reopen(open_store)
    assert read(ns, [3]) == 0
    store.close()
    _, ns = reopen(open_store)
    assert not ns.contains(page_hash(3))


def test_damage_under_a_running_store(open_store: OpenStore, directory: Path) -> None:
    _, ns = reopen(open_store)
    write(ns, range(10))
    flip(segment_files(directory)[0], record_offset(5) + BLOCK_BYTES + 1)
    assert readable(ns, range(10)) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_record_of_another_page_is_a_miss(open_store: OpenStore, written: Path) -> None:
    """An intact record in the wrong slot: what an index row older than the data points to."""
    path = segment_files(written)[0]
    contents = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(record_offset(2))
        file.write(contents[record_offset(7) : record_offset(8)])
    _, ns = reopen(open_store)
    assert readable(ns, range(10)) == [0, 1, 3, 4, 5, 6, 7, 8, 9]


def test_random_flips_never_give_a_wrong_page(open_store: OpenStore, written: Path) -> None:
    choose = random.Random(11)
    for path in segment_files(written):
        for _ in range(40):
            flip(path, choose.randrange(path.stat().st_size), choose.randint(1, 64))
    _, ns = reopen(open_store)
    good = readable(ns, range(30))
    assert 0 < len(good) < 30
    assert readable(ns, range(30)) == good
    assert write(ns, range(30)) == 30 - len(good)
    assert read(ns, range(30)) == 30


def test_record_of_unknown_encoding_is_a_miss(open_store: OpenStore, written: Path) -> None:
    """A later version's encrypted record, say: intact by its checksums, yet not page bytes."""
    from tiered_kv.tiers.disk.record import RecordHeader, pack_record, unpack_record

    path = segment_files(written)[0]
    block = aligned(BLOCK_BYTES)
    with path.open("r+b") as file:
        file.seek(record_offset(6))
        header = unpack_record(file.read(BLOCK_BYTES))
        assert header is not None
        pack_record(
            block,
            RecordHeader(
                header.namespace_id,
                header.page_hash,
                header.payload_bytes,
                header.sequence,
                header.payload_checksum,
                encoding=7,
            ),
        )
        file.seek(record_offset(6))
        file.write(block[:256])
    _, ns = reopen(open_store)
    assert readable(ns, range(8)) == [0, 1, 2, 3, 4, 5, 7]


# -- segment files


@pytest.mark.parametrize("keep_bytes", [0, 1, BLOCK_BYTES, record_offset(4) + 100])
def test_truncated_segment_is_forgotten(
    open_store: OpenStore, written: Path, keep_bytes: int
) -> None:
    first, *_ = segment_files(written)
    with first.open("r+b") as file:
        file.truncate(keep_bytes)
    _, ns = reopen(open_store)
    assert len(ns) == 0
    assert write(ns, range(30)) == 30
    assert read(ns, range(30)) == 30


def test_missing_segment_drops_only_its_rows(open_store: OpenStore, directory: Path) -> None:
    store, ns = reopen(open_store)
    write(ns, range(200))
    store.close()
    first, second, *_ = segment_files(directory)
    first.unlink()
    store, ns = reopen(open_store)
    assert 0 < len(ns) < 200
    survivors = readable(ns, range(200))
    assert len(survivors) == len(ns)
    assert second in segment_files(directory)


def test_segment_truncated_while_running(open_store: OpenStore, directory: Path) -> None:
    store, ns = reopen(open_store)
    write(ns, range(10))
    with segment_files(directory)[0].open("r+b") as file:
        file.truncate(record_offset(4))
    assert read(ns, range(10)) == 4
    assert store.stats().pages == store.stats().segments == 0, "found out at the first failure"
    store.collect_garbage()
    assert segment_files(directory) == []
    assert write(ns, range(10)) == 10
    assert read(ns, range(10)) == 10


def test_stray_segment_file_is_removed(open_store: OpenStore, written: Path) -> None:
    stray = written / "segments" / "00000077.seg"
    stray.write_bytes(b"x" * 5000)
    _, ns = reopen(open_store)
    assert not stray.exists()
    assert read(ns, range(30)) == 30
