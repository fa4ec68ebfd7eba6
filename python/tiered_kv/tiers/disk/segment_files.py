"""Files of segments: create, format, open, delete."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from tiered_kv.tiers.disk.buffers import AlignedBuffer
from tiered_kv.tiers.disk.faults import Blame, blame_of
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.record import BLOCK_BYTES, pack_segment
from tiered_kv.tiers.disk.segment import Segment

SEGMENT_SUFFIX = ".seg"


def segment_paths(directory: Path) -> list[Path]:
    """Every segment file, by number."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.suffix == SEGMENT_SUFFIX and path.stem.isdecimal()
    )


class SegmentFiles:
    """Owns the file descriptors of every segment. Methods raise OSError."""

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

    def path(self, number: int) -> Path:
        return self.directory / f"{number:08d}{SEGMENT_SUFFIX}"

    def create(self, number: int, record_bytes: int, slots: int) -> Segment:
        """A new file with all its blocks reserved; nothing is left behind if that fails."""
        segment = Segment(number, self.path(number), record_bytes, slots)
        try:
            fd = self._io.open(segment.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            segment.fds[False] = fd
            with self._watch():
                self._io.allocate(fd, segment.file_bytes)
                self.write_header(segment)
                if self.sync_writes:
                    self._io.fdatasync(fd)
                    self._io.sync_directory(self.directory)
        except OSError:
            self.close(segment)
            with contextlib.suppress(OSError):
                self.delete(segment.path)
            raise
        return segment

    def write_header(self, segment: Segment) -> None:
        block = AlignedBuffer(BLOCK_BYTES).view
        pack_segment(block, segment.header)
        self._io.pwritev(self.fd(segment, direct=False), [block], 0)

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
        return self.has_size(segment.path, segment.file_bytes)

    def fd(self, segment: Segment, *, direct: bool) -> int:
        """The segment's descriptor for this path, opened at first use."""
        fd = segment.fds.get(direct)
        if fd is not None:
            return fd
        with self._lock:
            if direct not in segment.fds:
                segment.fds[direct] = self._io.open(segment.path, self._open_flags(direct=direct))
            return segment.fds[direct]

    def reopen(self, segment: Segment, *, direct: bool) -> None:
        """Open the file anew under its descriptor: I/O under way goes on with the old one."""
        with self._lock:
            old = segment.fds.get(direct)
            if old is not None:
                new = self._io.open(segment.path, self._open_flags(direct=direct))
                os.dup2(new, old, inheritable=False)
                self._io.close(new)

    def _open_flags(self, *, direct: bool) -> int:
        return (os.O_RDONLY if self._read_only else os.O_RDWR) | (os.O_DIRECT if direct else 0)

    def sync(self, segment: Segment) -> None:
        self._io.fdatasync(self.fd(segment, direct=False))

    def drop_cached(self, segment: Segment, first_slot: int, n_slots: int) -> None:
        """Forget what the page cache holds of these slots (what is dirty is kept). Never raises."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(
                self.fd(segment, direct=False),
                segment.record_offset(first_slot),
                n_slots * segment.record_bytes,
                os.POSIX_FADV_DONTNEED,
            )

    def delete(self, path: Path) -> None:
        """Remove a segment's file. The caller closes it once no reader or writer is left."""
        self._io.delete(path)

    def close(self, segment: Segment) -> None:
        with self._lock:
            for fd in segment.fds.values():
                self._io.close(fd)
            segment.fds.clear()
