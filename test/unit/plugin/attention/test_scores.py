"""Attention with sinks and soft caps in prefill, decode and draft trees: rows, one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from tiered_kv.plugin.attention import cpu as cpu_attention
from tiered_kv.plugin.attention.cpu import CpuAttentionBackend
from tiered_kv.plugin.attention.scores import BLOCK_QUERIES

HEADS, KV_HEADS, HEAD, SCALE = 4, 2, 8, 0.3


class Pool:
    """KV of one layer, which nobody writes here."""

    def __init__(self, n_slots: int) -> None:
        self.keys = torch.randn(n_slots, KV_HEADS, HEAD)
        self.values = torch.randn(n_slots, KV_HEADS, HEAD)

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.keys

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self.values


class Batch:
    """Sequences of (keys, new tokens), on a backend that is asked as SGLang's models ask."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        window: int | None,
        cap: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        torch.manual_seed(1)
        self.lengths, self.window, self.cap, self.chunk = lengths, window, cap, chunk
        longest = max(n_keys for n_keys, _ in lengths)
        slots = torch.randperm(len(lengths) * longest).view(len(lengths), longest)
        self.slots = slots
        self.pool = Pool(slots.numel())
        self.sinks: torch.Tensor | None = torch.randn(HEADS).to(torch.bfloat16)
        self.query = torch.randn(sum(n_new for _, n_new in lengths), HEADS * HEAD)
        self.layer = SimpleNamespace(
            layer_id=0, logit_cap=cap, qk_head_dim=HEAD, v_head_dim=HEAD, scaling=SCALE,
            tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, is_cross_attention=False, attn_type=None,
            use_irope=chunk is not None,
            sliding_window_size=-1 if window is None else window,
        )  # fmt: skip
        self.forward = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            req_pool_indices=torch.arange(len(lengths)),
            seq_lens=torch.tensor([n_keys for n_keys, _ in lengths]),
            extend_seq_lens=torch.tensor([n_new for _, n_new in lengths]),
            extend_prefix_lens=torch.tensor([n_keys - n_new for n_keys, n_new in lengths]),
            out_cache_loc=None,
            encoder_lens=None,
        )
        self.backend = CpuAttentionBackend(
            SimpleNamespace(
                device="cpu",
                req_to_token_pool=SimpleNamespace(req_to_token=slots),
                token_to_kv_pool=self.pool,
                server_args=None,
                attention_chunk_size=chunk,
            )
        )

    def attended(self, how: str) -> torch.Tensor:
        self.backend.init_forward_metadata(self.forward)
        attend = getattr(self.backend, how)
        rows: torch.Tensor = attend(
            self.query, None, None, self.layer, self.forward, False, sinks=self.sinks
        )
        return rows.view(-1, HEADS, HEAD)

    def written_out(self) -> torch.Tensor:
        rows = []
        query = iter(self.query.view(-1, HEADS, HEAD))
        for slots, (n_keys, n_new) in zip(self.slots, self.lengths, strict=True):
            for place in range(n_keys - n_new, n_keys):
                first = 0 if self.window is None else max(0, place - self.window)
                if self.chunk is not None:
                    first = max(first, place // self.chunk * self.chunk)
                rows.append(self._row(next(query), slots[first : place + 1]))
        return torch.stack(rows)

    def _row(self, query: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        heads = []
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            scores = self.pool.keys[slots, kv_head] @ query[head] * SCALE
            if self.cap:
                scores = self.cap * torch.tanh(scores / self.cap)
            if self.sinks is not None:
                scores = torch.cat((scores, self.sinks[head : head + 1].float()))
            weights = scores.softmax(0)[: len(slots)]
            heads.append(weights @ self.pool.values[slots, kv_head])
        return torch.stack(heads)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    ("how", "lengths"),
    [
        ("forward_extend", [(7, 7), (40, 3), (BLOCK_QUERIES + 70, BLOCK_QUERIES + 30)]),
        ("forward_decode", [(1, 1), (33, 1), (12, 1)]),
    ],
)
def test_a_row_counts_the_sink_of_its_head(
    how: str, lengths: list[tuple[int, int]], window: int | None
) -> None:
    batch = Batch(lengths, window)
    rows = batch.attended(how)
    torch.testing.assert_close(rows, batch.written_out())
    batch.sinks = torch.full((HEADS,), float("-inf"))
    assert not torch.allclose(rows, batch.attended(how)), "sinks make no difference"


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("how", ["forward_extend", "forward_decode"])
def test_scores_stay_below_their_cap(how: str, window: int | None) -> None:
    lengths = [(30, 30 if how == "forward_extend" else 1), (12, 1)]
    batch = Batch(lengths, window, cap=0.5)
    batch.sinks = None
    rows = batch.attended(how)
    torch.testing.assert_close(rows, batch.written_out())
    batch.layer.logit_cap = 0.0
    assert not torch.allclose(rows, batch.attended(how)), "the cap makes no difference"


@pytest.mark.parametrize("how", ["forward_extend", "forward_decode"])
def test_a_token_sees_its_own_chunk(how: str) -> None:
    lengths = [(300, 210), (30, 30), (16, 1)] if how == "forward_extend" else [(33, 1), (16, 1)]
    batch = Batch(lengths, None, chunk=16)
    batch.sinks = None
    rows = batch.attended(how)
    torch.testing.assert_close(rows, batch.written_out())
    batch.layer.use_irope = False
    assert not torch.allclose(rows, batch.attended(how)), "chunks make no difference"


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (5, None), (None, 8)])
def test_drafts_have_sinks(window: int | None, chunk: int | None) -> None:
    n_nodes, n_before = 4, [9, 21]
    lengths = [(before + n_nodes, n_nodes) for before in n_before]
    batch = Batch(lengths, window, chunk=chunk)
    chain = torch.ones(2, n_nodes, n_nodes, dtype=torch.bool).tril()
    batch.forward.forward_mode = ForwardMode.TARGET_VERIFY
    batch.forward.seq_lens = torch.tensor(n_before)
    batch.forward.positions = (torch.tensor(n_before)[:, None] + torch.arange(n_nodes)).flatten()
    batch.forward.spec_info = SimpleNamespace(draft_token_num=n_nodes, custom_mask=chain.flatten())
    torch.testing.assert_close(batch.attended("forward_extend"), batch.written_out())


def test_a_layer_without_sinks_has_none_of_the_last_ones() -> None:
    batch = Batch([(30, 4)], None)
    with_sinks = batch.attended("forward_extend")
    batch.sinks = None
    assert not torch.allclose(batch.attended("forward_extend"), with_sinks)


def test_models_that_sglang_serves_with_triton_get_this_backend() -> None:
    cpu_attention.register()
    runner = SimpleNamespace(
        device="cpu", req_to_token_pool=None, token_to_kv_pool=object(), server_args=None
    )
    for name in ("torch_native", "triton"):
        assert isinstance(ATTENTION_BACKENDS[name](runner), CpuAttentionBackend)
