"""Where a prompt can go on if some of its model's layers look back a window only.

Such a layer needs of a prefix the KV of its last window, whatever came before. So a prefix ends
where all pages of the window before that can be had: pages further up may lack their rows of these
layers (docs/adr/0030-windows-apart.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tiered_kv.core.ids import PageHash
from tiered_kv.forest.node import Node


def pages_back(window_tokens: int, page_size: int) -> int:
    """How many pages before the end of a page a layer that looks back so far reads."""
    return -(-window_tokens // page_size)


def deepest_end(n_pages: int, n_back: int, is_there: Callable[[int], bool]) -> int:
    """The largest end, in pages, of at most `n_pages`, before which `n_back` pages are there.

    Towards the beginning of a prompt that is all of them. is_there: by their places in the prompt.
    """
    end = n_pages
    known = end  # Pages from here to the end are there.
    while known > max(0, end - n_back):
        known -= 1
        if not is_there(known):
            end = known
    return end


def names_along(path: Sequence[Node], n_pages: int) -> list[PageHash]:
    """Of the first `n_pages` pages of a path from a root's child downwards."""
    names: list[PageHash] = []
    for node in path:
        names.extend(node.page_hashes)
    return names[:n_pages]
