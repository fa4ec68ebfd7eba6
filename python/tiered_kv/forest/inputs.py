"""Images and the like in a prompt: what stands behind its placeholders is in its pages' names.

A page's tokens say which image is in it only as far as the engine's placeholders do, which are
short hashes. So the page in which an image begins carries a digest of it. KV of what comes before
in that page is named by it as well; pages before it are as without the image, and those behind it
lie below it in the tree, and in its chain of hashes.

The digest takes the upper halves of a page's first words, as token ids need the lower ones only.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from tiered_kv.forest.key import TOKEN_TYPECODE, TreeKey

#: Token ids are below it.
TOKEN_LIMIT = 1 << 31
DIGEST_BYTES = 32
_SHIFT = 32
_TOKEN_MASK = (1 << _SHIFT) - 1
#: A word has a sign, which stays as it is.
_BITS = 31
#: So many words have room for a digest, and for a bit that no page without one has.
LEAST_PAGE_TOKENS = -(-(8 * DIGEST_BYTES + 1) // _BITS)


@dataclass(frozen=True, slots=True)
class Input:
    """One image, video or audio of a prompt.

    start: the position of its first placeholder. digest: `DIGEST_BYTES`, equal only if the KV that
    comes of it is.
    """

    start: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class PromptKey:
    """What names the pages of a prompt beside its tokens: its tree, and its inputs."""

    tree: TreeKey
    inputs: tuple[Input, ...]


def named(
    tokens: array[int], inputs: Iterable[Input], page_size: int, begin: int = 0
) -> array[int]:
    """`tokens`, which begin at position `begin`, as they name pages; whole pages alone count.

    begin: a multiple of page_size, which is at least LEAST_PAGE_TOKENS.
    """
    by_page: dict[int, list[Input]] = {}
    for one in inputs:
        by_page.setdefault(one.start // page_size, []).append(one)
    words = array(TOKEN_TYPECODE, tokens)
    for page, begun in by_page.items():
        at = page * page_size - begin
        if at < 0 or at + page_size > len(words):
            continue
        mark = _mark(begun, page * page_size)
        for i in range(LEAST_PAGE_TOKENS):
            words[at + i] |= (mark >> i * _BITS & (1 << _BITS) - 1) << _SHIFT
    return words


def _mark(inputs: Iterable[Input], page_start: int) -> int:
    sha256 = hashlib.sha256(b"tiered-kv inputs 1\0")
    for one in sorted(inputs, key=lambda one: (one.start, one.digest)):
        sha256.update((one.start - page_start).to_bytes(8, "little") + one.digest)
    return 1 << 8 * DIGEST_BYTES | int.from_bytes(sha256.digest(), "little")


def token_ids(words: Iterable[int]) -> list[int]:
    """The engine's token ids of what `named` returned, or of tokens that it never saw."""
    return [word & _TOKEN_MASK for word in words]
