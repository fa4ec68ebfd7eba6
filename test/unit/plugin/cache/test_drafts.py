"""A draft's KV: where it is in a page, what waits for it, and what names it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from transformers import LlamaConfig

from support.tiny_llama import CONFIG
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.cache import drafts
from tiered_kv.plugin.cache.device_pool import buffers_of
from tiered_kv.tiers.device import buffer_format
from tiered_kv.tiers.layer_gate import LayerGate


def pool(n_layers: int, n_heads: int = 2, n_tokens: int = 32) -> Any:
    return MHATokenToKVPool(
        n_tokens, 16, torch.float32, n_heads, 8, n_layers, "cpu", enable_memory_saver=False
    )


class Allocator(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def context(model: Any, algorithm: str | None) -> Any:
    allocator = Allocator(get_kvcache=lambda: model)
    return SimpleNamespace(
        params=SimpleNamespace(token_to_kv_pool_allocator=allocator),
        server_args=SimpleNamespace(speculative_algorithm=algorithm),
    )


def runner(kv: Any, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(**CONFIG | changes)
    return SimpleNamespace(
        model=torch.nn.Linear(4, 4),
        token_to_kv_pool=kv,
        model_config=SimpleNamespace(hf_config=config, dtype=torch.float32, quantization=None),
    )


def note(ctx: Any, of_draft: Any) -> None:
    allocator = ctx.params.token_to_kv_pool_allocator
    inner = None if of_draft is None else SimpleNamespace(draft_runner=of_draft)
    worker = SimpleNamespace(draft_worker=inner, token_to_kv_pool_allocator=allocator)
    drafts.note(None, worker)


def test_a_pages_last_layers_are_the_drafts() -> None:
    device = drafts.with_draft(buffers_of(pool(3)), pool(1, n_heads=4))
    assert device.layers == (0, 0, 1, 1, 2, 2, 3, 3)
    page = buffer_format(16, device.layers, device.buffers)
    assert [part.n_bytes for part in page.parts] == [16 * 2 * 8 * 4] * 6 + [16 * 4 * 8 * 4] * 2


def test_a_drafts_layers_wait_for_their_own_rows() -> None:
    draft, gate = pool(2), LayerGate(5)
    drafts.register_gate(gate, draft)
    waited: list[int] = []
    gate.wait_until = waited.append  # type: ignore[method-assign]
    draft.get_key_buffer(1)
    draft.get_value_buffer(0)
    assert waited == [4, 3]


def test_other_weights_another_config_and_another_algorithm_are_another_name() -> None:
    kv = pool(1)
    ctx = context(kv, "EAGLE")
    names = {
        drafts.name_of(ctx, runner(kv)),
        drafts.name_of(ctx, runner(kv, seed=1)),
        drafts.name_of(ctx, runner(kv, rope_theta=5.0)),
        drafts.name_of(ctx, runner(pool(1).__class__(  # another type
            32, 16, torch.float16, 2, 8, 1, "cpu", enable_memory_saver=False
        ))),
        drafts.name_of(context(kv, "STANDALONE"), runner(kv)),
    }  # fmt: skip
    assert len(names) == 5
    assert drafts.name_of(ctx, runner(kv)) in names


def test_a_draft_in_other_slots_or_nowhere_is_refused() -> None:
    model = pool(2)
    for algorithm, of_draft, is_refused in (
        ("EAGLE", runner(pool(1)), False),
        ("EAGLE", runner(pool(1, n_tokens=64)), True),
        ("EAGLE", None, True),
        ("NGRAM", None, False),
        (None, None, False),
    ):
        ctx = context(model, algorithm)
        note(ctx, of_draft)
        assert drafts.runner_of(ctx) is of_draft
        if is_refused:
            with pytest.raises(ConfigError, match="does not find the draft's KV"):
                drafts.check_runner(ctx)
        else:
            drafts.check_runner(ctx)


def test_only_our_caches_keep_drafts_by_themselves() -> None:
    seen: list[Any] = []

    def theirs(**kwargs: Any) -> None:
        seen.append(kwargs)

    drafts.register(theirs, tree_cache=SimpleNamespace(hierarchy=None), draft_plan=1)
    assert not seen
    other = SimpleNamespace()
    drafts.register(theirs, tree_cache=other, draft_plan=1)
    assert seen == [{"tree_cache": other, "draft_plan": 1}]
