"""Files of segments: create, format, open, delete."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from tiered_kv.tiers.disk.buffers import AlignedBuffer
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

    def __init__(self, directory: Path, io_ops: IoOps, *, sync_writes: bool = False) -> None:
        self.directory = directory
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
            self._io.allocate(fd, segment.file_bytes)
            self.write_header(segment)
            if self.sync_writes:
                self._io.fdatasync(fd)
                self._io.sync_directory(self.directory)
        except OSError:
            self.close(segment)
            with contextlib.suppress(OSError):
                self.delete(segment)
            raise
        return segment

    def write_header(self, segment: Segment) -> None:
        block = AlignedBuffer(BLOCK_BYTES).view
        pack_segment(block, segment.header)
        self._io.pwritev(self.fd(segment, direct=False), [block], 0)

    def fd(self, segment: Segment, *, direct: bool) -> int:
        """The segment's descriptor for this path, opened at first use."""
        fd = segment.fds.get(direct)
        if fd is not None:
            return fd
        with self._lock:
            if direct not in segment.fds:
                flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
                segment.fds[direct] = self._io.open(segment.path, flags)
            return segment.fds[direct]

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

    def delete(self, segment: Segment) -> None:
        """Remove the file. The caller closes it once no reader or writer is left."""
        self._io.delete(segment.path)

    def close(self, segment: Segment) -> None:
        with self._lock:
            for fd in segment.fds.values():
                self._io.close(fd)
            segment.fds.clear()
