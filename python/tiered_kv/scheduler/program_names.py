"""Which program a request is a call of: what its caller says, or what its prompt goes on from.

A prompt that goes on where another one, or its answer, ended is taken for the next call of the same
program. What several programs ended with says nothing: a template that many begin with, or a prompt
that was sent twice. Nothing is hashed for this, the forest knows the names of pages; so programs
are recognised as long as device or host have what they go on from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tiered_kv.core.ids import PageHash
from tiered_kv.forest.node import Node
from tiered_kv.scheduler.request import QueuedRequest

#: Ends of prompts and answers that are remembered; those of long ago are forgotten first.
ENDS_MAX = 16384
#: No name of a caller's program begins so.
_INFERRED = "inferred "
_SEVERAL = ""


def program_of(tenant: str, session: str | None) -> str:
    """The name of a tenant's program; nobody else's is called so. "" without a session."""
    return f"{len(tenant)} {tenant} {session}" if session else ""


class ProgramNames:
    """Names by the pages with which their calls ended. Work: O(pages of a prompt) dictionary looks
    for an arrival, and O(nodes of a prompt) for an end."""

    def __init__(self, page_size: int, n_max: int = ENDS_MAX) -> None:
        """page_size: of the forest, in its units."""
        self._page_size = page_size
        self._n_max = n_max
        self._ends: dict[tuple[PageHash, str], str] = {}
        """By the name of the page and the tenant: nobody goes on with another's program."""
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._ends)

    def arrived(self, request: QueuedRequest) -> None:
        """Names the program of `request`, which was just looked up, unless its caller did."""
        if request.program:
            return
        whole = len(request.tokens) // self._page_size * self._page_size
        for page_hash, at in _pages_up(request):
            end = page_hash, request.tenant
            name = self._ends.get(end, _SEVERAL)
            if not name:
                continue
            if at == whole:
                # The same prompt again: whoever goes on from it may go on from either.
                self._ends[end] = _SEVERAL
                continue
            request.program = name
            return
        request.program = f"{_INFERRED}{next(self._numbers)}"

    def ended(self, request: QueuedRequest, last: Node | None) -> None:
        """Its answer is there, and cached with its prompt down to `last`; None: nothing is."""
        if last is None or last.is_root or not request.program:
            return
        self._remember(request, last.last_page_hash)
        whole = len(request.tokens) // self._page_size * self._page_size
        at: Node | None = last
        while at is not None and at.start >= whole:
            at = at.parent
        if at is not None and not at.is_root and whole < last.end:
            index = (whole - at.start) // self._page_size - 1
            self._remember(request, at.page_hashes[index])

    def _remember(self, request: QueuedRequest, page_hash: PageHash) -> None:
        name, end = request.program, (page_hash, request.tenant)
        known = self._ends.pop(end, name)
        self._ends[end] = name if known == name else _SEVERAL
        if len(self._ends) > self._n_max:
            del self._ends[next(iter(self._ends))]


def _pages_up(request: QueuedRequest) -> Iterator[tuple[PageHash, int]]:
    """The names of the cached pages of its prompt and where each ends, the deepest first."""
    for node in reversed(request.path):
        size = node.n_tokens // node.n_pages
        for index in range(node.n_pages - 1, -1, -1):
            end = node.start + (index + 1) * size
            if end <= len(request.tokens):
                yield node.page_hashes[index], end
