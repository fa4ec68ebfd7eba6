"""What the client of a store of named blobs has to do; any store that can do this will do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

Pieces: TypeAlias = Sequence[memoryview]
"""The memory of one blob: contiguous pieces, back to back."""


class StoreFullError(Exception):
    """The store has no room for anything now."""


class Blobs(Protocol):
    """A client of a store of named blobs, in a namespace of its own there.

    Thread-safe; calls block, and may raise anything. It moves bytes and promises nothing: what it
    reads is checked by whoever asked. Names are of 64 hexadecimal digits.
    """

    name: str
    """For the log: the engine, and where it is."""

    def memory(self, n_bytes: int, /) -> memoryview:
        """Memory that blobs are best moved from and to, for as long as the client lives."""
        ...

    def exist(self, keys: Sequence[str], /) -> Sequence[bool]:
        """Whether there is a blob of each name."""
        ...

    def touch(self, keys: Sequence[str], /) -> Sequence[bool]:
        """As `exist`; those that are there are not to be the first to go."""
        ...

    def read(self, keys: Sequence[str], blobs: Sequence[Pieces], /) -> Sequence[int]:
        """Fills the memory of each with its blob; how many bytes each blob has, -1 for none.

        Until it returns it may write there; afterwards no more.
        """
        ...

    def write(
        self, keys: Sequence[str], blobs: Sequence[Pieces], replaced: Sequence[bool], /
    ) -> Sequence[bool]:
        """Whether each blob is stored now. replaced: whether it is to replace one of that name.

        Raises StoreFullError if there is no room for any.
        """
        ...

    def remove(self, keys: Sequence[str], /) -> int:
        """Forgets the blobs of these names, as far as the store can; how many there were."""
        ...

    def close(self) -> None: ...
