"""Orders of texts that commute: which one the cache likely knows most of.

A prefix cache helps only as far as prompts begin alike, and documents that a search found come in
another order each time. Whoever says that their order does not matter (`spans.py`) gets the order
whose beginning was sent most of before. What was sent is remembered as chained digests, like the
names of pages: a chain stands for all that came before it, so that it says which text follows what,
for whom. What of it is still cached is not known here; a wrong guess costs nothing but the gain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

#: Chains and texts that are remembered, each; those that were not sent for longest go first.
REMEMBERED_MAX = 65_536
#: Digests that are looked up for one set at most; what is found by then is used.
LOOKS_MAX = 2_048


@dataclass(slots=True)
class _Search:
    """For the longest chain of known texts: what there is, and the best so far."""

    digests: list[bytes]
    sizes: list[int]
    looks: int = LOOKS_MAX
    path: tuple[int, ...] = ()
    size: int = 0


class SpanOrders:
    """What was sent before. Work for a set: at most `LOOKS_MAX` digests and those of its texts."""

    def __init__(self, n_max: int = REMEMBERED_MAX) -> None:
        self._n_max = n_max
        self._chains: dict[bytes, None] = {}
        """Those that were sent, the one that was sent last at the end."""
        self._counts: dict[bytes, int] = {}
        """How often a text was sent, by whom it was for; ordered alike."""

    def __len__(self) -> int:
        return max(len(self._chains), len(self._counts))

    def arrange(self, scope: bytes, before: bytes, texts: Sequence[str]) -> tuple[int, ...]:
        """The order in which to send `texts`, as positions; it is remembered as sent.

        First the longest run, in characters, that was sent after `before` already; then the others,
        most often sent first, as the caller has them among equals. scope: whose texts they are,
        nobody else's are looked at. before: stands for all that the prompt has before them, and
        for the scope.
        """
        digests = [_digest(text.encode("utf-8", "surrogatepass")) for text in texts]
        start = chain(before, b"")
        search = _Search(digests, [len(text) for text in texts])
        self._look(search, start, (), 0)
        names = [_digest(scope, digest) for digest in digests]
        rest = [i for i in range(len(texts)) if i not in search.path]
        rest.sort(key=lambda i: -self._counts.get(names[i], 0))
        order = (*search.path, *rest)
        at = start
        for i in order:
            at = chain(at, digests[i])
            self._remember(self._chains, at, None)
            self._remember(self._counts, names[i], self._counts.get(names[i], 0) + 1)
        return order

    def _look(self, search: _Search, at: bytes, path: tuple[int, ...], size: int) -> None:
        """Depth first, from the chain `at` of the texts of `path`; of equal texts only one."""
        if size > search.size:
            search.path, search.size = path, size
            if len(path) == len(search.digests):
                search.looks = 0
        used, tried = set(path), set[bytes]()
        for i, digest in enumerate(search.digests):
            if i in used or digest in tried:
                continue
            tried.add(digest)
            if search.looks <= 0:
                return
            search.looks -= 1
            following = chain(at, digest)
            if following in self._chains:
                self._look(search, following, (*path, i), size + search.sizes[i])

    def _remember(self, where: dict[bytes, T], name: bytes, value: T) -> None:
        where.pop(name, None)
        if len(where) >= self._n_max:
            del where[next(iter(where))]
        where[name] = value


def chain(before: bytes, digest: bytes) -> bytes:
    """The name of all that `before` stands for, and a text after it."""
    return _digest(before, digest)


def name_of(*parts: str) -> bytes:
    """A name that no other parts have."""
    return _digest(*(part.encode("utf-8", "surrogatepass") for part in parts))


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
