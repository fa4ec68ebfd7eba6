"""A model whose state is a hash of all tokens, over checkpoints on a host and a disk.

Prompts run in chunks, are aborted, and leave checkpoints where they should. A state at the end of a
chunk that is not the hash of the prompt up to there is noticed at once, and so is a prompt that
does not go on at the deepest place at which its pages and a state are there.
"""

from __future__ import annotations

import time
from array import array
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.memory.ticket import path_up, usable
from tiered_kv.tiers.in_memory import InMemoryStore
from tiered_kv.tiers.recurrent import RecurrentStates
from tiered_kv.tiers.state_store import StateLayout, StateStore
from tiered_kv.tiers.transfer import Collective

PAGE, STATE_BYTES = 2, 8
#: Few enough to come again, and mostly the beginnings of one another.
PROMPTS = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=13),
    st.builds(
        lambda n, tail: [0, 1] * n + tail, st.integers(2, 5), st.sampled_from([[], [0], [1, 1, 0]])
    ),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["serve"] * 6 + ["abort", "evict", "flush", "flush", "lose", "damage", "drop"]
        ),
        PROMPTS,
        st.integers(1, 5),
    ),
    min_size=15,
    max_size=60,
)


def after(state: int, tokens: list[int]) -> int:
    """What a state becomes by more tokens."""
    for token in tokens:
        state = (state * 1_000_003 + token + 1) % (1 << 61)
    return state


class Copier:
    """Of a rank: what its share of a state is, by slot."""

    n_bytes = STATE_BYTES

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}

    def save(self, device_slot: Any, memory: npt.NDArray[np.uint8]) -> None:
        memory[:] = np.frombuffer(self.slots[device_slot].to_bytes(8, "little"), np.uint8)

    def restore(self, memory: npt.NDArray[np.uint8], device_slot: Any) -> None:
        self.slots[device_slot] = int.from_bytes(memory.tobytes(), "little")


class Disk:
    """A namespace that can be made to lose records, to find that one is damaged, or to be slow."""

    def __init__(self, pages: Any) -> None:
        self._pages = pages
        self.lost: set[bytes] = set()
        self.damaged: set[bytes] = set()
        self.written: list[bytes] = []
        self.delay_s = 0.0

    def contains(self, name: bytes) -> bool:
        return name not in self.lost and bool(self._pages.contains(name))

    def write_pages(self, names: list[bytes], buffers: list[memoryview]) -> int:
        time.sleep(self.delay_s)
        self.written += names
        self.lost -= set(names)
        return int(self._pages.write_pages(names, buffers))

    def drop_pages(self, names: list[bytes]) -> int:
        return int(self._pages.drop_pages(names))

    def read_pages(self, names: list[bytes], buffers: list[memoryview]) -> int:
        time.sleep(self.delay_s)
        if any(name in self.lost or name in self.damaged for name in names):
            buffers[0][:] = b"\xee" * len(buffers[0])
            return 0
        return int(self._pages.read_pages(names, buffers))


class Machine:
    """A rank, whose states begin with `share`: a state of another rank is a wrong one."""

    def __init__(self, n_slots: int, collective: Collective | None = None, share: int = 0) -> None:
        self.share = share
        self.forest = Forest(PAGE)
        self.root = self.forest.root(namespace_hash("model"))
        layout = StateLayout(STATE_BYTES)
        pages: Any = InMemoryStore(1 << 20).namespace(bytes(32), layout.part_bytes)
        self.disk = Disk(pages)
        store: Any = StateStore(self.disk, layout)  # type: ignore[arg-type]
        self.copier = Copier()
        slots = np.zeros((n_slots, layout.slot_bytes), np.uint8)
        self.states = RecurrentStates(self.copier, layout, slots, store, PAGE, collective)
        self.n_requests = 0
        #: Where each request went on.
        self.starts: list[int] = []

    def path(self, tokens: array[int]) -> tuple[list[Node], int, int]:
        found = self.forest.peek(self.root, tokens, len(tokens) - 1)
        path = list(found.path)
        if found.partial is not None:
            path.append(self.forest.split(found.partial, found.common // PAGE)[0])
        ends = [0, *(node.end for node in path)]
        n_device, n_usable = usable(path)
        return path, ends[n_device], ends[n_usable]

    def wait_for_disk(self, rid: str, tokens: array[int]) -> None:
        self.states.wish(rid)
        for _ in range(1000):
            if self.states.has_come(rid, *self.path(tokens)):
                return
            self.states._queue.wait_for_one(0.01)
            self.states.poll()
        raise AssertionError("it waits for ever")

    def serve(self, prompt: list[int], chunk_pages: int, *, is_aborted: bool) -> None:
        tokens, rid, states = array("q", prompt), f"r{self.n_requests}", self.states
        self.n_requests += 1
        if chunk_pages > 1:
            # Else what is being written still holds its slot.
            states._queue.wait()
        states.poll()
        self.wait_for_disk(rid, tokens)
        states.end_promises()
        path, device, end = self.path(tokens)
        _, start = states.promise(rid, path, device, end)
        names = {name for node in path for name in node.page_hashes if name in states.table}
        best = [
            node.start + PAGE * (at + 1)
            for node in path
            for at, name in enumerate(node.page_hashes)
            if name in names and node.start + PAGE * (at + 1) <= end
        ]
        assert start == max(best, default=0)
        self.starts.append(start)
        slot = self.n_requests
        self.copier.slots[slot] = self.share
        if start:
            if chunk_pages == 5:
                self.want_all_room()
            states.give(rid, start, slot)
        while start < len(prompt):
            stop = min(len(prompt), (start // PAGE + chunk_pages) * PAGE)
            self.copier.slots[slot] = after(self.copier.slots[slot], prompt[start:stop])
            assert self.copier.slots[slot] == after(self.share, prompt[:stop]), "a wrong state"
            start = stop
            if stop % PAGE:
                continue
            if chunk_pages % 2 and stop < len(prompt):
                states.note(rid, stop, slot)
                continue
            last = self.forest.insert(self.root, tokens[:stop], range(stop)).last
            states.take(last.last_page_hash, slot, is_lasting=True)
        if is_aborted:
            states.forget_noted(rid)
        else:
            whole = len(prompt) // PAGE * PAGE
            last = self.forest.insert(self.root, tokens[:whole], range(whole)).last
            states.name_noted(rid, list(path_up(last))[::-1], is_lasting=True)
        assert not states._unnamed
        states.forget_wish(rid)

    def drop(self, prompt: list[int]) -> None:
        """Neither host nor disk is to have anything of `prompt`, also of what is under way."""
        tokens, rid = array("q", [*prompt, 0]), f"drop {self.n_requests}"
        self.n_requests += 1
        self.states.wish(rid)
        # Perhaps it begins to read.
        path, device, end = self.path(tokens)
        self.states.has_come(rid, path, device, end)
        names = [name for node in path for name in node.page_hashes]
        self.states.forget(names)
        self.states.drop_stored(names)
        self.states.poll()
        self.wait_for_disk(rid, tokens)
        self.states.forget_wish(rid)
        assert not any(name in self.states.table for name in names)
        assert not any(self.disk.contains(name) for name in names)

    def want_all_room(self) -> None:
        table = self.states.table
        taken = iter(table.reserve, None)
        for slot in list(taken):
            table.give_back(slot)

    def evict(self) -> None:
        leaves = list(self.forest.leaves(Tier.DEVICE))
        if leaves:
            self.forest.evict(leaves[0], Tier.DEVICE)

    def break_records(self, kind: str, number: int) -> None:
        """The first `number` records that were written are lost, or damaged ("lose", "damage")."""
        self.states._queue.wait()
        broken = self.disk.lost if kind == "lose" else self.disk.damaged
        broken |= set(self.disk.written[:number])

    def carry_out(self, kind: str, prompt: list[int], number: int) -> None:
        """One step of STEPS."""
        if kind in ("serve", "abort"):
            self.serve(prompt, number, is_aborted=kind == "abort")
        elif kind == "evict":
            self.evict()
        elif kind == "drop":
            self.drop(prompt)
        elif kind == "flush":
            self.states.flush()
        else:
            self.break_records(kind, number)
        self.states.table.check_integrity()
