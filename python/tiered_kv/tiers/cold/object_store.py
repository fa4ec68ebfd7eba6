"""A store of named blobs that others use as well, as a cold store.

A client for such a store moves bytes and promises nothing: it may be slow, forget, answer with what
was stored under that name long ago, with half of it, or with something else altogether. So the name
and a checksum go around each page, and what does not say that it is the page asked for is a miss.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from tiered_kv.core.ids import PageHash
from tiered_kv.tiers.gate import Gate
from tiered_kv.tiers.page_store import StoreTraits

MAGIC = b"TKVOBJ01"
#: magic, payload bytes, namespace id, page hash
_FIELDS = struct.Struct("<8sQ32s32s")
_DIGEST_BYTES = 16
HEADER_BYTES = _FIELDS.size + _DIGEST_BYTES
#: Most bytes of blobs that one call moves.
CALL_BYTES = 32 << 20
#: So many blobs that turned out to be something else are remembered, to be replaced.
BAD_MAX = 4096

T = TypeVar("T")


class Blobs(Protocol):
    """A client of a store of named blobs. Thread-safe; calls block, and may raise anything."""

    def exist(self, keys: Sequence[str], /) -> Sequence[bool]:
        """Whether there is a blob of each name."""
        ...

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview], /) -> Sequence[int]:
        """Fills each buffer with its blob; how many bytes each blob has, -1 if there is none."""
        ...

    def write(self, keys: Sequence[str], blobs: Sequence[memoryview], /) -> Sequence[bool]:
        """Whether each blob is stored now."""
        ...


class ObjectStore:
    """The pages of one namespace in `blobs`, as a `PageStore`.

    namespace_id: 32 bytes. key: if given, names of blobs are keyed, so that whoever does not have
    it can neither tell whose prompt a blob belongs to nor offer one in its place by name.
    """

    def __init__(
        self,
        blobs: Blobs,
        namespace_id: bytes,
        traits: StoreTraits,
        key: bytes = b"",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.traits = traits
        self._blobs = blobs
        self._namespace_id = namespace_id
        self._key = hashlib.blake2b(b"tiered-kv names", key=key[:64], digest_size=32).digest()
        self._page_bytes = traits.page_format.page_bytes
        self._blob_bytes = HEADER_BYTES + self._page_bytes
        # Names of blobs that are not what they should be.
        self._bad: dict[str, None] = {}
        self._pages_per_call = max(1, CALL_BYTES // self._blob_bytes)
        where = f"Cold store {traits.tier.name.lower()}"
        self._reading = Gate(
            f"{where} is not read because of an error (%s); it is tried again by itself.",
            f"{where} is read again after %.1f s.",
            now,
        )
        self._writing = Gate(
            f"{where} is not written because of an error (%s); it is tried again by itself.",
            f"{where} is written again after %.1f s.",
            now,
        )

    @property
    def is_degraded(self) -> bool:
        """Whether it is left alone for a while."""
        return self._reading.is_degraded or self._writing.is_degraded

    def known(self, hashes: Sequence[PageHash]) -> None:
        """Only the store knows."""

    def lookup(self, hashes: Sequence[PageHash]) -> int:
        keys = self._keys(hashes)
        found = self._call(self._reading, lambda: self._blobs.exist(keys))
        return 0 if found is None else _leading(found)

    def get(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        n_read = 0
        for at in range(0, len(hashes), self._pages_per_call):
            part = slice(at, at + self._pages_per_call)
            n_in_part = self._get_part(hashes[part], buffers[part])
            n_read += n_in_part
            if n_in_part < len(hashes[part]):
                break
        return n_read

    def _get_part(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        space: npt.NDArray[np.uint8] = np.empty((len(hashes), self._blob_bytes), dtype=np.uint8)
        views = [memoryview(row) for row in space]
        keys = self._keys(hashes)
        sizes = self._call(self._reading, lambda: self._blobs.read(keys, views))
        if sizes is None:
            return 0
        for n, (page_hash, view, size) in enumerate(zip(hashes, views, sizes, strict=False)):
            payload = view[HEADER_BYTES:]
            if size < 0:
                return n
            if size != self._blob_bytes or view[:HEADER_BYTES] != self._header(page_hash, payload):
                self._note_bad(keys[n])
                return n
            buffers[n][: self._page_bytes] = payload
        return min(len(hashes), len(sizes))

    def put(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        n_stored = 0
        for at in range(0, len(hashes), self._pages_per_call):
            part = slice(at, at + self._pages_per_call)
            n_in_part = self._put_part(hashes[part], buffers[part])
            n_stored += n_in_part
            if n_in_part < len(hashes[part]):
                break
        return n_stored

    def _put_part(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        keys = self._keys(hashes)

        def write() -> list[bool]:
            found = zip(keys, self._blobs.exist(keys), strict=True)
            are_there = [is_there and key not in self._bad for key, is_there in found]
            new = [n for n, is_there in enumerate(are_there) if not is_there]
            blobs = [self._blob(hashes[n], buffers[n]) for n in new]
            stored = self._blobs.write([keys[n] for n in new], blobs) if new else []
            for n, is_stored in zip(new, stored, strict=True):
                are_there[n] = is_stored
                if is_stored:
                    self._bad.pop(keys[n], None)
            return are_there

        stored = self._call(self._writing, write)
        return 0 if stored is None else _leading(stored)

    def touch(self, hashes: Iterable[PageHash]) -> None:
        """Others use them too: what stays is the store's own affair."""

    def drain_dropped(self) -> list[PageHash]:
        """Nobody tells: a read will."""
        return []

    def _note_bad(self, key: str) -> None:
        """There is a blob of that name, and it is not the page: the next write replaces it."""
        self._bad[key] = None
        if len(self._bad) > BAD_MAX:
            del self._bad[next(iter(self._bad))]

    def _call(self, gate: Gate, call: Callable[[], T]) -> T | None:
        """What it answers; None if it failed, or failed a moment ago."""
        admission = gate.try_enter()
        if admission is None:
            return None
        try:
            answer = call()
        except Exception as error:
            gate.fail(admission, error)
            return None
        except BaseException as error:
            gate.fail(admission, error)
            raise
        gate.succeed(admission)
        return answer

    def _keys(self, hashes: Sequence[PageHash]) -> list[str]:
        return [
            hmac.digest(self._key, self._namespace_id + page_hash, hashlib.sha256).hex()
            for page_hash in hashes
        ]

    def _header(self, page_hash: PageHash, payload: memoryview) -> bytes:
        fields = _FIELDS.pack(MAGIC, self._page_bytes, self._namespace_id, page_hash)
        digest = xxhash.xxh3_128(fields)
        digest.update(payload)
        return fields + digest.digest()

    def _blob(self, page_hash: PageHash, buffer: memoryview) -> memoryview:
        payload = buffer[: self._page_bytes]
        return memoryview(self._header(page_hash, payload) + bytes(payload))


def _leading(answers: Sequence[bool]) -> int:
    """How many leading ones are true."""
    return next((n for n, answer in enumerate(answers) if not answer), len(answers))
