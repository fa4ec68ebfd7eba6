"""The parts that need no store: records, I/O planning, buffers, the thread pool."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Sequence

import pytest
from disk_builders import NAMESPACE, aligned, page_hash

from tiered_kv.tiers.disk.ages import Ages
from tiered_kv.tiers.disk.buffers import MAX_PAGES_PER_IO, is_aligned
from tiered_kv.tiers.disk.io_pool import InFlight, IoPool
from tiered_kv.tiers.disk.page_io import (
    LARGEST_IO_BYTES,
    PageTransfer,
    plan_runs,
    transfer_all,
)
from tiered_kv.tiers.disk.record import (
    BLOCK_BYTES,
    RecordHeader,
    SegmentHeader,
    pack_record,
    pack_segment,
    unpack_record,
    unpack_segment,
)
from tiered_kv.tiers.disk.segment import Segment


def test_headers_come_back_equal() -> None:
    block = memoryview(bytearray(BLOCK_BYTES))
    record = RecordHeader(NAMESPACE, page_hash(1), 23_040, 77, bytes(range(16)))
    pack_record(block, record)
    assert unpack_record(block) == record
    assert unpack_segment(block) is None
    segment = SegmentHeader(5, 28_672, 1000)
    pack_segment(block, segment)
    assert unpack_segment(block) == segment
    cleared_often = SegmentHeader(5, 28_672, 1000, generation=2**32 - 1)
    pack_segment(block, cleared_often)
    assert unpack_segment(block) == cleared_often
    assert unpack_record(block) is None


def test_any_flipped_bit_of_a_header_is_noticed() -> None:
    block = memoryview(bytearray(BLOCK_BYTES))
    pack_record(block, RecordHeader(NAMESPACE, page_hash(1), 23_040, 77, bytes(16)))
    for bit in range(128 * 8):
        block[bit // 8] ^= 1 << bit % 8
        assert unpack_record(block) is None, bit
        block[bit // 8] ^= 1 << bit % 8
    assert unpack_record(block) is not None


@pytest.mark.parametrize("block", [b"", bytes(BLOCK_BYTES), b"\xff" * BLOCK_BYTES])
def test_blocks_that_are_no_headers(block: bytes) -> None:
    assert unpack_record(block) is None
    assert unpack_segment(block) is None


def transfers_in(slots: Sequence[tuple[int, int]], record_bytes: int) -> list[PageTransfer]:
    segments = {n: Segment(n, record_bytes, 5000, Ages()) for n, _ in slots}
    buffer = memoryview(bytearray(1))
    return [
        PageTransfer(position, page_hash(position), buffer, segments[number], slot)
        for position, (number, slot) in enumerate(slots)
    ]


def slots_of(runs: list[list[PageTransfer]]) -> list[list[tuple[int, int]]]:
    return [[(t.segment.number, t.slot) for t in run] for run in runs]


def test_neighbours_share_an_io() -> None:
    slots = [(1, 8), (1, 9), (2, 0), (1, 10), (1, 20), (2, 1)]
    runs = plan_runs(transfers_in(slots, 8192), io_threads=4)
    assert slots_of(runs) == [[(1, 8), (1, 9), (1, 10)], [(2, 0), (2, 1)], [(1, 20)]]


def test_the_head_of_the_batch_comes_first() -> None:
    slots = [(7, 100), (3, 5), (1, 1)]
    runs = plan_runs(transfers_in(slots, 8192), io_threads=4)
    assert slots_of(runs) == [[(7, 100)], [(3, 5)], [(1, 1)]]


@pytest.mark.parametrize("record_bytes", [8192, 28_672, 1 << 20, 16 << 20])
@pytest.mark.parametrize("io_threads", [1, 4])
def test_ios_are_bounded_and_shared_among_threads(record_bytes: int, io_threads: int) -> None:
    slots = [(1, slot) for slot in range(3000)]
    runs = plan_runs(transfers_in(slots, record_bytes), io_threads)
    assert sorted(slot for run in slots_of(runs) for slot in run) == slots
    assert max(len(run) for run in runs) <= MAX_PAGES_PER_IO
    assert max(len(run) for run in runs) * record_bytes <= max(
        LARGEST_IO_BYTES + record_bytes, record_bytes
    )
    assert len(runs) >= io_threads


def test_no_pages_no_ios() -> None:
    assert plan_runs([], 4) == []


@pytest.mark.parametrize("seed", range(20))
def test_short_transfers_go_on_where_they_stopped(seed: int) -> None:
    choose = random.Random(seed)
    source = choose.randbytes(40 * BLOCK_BYTES)
    lengths = [choose.randint(1, 6) * BLOCK_BYTES for _ in range(6)]
    buffers = [memoryview(bytearray(length)) for length in lengths]

    def read_a_bit(fd: int, into: Sequence[memoryview], offset: int) -> int:
        wanted = sum(map(len, into))
        done = 0
        limit = min(choose.randint(BLOCK_BYTES, 3 * BLOCK_BYTES), wanted)
        for buffer in into:
            n = min(len(buffer), limit - done)
            buffer[:n] = source[offset + done : offset + done + n]
            done += n
        return done

    transfer_all(read_a_bit, 0, buffers, 0)
    assert b"".join(buffers) == source[: sum(lengths)]


def test_transfer_that_stops_raises() -> None:
    with pytest.raises(OSError, match="short transfer") as caught:
        transfer_all(lambda *_: 0, 0, [memoryview(bytearray(10))], 0)
    assert caught.value.errno == errno.EIO


def test_alignment() -> None:
    area = aligned(3 * BLOCK_BYTES)
    assert is_aligned(area)
    assert is_aligned(area[BLOCK_BYTES:])
    assert not is_aligned(area[512:])
    assert not is_aligned(area.toreadonly())


def test_pool_keeps_at_most_its_threads_in_flight() -> None:
    """Four threads work at a time, three of them inside a system call."""
    pool = IoPool(3)
    lock = threading.Lock()
    most = {"working": 0, "in flight": 0}
    now = dict(most)
    done: list[int] = []

    def step(what: str, change: int) -> None:
        with lock:
            now[what] += change
            most[what] = max(most[what], now[what])

    def job(number: int, in_flight: InFlight) -> None:
        step("working", 1)
        with in_flight:
            step("in flight", 1)
            threading.Event().wait(0.002)
            step("in flight", -1)
        step("working", -1)
        done.append(number)

    pool.run([lambda limit, n=n: job(n, limit) for n in range(30)])
    pool.close()
    assert sorted(done) == list(range(30))
    assert 1 < most["in flight"] <= 3
    assert most["working"] <= 4


def test_pool_is_not_blocked_by_another_batch_that_is_stuck() -> None:
    pool = IoPool(2)
    release = threading.Event()
    stuck = threading.Thread(target=lambda: pool.run([lambda _: release.wait()] * 4))
    stuck.start()
    done: list[int] = []
    pool.run([lambda _, n=n: done.append(n) for n in range(5)])
    assert done == list(range(5))
    release.set()
    stuck.join()
    pool.close()
