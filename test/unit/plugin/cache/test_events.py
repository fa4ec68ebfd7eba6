"""KV events: one stored block per page, chained to its parent, with the medium of its tier."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from sglang.srt.mem_cache.cache_init_params import CacheInitParams

from support_plugin import on_release
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.inputs import Input, named
from tiered_kv.forest.key import SHARED_TREE, TreeKey, namespace_hash, tree_hash
from tiered_kv.plugin.cache.events import KvEvents, block_hash
from tiered_kv.plugin.upstream.current import cache_contract

PAGE = 4


def test_blocks_are_chained_pages_with_tokens_and_medium() -> None:
    forest = Forest(PAGE)
    root = forest.root(namespace_hash("m"))
    upper = forest.insert(root, array("q", range(8)), range(8)).last
    lower = forest.insert(root, array("q", range(12)), range(12)).last
    events = KvEvents(PAGE, enabled=True)
    events.stored(upper, Tier.DEVICE)
    events.stored(lower, Tier.HOST)
    first, second, third = events.take()
    assert isinstance(first, BlockStored)
    assert [first.token_ids, second.token_ids] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert first.parent_block_hash is None
    assert second.parent_block_hash == first.block_hashes[0]
    assert third.parent_block_hash == second.block_hashes[0]
    assert (first.medium, third.medium) == ("GPU", "CPU_PINNED")
    assert first.block_size == PAGE
    assert -(2**63) <= block_hash(upper.page_hashes[0]) < 2**63


def first_block(key: TreeKey, *labels: Any) -> BlockStored:
    """Of one prompt of a page, in the tree of `key`."""
    forest = Forest(PAGE)
    root = forest.root(tree_hash(namespace_hash("m"), key), key)
    events = KvEvents(PAGE, True, *labels)
    events.stored(forest.insert(root, array("q", range(PAGE)), range(PAGE)).last, Tier.DEVICE)
    (block,) = events.take()
    assert isinstance(block, BlockStored)
    return block


def test_blocks_tell_salts_and_adapters_apart() -> None:
    """Also to who finds blocks by parents and tokens, as routers do, and not by their hashes."""
    adapter = bytes(range(200, 232))
    keys = [
        SHARED_TREE,
        TreeKey(salt=b"a"),
        TreeKey(extra_key=b"a"),
        TreeKey(salt=b"a", extra_key=b"a"),
        TreeKey(adapter=adapter),
        TreeKey(adapter=bytes(32)),
        TreeKey(salt=b"a", adapter=adapter),
    ]
    blocks = [first_block(key) for key in keys]
    assert len({(block.parent_block_hash, block.lora_id) for block in blocks}) == len(keys)
    assert len({block.block_hashes[0] for block in blocks}) == len(keys)
    shared, *_ = blocks
    assert (shared.parent_block_hash, shared.lora_id) == (None, None)
    assert first_block(TreeKey(salt=b"a")).parent_block_hash == blocks[1].parent_block_hash
    of_adapter = blocks[4]
    assert of_adapter.parent_block_hash is None
    assert of_adapter.lora_id is not None
    assert 0 <= of_adapter.lora_id < 2**63


def test_blocks_with_images_have_the_engines_tokens() -> None:
    """Placeholders, as SGLang's own events have them, and not the words that name the page."""
    tokens = array("q", [7, 8, *[2_000_000] * 14])
    forest, events = Forest(16), KvEvents(16, enabled=True)
    root = forest.root(namespace_hash("m"))
    for digest in (bytes(32), bytes([1] * 32)):
        words = named(tokens, [Input(2, digest)], 16)
        events.stored(forest.insert(root, words, range(16)).last, Tier.DEVICE)
    first, second = events.take()
    assert first.token_ids == second.token_ids == tokens.tolist()
    assert first.block_hashes != second.block_hashes


@pytest.mark.skipif(on_release.IS_0_5_17, reason="its events have no field for a name")
def test_blocks_of_an_adapter_have_its_public_name() -> None:
    """The scheduler notes names by requests, under what they have as extra key: our TreeKey."""
    key = TreeKey(salt=b"a", adapter=bytes(32))
    params = CacheInitParams(False, None, None, PAGE)
    params.kv_event_lora_names.register(SimpleNamespace(lora_id="1", extra_key=key), "french")
    labels = cache_contract.block_labels(params)
    assert first_block(key, labels).lora_name == "french"
    for other in (TreeKey(salt=b"a"), TreeKey(adapter=bytes(32)), SHARED_TREE):
        assert first_block(other, labels).lora_name is None


@pytest.mark.skipif(on_release.IS_0_5_17, reason="its events have no field for a salt")
def test_events_for_dynamo_say_salts_in_words() -> None:
    """It hashes them itself, and looks for a salted prompt's first block where all begin."""
    salted = TreeKey(salt=b"a", salt_text="alice")
    keyed = TreeKey(salt=b"a", extra_key=b"b", salt_text="alice")
    params = CacheInitParams(False, None, None, PAGE)
    plain = cache_contract.block_labels(params)
    assert first_block(salted, plain).cache_salt is None
    params.dynamo_kv_event_format = True
    labels = cache_contract.block_labels(params)
    told = first_block(salted, labels)
    assert (told.cache_salt, told.parent_block_hash) == ("alice", None)
    assert told.block_hashes == first_block(salted, plain).block_hashes
    # It knows no extra keys: those blocks stay where it finds none.
    for key in (keyed, TreeKey(salt=b"a")):
        untold = first_block(key, labels)
        assert untold.cache_salt is None
        assert untold.parent_block_hash == first_block(key, plain).parent_block_hash is not None


def test_removal_names_the_same_blocks() -> None:
    forest = Forest(PAGE)
    node = forest.insert(forest.root(namespace_hash("m")), array("q", range(8)), range(8)).last
    events = KvEvents(PAGE, enabled=True)
    events.stored(node, Tier.DISK)
    events.removed(node, Tier.DISK)
    *stored, removed = events.take()
    assert isinstance(removed, BlockRemoved)
    assert removed.block_hashes == [event.block_hashes[0] for event in stored]
    assert removed.medium == "DISK"


def test_pages_that_a_tier_dropped_are_named_without_a_node() -> None:
    events = KvEvents(PAGE, enabled=True)
    page_hash = bytes(range(32))
    events.dropped([page_hash], Tier.DISK)
    events.dropped([], Tier.DISK)
    (only,) = events.take()
    assert isinstance(only, BlockRemoved)
    assert (only.block_hashes, only.medium) == ([block_hash(page_hash)], "DISK")


def test_take_empties_the_queue_and_clearing_is_an_event() -> None:
    events = KvEvents(PAGE, enabled=True)
    events.cleared()
    (only,) = events.take()
    assert isinstance(only, AllBlocksCleared)
    assert events.take() == []


def test_disabled_collects_nothing() -> None:
    forest = Forest(PAGE)
    node = forest.insert(forest.root(namespace_hash("m")), array("q", range(4)), range(4)).last
    events = KvEvents(PAGE, enabled=False)
    events.stored(node, Tier.DEVICE)
    events.removed(node, Tier.DEVICE)
    events.cleared()
    assert events.take() == []
