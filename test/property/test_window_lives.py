"""Requests' lives on SGLang's own loop, of a model one of whose layers looks back a window only.

Method: `support_plugin.lives`, with room for few of that layer's pages on the host.
Guarantee: in every pass the rows that the layer reads are of the tokens that they should be
(`WindowModel`), though rows further up are not; every answer is what a loop without a cache says;
at the end nothing is held.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("sglang")

from support_plugin.decode_loop import PretendDisk
from support_plugin.decode_requests import Oracle
from support_plugin.lives import check_happened, run_some
from support_plugin.window_loop import WindowLoop

#: (overlap, page size, device pages, chunk, disk, window in tokens, pages of windows on the host)
SHAPES: list[tuple[bool, int, int, int | None, bool, int, int]] = [
    (True, 4, 16, 8, True, 5, 12),
    (False, 4, 24, 64, True, 8, 40),
    (True, 2, 40, 16, False, 3, 16),
    (False, 1, 60, 8, True, 6, 40),
    (True, 8, 10, None, True, 1, 8),
]


def run_all(args: Any, n_histories: int) -> None:
    totals: Counter[str] = Counter()
    for shape, (overlap, page_size, n_pages, chunk, has_disk, window, n_rows) in enumerate(SHAPES):
        disk = PretendDisk() if has_disk else None
        loop = WindowLoop(
            args,
            window=window,
            n_window_pages=n_rows,
            overlap=overlap,
            page_size=page_size,
            n_pages=n_pages,
            n_host_pages=2 * n_pages,
            chunk_tokens=chunk,
            disk=disk,
        )
        oracle = Oracle(args, overlap=overlap)
        totals += run_some(loop, oracle, disk, range(shape, n_histories, len(SHAPES)))
        totals["hollow"] += loop.tp_worker.n_unread
    check_happened(totals, n_histories, "hollow")


def test_every_window_is_of_its_own_tokens(args: Any) -> None:
    run_all(args, 60)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_window_is_of_its_own_tokens_a_thousand_times(args: Any) -> None:
    run_all(args, 1000)
