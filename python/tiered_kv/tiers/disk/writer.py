"""`write_pages`: claim, allocate, write data, commit index rows, acknowledge."""

from __future__ import annotations

import itertools
import math
import sqlite3
from collections.abc import Callable, Sequence

from tiered_kv.tiers.disk.attempt import AbandonedError, Attempt
from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.faults import is_damage
from tiered_kv.tiers.disk.index import PageIndex
from tiered_kv.tiers.disk.io_path import Reuse
from tiered_kv.tiers.disk.io_pool import InFlight, IoPool
from tiered_kv.tiers.disk.namespace_entries import NamespaceEntries
from tiered_kv.tiers.disk.page_io import Outcome, PageIo, PageKind, PageTransfer, plan_runs
from tiered_kv.tiers.disk.segment import location, runs_of
from tiered_kv.tiers.disk.space import SpaceManager
from tiered_kv.tiers.disk.stats import Counters
from tiered_kv.tiers.disk.write_gate import WriteGate
from tiered_kv.tiers.gate import Admission


class PageWriter:
    """Thread-safe; one batch uses all I/O threads."""

    def __init__(
        self,
        catalog: Catalog,
        index: PageIndex,
        space: SpaceManager,
        page_io: PageIo,
        pool: IoPool,
        gate: WriteGate,
        counters: Counters,
        mend_index: Callable[[], None],
    ) -> None:
        """`mend_index` is called when the index turns out to be damaged."""
        self._mend_index = mend_index
        self._catalog = catalog
        self._index = index
        self._space = space
        self._page_io = page_io
        self._pool = pool
        self._gate = gate
        self._counters = counters

    def write(
        self,
        entries: NamespaceEntries,
        hashes: Sequence[bytes],
        buffers: Sequence[memoryview],
        reuse: Reuse,
        attempt: Attempt,
    ) -> int:
        """Store the pages that are not stored yet; returns how many this call acknowledged.

        A page that another thread is writing is waited for, not written twice. While the disk does
        not answer, nothing is written. What is cleared before it is acknowledged doesn't count.
        """
        if self._page_io.stalls.is_stalled():
            return 0
        with self._catalog.lock:
            mine, others = self._catalog.claim(entries, hashes)
        written = 0
        try:
            admission = self._gate.try_enter() if mine else None
            if admission is not None:
                written = self._write_admitted(
                    admission,
                    lambda: self._write_claimed(entries, hashes, buffers, mine, reuse, attempt),
                )
        finally:
            with self._catalog.lock:
                self._catalog.release(entries, [hashes[position] for position in mine])
        if others:
            with self._catalog.lock:
                self._catalog.wait_for_others(entries, others)
        return written

    def _write_admitted(
        self, admission: Admission, write: Callable[[], tuple[int, Exception | None]]
    ) -> int:
        """Whatever becomes of the write, the gate is told."""
        try:
            written, error = write()
        except BaseException as raised:
            self._gate.fail(admission, raised)
            raise
        if error is not None:
            self._gate.fail(admission, error)
            self._counters.add(io_errors=1)
            if isinstance(error, sqlite3.Error) and is_damage(error):
                self._mend_index()
        elif written:
            self._gate.succeed(admission)
        else:
            self._gate.leave(admission)
        return written

    def _write_claimed(
        self,
        entries: NamespaceEntries,
        hashes: Sequence[bytes],
        buffers: Sequence[memoryview],
        positions: Sequence[int],
        reuse: Reuse,
        attempt: Attempt,
    ) -> tuple[int, Exception | None]:
        """Returns pages acknowledged, and the error that ended it."""
        written = 0
        error: Exception | None = None
        for chunk in _even_chunks(positions, self._space.pages_per_batch(entries.record_bytes)):
            if error is not None or attempt.is_abandoned:
                break
            try:
                n_written, error = self._write_chunk(
                    entries, hashes, buffers, chunk, reuse, attempt
                )
                written += n_written
            except (OSError, sqlite3.Error) as raised:
                error = raised
        self._counters.add(writes=written, write_bytes=written * entries.page_bytes)
        return written, error

    def _write_chunk(
        self,
        entries: NamespaceEntries,
        hashes: Sequence[bytes],
        buffers: Sequence[memoryview],
        positions: Sequence[int],
        reuse: Reuse,
        attempt: Attempt,
    ) -> tuple[int, Exception | None]:
        """Returns pages acknowledged, and the first error of a data write."""
        slots = self._space.allocate(entries.record_bytes, len(positions))
        try:
            transfers = [
                PageTransfer(position, hashes[position], buffers[position], segment, slot)
                for position, (segment, slot) in zip(positions, slots, strict=False)
            ]
            error = self._write_data(entries, transfers, reuse, attempt)
            done = [t for t in transfers if t.outcome is Outcome.DONE]
            return self._acknowledge(entries, done), error
        finally:
            self._space.finish_writes(slots)

    def _write_data(
        self,
        entries: NamespaceEntries,
        transfers: Sequence[PageTransfer],
        reuse: Reuse,
        attempt: Attempt,
    ) -> OSError | None:
        kind = PageKind(entries.namespace_id, entries.page_bytes)
        with self._catalog.lock:
            sequence = self._catalog.tick()
        errors: list[OSError] = []

        def job(run: Sequence[PageTransfer]) -> Callable[[InFlight], None]:
            def write(in_flight: InFlight) -> None:
                try:
                    self._page_io.write_run(kind, run, sequence, in_flight, reuse, attempt)
                except AbandonedError:
                    pass
                except OSError as error:
                    # The file of a segment that was cleared may be gone already.
                    if self._catalog.is_current(run[0].segment):
                        errors.append(error)

            return write

        self._pool.run([job(run) for run in plan_runs(transfers, self._pool.io_threads)])
        return errors[0] if errors else None

    def _acknowledge(self, entries: NamespaceEntries, done: Sequence[PageTransfer]) -> int:
        try:
            self._page_io.sync(t for t in done if self._catalog.is_current(t.segment))
        except OSError:
            if all(self._catalog.is_current(t.segment) for t in done):
                raise
            return 0
        # The index lock spans commit and catalog, so that nobody sees one without the other.
        with self._index.lock:
            with self._catalog.lock:
                current = [t for t in done if self._catalog.is_current(t.segment)]
                if not current:
                    return 0
                access = self._catalog.tick() << 1
                is_new = self._catalog.register(entries)
                row = entries.row
            current.sort(key=lambda t: (t.segment.number, t.slot))
            self._index.put_runs(
                runs_of(
                    (location(t.segment.number, t.slot), row.number, t.page_hash, access)
                    for t in current
                ),
                [row] if is_new else [],
            )
            with self._catalog.lock:
                n_stored = 0
                for t in current:
                    if self._catalog.is_current(t.segment):
                        self._catalog.put(entries, t.page_hash, t.segment, t.slot, access)
                        n_stored += 1
                entries.is_recorded = entries.is_recorded or entries.row == row
        return n_stored


def _even_chunks(positions: Sequence[int], most: int) -> list[Sequence[int]]:
    """Split into the fewest parts of at most `most`, of one size: a small last part would be one
    more round trip to the disk with nothing to do beside it."""
    n_chunks = math.ceil(len(positions) / most)
    bounds = [len(positions) * i // n_chunks for i in range(n_chunks + 1)]
    return [positions[start:end] for start, end in itertools.pairwise(bounds)]
