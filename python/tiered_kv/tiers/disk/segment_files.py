"""Files of segments: create, format, open, delete."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from tiered_kv.tiers.disk.buffers import AlignedBuffer
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.record import BLOCK_BYTES, SegmentHeader, pack_segment
from tiered_kv.tiers.disk.segment import Segment

SEGMENT_SUFFIX = ".seg"

MOST_OPEN = 256
"""Descriptors kept open. One in use is never closed, so there may be a few more."""


def segment_paths(directory: Path) -> list[Path]:
    """Every segment file, by number."""
    return sorted(
        (
            path
            for path in directory.iterdir()
            if path.suffix == SEGMENT_SUFFIX and path.stem.isdecimal()
        ),
        key=lambda path: int(path.stem),
    )


class _Descriptor:
    __slots__ = ("fd", "is_forgotten", "users")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0
        self.is_forgotten = False


class SegmentFiles:
    """Owns the file descriptors of segments, the ones used lately. Methods raise OSError."""

    def __init__(self, directory: Path, io_ops: IoOps, *, sync_writes: bool = False) -> None:
        self.directory = directory
        self.sync_writes = sync_writes
        """Data and names of files reach the device before a page is acknowledged."""
        self._io = io_ops
        self._lock = threading.Lock()
        # By segment number and whether past the page cache; the one used longest ago is first.
        self._open: OrderedDict[tuple[int, bool], _Descriptor] = OrderedDict()

    def path(self, number: int) -> Path:
        return self.directory / f"{number:08d}{SEGMENT_SUFFIX}"

    def create(self, header: SegmentHeader) -> None:
        """A new file with all its blocks reserved; nothing is left behind if that fails."""
        try:
            fd = self._io.open(self.path(header.number), os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                self._io.allocate(fd, Segment.file_size(header.record_bytes, header.slots))
                block = AlignedBuffer(BLOCK_BYTES).view
                pack_segment(block, header)
                self._io.pwritev(fd, [block], 0)
                if self.sync_writes:
                    self._io.fdatasync(fd)
                    self._io.sync_directory(self.directory)
            finally:
                self._io.close(fd)
        except OSError:
            with contextlib.suppress(OSError):
                self.delete(header.number)
            raise

    @contextlib.contextmanager
    def opened(self, segment: Segment, *, direct: bool) -> Iterator[int]:
        """The segment's descriptor for this path, which stays open as long as it is used here."""
        key = (segment.number, direct)
        with self._lock:
            found = self._use(key)
        if found is None:
            # Not under the lock: a disk that hangs must not keep others from what is open.
            fd = self._io.open(segment.path, os.O_RDWR | (os.O_DIRECT if direct else 0))
            found, surplus = self._add(key, fd)
            self._close(surplus)
        try:
            yield found.fd
        finally:
            with self._lock:
                found.users -= 1
                is_last = found.is_forgotten and not found.users
            if is_last:
                self._close([found.fd])

    def _use(self, key: tuple[int, bool]) -> _Descriptor | None:
        found = self._open.get(key)
        if found is not None:
            self._open.move_to_end(key)
            found.users += 1
        return found

    def _add(self, key: tuple[int, bool], fd: int) -> tuple[_Descriptor, list[int]]:
        """The descriptor to use, and those to close."""
        with self._lock:
            found = self._use(key)
            if found is not None:  # Another thread was faster.
                return found, [fd]
            new = self._open[key] = _Descriptor(fd)
            new.users = 1
            idle = [k for k, d in self._open.items() if not d.users]
            surplus = idle[: max(len(self._open) - MOST_OPEN, 0)]
            return new, [self._open.pop(k).fd for k in surplus]

    def _close(self, fds: list[int]) -> None:
        for fd in fds:
            self._io.close(fd)

    def sync(self, segment: Segment) -> None:
        with self.opened(segment, direct=False) as fd:
            self._io.fdatasync(fd)

    def drop_cached(self, segment: Segment, first_slot: int, n_slots: int) -> None:
        """Forget what the page cache holds of these slots (what is dirty is kept). Never raises."""
        with contextlib.suppress(OSError), self.opened(segment, direct=False) as fd:
            os.posix_fadvise(
                fd,
                segment.record_offset(first_slot),
                n_slots * segment.record_bytes,
                os.POSIX_FADV_DONTNEED,
            )

    def delete(self, number: int) -> None:
        """Remove the file; who still uses it finds it cut off."""
        self._io.delete(self.path(number))
        self._forget([(number, direct) for direct in (False, True)])

    def close(self) -> None:
        """Close all descriptors, those in use when they are not any more."""
        self._forget(list(self._open))

    def _forget(self, keys: list[tuple[int, bool]]) -> None:
        idle = []
        with self._lock:
            for key in keys:
                descriptor = self._open.pop(key, None)
                if descriptor is not None:
                    descriptor.is_forgotten = True
                    if not descriptor.users:
                        idle.append(descriptor.fd)
        self._close(idle)
