"""The disk tier's interface over a dictionary: the reference to test against, and to simulate with.

Same names, same promises as `tiers/disk` (`namespace.DiskNamespace`, `store.DiskStore`), without a
byte on disk: nothing survives the process. Pages are content-addressed, acknowledged one by one,
and the ones used longest ago make room for new ones.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from tiered_kv.core.errors import DiskTierError
from tiered_kv.core.ids import PAGE_HASH_BYTES
from tiered_kv.tiers.alignment import round_up


class InMemoryNamespace:
    """The pages of one namespace. Every method is thread-safe."""

    def __init__(self, namespace_id: bytes, page_bytes: int, store: InMemoryStore) -> None:
        self.namespace_id = namespace_id
        self.page_bytes = page_bytes
        self.slot_bytes = round_up(page_bytes)
        self._store = store
        self._dropped: list[bytes] | None = []

    def __len__(self) -> int:
        """Pages stored."""
        return self._store.count_pages(self.namespace_id)

    def contains(self, page_hash: bytes) -> bool:
        """Is the page stored?"""
        return self._store.find(self.namespace_id, page_hash)

    def count_prefix(self, hashes: Sequence[bytes]) -> int:
        """How many leading pages are stored."""
        for position, page_hash in enumerate(hashes):
            if not self.contains(page_hash):
                return position
        return len(hashes)

    def touch(self, hashes: Iterable[bytes]) -> None:
        """Pages are in use in a nearer tier: they stay as long as pages that are read from here."""
        for page_hash in hashes:
            self._store.get(self.namespace_id, page_hash)

    def drop_pages(self, hashes: Sequence[bytes]) -> int:
        """Forget pages; returns how many there were."""
        return sum(self._store.drop(self.namespace_id, page_hash) for page_hash in hashes)

    def drain_dropped(self) -> list[bytes] | None:
        """Pages given up since the last call; None if all were."""
        dropped, self._dropped = self._dropped, []
        return None if dropped is None else [h for h in dropped if not self.contains(h)]

    def note_dropped(self, page_hash: bytes | None) -> None:
        """The page has gone; None: all have."""
        if page_hash is None:
            self._dropped = None
        elif self._dropped is not None:
            self._dropped.append(page_hash)

    def write_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> int:
        """Store pages; returns how many were not stored before.

        Raises ValueError for hashes or buffers of the wrong number or length.
        """
        views = self._check(hashes, buffers)
        return sum(
            self._store.put(self.namespace_id, page_hash, bytes(view[: self.page_bytes]))
            for page_hash, view in zip(hashes, views, strict=True)
        )

    def read_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> int:
        """Fill buffers; returns the number of leading pages read: the first miss ends it.

        Raises ValueError for hashes or buffers of the wrong number or length.
        """
        views = self._check(hashes, buffers)
        for position, (page_hash, view) in enumerate(zip(hashes, views, strict=True)):
            page = self._store.get(self.namespace_id, page_hash)
            if page is None:
                return position
            view[: self.page_bytes] = page
        return len(hashes)

    def _check(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> list[memoryview]:
        if len(hashes) != len(buffers):
            raise ValueError(f"{len(hashes)} hashes but {len(buffers)} buffers")
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        for page_hash, view in zip(hashes, views, strict=True):
            if len(page_hash) != PAGE_HASH_BYTES:
                raise ValueError(f"a page hash has {PAGE_HASH_BYTES} bytes, not {len(page_hash)}")
            if len(view) not in (self.page_bytes, self.slot_bytes):
                raise ValueError(
                    f"a buffer has {len(view)} bytes, a page {self.page_bytes} (or padded "
                    f"{self.slot_bytes})"
                )
        return views


class InMemoryStore:
    """Namespaces that share `capacity_bytes` (whole slots; None: no limit). Thread-safe.

    After `close` it refuses reads and writes, as a closed store on disk does: they do nothing.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        # Least recently used first, over all namespaces.
        self._pages: OrderedDict[tuple[bytes, bytes], bytes] = OrderedDict()
        self._namespaces: dict[bytes, InMemoryNamespace] = {}
        self._bytes_used = 0
        self._is_closed = False

    def namespace(
        self, namespace_id: bytes, page_bytes: int, description: str = ""
    ) -> InMemoryNamespace:
        """The pages of one namespace, which is made if it is new.

        Raises DiskTierError if the namespace has pages of another size, or one does not fit.
        """
        del description
        with self._lock:
            namespace = self._namespaces.get(namespace_id)
            if namespace is None:
                namespace = InMemoryNamespace(namespace_id, page_bytes, self)
                self._namespaces[namespace_id] = namespace
        if namespace.page_bytes != page_bytes:
            raise DiskTierError(
                f"Namespace {namespace_id.hex()[:16]} holds pages of {namespace.page_bytes} bytes, "
                f"not {page_bytes}: two layouts must not share one namespace id."
            )
        if self.capacity_bytes is not None and namespace.slot_bytes > self.capacity_bytes:
            raise DiskTierError(
                f"A page of {namespace.slot_bytes} bytes does not fit into a tier of "
                f"{self.capacity_bytes} bytes: give it more."
            )
        return namespace

    def clear(self) -> None:
        """Delete every page."""
        with self._lock:
            self._pages.clear()
            self._bytes_used = 0
            for namespace in self._namespaces.values():
                namespace.note_dropped(None)

    def close(self) -> None:
        """Later reads and writes do nothing. Closing twice is harmless."""
        with self._lock:
            self._is_closed = True

    # -- for InMemoryNamespace ----------------------------------------------------------------

    def count_pages(self, namespace_id: bytes) -> int:
        with self._lock:
            return sum(owner == namespace_id for owner, _ in self._pages)

    def find(self, namespace_id: bytes, page_hash: bytes) -> bool:
        with self._lock:
            return (namespace_id, page_hash) in self._pages

    def get(self, namespace_id: bytes, page_hash: bytes) -> bytes | None:
        """The page, which counts as used now; None if it is not stored."""
        key = (namespace_id, page_hash)
        with self._lock:
            if self._is_closed or key not in self._pages:
                return None
            self._pages.move_to_end(key)
            return self._pages[key]

    def drop(self, namespace_id: bytes, page_hash: bytes) -> bool:
        """True if the page was stored and is no more."""
        with self._lock:
            page = self._pages.pop((namespace_id, page_hash), None)
            if page is not None:
                self._bytes_used -= round_up(len(page))
                self._namespaces[namespace_id].note_dropped(page_hash)
            return page is not None

    def put(self, namespace_id: bytes, page_hash: bytes, page: bytes) -> bool:
        """True if the page was not stored before and is now."""
        key = (namespace_id, page_hash)
        with self._lock:
            if self._is_closed or key in self._pages:
                return False
            self._pages[key] = page
            self._bytes_used += round_up(len(page))
            while self.capacity_bytes is not None and self._bytes_used > self.capacity_bytes:
                (owner, name), oldest = self._pages.popitem(last=False)
                self._bytes_used -= round_up(len(oldest))
                self._namespaces[owner].note_dropped(name)
            return True
