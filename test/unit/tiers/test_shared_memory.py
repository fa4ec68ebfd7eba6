"""Memory that several ranks map; each is a thread here, which finds the file as a process would."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from support_tiers.doubles import BarrierMinimum
from tiered_kv.tiers.shared_memory import Ranks, share_memory

N_BYTES = 3 * mmap.PAGESIZE

Mapped = list[mmap.mmap | None]


def on_each(n_ranks: int, share: Callable[[int, Ranks], mmap.mmap | None]) -> Mapped:
    barrier = BarrierMinimum(n_ranks)
    mapped: Mapped = [None] * n_ranks

    def run(rank: int) -> None:
        mapped[rank] = share(rank, barrier.rank(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return mapped


def n_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_ranks_with_the_same_first_one_have_the_same_memory() -> None:
    n_open = n_files()
    mapped = on_each(4, lambda rank, ranks: share_memory(N_BYTES, rank, rank // 2 * 2, ranks))
    a, b, c, d = (memory for memory in mapped if memory is not None)
    assert [len(memory) for memory in (a, b, c, d)] == [N_BYTES] * 4
    a[7:9], c[7:9] = b"ac", b"cc"
    assert (b[7:9], d[7:9]) == (b"ac", b"cc")
    b[-1:] = b"!"
    assert (a[-1:], c[-1:]) == (b"!", b"\0")
    for memory in (a, b, c, d):
        memory.close()
    assert n_files() == n_open


def test_another_process_has_it_too() -> None:
    (memory,) = on_each(1, lambda rank, ranks: share_memory(N_BYTES, rank, 0, ranks))
    assert memory is not None
    child = os.fork()
    if child == 0:
        memory[100:105] = b"child"
        os._exit(0)
    os.waitpid(child, 0)
    assert memory[100:105] == b"child"


def test_nobody_has_it_if_one_cannot_reach_it(tmp_path: Path) -> None:
    def share(rank: int, ranks: Ranks) -> mmap.mmap | None:
        return share_memory(N_BYTES, rank, 0, ranks, tmp_path if rank else Path("/proc"))

    assert on_each(2, share) == [None, None]


def test_nobody_has_it_if_the_file_is_another_ones(tmp_path: Path) -> None:
    """As in another namespace of processes, where the same number is somebody else."""

    def share(rank: int, ranks: Ranks) -> mmap.mmap | None:
        return share_memory(N_BYTES, rank, 0, ranks, tmp_path if rank else Path("/proc"))

    files = tmp_path / str(os.getpid()) / "fd"
    files.mkdir(parents=True)
    for fd in range(64):
        (files / str(fd)).write_bytes(bytes(N_BYTES))
    assert on_each(2, share) == [None, None]


def test_nobody_has_it_where_files_in_memory_are_forbidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(name: str) -> int:
        raise PermissionError(name)

    monkeypatch.setattr(os, "memfd_create", forbidden)
    assert on_each(2, lambda rank, ranks: share_memory(N_BYTES, rank, 0, ranks)) == [None, None]
