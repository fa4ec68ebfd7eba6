"""What a cache asks of state that a prefix needs beside KV in a row for each token.

A prefix then ends at a place where all of that can be had, and KV below is of no use to whoever
goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tiered_kv.forest.node import Node


class Places(Protocol):
    """State beside KV. Paths lead from a root's child downwards."""

    def promise(self, rid: str, path: Sequence[Node], device: int, usable: int) -> tuple[int, int]:
        """Where `rid` can go on along `path`: (with what the device has, with the host's, too).

        device, usable: how far the KV of `path` can be had, in tokens. What is needed of the host
        stays there until the pass is formed.
        """
        ...

    def end_promises(self) -> None:
        """A pass is being formed anew: everybody is looked at again."""
        ...

    def bring(self, last: Node) -> bool:
        """`last` is on the device, and somebody goes on from its end; False if that cannot be."""
        ...

    def wish(self, rid: str) -> None:
        """`rid` waits to be admitted: what the disk has for it is to be on the host by then."""
        ...

    def is_wished(self, rid: str) -> bool: ...

    def forget_wish(self, rid: str) -> None: ...

    def has_come(self, rid: str, path: Sequence[Node], device: int, usable: int) -> bool:
        """Whether the best place for `rid` can be had from the host; starts to read what cannot."""
        ...

    def poll(self) -> None:
        """Takes up what has been copied, read and written."""
        ...

    def flush(self) -> None:
        """Empties the host; what is under way arrives."""
        ...

    def check_integrity(self) -> None: ...

    def close(self, timeout_s: float) -> None:
        """Lets what is to be written reach the disk, as far as the time allows."""
        ...
