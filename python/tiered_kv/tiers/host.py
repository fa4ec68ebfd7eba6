"""The host tier: a preallocated pool of page slots in main memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tiered_kv.core.errors import ConfigError
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.slots import PageIds, SlotAllocator

#: Fewer slots than this can't hold the pages that are in flight between two tiers.
MIN_HOST_PAGES = 4


class HostPool:
    """`n_pages` slots of `slot_bytes` in one anonymous mapping (4 KiB aligned, for O_DIRECT).

    pages: uint8 array of shape (n_pages, slot_bytes); a page's bytes are the first page_bytes.
    `register(address, n_bytes)` pins the mapping for DMA on a GPU; None leaves it pageable.
    """

    def __init__(
        self,
        page_format: PageFormat,
        size_bytes: int,
        register: Callable[[int, int], None] | None = None,
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
        self._mapping = mmap.mmap(-1, n_pages * self.slot_bytes)
        self.pages: npt.NDArray[np.uint8] = np.frombuffer(self._mapping, dtype=np.uint8).reshape(
            n_pages, self.slot_bytes
        )
        self._slots = SlotAllocator(n_pages)
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
        self._slots.free(ids)

    def clear(self, keep: PageIds) -> None:
        """All slots but those in `keep` are free."""
        self._slots.clear(keep)

    def views(self, ids: PageIds) -> list[memoryview]:
        """The slots' whole bytes (padding included), writable, without a copy."""
        return [memoryview(self.pages[i]) for i in ids.tolist()]
