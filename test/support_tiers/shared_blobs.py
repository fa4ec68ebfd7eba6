"""A store of blobs that a cluster might share: slow, forgetful, and not to be believed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence

from support_tiers.doubles import Faults
from tiered_kv.tiers.shared.blobs import Pieces


class SharedBlobs:
    """Honest, until a test says otherwise. Any number of clients; thread-safe.

    A lie is what a `read` returns instead of the blob: see `torn`, `foreign` and `stale`.
    """

    name = "double"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.blobs: dict[str, bytes] = {}
        self.reads, self.writes, self.asks = Faults(), Faults(), Faults()
        self.lie: Callable[[str, bytes], bytes | None] | None = None
        self.takes: Callable[[str], bool] = lambda _: True
        """Whether a blob is stored, rather than refused."""

    def memory(self, n_bytes: int) -> memoryview:
        return memoryview(bytearray(n_bytes))

    def exist(self, keys: Sequence[str]) -> list[bool]:
        self.asks.pass_through()
        with self._lock:
            return [key in self.blobs for key in keys]

    touch = exist

    def read(self, keys: Sequence[str], blobs: Sequence[Pieces]) -> list[int]:
        self.reads.pass_through()
        sizes = []
        for key, pieces in zip(keys, blobs, strict=True):
            with self._lock:
                blob = self.blobs.get(key)
            if blob is not None and self.lie is not None:
                blob = self.lie(key, blob)
            if blob is None:
                sizes.append(-1)
                continue
            at = 0
            for piece in pieces:
                part = blob[at : at + len(piece)]
                piece[: len(part)] = part
                at += len(piece)
            sizes.append(len(blob))
        return sizes

    def write(
        self, keys: Sequence[str], blobs: Sequence[Pieces], replaced: Sequence[bool]
    ) -> list[bool]:
        self.writes.pass_through()
        taken = [self.takes(key) for key in keys]
        with self._lock:
            for key, pieces, is_taken in zip(keys, blobs, taken, strict=True):
                if is_taken:
                    self.blobs[key] = b"".join(pieces)
        return taken

    def remove(self, keys: Sequence[str]) -> int:
        self.writes.pass_through()
        with self._lock:
            return sum(self.blobs.pop(key, None) is not None for key in keys)

    def close(self) -> None:
        pass

    # -- what becomes of them -----------------------------------------------------------------

    def forget(self, share: float = 1.0, seed: int = 0) -> None:
        """Some of the blobs are gone, and nobody is told."""
        dice = random.Random(seed)
        with self._lock:
            for key in [key for key in self.blobs if dice.random() < share]:
                del self.blobs[key]

    def release(self) -> None:
        for faults in (self.reads, self.writes, self.asks):
            faults.release()


def lies(blobs: SharedBlobs) -> Iterator[tuple[str, Callable[[str, bytes], bytes | None]]]:
    """Each way in which a blob can be something else, by name."""

    def foreign(key: str, blob: bytes) -> bytes:
        return next((other for k, other in blobs.blobs.items() if k != key), blob[::-1])

    yield "forgotten", lambda _, blob: None
    yield "cut short", lambda _, blob: blob[: len(blob) // 2]
    yield "empty", lambda _, blob: b""
    yield "longer", lambda _, blob: blob + b"x"
    yield "torn", lambda _, blob: blob[: len(blob) // 2] + bytes(len(blob) - len(blob) // 2)
    yield "a bit flipped", lambda _, blob: blob[:-1] + bytes([blob[-1] ^ 4])
    yield "its name flipped", lambda _, blob: blob[:60] + bytes([blob[60] ^ 1]) + blob[61:]
    yield "another page", foreign
    yield "another format", lambda _, blob: b"TKVOBJ00" + blob[8:]
    yield "noise", lambda _, blob: random.Random(1).randbytes(len(blob))
