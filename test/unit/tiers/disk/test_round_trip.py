"""What is written is read back, equal, on both paths, for any page size and any buffer."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from disk_builders import NAMESPACE, aligned, filled, page_hash, page_payload

from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]


@pytest.mark.parametrize("page_bytes", [1, 100, 4095, 4096, 4097, 23_040, 64 << 10, 1_000_001])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "exact"])
def test_round_trip(open_store: OpenStore, direct_io: bool, page_bytes: int, padded: bool) -> None:
    ns = open_store(direct_io=direct_io).namespace(NAMESPACE, page_bytes)
    length = ns.slot_bytes if padded else page_bytes
    hashes = [page_hash(seed) for seed in range(17)]
    buffers = [filled(seed, page_bytes, length) for seed in range(17)]
    assert ns.write_pages(hashes, buffers) == 17
    assert ns.count_prefix(hashes) == 17
    order = list(range(17))
    random.Random(page_bytes).shuffle(order)
    results = [aligned(length) for _ in order]
    assert ns.read_pages([hashes[i] for i in order], results) == 17
    for i, view in zip(order, results, strict=True):
        assert view[:page_bytes] == page_payload(i, page_bytes)
