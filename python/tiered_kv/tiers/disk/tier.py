"""The disk tier as a server has it: in use, only read, or not there, and mending itself.

A store is opened, looked after and closed on a thread of its own. Whatever becomes of it, the
namespaces that were handed out stay, and the scheduler's thread never waits: without a store they
hold nothing and take nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

from tiered_kv.core.errors import DiskStateError, DiskTierError
from tiered_kv.tiers.alignment import round_up
from tiered_kv.tiers.disk.budget import Budget
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.stats import Counters, DiskStats
from tiered_kv.tiers.disk.store import CLOSE_TIMEOUT_S, DiskStore
from tiered_kv.tiers.gate import FIRST_PAUSE_S, LONGEST_PAUSE_S

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 3.0
"""A start waits so long for the store, enough to tell misuse and to load a few million pages;
serving begins without it if it takes longer."""
LOOK_S = 10.0
"""So often it is looked whether the files are still there."""


class StoreOpener(Protocol):
    """Opens one store, again and again if need be (see `shards.ShardOpener`)."""

    def open(self) -> DiskStore: ...

    def open_read_only(self) -> DiskStore | None: ...

    def can_write(self) -> bool: ...

    def begin_anew(self) -> None: ...

    def release(self) -> None: ...


class DiskTier:
    """One store's worth of pages, in whatever state its directory is. Thread-safe."""

    def __init__(self, opener: StoreOpener, name: str, capacity_bytes: int) -> None:
        """Use `open`. name: the directory, for the log."""
        self.name = name
        self.capacity_bytes = capacity_bytes
        self._opener = opener
        self._lock = threading.Lock()
        self._store: DiskStore | None = None
        self._namespaces: weakref.WeakSet[TierNamespace] = weakref.WeakSet()
        # Stores that are out of use and not closed yet.
        self._retired: list[DiskStore] = []
        # What the counters of stores said that are closed: counters never go back.
        self._counted = dict.fromkeys(Counters.NAMES, 0)
        # Times that everything was to be deleted while no store could do it.
        self._n_clears = 0
        self._wake = threading.Event()
        self._is_closing = False
        # What the start waits for; once it is over, misuse is trouble like any other.
        self._first_outcome = threading.Event()
        self._is_started = False
        self._misuse: DiskTierError | None = None
        self._troubled_since: float | None = None
        self._thread = threading.Thread(target=self._keep, name="tiered-kv-disk-tier", daemon=True)

    @classmethod
    def open(
        cls,
        opener: StoreOpener,
        name: str,
        capacity_bytes: int,
        timeout_s: float = START_TIMEOUT_S,
    ) -> DiskTier:
        """Returns a tier in use, or one that will be as soon as its disk allows.

        Raises DiskTierError for misuse: in use by another server, not ours, no or the wrong key.
        """
        tier = cls(opener, name, capacity_bytes)
        began_s = time.monotonic()
        tier._thread.start()
        if not tier._first_outcome.wait(timeout_s):
            logger.warning(
                "Disk tier %s is not open after %.0f s: the server starts without it, and uses it "
                "as soon as it is.",
                name,
                timeout_s,
            )
        with tier._lock:
            tier._is_started = tier._misuse is None
            if tier._troubled_since is None and tier._store is None:
                tier._troubled_since = began_s
        if tier._misuse is not None:
            raise tier._misuse
        return tier

    # -- what the scheduler's thread calls

    def namespace(
        self, namespace_id: bytes, page_bytes: int, description: str = ""
    ) -> TierNamespace:
        """The pages of one namespace, now and whenever the store comes back. Never waits.

        namespace_id: 32 bytes. page_bytes: payload bytes of every page in it. Raises DiskTierError
        if the capacity is too small for them.
        """
        Budget(self.capacity_bytes).slots_per_segment(BLOCK_BYTES + round_up(page_bytes))
        namespace = TierNamespace(namespace_id, page_bytes, description)
        with self._lock:
            self._namespaces.add(namespace)
            if self._store is not None:
                namespace.bind(self._store)
        return namespace

    def stats(self) -> DiskStats:
        """As `DiskStore.stats`; never waits for the disk."""
        with self._lock:
            store = self._store
            counted = collections.Counter(self._counted)
            for retired in self._retired:
                counted.update(retired.counters.snapshot())
        if store is None:
            return DiskStats.without_store(self.capacity_bytes, counted)
        stats = store.stats()
        totals = {name: getattr(stats, name) + n for name, n in counted.items()}
        return dataclasses.replace(stats, **totals)

    def clear(self) -> None:
        """Forget every page, at once; if the store cannot, the next begins by deleting them."""
        with self._lock:
            store = self._store
            if store is None or store.read_only:
                self._n_clears += 1
                self._opener.begin_anew()
                self._take_out()
                store = None
        if store is not None:
            store.clear()
        self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Close the store. What hangs for longer than `timeout_s` is left to the process's end."""
        deadline = time.monotonic() + timeout_s
        self._is_closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return
        with self._lock:
            self._take_out()
        if self._close_retired(max(deadline - time.monotonic(), 0.0)):
            self._opener.release()

    # -- the tier's own thread

    def _keep(self) -> None:
        pause_s = 0.0
        while not self._is_closing:
            try:
                pause_s = self._mend(pause_s)
            except DiskTierError as error:
                if self._ends_start(error):
                    return
                pause_s = self._note_trouble(str(error), pause_s)
            except Exception:
                logger.exception("Disk tier %s: an error nobody foresaw", self.name)
                pause_s = _longer(pause_s)
            self._first_outcome.set()
            if self._wake.wait(pause_s):
                pause_s = 0.0  # Things have changed: how often it failed before says nothing.
            self._wake.clear()

    def _ends_start(self, misuse: DiskTierError) -> bool:
        """Misuse is told to whoever starts the server, while he waits."""
        with self._lock:
            if self._is_started or self._first_outcome.is_set():
                return False
            self._misuse = misuse
        self._opener.release()
        self._first_outcome.set()
        return True

    def _mend(self, pause_s: float) -> float:
        """One round: look after the store, or try to get one. Returns the pause until the next.

        Raises DiskTierError.
        """
        store = self._store
        if store is not None:
            if store.read_only and not self._opener.can_write():
                return _longer(pause_s)
            if not store.read_only:
                if self._is_whole(store):
                    return LOOK_S
                pause_s = 0.0
            with self._lock:
                self._take_out()
        if not self._close_retired(CLOSE_TIMEOUT_S):
            return _longer(pause_s)
        n_clears = self._n_clears
        try:
            opened = self._opener.open()
        except DiskStateError as error:
            return self._read_only(error, pause_s)
        if not self._put_in(opened, n_clears):
            return 0.0
        if self._troubled_since is not None:
            logger.warning(
                "Disk tier %s is in use after %.0f s, with %d pages.",
                self.name,
                time.monotonic() - self._troubled_since,
                opened.stats().pages,
            )
            self._troubled_since = None
        return LOOK_S

    def _read_only(self, error: DiskStateError, pause_s: float) -> float:
        """The disk is at fault: at least read what is there."""
        how = "the server runs without it"
        n_clears = self._n_clears
        try:
            store = self._opener.open_read_only()
        except DiskTierError:
            store = None
        if store is not None and not store.stats().pages:
            store.close()
            store = None
        if store is not None and self._put_in(store, n_clears):
            how = f"its {store.stats().pages} pages are read, and none are written"
        return self._note_trouble(f"{error} Until then {how}", pause_s)

    def _note_trouble(self, what: str, pause_s: float) -> float:
        if self._troubled_since is None:
            self._troubled_since = time.monotonic()
            logger.warning("%s; it is tried again by itself.", what.rstrip("."))
            return FIRST_PAUSE_S
        return _longer(pause_s)

    def _is_whole(self, store: DiskStore) -> bool:
        """False if the store is of no use any more."""
        try:
            if store.look_after_files():
                return True
        except OSError:
            return True  # Reads and writes will tell.
        logger.warning(
            "Disk tier %s: its directory was deleted or replaced by somebody else; it begins anew.",
            self.name,
        )
        self._troubled_since = time.monotonic()
        return False

    def _put_in(self, store: DiskStore, n_clears: int) -> bool:
        """Use the store, unless what is in it was cleared while it was opened."""
        with self._lock:
            if self._n_clears != n_clears:
                self._retired.append(store)
                return False
            self._store = store
            for namespace in self._namespaces:
                try:
                    namespace.bind(store)
                except DiskTierError as error:  # The others have theirs all the same.
                    logger.warning("%s It has no pages on disk.", error)
            return True

    def _take_out(self) -> None:
        """The store is out of use, and to be closed. The caller holds the lock."""
        if self._store is not None:
            self._retired.append(self._store)
            self._store = None
            for namespace in self._namespaces:
                namespace.release()

    def _close_retired(self, timeout_s: float) -> bool:
        """False if one of them is still busy: then its directory is, too."""
        deadline = time.monotonic() + timeout_s
        for store in list(self._retired):
            if not store.close(max(deadline - time.monotonic(), 0.0)):
                return False
            with self._lock:
                self._retired.remove(store)
                for name, n in store.counters.snapshot().items():
                    self._counted[name] += n
        return True


def _longer(pause_s: float) -> float:
    return min(max(2 * pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)


class TierNamespace:
    """The pages of one namespace: those of a `DiskNamespace` while there is a store, else none.

    See `DiskNamespace` for what each call does. While the disk does not answer nothing is there.
    """

    def __init__(self, namespace_id: bytes, page_bytes: int, description: str) -> None:
        self.namespace_id = namespace_id
        self.page_bytes = page_bytes
        self._description = description
        self._bound: DiskNamespace | None = None
        self._has_lost_all = False

    def bind(self, store: DiskStore) -> None:
        """Raises DiskTierError if the store has the namespace with pages of another size."""
        self._bound = store.namespace(self.namespace_id, self.page_bytes, self._description)

    def release(self) -> None:
        self._has_lost_all = self._bound is not None
        self._bound = None

    def __len__(self) -> int:
        bound = self._bound
        return 0 if bound is None else len(bound)

    def contains(self, page_hash: bytes) -> bool:
        bound = self._bound
        return bound is not None and bound.contains(page_hash) and not bound.is_stalled()

    def count_prefix(self, hashes: Sequence[bytes]) -> int:
        bound = self._bound
        return 0 if bound is None or bound.is_stalled() else bound.count_prefix(hashes)

    def write_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> int:
        bound = self._bound
        return 0 if bound is None else bound.write_pages(hashes, buffers)

    def read_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> int:
        bound = self._bound
        return 0 if bound is None else bound.read_pages(hashes, buffers)

    def touch(self, hashes: Iterable[bytes]) -> None:
        bound = self._bound
        if bound is not None:
            bound.touch(hashes)

    def drop_pages(self, hashes: Sequence[bytes]) -> int:
        """What cannot be taken out of the index comes back with the next start; returns 0 then."""
        bound = self._bound
        try:
            return 0 if bound is None else bound.drop_pages(hashes)
        except sqlite3.Error as error:
            logger.warning("Disk tier: pages that were dropped may come back: %s.", error)
            return 0

    def drain_dropped(self) -> list[bytes] | None:
        if self._has_lost_all:
            self._has_lost_all = False
            return None
        bound = self._bound
        return [] if bound is None else bound.drain_dropped()
