"""A snapshot as text, for terminals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiered_kv.core.units import format_bytes

#: Prefixes and requests that are listed.
LISTED = 12


def table(snapshot: Mapping[str, Any]) -> str:
    """Some forty lines, the last one ended."""
    lines = [*_tiers(snapshot), "", *_edges(snapshot), "", *_prefixes(snapshot), ""]
    return "\n".join([*lines, *_requests(snapshot)]) + "\n"


def _tiers(snapshot: Mapping[str, Any]) -> list[str]:
    lines = [f"{'tier':<10}{'tokens':>14}{'of':>14}{'pinned':>12}"]
    for tier in snapshot["tiers"]:
        lines.append(
            f"{tier['tier']:<10}{tier['resident_tokens']:>14,}{tier['capacity_tokens']:>14,}"
            f"{tier['pinned_tokens']:>12,}  {tier['state']}".rstrip()
        )
    return lines


def _edges(snapshot: Mapping[str, Any]) -> list[str]:
    lines = [f"{'moved':<20}{'so far':>14}{'under way':>14}"]
    for edge in snapshot["edges"]:
        name = f"{edge['source']} to {edge['target']}"
        moved, queued = format_bytes(edge["moved_bytes"]), format_bytes(edge["queued_bytes"])
        lines.append(f"{name:<20}{moved:>14}{queued:>14}")
    return lines


def _prefixes(snapshot: Mapping[str, Any]) -> list[str]:
    forest = snapshot["forest"]
    count, rest = forest["count"], forest["count"] - min(LISTED, len(forest["prefixes"]))
    lines = [f"{'prefix':<10}{'tokens':>9}{'with below':>12}{'hits':>7}{'used ago':>10}  tiers"]
    for prefix in forest["prefixes"][:LISTED]:
        tiers = ", ".join(t for t, state in prefix["tiers"].items() if state == "resident")
        used = f"{prefix['last_use_s']:,.0f} s"
        lines.append(
            f"{prefix['name']:<10}{prefix['tokens']:>9,}{prefix['tokens_with_below']:>12,}"
            f"{prefix['hits']:>7,}{used:>10}  {tiers}".rstrip()
        )
    if not count:
        return ["Nothing is cached yet."]
    return [*lines, f"and {rest:,} more"] if rest else lines


def _requests(snapshot: Mapping[str, Any]) -> list[str]:
    requests = snapshot["requests"]
    counts = ", ".join(f"{requests[kind]['count']:,} {kind}" for kind in requests)
    lines = [f"{'request':<12}{'class':<14}{'tenant':<14}{'prompt':>8}{'waited':>10}{'slack':>10}"]
    rows = requests["waiting"]["rows"][:LISTED]
    for row in rows:
        slack = "none" if row["slack_s"] is None else f"{row['slack_s']:,.1f} s"
        waited = f"{row['age_s']:,.1f} s"
        lines.append(
            f"{row['name'][:10]:<12}{row['slo_class'][:12]:<14}{row['tenant']:<14}"
            f"{row['prompt_tokens']:>8,}{waited:>10}{slack:>10}"
        )
    return [counts, *lines] if rows else [counts]
