"""Chunks of prompts end where checkpoints are wanted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from tiered_kv.plugin.hooks import recurrent as hooks


class Cache:
    """Wants checkpoints as `HybridPrefixCache` does."""

    def __init__(self) -> None:
        from tiered_kv.plugin.cache.hybrid_cache import HybridPrefixCache

        self.states, self.page_size, self.interval = object(), 16, 32
        self.stop_before = HybridPrefixCache.stop_before.__get__(self)


def request(n_tokens: int, *, cached: int = 0, parting: int = 0, host: int = 0) -> Any:
    return SimpleNamespace(
        full_untruncated_fill_ids=[0] * n_tokens,
        # As one release has it, and the other.
        prefix_indices=[0] * cached,
        prefix_len=cached,
        host_hit_length=host,
        tiered_kv_parting=parting,
    )


@pytest.mark.parametrize(
    ("req", "stop"),
    [
        (request(100), 96),  # its last page
        (request(96), None),  # which it ends with
        (request(40), 32),
        (request(31), None),  # too short to be worth a pass
        (request(100, cached=80), None),
        (request(100, cached=64), 96),
        (request(100, parting=48), 48),  # where others may part from it
        (request(100, cached=32, parting=48), 96),  # too near to its beginning
        (request(100, cached=48, parting=48), 96),
        (request(100, parting=96), 96),
    ],
)
def test_where_a_chunk_is_to_end(req: Any, stop: int | None) -> None:
    assert Cache().stop_before(req, len(req.prefix_indices)) == stop


def adder(room: int) -> Any:
    return SimpleNamespace(tree_cache=Cache(), rem_chunk_tokens=room, can_run_list=[])


def test_the_chunk_ends_there_and_nobody_follows() -> None:
    def add(adder: Any, req: Any, **kwargs: Any) -> str:
        assert adder.rem_chunk_tokens == 96 - 16, "of a prompt that has 16 tokens on the host"
        adder.can_run_list.append(req)
        adder.rem_chunk_tokens = 0
        return "OTHER"

    one = adder(500)
    assert hooks.add_one_req(add, one, request(100, host=16), has_chunked_req=False) == "OTHER"
    assert one.rem_chunk_tokens == 0


def test_who_is_not_added_takes_no_room_from_others() -> None:
    one = adder(500)
    hooks.add_one_req(lambda adder, req: "NO_TOKEN", one, request(100))
    assert one.rem_chunk_tokens == 500


def test_a_shorter_chunk_stays_as_it_is() -> None:
    one, seen = adder(48), []
    for hook in (hooks.add_one_req, hooks.add_chunked_req):
        hook(lambda adder, req: seen.append(adder.rem_chunk_tokens), one, request(100))
    assert seen == [48, 48]


def test_a_prompt_that_goes_on_stops_there_as_well() -> None:
    one, seen = adder(500), []
    hooks.add_chunked_req(
        lambda adder, req: seen.append(adder.rem_chunk_tokens), one, request(100, cached=64)
    )
    assert seen == [32]


def test_other_caches_are_left_alone() -> None:
    one = SimpleNamespace(tree_cache=SimpleNamespace(), rem_chunk_tokens=500, can_run_list=[])
    for hook in (hooks.add_one_req, hooks.add_chunked_req):
        assert hook(lambda adder, req: adder.rem_chunk_tokens, one, request(100)) == 500
    hooks.after_alloc([1], SimpleNamespace(), [request(100)])
    hooks.after_run_batch(None, SimpleNamespace(tree_cache=one.tree_cache), None)
