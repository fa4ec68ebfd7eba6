"""Decoding on the CPU backend with cascade attention, against upstream's own decode.

Guarantee: with a plan the outputs are upstream's, up to rounding, and without one (or for what the
runner cannot do) upstream computes them. The negative controls show that the comparison would
notice a wrong group, and that the integrity check refuses one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from tiered_kv.attention.plan import CascadePlan, Group, Level
from tiered_kv.core.errors import IntegrityError
from tiered_kv.plugin.attention.cascade import PlannedBatch
from tiered_kv.plugin.attention.cpu import CpuAttentionBackend

HEADS, KV_HEADS, SIZE = 6, 2, 16
SHARED = 300
N_TOKENS = (320, 301, 450, 90)
GROUP = Group((0, 1, 2), 0, SHARED)
PLAN = CascadePlan(4, (Level((GROUP,)),))


class Pool:
    """One layer's KV, in slots all over it."""

    def __init__(self, n_slots: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(3)
        self.keys, self.values = torch.randn(2, n_slots, KV_HEADS, SIZE, generator=generator).to(
            dtype
        )
        self.dtype = dtype

    def set_kv_buffer(self, layer: Any, where: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.keys[where.loc] = k.view(-1, KV_HEADS, SIZE)
        self.values[where.loc] = v.view(-1, KV_HEADS, SIZE)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.values


class Rig:
    """Four requests, three of which share their first tokens' slots."""

    def __init__(self, *, check: bool = False, dtype: torch.dtype = torch.float32) -> None:
        order = torch.randperm(sum(N_TOKENS), generator=torch.Generator().manual_seed(1)).int()
        self.slots = torch.zeros(9, 512, dtype=torch.int32)
        self.table_rows = torch.tensor([5, 2, 8, 0])
        start = 0
        for row, (table_row, n) in enumerate(zip(self.table_rows, N_TOKENS, strict=True)):
            self.slots[table_row, :n] = order[start : start + n]
            if row in (1, 2):
                self.slots[table_row, :SHARED] = self.slots[self.table_rows[0], :SHARED]
            start += n
        server_args = SimpleNamespace(tiered_kv_debug_integrity=check)
        self.runner = SimpleNamespace(
            device="cpu",
            req_to_token_pool=SimpleNamespace(req_to_token=self.slots),
            token_to_kv_pool=Pool(sum(N_TOKENS), dtype),
            server_args=server_args,
        )
        self.dtype = dtype
        self.planned: PlannedBatch | None = PlannedBatch(PLAN, N_TOKENS, is_new=True)

    def ours(self) -> CpuAttentionBackend:
        backend = CpuAttentionBackend(self.runner)
        backend.cascade = self  # type: ignore[assignment]
        return backend

    def take(self) -> PlannedBatch | None:
        return self.planned

    def decode(self, backend: TorchNativeAttnBackend, **layer_fields: Any) -> torch.Tensor:
        """One layer of a decode pass, new KV included."""
        generator = torch.Generator().manual_seed(7)
        q, k, v = (
            torch.randn(4, heads * SIZE, generator=generator).to(self.dtype)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        last = torch.tensor([n - 1 for n in N_TOKENS])
        batch = SimpleNamespace(
            req_pool_indices=self.table_rows,
            seq_lens=torch.tensor(N_TOKENS),
            encoder_lens=None,
            forward_mode=ForwardMode.DECODE,
            out_cache_loc=self.slots[self.table_rows, last].long(),
        )
        layer = {
            "layer_id": 0,
            "tp_q_head_num": HEADS,
            "tp_k_head_num": KV_HEADS,
            "qk_head_dim": SIZE,
            "v_head_dim": SIZE,
            "scaling": SIZE**-0.5,
            "logit_cap": 0.0,
            "is_cross_attention": False,
            "attn_type": AttentionType.DECODER,
            "sliding_window_size": -1,
        }
        backend.init_forward_metadata(batch)  # type: ignore[arg-type]
        return backend.forward_decode(q, k, v, SimpleNamespace(**layer | layer_fields), batch)

    def upstreams(self, **layer_fields: Any) -> torch.Tensor:
        return self.decode(TorchNativeAttnBackend(self.runner), **layer_fields)


@pytest.mark.parametrize("plan", [PLAN, CascadePlan(4)], ids=["a group", "rows"])
def test_outputs_are_upstreams(plan: CascadePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(check=True)
    rig.planned = PlannedBatch(plan, N_TOKENS, is_new=True)
    expected = rig.upstreams()
    monkeypatch.delattr(TorchNativeAttnBackend, "_run_sdpa_forward_decode")
    torch.testing.assert_close(rig.decode(rig.ours()), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_as_near_to_the_truth_as_upstream() -> None:
    exact = Rig().upstreams().double()
    rig = Rig(dtype=torch.bfloat16)
    ours, theirs = (
        (output.double() - exact).norm() for output in (rig.decode(rig.ours()), rig.upstreams())
    )
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize(
    ("group", "is_wrong"),
    [(GROUP, [False] * 4), (Group((0, 3), 0, 80), [False, False, False, True])],
    ids=["right", "wrong"],
)
def test_a_wrong_group_would_be_noticed(group: Group, is_wrong: list[bool]) -> None:
    """The control: rows 0 and 3 share nothing, so row 3 reads another's KV."""
    rig = Rig()
    rig.planned = PlannedBatch(CascadePlan(4, (Level((group,)),)), N_TOKENS, is_new=True)
    difference = (rig.decode(rig.ours()) - rig.upstreams()).abs().amax(1)
    assert [bool(d > 1e-2) for d in difference] == is_wrong


def test_the_integrity_check_refuses_a_wrong_group() -> None:
    rig = Rig(check=True)
    wrong = CascadePlan(4, (Level((Group((0, 3), 0, 80),)),))
    rig.planned = PlannedBatch(wrong, N_TOKENS, is_new=True)
    with pytest.raises(IntegrityError, match="do not share"):
        rig.decode(rig.ours())


@pytest.mark.parametrize(
    ("layer", "planned"),
    [
        ({"sliding_window_size": 64}, True),
        ({}, False),
    ],
    ids=["window", "no plan"],
)
def test_the_rest_is_left_to_upstream(
    layer: dict[str, Any], planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig()
    backend = rig.ours()
    monkeypatch.setattr(backend._runner, "run", None)
    if not planned:
        rig.planned = None
    assert torch.equal(rig.decode(backend, **layer), rig.upstreams(**layer))


def test_groups_are_not_read_once_where_scores_have_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    backend = rig.ours()
    monkeypatch.setattr(backend._runner, "run", None)
    # So high that it changes nothing that could be seen.
    torch.testing.assert_close(rig.decode(backend, logit_cap=1e6), rig.upstreams())


@pytest.mark.parametrize("n_tokens", [N_TOKENS[:3], (*N_TOKENS[:3], 0)], ids=["rows", "padding"])
def test_a_plan_that_does_not_fit_the_batch_is_not_used(
    n_tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig()
    backend = rig.ours()
    monkeypatch.setattr(backend._runner, "run", None)
    rig.planned = PlannedBatch(CascadePlan(len(n_tokens)), n_tokens, is_new=True)
    assert torch.equal(rig.decode(backend), rig.upstreams())
