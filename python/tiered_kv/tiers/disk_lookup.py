"""Finding out, on a thread of its own, which pages of a long prompt the disk has."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from tiered_kv.forest.key import page_hashes
from tiered_kv.forest.node import Node
from tiered_kv.tiers.disk_pages import DiskPages


@dataclass(frozen=True, slots=True)
class DiskLookup:
    """Which pages of a prompt, from the one at `first_page` on, the disk has without a gap."""

    rid: str
    disk: DiskPages
    root_hash: bytes
    tokens: array[int]
    page_size: int
    first_page: int
    hashes: list[bytes]
    """Of all pages of the prompt; filled by the worker, and not read before it is done."""

    @property
    def n_pages(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Stored:
    """The answer: pages [first, end) of a prompt are on disk."""

    first: int
    end: int
    hashes: list[bytes]
    first_hashed: int = 0
    """The page that the first of `hashes` is of."""

    def between(self, first: int, end: int) -> list[bytes]:
        """The hashes of the stored pages from page `first` on, before page `end`."""
        return self.hashes[first - self.first_hashed : min(self.end, end) - self.first_hashed]


def look_up(job: DiskLookup) -> int:
    """How many pages from `job.first_page` on are stored without a gap."""
    job.hashes.extend(page_hashes(job.root_hash, job.tokens, job.page_size))
    return job.disk.count_prefix(job.hashes[job.first_page :])


def prompt_of(node: Node, tokens: array[int]) -> tuple[Node, array[int]]:
    """The root above `node`, and all tokens from there: those of the path, then `tokens`."""
    path = []
    at = node
    while at.parent is not None:
        path.append(at.tokens)
        at = at.parent
    prompt = array("q")
    for run in reversed(path):
        prompt.extend(run)
    prompt.extend(tokens)
    return at, prompt
