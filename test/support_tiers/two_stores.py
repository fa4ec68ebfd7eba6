"""What tests ask of a disk and a shared store below one host."""

from __future__ import annotations

from array import array

from support_tiers.tier_rig import Rig
from tiered_kv.tiers.cold.tier import ColdTier


def far(rig: Rig) -> ColdTier:
    return rig.hierarchy.colds[-1]


def n_blobs(rig: Rig, tokens: array[int]) -> int:
    """Leading pages of a prompt that the shared store has."""
    hashes = rig.hashes(rig.hierarchy.root(), tokens)
    return far(rig).last_store.lookup(hashes)


def lose_on_disk(rig: Rig, tokens: array[int], pages: slice) -> None:
    """As if the disk had given them up some time ago."""
    namespace = rig.disk.namespace
    for page_hash in rig.hashes(rig.hierarchy.root(), tokens)[pages]:
        del namespace._store._pages[namespace.namespace_id, page_hash]
