"""The host tier: a preallocated pool of page slots in main memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tiered_kv.core.errors import ConfigError
from tiered_kv.tiers.host_memory import map_private
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.slots import PageIds, SlotAllocator

#: Fewer slots than this can't hold the pages that are in flight between two tiers.
MIN_HOST_PAGES = 4


class HostPool:
    """`n_pages` slots of `slot_bytes` in one mapping (aligned for O_DIRECT).

    pages: uint8 array of shape (n_pages, slot_bytes); a page's bytes are the first page_bytes.
    `register(address, n_bytes)` pins the mapping for DMA on a GPU; None leaves it pageable.
    shared: `size_bytes` of memory in which other ranks have the same pool; None: memory of its own.
    """

    def __init__(
        self,
        page_format: PageFormat,
        size_bytes: int,
        register: Callable[[int, int], None] | None = None,
        shared: mmap.mmap | None = None,
    ) -> None:
        self.page_format = page_format
        self.slot_bytes = page_format.slot_bytes
        n_pages = size_bytes // self.slot_bytes
        if n_pages < MIN_HOST_PAGES:
            raise ConfigError(
                f"the host tier of {size_bytes} bytes is too small: a page of "
                f"{page_format.page_size} tokens takes {self.slot_bytes} bytes here and at least "
                f"{MIN_HOST_PAGES} pages are needed; raise --tiered-kv-host-size to "
                f"{MIN_HOST_PAGES * self.slot_bytes} bytes or more"
            )
        n_bytes = n_pages * self.slot_bytes
        self.is_shared = shared is not None
        memory = (
            map_private(n_bytes) if shared is None else np.frombuffer(shared, np.uint8, n_bytes)
        )
        self.pages: npt.NDArray[np.uint8] = memory[:n_bytes].reshape(n_pages, self.slot_bytes)
        self._slots = SlotAllocator(n_pages)
        # How many keep a slot beside the one who counts.
        self._others = np.zeros(n_pages, dtype=np.int16)
        self._n_others = 0
        if register is not None:
            register(self.pages.ctypes.data, self.pages.nbytes)

    @property
    def n_pages(self) -> int:
        return self._slots.n_slots

    @property
    def n_free(self) -> int:
        return self._slots.n_free

    def alloc(self, n_pages: int) -> PageIds | None:
        return self._slots.alloc(n_pages)

    def free(self, ids: PageIds) -> None:
        """Gives slots back; one that `clear` kept for several is free when all of them did."""
        if self._n_others:
            is_held = self._others[ids] > 0
            self._others[ids[is_held]] -= 1
            self._n_others -= int(np.count_nonzero(is_held))
            ids = ids[~is_held]
        self._slots.free(ids)

    def clear(self, keep: Sequence[PageIds]) -> None:
        """All slots but those in `keep` are free: whoever keeps some gives them back himself."""
        ids = np.concatenate([np.empty(0, dtype=np.int64), *keep])
        kept, n_keepers = np.unique(ids, return_counts=True)
        self._slots.clear(kept)
        self._others[:] = 0
        self._others[kept] = n_keepers - 1
        self._n_others = len(ids) - len(kept)

    def views(self, ids: PageIds) -> list[memoryview]:
        """The slots' whole bytes (padding included), writable, without a copy."""
        return [memoryview(self.pages[i]) for i in ids.tolist()]
