"""Scatter and gather: neighbouring records go to or come from the disk in one system call."""

from __future__ import annotations

import contextlib
import enum
import errno
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tiered_kv.tiers.disk.buffers import MAX_PAGES_PER_IO, Scratch, ScratchPool, is_aligned
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.io_path import PathPolicy
from tiered_kv.tiers.disk.io_pool import InFlight
from tiered_kv.tiers.disk.record import (
    BLOCK_BYTES,
    ENCODING_PLAIN,
    RecordHeader,
    checksum,
    pack_record,
    round_up,
    unpack_record,
)
from tiered_kv.tiers.disk.segment import Segment
from tiered_kv.tiers.disk.segment_files import SegmentFiles

SMALLEST_IO_BYTES = 1 << 20
LARGEST_IO_BYTES = 4 << 20

_UNLIMITED: InFlight = contextlib.nullcontext()


class Outcome(enum.Enum):
    """What became of one page of an I/O."""

    DONE = enum.auto()
    DAMAGED = enum.auto()
    """The slot does not hold this page, or not whole: torn, flipped, or reused meanwhile."""
    FAILED = enum.auto()
    """The system call failed."""


@dataclass(slots=True)
class PageTransfer:
    """One page on its way between a caller's buffer and a slot."""

    position: int
    """Place in the caller's batch."""
    page_hash: bytes
    buffer: memoryview
    """Bytes, `page_bytes` or `slot_bytes` long."""
    segment: Segment
    slot: int
    outcome: Outcome = Outcome.FAILED


@dataclass(frozen=True, slots=True)
class PageKind:
    """What the records of one namespace have in common."""

    namespace_id: bytes
    page_bytes: int


def plan_runs(transfers: Sequence[PageTransfer], io_threads: int) -> list[list[PageTransfer]]:
    """Group pages in adjacent slots into I/Os, small enough that every thread gets a share.

    The runs that hold the head of the batch come first: a reader wants a prefix.
    """
    if not transfers:
        return []
    record_bytes = transfers[0].segment.record_bytes
    share = math.ceil(len(transfers) * record_bytes / io_threads)
    io_bytes = min(max(share, SMALLEST_IO_BYTES), LARGEST_IO_BYTES)
    pages_per_io = min(max(math.ceil(io_bytes / record_bytes), 1), MAX_PAGES_PER_IO)
    runs: list[list[PageTransfer]] = []
    for transfer in sorted(transfers, key=lambda t: (t.segment.number, t.slot)):
        run = runs[-1] if runs else None
        if (
            run is not None
            and len(run) < pages_per_io
            and run[-1].segment is transfer.segment
            and run[-1].slot + 1 == transfer.slot
        ):
            run.append(transfer)
        else:
            runs.append([transfer])
    runs.sort(key=lambda r: min(t.position for t in r))
    return runs


class PageIo:
    """Reads and writes runs of records; outcomes are noted in the transfers."""

    def __init__(
        self, files: SegmentFiles, io_ops: IoOps, paths: PathPolicy, scratch: ScratchPool
    ) -> None:
        self._files = files
        self._io = io_ops
        self._paths = paths
        self._scratch = scratch

    def write_run(
        self,
        kind: PageKind,
        run: Sequence[PageTransfer],
        sequence: int,
        in_flight: InFlight = _UNLIMITED,
    ) -> None:
        """Write records into adjacent slots. Raises OSError; then no page of the run counts."""
        segment = run[0].segment
        direct = self._paths.use_direct_write(len(run) * segment.record_bytes)
        with self._scratch.borrow() as scratch:
            layout = _Layout(kind, run, scratch, direct=direct)
            for position, transfer in enumerate(run):
                header = RecordHeader(
                    kind.namespace_id,
                    transfer.page_hash,
                    kind.page_bytes,
                    sequence,
                    checksum(transfer.buffer[: kind.page_bytes]),
                )
                pack_record(scratch.header(position), header)
                layout.copy_in(position)
            fd = self._files.fd(segment, direct=direct)
            offset = segment.record_offset(run[0].slot)
            with in_flight:
                transfer_all(self._io.pwritev, fd, layout.buffers, offset)
        for transfer in run:
            transfer.outcome = Outcome.DONE

    def read_run(
        self, kind: PageKind, run: Sequence[PageTransfer], in_flight: InFlight = _UNLIMITED
    ) -> None:
        """Read records from adjacent slots and verify them. Raises OSError."""
        segment = run[0].segment
        direct = self._paths.use_direct_read(len(run) * segment.record_bytes)
        with self._scratch.borrow() as scratch:
            layout = _Layout(kind, run, scratch, direct=direct)
            fd = self._files.fd(segment, direct=direct)
            offset = segment.record_offset(run[0].slot)
            with in_flight:
                transfer_all(self._io.preadv, fd, layout.buffers, offset)
            for position, transfer in enumerate(run):
                layout.copy_out(position)
                header = unpack_record(scratch.header(position))
                good = header is not None and _is_page(header, kind, transfer)
                transfer.outcome = Outcome.DONE if good else Outcome.DAMAGED

    def sync(self, written: Iterable[PageTransfer]) -> None:
        """Put written pages on the device, if the store promises that. Raises OSError."""
        if self._files.sync_writes:
            for segment in {t.segment.number: t.segment for t in written}.values():
                self._files.sync(segment)


def _is_page(header: RecordHeader, kind: PageKind, transfer: PageTransfer) -> bool:
    """Is the payload that was read with this header the whole page that was asked for?"""
    return (
        header.page_hash == transfer.page_hash
        and header.namespace_id == kind.namespace_id
        and header.payload_bytes == kind.page_bytes
        and header.encoding == ENCODING_PLAIN
        and header.payload_checksum == checksum(transfer.buffer[: kind.page_bytes])
    )


class _Layout:
    """The buffers of one I/O: per page its header block, then memory for its padded payload.

    A payload goes straight to or from the caller's memory. If it ends inside a block, its tail
    takes the way through a scratch block, so that nothing is written past the caller's view;
    if direct I/O cannot use the caller's memory at all, the whole payload does.
    """

    def __init__(
        self, kind: PageKind, run: Sequence[PageTransfer], scratch: Scratch, *, direct: bool
    ) -> None:
        self._page_bytes = kind.page_bytes
        slot_bytes = round_up(kind.page_bytes)
        self.buffers: list[memoryview] = []
        # Per page: (part of the caller's memory, scratch memory it is copied through).
        self._copies: list[tuple[memoryview, memoryview] | None] = []
        bounced = [direct and not is_aligned(t.buffer) for t in run]
        bounce = scratch.bounce(sum(bounced) * slot_bytes) if any(bounced) else None
        for position, transfer in enumerate(run):
            self.buffers.append(scratch.header(position))
            buffer = transfer.buffer
            if bounced[position]:
                assert bounce is not None
                through, bounce = bounce[:slot_bytes], bounce[slot_bytes:]
                self.buffers.append(through)
                self._copies.append((buffer[: kind.page_bytes], through))
            elif len(buffer) == slot_bytes:
                self.buffers.append(buffer)
                self._copies.append(None)
            else:
                whole = kind.page_bytes & -BLOCK_BYTES
                tail = scratch.tail(position)
                self.buffers += [buffer[:whole], tail] if whole else [tail]
                self._copies.append((buffer[whole:], tail))

    def copy_in(self, position: int) -> None:
        copy = self._copies[position]
        if copy is not None:
            ours, through = copy
            through[: len(ours)] = ours

    def copy_out(self, position: int) -> None:
        copy = self._copies[position]
        if copy is not None:
            ours, through = copy
            ours[:] = through[: len(ours)]


def transfer_all(
    call: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    buffers: Sequence[memoryview],
    offset: int,
) -> None:
    """Repeat a short read or write until everything went through; OSError if it gets stuck."""
    remaining = list(buffers)
    while remaining:
        done = call(fd, remaining, offset)
        expected = sum(map(len, remaining))
        if done >= expected:
            return
        # Direct I/O can only go on from a block boundary.
        done &= -BLOCK_BYTES
        if done <= 0:
            raise OSError(errno.EIO, f"short transfer, {os.strerror(errno.EIO)}")
        offset += done
        while done >= len(remaining[0]):
            done -= len(remaining[0])
            del remaining[0]
        if done:
            remaining[0] = remaining[0][done:]
