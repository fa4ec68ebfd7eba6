"""Block ids for content that is made up: shared between sessions, or one session's own.

Ids say what a block contains, wherever it stands; reuse needs equal ids from the first block on.
"""

from __future__ import annotations

from array import array

STRIDE = 1 << 24
"""Blocks that one session or one piece of shared content can have."""

_SHARED = 1 << 56


def own_blocks(session: int, first: int, end: int) -> array[int]:
    """Ids of blocks `first` to `end` (exclusive) of a session's own content."""
    base = (session + 1) * STRIDE
    return array("q", range(base + first, base + end))


def shared_blocks(content: int, n_blocks: int) -> array[int]:
    """Ids of the first `n_blocks` of a numbered piece of shared content: a document, say."""
    base = _SHARED + content * STRIDE
    return array("q", range(base, base + n_blocks))


def blocks_spanned(n_tokens: int, block_tokens: int) -> int:
    """Blocks that `n_tokens` touch, the last perhaps partly filled."""
    return -(-n_tokens // block_tokens)
