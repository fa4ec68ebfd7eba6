"""A store on this machine, which has the names of its pages in memory, as a cold store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.page_store import StoreTraits


class LocalPages(Protocol):
    """The pages of one namespace; `tiers.disk.namespace.DiskNamespace` says what each call does."""

    def __len__(self) -> int: ...

    def contains(self, page_hash: bytes, /) -> bool: ...

    def count_prefix(self, hashes: Sequence[bytes], /) -> int: ...

    def touch(self, hashes: Iterable[bytes], /) -> None: ...

    def write_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview], /) -> int: ...

    def read_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview], /) -> int: ...

    def drop_pages(self, hashes: Sequence[bytes], /) -> int: ...

    def drain_dropped(self) -> list[bytes] | None: ...


class LocalStore:
    """`pages`, which are kept as `page_format` says, as a `PageStore`."""

    def __init__(self, pages: LocalPages, page_format: PageFormat, tier: Tier = Tier.DISK) -> None:
        self.pages = pages
        self.traits = StoreTraits(tier, page_format)

    def known(self, hashes: Sequence[PageHash]) -> int:
        if len(hashes) == 1:  # Most prompts are not here at all.
            return int(self.pages.contains(hashes[0]))
        return self.pages.count_prefix(hashes)

    lookup = known

    def get(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        return self.pages.read_pages(hashes, buffers)

    def put(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        self.pages.write_pages(hashes, buffers)
        return self.pages.count_prefix(hashes)

    def touch(self, hashes: Iterable[PageHash]) -> None:
        self.pages.touch(hashes)

    def drop(self, hashes: Sequence[PageHash]) -> int:
        return self.pages.drop_pages(hashes)

    def drain_dropped(self) -> list[PageHash] | None:
        return self.pages.drain_dropped()
