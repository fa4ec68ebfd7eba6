"""The keeper: one thread that does what takes I/O and no caller should wait for.

It makes room for writes, ahead of need; deletes what was cleared; packs the index's rows and gives
its unused blocks back; and saves the order of use about once a minute, so that it survives
`kill -9`. Work is done in small steps, and what somebody waits for comes first after each.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.faults import is_damage
from tiered_kv.tiers.disk.generation import write_generation
from tiered_kv.tiers.disk.index_upkeep import IndexUpkeep
from tiered_kv.tiers.disk.reclaimer import Reclaimer
from tiered_kv.tiers.disk.space import SpaceManager
from tiered_kv.tiers.gate import FIRST_PAUSE_S, LONGEST_PAUSE_S

logger = logging.getLogger(__name__)

_BREATH_S = 0.002
"""Between two steps that nobody waits for: others want the index's lock, too."""
_CLOSE_S = 2.0
"""How long closing may give unused blocks of the index back."""


class Keeper:
    """Start it once; it ends with `stop`."""

    def __init__(
        self,
        directory: Path,
        catalog: Catalog,
        *,
        saved_generation: int | None,
        sync_writes: bool,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """saved_generation: what the directory says; None if it doesn't."""
        self._directory = directory
        self._catalog = catalog
        self._sync_writes = sync_writes
        self._now = now
        self._wake = threading.Event()
        self._is_stopping = False
        self._saved_generation = saved_generation
        self._jobs: list[_Job] = []
        self._tidying: list[Tidying] = []
        self._thread = threading.Thread(
            target=self._run, name="tiered-kv-disk-housekeeping", daemon=True
        )

    def start(
        self,
        space: SpaceManager,
        reclaimer: Reclaimer,
        upkeep: IndexUpkeep,
        mend_index: Callable[[], None],
    ) -> None:
        self._space = space
        self._reclaimer = reclaimer
        self._upkeep = upkeep
        self._mend_index = mend_index
        # The most urgent first.
        self._jobs = [
            _Job(self.save_generation),
            _Job(self._make_spares),
            _Job(self._tidy),
            _Job(reclaimer.delete_condemned),
            _Job(space.dispose),
            _Job(upkeep.refill),
            _Job(upkeep.pack),
            _Job(upkeep.save_order_of_use),
            _Job(upkeep.forget_namespaces),
            _Job(upkeep.give_back),
        ]
        self._thread.start()

    def wake(self) -> None:
        """There is work. Never waits."""
        self._wake.set()

    def pause(self, seconds: float) -> None:
        """Leave the disk to others for a while, unless a writer waits."""
        deadline = self._now() + seconds
        while (left := deadline - self._now()) > 0:
            # In this order: who asks after the look wakes.
            self._wake.clear()
            if self._space.needs or self._is_stopping:
                break
            self._wake.wait(left)

    def save_generation(self) -> bool:
        """Note on disk how often everything was cleared; False if that is known there. The
        thread's. Raises OSError."""
        generation = self._catalog.generation
        if generation == self._saved_generation:
            return False
        write_generation(self._directory, generation, sync=self._sync_writes)
        self._saved_generation = generation
        return True

    def tidy(self) -> None:
        """Delete what holds no page and compact the index; returns when that is done.

        Raises OSError or sqlite3.Error.
        """
        tidying = Tidying()
        self._tidying.append(tidying)
        self.wake()
        while not tidying.is_over.wait(0.1):
            if not self._thread.is_alive():
                return
        if tidying.error is not None:
            raise tidying.error

    def stop(self, timeout_s: float) -> bool:
        """End what is under way and save what is known; False if that takes longer."""
        self._is_stopping = True
        self.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- the thread

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                if not self._step():
                    self._wake.wait(self._idle_s())
            except Exception:
                logger.exception("Disk tier %s: an error nobody foresaw", self._directory)
                self._wake.wait(FIRST_PAUSE_S)
            self._wake.clear()
        self._finish()

    def _step(self) -> bool:
        """Do the most urgent thing there is; False if there is nothing to do now."""
        if self._serve_needs():
            return True
        for job in self._jobs:
            if job.retry_at <= self._now() and self._try(job):
                self.pause(_BREATH_S)
                return True
        return False

    def _try(self, job: _Job) -> bool:
        try:
            did = job.run()
        except Exception as error:
            # Whatever it is: what comes after this job must not be kept from being done.
            if not isinstance(error, OSError | sqlite3.Error):
                logger.exception("Disk tier %s: an error nobody foresaw", self._directory)
            elif not job.pause_s:
                logger.warning(
                    "Disk tier %s: something that nobody waits for went wrong (%s); it is tried "
                    "again by itself.",
                    self._directory,
                    error,
                )
            job.back_off(self._now())
            if isinstance(error, sqlite3.Error) and is_damage(error):
                self._mend_index()
            return False
        job.pause_s = 0.0
        return did

    def _idle_s(self) -> float:
        """How long there is nothing to do, unless somebody says that there is."""
        wake_at = [job.retry_at for job in self._jobs if job.pause_s]
        return max(min([*wake_at, self._upkeep.next_save_at]) - self._now(), 0.01)

    def _serve_needs(self) -> bool:
        """Make room for writers that wait."""
        for record_bytes in list(self._space.needs):
            error: Exception | None = None
            has_room = True
            try:
                while has_room and not self._space.has_free(record_bytes):
                    has_room = self._reclaimer.make_room(record_bytes, at_once=True)
            except Exception as raised:
                has_room, error = False, raised
            self._space.end_need(record_bytes, has_room=has_room, error=error)
            return True
        return False

    def _make_spares(self) -> bool:
        sizes = self._space.sizes_short_of_spares()
        return any(self._reclaimer.make_room(size, at_once=False) for size in sizes)

    def _tidy(self) -> bool:
        if not self._tidying:
            return False
        tidying = self._tidying.pop(0)
        try:
            while self._space.condemn_free(even_spares=True) or self._reclaimer.delete_condemned():
                self._let_others()
            self._upkeep.compact(self._let_others)
        except (OSError, sqlite3.Error) as error:
            tidying.error = error
        tidying.is_over.set()
        return True

    def _let_others(self) -> bool:
        """In the middle of something long: who wants to write does not wait for the end of it."""
        self._serve_needs()
        self.pause(_BREATH_S)
        return True

    def _finish(self) -> None:
        """The last thing: what the next run should know."""
        deadline = self._now() + _CLOSE_S
        try:
            self.save_generation()
            self._upkeep.save_all()
            self._upkeep.compact(lambda: self._now() < deadline)
        except (OSError, sqlite3.Error) as error:
            logger.warning("Disk tier: the order of use was not saved (%s).", error)
        for tidying in self._tidying:
            tidying.is_over.set()


class _Job:
    """Work that nobody waits for: after an error it rests 1 s, then twice as long, up to 60 s."""

    def __init__(self, run: Callable[[], bool]) -> None:
        self.run = run
        self.retry_at = 0.0
        self.pause_s = 0.0

    def back_off(self, now: float) -> None:
        self.pause_s = min(max(2 * self.pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        self.retry_at = now + self.pause_s


class Tidying:
    """Somebody waits until everything is in order."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.error: Exception | None = None
