"""Files of segments: create, format, open, delete."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from tiered_kv.tiers.disk.buffers import AlignedBuffer
from tiered_kv.tiers.disk.faults import Blame, blame_of
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
    """Owns the descriptors of the segments that were used last. Methods raise OSError."""

    def __init__(
        self,
        directory: Path,
        io_ops: IoOps,
        *,
        sync_writes: bool = False,
        read_only: bool = False,
        watch: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """watch: entered around what waits for the disk."""
        self.directory = directory
        self._watch = watch
        self._read_only = read_only
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
            with self._watch():
                self._create(header)
        except OSError:
            with contextlib.suppress(OSError):
                self.delete(header.number)
            raise

    def _create(self, header: SegmentHeader) -> None:
        block = AlignedBuffer(BLOCK_BYTES).view
        pack_segment(block, header)
        fd = self._io.open(self.path(header.number), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            self._io.allocate(fd, Segment.file_size(header.record_bytes, header.slots))
            self._io.pwritev(fd, [block], 0)
            if self.sync_writes:
                self._io.fdatasync(fd)
                self._io.sync_directory(self.directory)
        finally:
            self._io.close(fd)

    def has_size(self, path: Path, n_bytes: int) -> bool:
        """Is the file there, whole, and within reach?

        Raises OSError if that cannot be told now: the error speaks of the process, or of the whole
        file system.
        """
        try:
            return self._io.size(path) == n_bytes
        except FileNotFoundError:
            return False
        except OSError as error:
            if blame_of(error) is Blame.MEDIUM:
                return False
            raise

    def is_whole(self, segment: Segment) -> bool:
        """See `has_size`."""
        return self.has_size(self.path(segment.number), segment.file_bytes)

    @contextlib.contextmanager
    def opened(self, segment: Segment, *, direct: bool) -> Iterator[int]:
        """The segment's descriptor for this path, which stays open as long as it is used here."""
        key = (segment.number, direct)
        with self._lock:
            found = self._use(key)
        if found is None:
            # Not under the lock: a disk that hangs must not keep others from what is open.
            fd = self._io.open(self.path(segment.number), self._open_flags(direct=direct))
            found = self._add(key, fd)
        try:
            yield found.fd
        finally:
            with self._lock:
                found.users -= 1
                is_last = found.is_forgotten and not found.users
            if is_last:
                self._io.close(found.fd)

    def _use(self, key: tuple[int, bool]) -> _Descriptor | None:
        found = self._open.get(key)
        if found is not None:
            self._open.move_to_end(key)
            found.users += 1
        return found

    def _add(self, key: tuple[int, bool], fd: int) -> _Descriptor:
        """Use this one, or the one that another thread has opened meanwhile."""
        with self._lock:
            surplus = [fd]
            used = self._use(key)
            if used is None:
                used = self._open[key] = _Descriptor(fd)
                used.users = 1
                n_surplus = max(len(self._open) - MOST_OPEN, 0)
                idle = [k for k, d in self._open.items() if n_surplus and not d.users]
                surplus = [self._open.pop(k).fd for k in idle[:n_surplus]]
        for each in surplus:
            self._io.close(each)
        return used

    def _open_flags(self, *, direct: bool) -> int:
        return (os.O_RDONLY if self._read_only else os.O_RDWR) | (os.O_DIRECT if direct else 0)

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
        """Remove a segment's file; who still uses it finds it cut off."""
        with self._watch():
            self._io.delete(self.path(number))
        self.forget(number)

    def forget(self, number: int) -> None:
        """Open the segment anew when it is used next; I/O under way goes on."""
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
        for fd in idle:
            self._io.close(fd)
