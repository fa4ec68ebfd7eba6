"""The CPU attention backend against upstream's, whose rows it must return at less cost."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from tiered_kv.plugin.attention import cpu as cpu_attention
from tiered_kv.plugin.attention.cpu import BLOCK_QUERIES, CpuAttentionBackend, LowerRightMask

HEAD = 16


def new_backend(cls: type[TorchNativeAttnBackend]) -> TorchNativeAttnBackend:
    runner = SimpleNamespace(
        device="cpu", req_to_token_pool=None, token_to_kv_pool=object(), server_args=None
    )
    return cls(runner)


def extend_arguments(
    lengths: list[tuple[int, int]],
    *,
    seed: int,
    query_heads: int = 6,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Of a batch of (cached tokens, new tokens), its KV scattered over a pool."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(prefix + new for prefix, new in lengths)
    n_new = sum(new for _, new in lengths)
    longest = max(prefix + new for prefix, new in lengths)
    order = torch.randperm(total, generator=generator)
    table = torch.zeros(len(lengths) + 3, longest + 5, dtype=torch.int32)
    rows = list(range(len(lengths)))[::-1]
    start = 0
    for row, (prefix, new) in zip(rows, lengths, strict=True):
        table[row, : prefix + new] = order[start : start + prefix + new]
        start += prefix + new

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "query": normal(n_new, query_heads, HEAD).to(dtype),
        "output": torch.empty(n_new, query_heads, HEAD, dtype=dtype),
        "k_cache": normal(total, kv_heads, HEAD).to(kv_dtype or dtype),
        "v_cache": normal(total, kv_heads, HEAD).to(kv_dtype or dtype),
        "req_to_token": table,
        "req_pool_indices": torch.tensor(rows),
        "seq_lens": torch.tensor([prefix + new for prefix, new in lengths]),
        "extend_prefix_lens": torch.tensor([prefix for prefix, _ in lengths]),
        "extend_seq_lens": torch.tensor([new for _, new in lengths]),
        "scaling": 0.3,
        "enable_gqa": query_heads != kv_heads,
        "causal": True,
    } | options


def both(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    ours = new_backend(CpuAttentionBackend)._run_sdpa_forward_extend(**arguments)
    theirs = new_backend(TorchNativeAttnBackend)._run_sdpa_forward_extend(
        **arguments | {"output": torch.empty_like(arguments["output"])}
    )
    assert ours is arguments["output"]
    return ours, theirs


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_upstreams(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [
        (rng.choice((0, rng.randrange(1500))), rng.randint(1, rng.choice((8, 300, 1300))))
        for _ in range(rng.randint(1, 4))
    ]
    query_heads, kv_heads = rng.choice(((6, 2), (4, 4), (8, 1)))
    ours, theirs = both(
        extend_arguments(lengths, seed=seed, query_heads=query_heads, kv_heads=kv_heads)
    )
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "prefix", [0, 1, BLOCK_QUERIES - 100, BLOCK_QUERIES, 3 * BLOCK_QUERIES + 1]
)
@pytest.mark.parametrize("new", [1, 100, BLOCK_QUERIES, BLOCK_QUERIES + 1, 2 * BLOCK_QUERIES])
def test_block_edges(prefix: int, new: int) -> None:
    ours, theirs = both(extend_arguments([(prefix, new)], seed=prefix * 7 + new))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bfloat16_rows_are_as_exact_as_upstreams() -> None:
    arguments = extend_arguments([(700, 90), (0, 33)], seed=5, dtype=torch.bfloat16)
    ours, theirs = both(arguments)
    exact, _ = both(
        {
            name: value.float() if getattr(value, "dtype", None) is torch.bfloat16 else value
            for name, value in arguments.items()
        }
    )
    assert (ours.float() - exact).abs().max() <= 1.1 * (theirs.float() - exact).abs().max()


def test_a_cache_of_another_dtype_is_converted() -> None:
    ours, theirs = both(extend_arguments([(40, 9)], seed=2, kv_dtype=torch.float16))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"causal": False}, {"sliding_window_size": 7}])
def test_other_masks_are_left_to_upstream(options: dict[str, Any]) -> None:
    ours, theirs = both(extend_arguments([(0, 50), (0, 20)], seed=3, **options))
    assert torch.equal(ours, theirs)


def test_one_backend_serves_several_dtypes_and_growing_contexts() -> None:
    mask = LowerRightMask()
    for dtype in (torch.float32, torch.bfloat16):
        for n_queries, n_keys in ((3, 5), (2, 3000), (BLOCK_QUERIES, 5000), (1, 1)):
            view = mask.view(n_queries, n_keys, dtype)
            seen = torch.ones(n_queries, n_keys).tril(n_keys - n_queries).bool()
            assert view.dtype is dtype
            assert torch.equal(view == 0, seen)
            assert torch.equal(view == float("-inf"), ~seen)


def test_a_long_prefix_costs_little() -> None:
    """64 rows instead of 4,064: a third of upstream's time leaves room for a noisy machine."""
    arguments = extend_arguments([(4000, 64)], seed=1)
    backends = [new_backend(CpuAttentionBackend), new_backend(TorchNativeAttnBackend)]

    def seconds(backend: TorchNativeAttnBackend) -> float:
        start = time.perf_counter()
        backend._run_sdpa_forward_extend(**arguments)
        return time.perf_counter() - start

    times = [[seconds(backend) for backend in backends] for _ in range(4)]
    ours, theirs = (min(column) for column in zip(*times, strict=True))
    assert ours < theirs / 3


def test_registered_under_upstreams_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTENTION_BACKENDS, "torch_native", ATTENTION_BACKENDS["torch_native"])
    cpu_attention.register()
    assert ATTENTION_BACKENDS["torch_native"] is CpuAttentionBackend
