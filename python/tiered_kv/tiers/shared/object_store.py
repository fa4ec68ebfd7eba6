"""A store of named blobs that others use as well, as a cold store.

A client for such a store moves bytes and promises nothing: it may be slow, forget, answer with what
was stored under that name long ago, with half of it, or with something else altogether. So a header
goes around each page (`envelope`), and what does not say that it is the page asked for is a miss.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tiered_kv.core.ids import PageHash
from tiered_kv.tiers.page_store import StoreTraits
from tiered_kv.tiers.shared.blobs import Pieces
from tiered_kv.tiers.shared.envelope import HEADER_BYTES, Envelope, StoreSecrets
from tiered_kv.tiers.shared.link import StoreLink

#: Most bytes of blobs that one call moves.
CALL_BYTES = 16 << 20
#: So many blobs that turned out to be something else are remembered, to be replaced.
BAD_MAX = 4096
#: What was touched is not touched again for so long: each page costs a name, and asking for it.
TOUCH_AGAIN_S = 30.0
#: So many pages are remembered to have been touched.
TOUCHED_MAX = 65536
#: So many pages are remembered to have been written by this server: those it may delete.
WRITTEN_MAX = 262144
#: So many pages that have gone are remembered until somebody listens.
DROPPED_MAX = 65536


@dataclass(frozen=True, slots=True)
class _Parcel:
    """The memory of a page on its way."""

    name: bytes
    header: memoryview
    sealed: memoryview | None
    """Where its ciphertext is, if it is encrypted."""
    payload: memoryview


class ObjectStore:
    """The pages of one namespace (32 bytes), as a `PageStore`."""

    def __init__(
        self,
        link: StoreLink,
        namespace_id: bytes,
        traits: StoreTraits,
        secrets: StoreSecrets = StoreSecrets(),  # noqa: B008
    ) -> None:
        self.traits = traits
        self._link = link
        self._envelope = Envelope(secrets, namespace_id, traits.page_format.page_bytes)
        self._blob_bytes = HEADER_BYTES + self._envelope.page_bytes
        # Names of blobs that are not what they should be.
        self._bad: dict[str, None] = {}
        self._dropped: list[PageHash] = []
        # Those that this server stored; those of long ago are forgotten first.
        self._written: dict[PageHash, None] = {}
        # When pages were touched.
        self._touched: dict[PageHash, float] = {}
        self._pages_per_call = max(1, CALL_BYTES // self._blob_bytes)

    @property
    def is_degraded(self) -> bool:
        """Whether it is left alone for a while."""
        return self._link.is_degraded

    def known(self, hashes: Sequence[PageHash]) -> int | None:
        """Only the store knows; but if nobody is to ask it now, it has nothing."""
        del hashes
        return None if self._link.is_readable else 0

    def lookup(self, hashes: Sequence[PageHash]) -> int:
        if not self._link.is_readable:
            return 0
        found = self._exist(self._keys(hashes))
        return 0 if found is None else _leading(found)

    def get(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        n_read = 0
        for part in self._parts(len(hashes)):
            n_in_part = self._get_part(hashes[part], buffers[part])
            n_read += n_in_part
            if n_in_part < part.stop - part.start:
                break
        return n_read

    def put(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        n_stored = 0
        for part in self._parts(len(hashes)):
            n_in_part = self._put_part(hashes[part], buffers[part])
            n_stored += n_in_part
            if n_in_part < part.stop - part.start:
                break
        return n_stored

    def touch(self, hashes: Iterable[PageHash]) -> None:
        """Those that have gone meanwhile are told by `drain_dropped`."""
        now_s, link = time.monotonic(), self._link
        touched = self._touched
        names = [
            name for name in hashes if touched.get(name, -TOUCH_AGAIN_S) <= now_s - TOUCH_AGAIN_S
        ]
        keys = self._keys(names)
        found = link.ask(lambda: link.blobs.touch(keys)) if keys else ()
        if found is None:  # Who knows what has become of it.
            self._touched = {}
            return
        gone = [name for name, is_there in zip(names, found, strict=True) if not is_there]
        self._dropped = [*self._dropped, *gone][-DROPPED_MAX:]
        if len(touched) + len(names) > TOUCHED_MAX:
            self._touched = touched = {}
        touched.update(dict.fromkeys(names, now_s))
        for name in gone:
            del touched[name]

    def drop(self, hashes: Sequence[PageHash]) -> int:
        """What other servers wrote is not this one's to delete."""
        own = [page_hash for page_hash in hashes if page_hash in self._written]
        keys = self._keys(own)
        n_removed = self._link.write(lambda: self._link.blobs.remove(keys)) if keys else 0
        if n_removed is None:
            return 0
        for page_hash in own:
            self._written.pop(page_hash, None)
            self._touched.pop(page_hash, None)
        return n_removed

    def drain_dropped(self) -> list[PageHash]:
        dropped, self._dropped = self._dropped, []
        return dropped

    # -- a part of a call ---------------------------------------------------------------------

    def _parts(self, n_pages: int) -> list[slice]:
        step = self._pages_per_call
        return [slice(at, min(at + step, n_pages)) for at in range(0, n_pages, step)]

    def _get_part(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        link = self._link
        with link.read_memory.take(len(hashes) * self._scratch_bytes) as memory:
            parcels = self._parcels(hashes, buffers, memory)
            keys = [parcel.name.hex() for parcel in parcels]
            blobs: list[Pieces] = [
                (p.header, p.payload if p.sealed is None else p.sealed[: self._envelope.page_bytes])
                for p in parcels
            ]
            sizes = link.read(lambda: link.blobs.read(keys, blobs))
            for n, (parcel, size) in enumerate(zip(parcels, sizes or (), strict=False)):
                if size < 0:
                    return n
                if size != self._blob_bytes or not self._envelope.open(
                    parcel.name, parcel.header, parcel.sealed, parcel.payload
                ):
                    self._note_bad(keys[n])
                    return n
        return len(sizes or ())

    def _put_part(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        link = self._link
        if not link.writing.is_passable:
            return 0
        found = self._exist(self._keys(hashes))
        if found is None:
            return 0
        are_there = list(found)
        with link.write_memory.take(len(hashes) * self._scratch_bytes) as memory:
            parcels = self._parcels(hashes, buffers, memory)
            new = [
                n for n, p in enumerate(parcels) if not are_there[n] or p.name.hex() in self._bad
            ]
            keys = [parcels[n].name.hex() for n in new]
            blobs = [self._sealed(parcels[n]) for n in new]
            replaced = [are_there[n] for n in new]
            stored = link.write(lambda: link.blobs.write(keys, blobs, replaced)) if new else ()
            for n in new:
                are_there[n] = False
            for n, key, is_stored in zip(new, keys, stored or (), strict=False):
                are_there[n] = is_stored
                if is_stored:
                    self._bad.pop(key, None)
                    self._note_written(hashes[n])
        return _leading(are_there)

    @property
    def _scratch_bytes(self) -> int:
        """Of one page."""
        return HEADER_BYTES + self._envelope.sealed_bytes

    def _parcels(
        self, hashes: Sequence[PageHash], buffers: Sequence[memoryview], memory: memoryview
    ) -> list[_Parcel]:
        n_pages, n_sealed = len(hashes), self._envelope.sealed_bytes
        parcels = []
        for n, (page_hash, buffer) in enumerate(zip(hashes, buffers, strict=True)):
            header = memory[n * HEADER_BYTES : (n + 1) * HEADER_BYTES]
            at = n_pages * HEADER_BYTES + n * n_sealed
            sealed = memory[at : at + n_sealed] if n_sealed else None
            payload = buffer[: self._envelope.page_bytes]
            parcels.append(_Parcel(self._envelope.name(page_hash), header, sealed, payload))
        return parcels

    def _sealed(self, parcel: _Parcel) -> Pieces:
        body = self._envelope.seal(parcel.name, parcel.payload, parcel.header, parcel.sealed)
        return (parcel.header, body)

    def _exist(self, keys: Sequence[str]) -> Sequence[bool] | None:
        return self._link.ask(lambda: self._link.blobs.exist(keys)) if keys else ()

    def _note_bad(self, key: str) -> None:
        """There is a blob of that name, and it is not the page: the next write replaces it."""
        self._link.count_bad()
        self._bad[key] = None
        if len(self._bad) > BAD_MAX:
            del self._bad[next(iter(self._bad))]

    def _note_written(self, page_hash: PageHash) -> None:
        self._written[page_hash] = None
        if len(self._written) > WRITTEN_MAX:
            del self._written[next(iter(self._written))]

    def _keys(self, hashes: Sequence[PageHash]) -> list[str]:
        return [self._envelope.name(page_hash).hex() for page_hash in hashes]


def _leading(answers: Sequence[bool]) -> int:
    """How many leading ones are true."""
    return next((n for n, answer in enumerate(answers) if not answer), len(answers))
