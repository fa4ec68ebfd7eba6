"""The disk of disk_at_scale.py: it moves no bytes, and takes the time that a device would."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.record import BLOCK_BYTES, ID_BYTES, RecordHeader, checksum, pack_record

NAMESPACE = hashlib.sha256(b"benchmark").digest()
_HEADER_BYTES = 256
"""More of a block no record's header takes."""


def page_name(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=ID_BYTES).digest()


class SimulatedDisk(IoOps):
    """Every page holds zeros, so that a record is told by its header alone."""

    def __init__(self, page_bytes: int, slots: int, bytes_per_s: float) -> None:
        self._page_bytes = page_bytes
        self._slots = slots
        self._bytes_per_s = bytes_per_s
        self._digest = checksum(bytes(page_bytes))
        self._numbers: dict[int, int] = {}
        # By segment, in one piece: many objects would cost the garbage collector time.
        self._headers: dict[int, bytearray] = {}
        self._lock = threading.Lock()
        self._busy_until = 0.0

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags & ~os.O_DIRECT)
        self._numbers[fd] = int(path.stem) if path.stem.isdecimal() else -1
        return fd

    def allocate(self, fd: int, n_bytes: int) -> None:
        os.ftruncate(fd, n_bytes)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self._numbers[fd] < 0 or offset == 0:
            return super().pwritev(fd, buffers, offset)
        at = offset
        for buffer in buffers:
            if len(buffer) == BLOCK_BYTES:
                number = self._numbers[fd]
                if number not in self._headers:
                    self._headers[number] = bytearray(_HEADER_BYTES * self._slots)
                self._headers[number][self._place(at)] = buffer[:_HEADER_BYTES]
            at += len(buffer)
        self._take_time(at - offset)
        return at - offset

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self._numbers[fd] < 0:
            return super().preadv(fd, buffers, offset)
        at = offset
        for buffer in buffers:
            if len(buffer) == BLOCK_BYTES:
                written = self._headers.get(self._numbers[fd], b"")[self._place(at)]
                if any(written):
                    buffer[:_HEADER_BYTES] = written
                else:
                    pack_record(buffer, self._first_header(self._numbers[fd], at))
            at += len(buffer)
        self._take_time(at - offset)
        return at - offset

    def _place(self, offset: int) -> slice:
        first = self._slot(offset) * _HEADER_BYTES
        return slice(first, first + _HEADER_BYTES)

    def _slot(self, offset: int) -> int:
        return (offset - BLOCK_BYTES) // (BLOCK_BYTES + self._page_bytes)

    def _first_header(self, number: int, offset: int) -> RecordHeader:
        name = page_name(number * self._slots + self._slot(offset))
        return RecordHeader(NAMESPACE, name, self._page_bytes, 1, self._digest)

    def _take_time(self, n_bytes: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._busy_until = max(self._busy_until, now) + n_bytes / self._bytes_per_s
            wait_s = self._busy_until - now
        time.sleep(wait_s)
