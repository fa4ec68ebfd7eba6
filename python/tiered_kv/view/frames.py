"""What the page is told: a snapshot with what changed since the last one, or why there is none.

Pure: no clock, no network. A snapshot counts bytes and hits since the server's start; people want
rates, and what happened in the last minutes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

#: Points of history that are kept: ten minutes at one a second.
HISTORY_MAX = 600
_HIT_TIERS = ("device", "host", "disk", "store")

Snapshot = Mapping[str, Any]
Frame = dict[str, Any]


class Frames:
    """Makes frames of the snapshots of one server, in order."""

    def __init__(self) -> None:
        self.last: Frame | None = None
        self._before: Snapshot | None = None
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY_MAX)
        self._lost: tuple[float, str] | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The points so far, oldest first."""
        return list(self._history)

    def seen(self, snapshot: Snapshot) -> Frame:
        """The server has answered."""
        before, self._before, self._lost = self._before, snapshot, None
        if before is not None and _is_another_life(before, snapshot):
            before = None
            self._history.clear()
        point = _point(before, snapshot)
        self._history.append(point)
        edges = _edges(before, snapshot)
        self.last = {"state": "live", "snapshot": snapshot, "edges": edges, "point": point}
        return self.last

    def lost(self, sentence: str, now_s: float) -> Frame:
        """It has not. now_s: Unix time."""
        since_s, _ = self._lost or (now_s, "")
        self._lost = since_s, sentence
        self.last = {
            "state": "disconnected",
            "sentence": sentence,
            "since_s": since_s,
            "snapshot": self._before,
            "edges": [],
            "point": None,
        }
        return self.last


def _is_another_life(before: Snapshot, now: Snapshot) -> bool:
    """Whether the server was restarted in between: its counters began anew."""
    if now["hits"]["requests"] < before["hits"]["requests"]:
        return True
    moved = {_edge(edge): edge["moved_bytes"] for edge in before["edges"]}
    return any(edge["moved_bytes"] < moved.get(_edge(edge), 0) for edge in now["edges"])


def _edge(edge: Mapping[str, Any]) -> tuple[str, str]:
    return edge["source"], edge["target"]


def _edges(before: Snapshot | None, now: Snapshot) -> list[dict[str, Any]]:
    """The edges of `now` with bytes a second since `before`; 0 if there is none."""
    moved = {} if before is None else {_edge(e): e["moved_bytes"] for e in before["edges"]}
    seconds = 0.0 if before is None else now["at_s"] - before["at_s"]
    edges = []
    for edge in now["edges"]:
        more = edge["moved_bytes"] - moved.get(_edge(edge), edge["moved_bytes"])
        rate = more / seconds if seconds > 0 else 0.0
        edges.append({**edge, "bytes_per_s": round(rate)})
    return edges


def _point(before: Snapshot | None, now: Snapshot) -> dict[str, Any]:
    """Prompt tokens of requests that finished since `before`, by where their KV came from."""
    names = ("prompt_tokens", *_HIT_TIERS)
    hits, old = now["hits"], {} if before is None else before["hits"]
    tokens = {name: hits[name] - old.get(name, hits[name]) for name in names}
    computed = max(0, tokens["prompt_tokens"] - sum(tokens[tier] for tier in _HIT_TIERS))
    return {
        "at_s": now["at_s"],
        **{tier: tokens[tier] for tier in _HIT_TIERS},
        "computed": computed,
        "waiting": now["requests"]["waiting"]["count"],
    }
