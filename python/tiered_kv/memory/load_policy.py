"""Load or recompute: how many leading pages of those a farther tier has are worth loading."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

#: Loading more is preferred while it costs at most this much more: it leaves the device to others.
TOLERANCE = 0.02


class LoadPolicy(enum.Enum):
    """Whether pages found in a farther tier are loaded."""

    COST = "cost"
    """As many as make the prompt ready soonest, by the cost model."""

    ALWAYS = "always"
    """All of them."""

    NEVER = "never"
    """None of them: everything that is not on the device is computed."""


@dataclass(frozen=True, slots=True)
class LoadQuestion:
    """`n_pages` pages from token `start` on could be loaded, for a prompt of `prompt_tokens`."""

    n_pages: int
    page_tokens: int
    start: int
    prompt_tokens: int
    load_s: Callable[[int], float]
    """Seconds to load that many leading pages, what is queued before them included."""
    recompute_s: Callable[[int, int], float]
    """Seconds to compute tokens [start, end)."""
    overlapped: bool
    """Whether the forward pass runs while pages arrive, layer by layer."""
    wait_s: float = 0.0
    """Seconds for which the request would wait in any case."""

    def ready_s(self, k: int) -> float:
        """Seconds until the prompt is computed if `k` pages are loaded and the rest is not."""
        load_s = max(self.load_s(k) if k else 0.0, self.wait_s)
        compute_s = self.recompute_s(self.start + k * self.page_tokens, self.prompt_tokens)
        return max(load_s, compute_s) if self.overlapped else load_s + compute_s


def pages_to_load(question: LoadQuestion) -> int:
    """The boundary: pages [0, k) are loaded, the rest is computed. O(log n_pages).

    Loading takes longer the more pages there are, computing the rest less. If both overlap, the
    sum's place is taken by the longer, which is least where they meet. If not, the time is least at
    an end (a deeper page costs more to compute and no more to load) or on either side of where
    loading stops being hidden by waiting. The answer is among these; of equals, the largest.
    """
    n = question.n_pages
    candidates = {0, n}
    if question.overlapped:
        k = _first(n, lambda k: question.load_s(k) >= _compute_s(question, k))
        candidates |= {min(k, n), k - 1}
    elif question.wait_s > 0:
        k = _first(n, lambda k: question.load_s(k) > question.wait_s)
        candidates |= {min(k, n), k - 1}
    times = {k: question.ready_s(k) for k in candidates}
    best_s = min(times.values())
    return max(k for k, seconds in times.items() if seconds <= best_s * (1.0 + TOLERANCE))


def _compute_s(question: LoadQuestion, k: int) -> float:
    return question.recompute_s(question.start + k * question.page_tokens, question.prompt_tokens)


def _first(n: int, holds: Callable[[int], bool]) -> int:
    """The least k in [1, n] for which `holds`, which stays true once it is; n + 1 if none."""
    low, high = 1, n + 1
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
