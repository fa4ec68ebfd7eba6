"""Which path an I/O takes, and that pages written by one path are read right by the other."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    aligned,
    filled,
    page_hash,
    page_payload,
    read,
    segment_files,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.io_path import AdaptivePath, IoMode, Reuse, choose_path
from tiered_kv.tiers.disk.memory_pressure import MemoryPressure, MemorySample
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]


def pressure(available_share: float) -> MemoryPressure:
    return MemoryPressure(lambda: MemorySample(available_share, None))


class Memory:
    """Memory that is plentiful or not, as the test says."""

    def __init__(self) -> None:
        self.plentiful = True

    def is_plentiful(self) -> bool:
        return self.plentiful

    was_plentiful = is_plentiful


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def ns(open_store: OpenStore, memory: Memory) -> DiskNamespace:
    store = open_store()
    if not store.stats().direct_io:
        pytest.skip("no direct I/O on this file system")
    store._paths.policy._pressure = memory  # type: ignore[attr-defined]
    return store.namespace(NAMESPACE, PAGE_BYTES)


def counted(ns: DiskNamespace) -> dict[str, int]:
    """Pages that took each way so far."""
    counts = ns._operations.reader._counters.snapshot()
    record_bytes = PAGE_BYTES + BLOCK_BYTES
    return {
        f"{path} {what}": n
        for path in ("direct", "buffered")
        for what in ("read", "write")
        if (n := counts[f"{path}_{what}_bytes"] // record_bytes)
    }


def buffers(seeds: Sequence[int]) -> list[memoryview]:
    return [filled(seed, PAGE_BYTES) for seed in seeds]


@pytest.mark.parametrize(
    ("available_share", "reuse", "is_direct"),
    [
        (0.5, Reuse.SOON, False),
        (0.5, Reuse.LATER, True),
        (0.05, Reuse.SOON, True),
        (0.05, Reuse.LATER, True),
    ],
)
def test_page_cache_needs_plenty_and_near_reuse(
    available_share: float, reuse: Reuse, is_direct: bool
) -> None:
    assert AdaptivePath(pressure(available_share)).use_direct(reuse) is is_direct


def test_stats_look_at_memory_once(open_store: OpenStore) -> None:
    """The scheduler's thread asks for them once a second, and reading what the kernel says of
    memory takes milliseconds on a busy machine. So they say what the last I/O was told."""
    looks: list[float] = []

    def look() -> MemorySample:
        looks.append(0.05 if looks else 0.5)
        return MemorySample(looks[-1], None)

    times = iter(range(100))
    store = open_store()
    if not store.stats().direct_io:
        pytest.skip("no direct I/O on this file system")
    policy = store._paths.policy = AdaptivePath(MemoryPressure(look, lambda: float(next(times))))
    assert [store.stats().direct_io_soon for _ in range(3)] == [False] * 3
    assert len(looks) == 1
    assert policy.use_direct(Reuse.SOON)
    assert len(looks) == 2
    assert store.stats().direct_io_soon
    assert len(looks) == 2


@pytest.mark.parametrize("mode", list(IoMode))
def test_forced_modes_never_change(tmp_path: Path, mode: IoMode) -> None:
    paths = choose_path(tmp_path, IoOps(), mode=mode, pressure=pressure(0.5))
    if not paths.has_direct:
        pytest.skip("no direct I/O on this file system")
    answers = {paths.use_direct(reuse) for reuse in Reuse}
    expected = {IoMode.AUTO: {True, False}, IoMode.DIRECT: {True}, IoMode.BUFFERED: {False}}
    assert answers == expected[mode]


def test_hints_choose_the_path(ns: DiskNamespace, memory: Memory) -> None:
    hashes = [page_hash(seed) for seed in range(6)]
    ns.write_pages(hashes[:2], buffers([0, 1]), Reuse.SOON)
    ns.write_pages(hashes[2:3], buffers([2]), Reuse.LATER)
    ns.write_pages(hashes[3:4], buffers([3]))
    assert counted(ns) == {"buffered write": 2, "direct write": 2}
    targets = [aligned(PAGE_BYTES) for _ in range(4)]
    assert ns.read_pages(hashes[:4], targets, Reuse.SOON) == 4
    assert ns.read_pages(hashes[:1], targets[:1], Reuse.LATER) == 1
    assert counted(ns)["buffered read"] == 4
    assert counted(ns)["direct read"] == 1
    memory.plentiful = False
    ns.write_pages(hashes[4:5], buffers([4]), Reuse.SOON)
    assert ns.read_pages(hashes[:4], targets, Reuse.SOON) == 4
    assert counted(ns) == {
        "buffered write": 2,
        "direct write": 3,
        "buffered read": 4,
        "direct read": 5,
    }


def test_pages_that_are_read_again_move_into_the_page_cache(ns: DiskNamespace) -> None:
    write(ns, range(4))
    assert read(ns, range(4)) == 4
    assert counted(ns)["direct read"] == 4, "read for the first time"
    assert read(ns, range(4)) == 4
    assert counted(ns)["buffered read"] == 4, "read again within a few operations"


def test_pages_read_long_ago_do_not(ns: DiskNamespace) -> None:
    write(ns, range(2))
    read(ns, [0])
    for _ in range(1100):
        read(ns, [77])  # a miss is an operation, too
    read(ns, [0])
    assert "buffered read" not in counted(ns)


def test_stats_tell_the_path(open_store: OpenStore, io_mode: IoMode) -> None:
    stats = open_store(io_mode=io_mode).stats()
    assert stats.direct_io is stats.direct_io_soon is (io_mode is IoMode.DIRECT)


REUSES = st.sampled_from([Reuse.SOON, Reuse.LATER])
STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "read"]), st.integers(0, 200), st.integers(1, 8), REUSES),
    max_size=60,
)


@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_paths_agree_on_every_byte(tmp_path_factory: pytest.TempPathFactory, steps: object) -> None:
    """Slots are written and, when they are reused, written over by either path, and read by
    either: nothing stale, nothing torn, nothing lost but what the small budget gave up."""
    directory = tmp_path_factory.mktemp("paths")
    with DiskStore.open(directory / "disk", capacity_bytes=3 * MIB) as store:
        if not store.stats().direct_io:
            pytest.skip("no direct I/O on this file system")
        store._paths.policy._pressure = Memory()  # type: ignore[attr-defined]
        ns = store.namespace(NAMESPACE, PAGE_BYTES)
        for what, first, count, reuse in steps:  # type: ignore[attr-defined]
            seeds = list(range(first, first + count))
            hashes = [page_hash(seed) for seed in seeds]
            if what == "write":
                ns.write_pages(hashes, buffers(seeds), reuse)
                assert ns.count_prefix(hashes) == count
            seeds = [seed for seed in seeds if ns.contains(page_hash(seed))]
            targets = [aligned(PAGE_BYTES) for _ in seeds]
            assert ns.read_pages([page_hash(s) for s in seeds], targets, reuse) == len(seeds)
            for seed, target in zip(seeds, targets, strict=True):
                assert target == page_payload(seed, PAGE_BYTES)
        assert store.stats().checksum_failures == 0


class StaleCache(IoOps):
    """A page cache that goes wrong: reads through it return flipped bytes until it is dropped."""

    def __init__(self) -> None:
        self.is_stale = False
        self.direct_fds: set[int] = set()

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        if flags & os.O_DIRECT:
            self.direct_fds.add(fd)
        else:
            self.direct_fds.discard(fd)
        return fd

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        done = super().preadv(fd, buffers, offset)
        if self.is_stale and fd not in self.direct_fds:
            buffers[-1][5] ^= 0xFF
        return done


def test_damage_in_the_page_cache_only_is_overcome(open_store: OpenStore) -> None:
    io = StaleCache()
    store = open_store(io_ops=io, io_mode=IoMode.BUFFERED)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(8))
    if not io.direct_fds and not choose_path(store.directory, IoOps(), mode=IoMode.AUTO).has_direct:
        pytest.skip("no direct I/O on this file system")
    io.is_stale = True
    assert read(ns, range(8)) == 8
    assert store.stats().checksum_failures == 0
    io.is_stale = False
    offset = BLOCK_BYTES + 3 * (BLOCK_BYTES + PAGE_BYTES) + BLOCK_BYTES + 9
    with segment_files(store.directory)[0].open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))
    assert read(ns, range(8)) == 3, "damage on the device stays damage"
    assert store.stats().checksum_failures == 1


def test_random_buffers_on_both_paths(ns: DiskNamespace) -> None:
    """Unaligned and padded buffers take the page cache for one call and go past it for the next."""
    choose = random.Random(4)
    area = aligned(40 * PAGE_BYTES)
    for seed in range(60):
        start = choose.choice([0, 4096, 13, 77_777])
        view = area[start : start + PAGE_BYTES]
        view[:] = page_payload(seed, PAGE_BYTES)
        ns.write_pages([page_hash(seed)], [view], choose.choice(list(Reuse)))
        view[:] = bytes(PAGE_BYTES)
        assert ns.read_pages([page_hash(seed)], [view], choose.choice(list(Reuse))) == 1
        assert view == page_payload(seed, PAGE_BYTES)
