"""What a snapshot says, with names and units: the JSON that is served (docs/view.md).

Made in the HTTP server's process from what the scheduler's thread noted. Prefixes are named by the
head of their last page's hash: the same name on every server with the same weights, and nothing of
what was said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tiered_kv.core.ids import Tier
from tiered_kv.snapshot.gangs import gangs_of

VERSION = 1
NAME_CHARACTERS = 8
#: A tenant's name may be that of its API key, of which this much is enough to tell it apart.
TENANT_CHARACTERS = 12

_REQUEST_FIELDS = (
    *("name", "slo_class", "tenant", "prompt_tokens", "output_tokens", "cached_tokens"),
    *("age_s", "slack_s", "prefix"),
)
KINDS = ("waiting", "running", "parked", "prefilling")

#: First token ids of a prefix -> text.
Decode = Callable[[Sequence[int]], str]


def shaped(raw: Mapping[str, Any], *, at_s: float, decode: Decode | None = None) -> dict[str, Any]:
    """The snapshot as it is served.

    raw: both parts of `plugin/snapshots/collect.py`. at_s: when it was taken, Unix time. decode:
    for the text of prefixes, if that was asked for at the start.
    """
    prefixes = [_prefix(row, raw["page_tokens"], decode) for row in raw["prefixes"]]
    requests = {kind: _requests(raw[kind]) for kind in KINDS}
    everyone = [row for kind in KINDS for row in requests[kind]["rows"]]
    gangs = gangs_of(
        {prefix["id"]: (prefix["parent"], prefix["end"]) for prefix in prefixes},
        [row["prefix"] for row in everyone],
    )
    for row, gang in zip(everyone, gangs, strict=True):
        row["gang"] = gang
    return {
        "version": VERSION,
        "at_s": at_s,
        "scheduler_us": max(raw["forest_us"], raw["requests_us"]),
        "page_tokens": raw["page_tokens"],
        "policy": raw["policy"],
        "tiers": _tiers(raw),
        "edges": [
            {
                "source": _tier(source),
                "target": _tier(target),
                "moved_bytes": moved,
                "queued_bytes": queued,
                "transfers": n,
            }
            for source, target, moved, queued, n in raw["edges"]
        ],
        "forest": {
            "count": raw["totals"]["count"],
            "tokens": raw["totals"]["tokens"],
            "rest": _rest(raw["totals"], prefixes),
            "trees": [_tree(row) for row in raw["trees"]],
            "prefixes": prefixes,
        },
        "requests": requests,
        "hits": dict(raw["hits"]),
    }


def _prefix(row: Sequence[Any], page_tokens: int, decode: Decode | None) -> dict[str, Any]:
    node_id, parent, n_tokens, end, below, hits, age_s, next_s, pins, digest, states, ids = row
    prefix = {
        "id": node_id,
        "parent": parent,
        "name": digest.hex()[:NAME_CHARACTERS],
        "tokens": n_tokens,
        "end": end,
        "tokens_with_below": below,
        "pages": n_tokens // page_tokens,
        "hits": hits,
        "last_use_s": _rounded(age_s),
        "next_use_s": _rounded(next_s),
        "users": pins,
        "tiers": {_tier(at): state for at, state in enumerate(states)},
    }
    if decode is not None and ids:
        prefix["text"] = decode(ids)
    return prefix


def _tree(row: Sequence[Any]) -> dict[str, Any]:
    root_id, digest, n_tokens, is_salted, is_adapted = row
    return {
        "id": root_id,
        "name": digest.hex()[:NAME_CHARACTERS],
        "tokens": n_tokens,
        "salted": is_salted,
        "adapter": is_adapted,
    }


def _rest(totals: Mapping[str, Any], prefixes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the prefixes that are not shown are together."""
    resident = {}
    for at, n_tokens in totals["resident"]:
        tier = _tier(at)
        shown = sum(p["tokens"] for p in prefixes if p["tiers"].get(tier) == "resident")
        resident[tier] = n_tokens - shown
    return {
        "count": totals["count"] - len(prefixes),
        "tokens": totals["tokens"] - sum(p["tokens"] for p in prefixes),
        "resident_tokens": resident,
    }


def _tiers(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    resident, pinned = dict(raw["totals"]["resident"]), dict(raw["totals"]["pinned"])
    return [
        {
            "tier": _tier(at),
            "capacity_tokens": capacity,
            # A store holds more than the forest knows of: what was written before a restart, say.
            "resident_tokens": resident.get(at, 0) if held is None else held,
            "forest_tokens": resident.get(at, 0),
            "pinned_tokens": pinned.get(at, 0),
            "state": state,
        }
        for at, capacity, held, state in raw["tiers"]
    ]


def _requests(raw: Mapping[str, Any]) -> dict[str, Any]:
    rows = [dict(zip(_REQUEST_FIELDS, row, strict=True)) for row in raw["rows"]]
    for row in rows:
        row["tenant"] = row["tenant"][:TENANT_CHARACTERS]
        row["age_s"], row["slack_s"] = _rounded(row["age_s"]), _rounded(row["slack_s"])
    return {**{key: value for key, value in raw.items() if key != "rows"}, "rows": rows}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else round(seconds, 3)


def _tier(at: int) -> str:
    return Tier(at).name.lower()
