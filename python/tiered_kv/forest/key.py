"""Content addresses: a chain of hashes that starts from a namespace and adds a page at a time.

A page's hash names everything that its KV depends on: the namespace (model, dtype, layout, tenant,
...) and all tokens from the start of the prompt to the page's end. So two equal hashes mean
interchangeable KV, in this process, after a restart, and on another replica.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

TOKEN_TYPECODE = "q"
TOKEN_BYTES = 8

_LITTLE_ENDIAN = sys.byteorder == "little"


class Sliceable(Protocol):
    """Slots of consecutive pages in one tier: a tensor, an array, a list, a range.

    The forest only measures and slices it; what a slot means is the tier's business. Slices are
    kept as they are, so they must not change when the caller reuses the sliced object's memory.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Sliceable: ...


@dataclass(frozen=True, slots=True)
class TreeKey:
    """What parts the trees of one namespace: equal keys share KV, others share nothing.

    salt, extra_key: names of what the caller sent as `cache_salt` and `extra_key`; None if nothing.
    adapter: a name of the contents of the LoRA adapter; None for the base model.
    is_lasting: whether the parts mean the same after a restart. If not (an adapter whose contents
    have no name), pages of the tree stay above the disk.
    salt_text: the salt in words, where somebody may be told it; None otherwise. Names nothing.
    """

    salt: bytes | None = None
    extra_key: bytes | None = None
    adapter: bytes | None = None
    is_lasting: bool = True
    salt_text: str | None = field(default=None, compare=False)


#: The tree of requests that name neither a salt nor a key, with the base model.
SHARED_TREE = TreeKey()


@lru_cache(maxsize=4096)
def tree_hash(namespace: bytes, key: TreeKey) -> bytes:
    """32 bytes that name the tree `key` of `namespace`; the root of its page hash chains."""
    return namespace_hash("tree", namespace, key.salt, key.extra_key, key.adapter)


def namespace_hash(*parts: str | bytes | int | None) -> bytes:
    """32 bytes that name a namespace.

    Parts are hashed with their type and length in front, so ("ab", "c"), ("a", "bc"),
    (b"ab", "c") and ("ab", "c", None) all differ; order matters.
    """
    digest = hashlib.sha256(b"tiered-kv namespace 1\0")
    for part in parts:
        if part is None:
            kind, data = b"n", b""
        elif isinstance(part, bytes):
            kind, data = b"b", part
        elif isinstance(part, str):
            kind, data = b"s", part.encode("utf-8", "surrogatepass")
        else:
            kind, data = b"i", str(int(part)).encode("ascii")
        digest.update(kind + len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def page_hashes(parent: bytes, tokens: array[int], page_size: int) -> list[bytes]:
    """Hashes of the whole pages of `tokens`, chained from `parent` (32 bytes).

    hash(page) = sha256(hash(page before) + the page's tokens as little-endian int64). A tail
    shorter than a page is ignored.
    """
    sha256 = hashlib.sha256
    step = page_size * TOKEN_BYTES
    data = _little_endian_bytes(tokens)
    hashes = []
    for begin in range(0, len(data) - step + 1, step):
        parent = sha256(parent + data[begin : begin + step]).digest()
        hashes.append(parent)
    return hashes


def page_hash(parent: bytes, page: array[int]) -> bytes:
    """The hash of the one page `page` after the page, or namespace, called `parent`."""
    return hashlib.sha256(parent + _little_endian_bytes(page)).digest()


def _little_endian_bytes(tokens: array[int]) -> bytes:
    if _LITTLE_ENDIAN:
        return tokens.tobytes()
    swapped = array(TOKEN_TYPECODE, tokens)
    swapped.byteswap()
    return swapped.tobytes()
