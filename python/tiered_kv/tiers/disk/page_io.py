"""Scatter and gather: neighbouring records go to or come from the disk in one system call."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiered_kv.tiers.alignment import round_up
from tiered_kv.tiers.disk.attempt import Attempt
from tiered_kv.tiers.disk.buffers import (
    MAX_PAGES_PER_IO,
    AlignedBuffer,
    Scratch,
    ScratchPool,
)
from tiered_kv.tiers.disk.faults import Blame, blame_of
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.io_path import IoPaths, Reuse
from tiered_kv.tiers.disk.io_pool import InFlight
from tiered_kv.tiers.disk.record import (
    DIGEST_BYTES,
    ENCODING_PLAIN,
    SALT_BYTES,
    RecordHeader,
    checksum,
    pack_record,
    record_fields,
    unpack_record,
)
from tiered_kv.tiers.disk.record_layout import RecordLayout, SealedLayout, transfer_all
from tiered_kv.tiers.disk.segment import Segment
from tiered_kv.tiers.disk.segment_files import SegmentFiles
from tiered_kv.tiers.disk.stall_watch import StallWatch
from tiered_kv.tiers.disk.stats import Counters

if TYPE_CHECKING:
    from tiered_kv.tiers.disk.encryption import PageCipher

SMALLEST_IO_BYTES = 1 << 20
LARGEST_IO_BYTES = 4 << 20

_UNLIMITED: InFlight = contextlib.nullcontext()
_KEPT = Attempt()
"""Nobody abandons it."""


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
    error: OSError | None = None
    """Why the system call failed, if it did."""


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
    # Two for each thread: while one is on its way, the checksums of the next are computed.
    share = math.ceil(len(transfers) * record_bytes / (2 * io_threads))
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
    """Reads and writes runs of records; outcomes are noted in the transfers. Thread-safe."""

    def __init__(
        self,
        files: SegmentFiles,
        io_ops: IoOps,
        paths: IoPaths,
        scratch: ScratchPool,
        counters: Counters,
        *,
        stalls: StallWatch,
        cipher: PageCipher | None = None,
    ) -> None:
        self.stalls = stalls
        self._files = files
        self._io = io_ops
        self._paths = paths
        self._scratch = scratch
        self._counters = counters
        self._cipher = cipher

    def write_run(
        self,
        kind: PageKind,
        run: Sequence[PageTransfer],
        sequence: int,
        in_flight: InFlight = _UNLIMITED,
        reuse: Reuse = Reuse.LATER,
        attempt: Attempt = _KEPT,
    ) -> None:
        """Write records into adjacent slots.

        Raises OSError or AbandonedError; then no page of the run counts.
        """
        self._by_a_path(
            reuse,
            lambda direct: self._write(kind, run, sequence, in_flight, attempt, direct=direct),
        )
        for transfer in run:
            transfer.outcome = Outcome.DONE

    def read_run(
        self,
        kind: PageKind,
        run: Sequence[PageTransfer],
        in_flight: InFlight = _UNLIMITED,
        reuse: Reuse = Reuse.LATER,
    ) -> None:
        """Read records from adjacent slots and verify them. Raises OSError."""
        direct = self._by_a_path(
            reuse, lambda direct: self._read(kind, run, in_flight, direct=direct)
        )
        if (
            not direct
            and self._paths.has_direct
            and any(t.outcome is not Outcome.DONE for t in run)
        ):
            # What the page cache holds may be damaged, or stale, while the device has it right.
            self._files.drop_cached(run[0].segment, run[0].slot, len(run))
            self._read(kind, run, in_flight, direct=True)

    def is_whole(self, kind: PageKind, page_hash: bytes, segment: Segment, slot: int) -> bool:
        """Can this page be read back from this slot? Raises OSError where that isn't its fault."""
        buffer = AlignedBuffer(round_up(kind.page_bytes)).view
        transfer = PageTransfer(0, page_hash, buffer, segment, slot)
        try:
            self.read_run(kind, [transfer])
        except OSError as error:
            if blame_of(error) is not Blame.MEDIUM:
                raise
        return transfer.outcome is Outcome.DONE

    def _by_a_path(self, reuse: Reuse, move: Callable[[bool], None]) -> bool:
        """Move data by the path that suits, or the one that is left; returns if it was direct."""
        direct = self._paths.use_direct(reuse)
        try:
            move(direct)
        except OSError as error:
            if not (direct and self._paths.is_refusal(error)):
                raise
            direct = False
            move(direct)
        return direct

    def _write(
        self,
        kind: PageKind,
        run: Sequence[PageTransfer],
        sequence: int,
        in_flight: InFlight,
        attempt: Attempt,
        *,
        direct: bool,
    ) -> None:
        with self._scratch.borrow() as scratch:
            if self._cipher is None:
                buffers = _pack_plain(kind, run, sequence, scratch, direct=direct)
            else:
                buffers = _pack_sealed(kind, run, sequence, scratch, self._cipher)
            # Only now: what was packed before this point is what the caller gave.
            attempt.check()
            self._transfer(self._io.pwritev, run, buffers, in_flight, direct=direct)
        self._count("direct_write_bytes" if direct else "buffered_write_bytes", run)

    def _read(
        self,
        kind: PageKind,
        run: Sequence[PageTransfer],
        in_flight: InFlight,
        *,
        direct: bool,
    ) -> None:
        with self._scratch.borrow() as scratch:
            payloads = [t.buffer for t in run]
            plain = sealed = None
            if self._cipher is None:
                plain = RecordLayout(kind.page_bytes, payloads, scratch, direct=direct)
            else:
                sealed = SealedLayout(kind.page_bytes, len(run), scratch)
            layout = plain or sealed
            assert layout is not None
            self._transfer(self._io.preadv, run, layout.buffers, in_flight, direct=direct)
            for position, transfer in enumerate(run):
                block = scratch.header(position)
                if plain is not None:
                    plain.copy_out(position)
                    good = _is_page(block, kind, transfer)
                else:
                    assert sealed is not None
                    assert self._cipher is not None
                    good = _unseal(block, kind, transfer, sealed.sealed(position), self._cipher)
                transfer.outcome = Outcome.DONE if good else Outcome.DAMAGED
        self._count("direct_read_bytes" if direct else "buffered_read_bytes", run)

    def _transfer(
        self,
        call: Callable[[int, Sequence[memoryview], int], int],
        run: Sequence[PageTransfer],
        buffers: Sequence[memoryview],
        in_flight: InFlight,
        *,
        direct: bool,
    ) -> None:
        """The system calls for a run; once more if the open file turns out to lead nowhere."""
        segment, offset = run[0].segment, run[0].segment.record_offset(run[0].slot)

        def transfer() -> None:
            opened = self._files.opened(segment, direct=direct)
            with in_flight, self.stalls.watch(), opened as fd:
                transfer_all(call, fd, buffers, offset)

        try:
            transfer()
        except OSError as error:
            if blame_of(error) is not Blame.HANDLE:
                raise
            self._files.forget(segment.number)
            transfer()

    def sync(self, written: Iterable[PageTransfer]) -> None:
        """Put written pages on the device, if the store promises that. Raises OSError."""
        if self._files.sync_writes:
            for segment in {t.segment.number: t.segment for t in written}.values():
                with self.stalls.watch():
                    self._files.sync(segment)

    def _count(self, counter: str, run: Sequence[PageTransfer]) -> None:
        self._counters.add(**{counter: len(run) * run[0].segment.record_bytes})


def _pack_plain(
    kind: PageKind, run: Sequence[PageTransfer], sequence: int, scratch: Scratch, *, direct: bool
) -> Sequence[memoryview]:
    layout = RecordLayout(kind.page_bytes, [t.buffer for t in run], scratch, direct=direct)
    for position, transfer in enumerate(run):
        digest = checksum(transfer.buffer[: kind.page_bytes])
        header = RecordHeader(
            kind.namespace_id, transfer.page_hash, kind.page_bytes, sequence, digest
        )
        pack_record(scratch.header(position), header)
        layout.copy_in(position)
    return layout.buffers


def _pack_sealed(
    kind: PageKind,
    run: Sequence[PageTransfer],
    sequence: int,
    scratch: Scratch,
    cipher: PageCipher,
) -> Sequence[memoryview]:
    layout = SealedLayout(kind.page_bytes, len(run), scratch)
    for position, transfer in enumerate(run):
        header = RecordHeader(
            kind.namespace_id,
            transfer.page_hash,
            kind.page_bytes,
            sequence,
            bytes(DIGEST_BYTES),
            cipher.encoding,
            os.urandom(SALT_BYTES),
        )
        tag = cipher.encrypt(
            record_fields(header),
            header.salt,
            transfer.buffer[: kind.page_bytes],
            layout.sealed(position),
        )
        pack_record(scratch.header(position), dataclasses.replace(header, payload_checksum=tag))
    return layout.buffers


def _is_page(block: memoryview, kind: PageKind, transfer: PageTransfer) -> bool:
    """Is the payload that was read with this header the whole page that was asked for?"""
    header = unpack_record(block)
    return (
        header is not None
        and _is_of(header, kind, transfer, ENCODING_PLAIN)
        and header.payload_checksum == checksum(transfer.buffer[: kind.page_bytes])
    )


def _unseal(
    block: memoryview,
    kind: PageKind,
    transfer: PageTransfer,
    sealed: memoryview,
    cipher: PageCipher,
) -> bool:
    """Decrypt into the caller's memory; False if this is not the page that was asked for."""
    header = unpack_record(block)
    if header is None or not _is_of(header, kind, transfer, cipher.encoding):
        return False
    sealed[kind.page_bytes :] = header.payload_checksum
    payload = transfer.buffer[: kind.page_bytes]
    return cipher.decrypt(record_fields(header), header.salt, sealed, payload)


def _is_of(header: RecordHeader, kind: PageKind, transfer: PageTransfer, encoding: int) -> bool:
    return (
        header.page_hash == transfer.page_hash
        and header.namespace_id == kind.namespace_id
        and header.payload_bytes == kind.page_bytes
        and header.encoding == encoding
    )
