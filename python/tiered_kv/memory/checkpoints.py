"""Which checkpoints of recurrent state the host keeps, and where a prompt can go on from one.

A layer with recurrent state (Mamba, linear attention, short convolutions) has one state for all
tokens before a position, and no way back from it. So a prefix can be reused only where its state
was kept: at the end of a page, under that page's name, which stands for all tokens up to there
(docs/adr/0028-recurrent-state.md).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tiered_kv.core.errors import IntegrityError
from tiered_kv.core.ids import PageHash
from tiered_kv.forest.node import Node


class Boundary(NamedTuple):
    """The end of a page: so many tokens from the root, and the page's name."""

    n_tokens: int
    name: PageHash


def boundaries(path: Sequence[Node], end: int, page_size: int) -> Iterator[Boundary]:
    """The ends of the pages of `path`, as far as they are at most `end`, the deepest first.

    path: nodes from a root's child downwards.
    """
    for node in reversed(path):
        n_tokens = min(end, node.end) // page_size * page_size
        while n_tokens > node.start:
            yield Boundary(n_tokens, node.page_hashes[(n_tokens - node.start) // page_size - 1])
            n_tokens -= page_size


def deepest(
    path: Sequence[Node], end: int, page_size: int, is_there: Callable[[PageHash], bool]
) -> Boundary | None:
    """The first of `boundaries` that is there; or None."""
    # Without one it looks at every page of a prompt.
    for node in reversed(path):
        hashes = node.page_hashes
        for place in range((min(end, node.end) - node.start) // page_size, 0, -1):
            if is_there(hashes[place - 1]):
                return Boundary(node.start + place * page_size, hashes[place - 1])
    return None


class Checkpoints:
    """Names of the states that are kept in `n_slots` slots; the least recently used makes way.

    A slot is free, reserved (somebody fills it), or kept under a name. One that is held stays as it
    is until it is let go, whatever becomes of its name: somebody reads it.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self._free = list(range(n_slots - 1, -1, -1))
        self._reserved: set[int] = set()
        self._kept: OrderedDict[PageHash, int] = OrderedDict()
        """The least recently used first."""
        self._holds: dict[int, int] = {}
        self._nameless: set[int] = set()
        """Held slots whose name is gone: free when they are let go."""

    def __len__(self) -> int:
        """Checkpoints kept."""
        return len(self._kept)

    def __contains__(self, name: PageHash) -> bool:
        return name in self._kept

    def deepest(self, path: Sequence[Node], end: int, page_size: int) -> Boundary | None:
        """Where a prompt goes on that may go on at any page of `path` down to `end`; or None."""
        return deepest(path, end, page_size, self._kept.__contains__)

    def reserve(self) -> int | None:
        """A slot to be filled, then kept or given back; None if all are in use."""
        if not self._free:
            # Few are held, and they were used just now: this finds one soon.
            victim = next((n for n, slot in self._kept.items() if slot not in self._holds), None)
            if victim is None:
                return None
            self.drop(victim)
        slot = self._free.pop()
        self._reserved.add(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """A reserved slot is not needed."""
        self._reserved.remove(slot)
        self._free.append(slot)

    def keep(self, slot: int, name: PageHash) -> bool:
        """A reserved slot holds the state `name` now; False if there is one, which stays."""
        if name in self._kept:
            self.give_back(slot)
            self._kept.move_to_end(name)
            return False
        self._reserved.remove(slot)
        self._kept[name] = slot
        return True

    def use(self, name: PageHash) -> int:
        """The slot of a checkpoint that is kept; it was used now."""
        self._kept.move_to_end(name)
        return self._kept[name]

    def hold(self, slot: int) -> None:
        self._holds[slot] = self._holds.get(slot, 0) + 1

    def let_go(self, slot: int) -> None:
        """Takes back one `hold`."""
        self._holds[slot] -= 1
        if not self._holds[slot]:
            del self._holds[slot]
            if slot in self._nameless:
                self._nameless.remove(slot)
                self._free.append(slot)

    def drop(self, name: PageHash) -> None:
        slot = self._kept.pop(name)
        if slot in self._holds:
            self._nameless.add(slot)
        else:
            self._free.append(slot)

    def clear(self) -> None:
        """Forgets all names; what is reserved or held stays with whoever has it."""
        for name in list(self._kept):
            self.drop(name)

    def check_integrity(self) -> None:
        """Raises IntegrityError if a slot is nowhere, or in two places."""
        kept = list(self._kept.values())
        slots = sorted([*self._free, *self._reserved, *self._nameless, *kept])
        if slots != list(range(self.n_slots)):
            raise IntegrityError(f"Checkpoints: {self.n_slots} slots are accounted for as {slots}.")
        if not self._nameless <= self._holds.keys() <= self._nameless | set(kept):
            raise IntegrityError("Checkpoints: a slot is held that has no state, or kept for none.")
