"""Which requests go on from the same prefix, as far as the prefixes shown tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def gangs_of(
    prefixes: Mapping[int, tuple[int, int]], places: Sequence[int | None]
) -> list[int | None]:
    """The gang of each request: the id of the prefix that its members share; None: it is alone.

    It is the prefix of its path below which the most tokens are read again, as for the iteration
    policies: (requests below it, less one) x tokens to its end. prefixes: (parent, end) by id, each
    behind its parent. places: the prefix that each request goes on from.
    """
    below: dict[int, int] = {}
    for place in places:
        if place is not None and place in prefixes:
            below[place] = below.get(place, 0) + 1
    for prefix_id in list(prefixes)[::-1]:
        parent, _ = prefixes[prefix_id]
        if prefix_id in below and parent in prefixes:
            below[parent] = below.get(parent, 0) + below[prefix_id]
    best: dict[int, tuple[int, int | None]] = {}
    for prefix_id, (parent, end) in prefixes.items():
        saved = (below.get(prefix_id, 0) - 1) * end
        above = best.get(parent, (0, None))
        best[prefix_id] = (saved, prefix_id) if saved > 0 and saved >= above[0] else above
    return [None if place is None else best.get(place, (0, None))[1] for place in places]
