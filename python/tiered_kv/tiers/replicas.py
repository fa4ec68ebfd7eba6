"""What ranks with equal KV do once for all of them, instead of each for itself.

They share one host pool, and as they decide alike its slots mean the same pages to all. Each writes
a part of what goes there from the device, and loads whatever it needs. One reads and writes the
cold stores. A page counts as moved once all ranks agree on it: each answers for its own part, the
agreement is the minimum, so who has no part in a move says that all of it is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from tiered_kv.core.ids import PageHash
from tiered_kv.tiers.device import Copying, LayerDone, PageCopier
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.page_store import StoreTraits
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import After

#: Neighbouring host pages that one rank writes: pages in a row are copied as one piece.
BLOCK_PAGES = 8


class PartCopier:
    """Copies to the host what is this rank's to write, and to the device everything.

    place, n_holders: of this rank among those that share the host pool.
    """

    def __init__(self, copier: PageCopier, place: int, n_holders: int) -> None:
        self.page_format: PageFormat = copier.page_format
        self._copier = copier
        self._place = place
        self._n_holders = n_holders

    @property
    def timed(self) -> bool:
        return self._copier.timed

    @timed.setter
    def timed(self, timed: bool) -> None:
        self._copier.timed = timed

    def use_device(self) -> None:
        self._copier.use_device()

    def begin_to_device(
        self,
        host_pages: PageIds,
        device_slots: torch.Tensor,
        after: After,
        layer_done: LayerDone,
    ) -> Copying:
        return self._copier.begin_to_device(host_pages, device_slots, after, layer_done)

    def to_host(
        self,
        device_slots: torch.Tensor,
        host_pages: PageIds,
        after: After,
        part: PageIds | None = None,
    ) -> float | None:
        assert part is None, "the part is for this class to say"
        # By the page, not by its place in the call: ranks may cut a job into other parts.
        own = np.flatnonzero(host_pages // BLOCK_PAGES % self._n_holders == self._place)
        if len(own) == 0:
            return None
        return self._copier.to_host(device_slots, host_pages, after, own)


class StoreOfAnother:
    """A cold store, on a rank for which another reads and writes it (a `PageStore`).

    Only the other can say no.
    """

    def __init__(self, traits: StoreTraits) -> None:
        self.traits = traits

    def known(self, hashes: Sequence[PageHash]) -> int:
        return len(hashes)

    lookup = known

    def get(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        del buffers
        return len(hashes)

    put = get

    def touch(self, hashes: Iterable[PageHash]) -> None:
        pass

    def drop(self, hashes: Sequence[PageHash]) -> int:
        return len(hashes)

    def drain_dropped(self) -> list[PageHash]:
        return []
