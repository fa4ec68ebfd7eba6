"""Attention of draft trees: a node's row is that of plain attention over the node's own path."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from tiered_kv.plugin.attention.cpu import CpuAttentionBackend

HEADS, KV_HEADS, HEAD = 6, 2, 8
N_NODES = 5


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("is_chain", [True, False])
def test_a_node_sees_its_path_alone(is_chain: bool, window: int | None) -> None:
    dice = random.Random(f"{is_chain} {window}")
    generator = torch.Generator().manual_seed(3)
    n_before = [1, 17, 6]
    slots = torch.randperm(100, generator=generator)[: 3 * 30].view(3, 30)
    keys = torch.randn(100, KV_HEADS, HEAD, generator=generator)
    values = torch.randn(100, KV_HEADS, HEAD, generator=generator)
    query = torch.randn(3 * N_NODES, HEADS, HEAD, generator=generator)
    seen = torch.eye(N_NODES, dtype=torch.bool).repeat(3, 1, 1)
    for mask in seen:
        for node in range(1, N_NODES):
            mask[node] |= mask[node - 1 if is_chain else dice.randrange(node)]
    positions = seen.sum(-1) - 1 + torch.tensor(n_before)[:, None]
    batch = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        seq_lens=torch.tensor(n_before),
        positions=positions.flatten(),
        out_cache_loc=None,
        spec_info=SimpleNamespace(draft_token_num=N_NODES, custom_mask=seen.flatten()),
    )
    runner = SimpleNamespace(
        device="cpu", req_to_token_pool=None, token_to_kv_pool=object(), server_args=None
    )
    backend = CpuAttentionBackend(runner)
    backend.init_forward_metadata(batch)
    output = torch.full_like(query, torch.nan)
    backend._run_sdpa_forward_extend(
        query, output, keys, values, slots, torch.arange(3), batch.seq_lens, None, None,
        scaling=0.4, enable_gqa=True, causal=True, sliding_window_size=window,
    )  # fmt: skip
    for request, before in enumerate(n_before):
        for node in range(N_NODES):
            path = seen[request, node].nonzero().flatten() + before
            own = torch.cat((slots[request, :before], slots[request, path]))
            own = own if window is None else own[-window - 1 :]
            row = request * N_NODES + node
            for head in range(HEADS):
                kv_head = head // (HEADS // KV_HEADS)
                weights = torch.softmax(0.4 * keys[own, kv_head] @ query[row, head], dim=0)
                expected = weights @ values[own, kv_head]
                assert torch.allclose(output[row, head], expected, atol=1e-5)


def test_the_next_pass_has_no_trees() -> None:
    backend = CpuAttentionBackend(
        SimpleNamespace(
            device="cpu", req_to_token_pool=None, token_to_kv_pool=object(), server_args=None
        )
    )
    backend._trees = object()  # type: ignore[assignment]
    backend.init_forward_metadata(
        SimpleNamespace(forward_mode=ForwardMode.DECODE, out_cache_loc=None)
    )
    assert backend._trees is None
