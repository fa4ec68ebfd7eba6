"""Memory that several processes of one machine have in common.

A file in memory (memfd) without a name: it needs no /dev/shm, which containers make small, and it
is gone when the last process that maps it is.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from pathlib import Path
from typing import Protocol

from tiered_kv.tiers.transfer import Collective

_MARK_BYTES = 16
_OFFER = struct.Struct(f"<qq{_MARK_BYTES}s")
_NAME = "tiered-kv-host"


class Ranks(Collective, Protocol):
    """What the ranks of a server tell each other; all of them make each call."""

    def gather(self, data: bytes) -> list[bytes]:
        """What every rank gave, in their order; equally long on all."""
        ...


def share_memory(
    n_bytes: int, rank: int, first: int, ranks: Ranks, processes: Path = Path("/proc")
) -> mmap.mmap | None:
    """`n_bytes` that this rank has in common with all that name the same `first` rank.

    Every rank must make the call. Returns None on all of them if one cannot have it. The memory
    takes room as it is written. processes: where the system shows the files that processes have
    open.
    """
    made = _make(n_bytes) if rank == first else None
    fd, mark = (-1, bytes(_MARK_BYTES)) if made is None else made
    try:
        offers = ranks.gather(_OFFER.pack(os.getpid(), fd, mark))
        mapping = _map(processes, n_bytes, *_OFFER.unpack(offers[first]))
        # Nobody needs the first one's file any more once all have answered.
        (is_shared,) = ranks.minimum([int(mapping is not None)])
    finally:
        if fd >= 0:
            os.close(fd)
    return mapping if is_shared else None


def _make(n_bytes: int) -> tuple[int, bytes] | None:
    """A file in memory, and what it begins with."""
    mark = secrets.token_bytes(_MARK_BYTES)
    try:
        fd = os.memfd_create(_NAME)
    except (AttributeError, OSError):  # not Linux; forbidden
        return None
    try:
        os.ftruncate(fd, n_bytes)
        os.pwrite(fd, mark, 0)
    except OSError:
        os.close(fd)
        return None
    return fd, mark


def _map(processes: Path, n_bytes: int, pid: int, fd: int, mark: bytes) -> mmap.mmap | None:
    if fd < 0:
        return None
    try:
        own = os.open(processes / str(pid) / "fd" / str(fd), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        mapping = mmap.mmap(own, n_bytes)
    except OSError:
        return None
    finally:
        os.close(own)
    # In another namespace of processes the number would be somebody else's.
    return mapping if mapping[:_MARK_BYTES] == mark else None
