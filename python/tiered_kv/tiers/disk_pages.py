"""What the pipelines between the tiers ask of the disk tier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class DiskPages(Protocol):
    """The pages of one namespace; `tiers.disk.namespace.DiskNamespace` says what each call does.

    Buffers are host slots: contiguous memoryviews of a page's bytes, padded or not.
    """

    def __len__(self) -> int: ...

    def contains(self, page_hash: bytes, /) -> bool: ...

    def count_prefix(self, hashes: Sequence[bytes], /) -> int: ...

    def touch(self, hashes: Iterable[bytes], /) -> None: ...

    def write_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview], /) -> int: ...

    def read_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview], /) -> int: ...

    def drain_dropped(self) -> list[bytes] | None: ...
