"""The FlashInfer backend's own part of a pass, with stand-ins for upstream's and the kernels.

Guarantee: what is planned and permuted gives full attention for every row of the batch; passes
without levels are upstream's alone. No kernel was run.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention import attention_registry
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

from support_attention.batches import Batch, draw_batch, in_float64, worst_error
from support_attention.flashinfer import PagedDecode, PagedPrefill, merge_in_place
from support_plugin import on_release
from tiered_kv.attention.flashinfer_runner import FlashInferLevels
from tiered_kv.attention.plan import CascadePlan
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.attention import flashinfer as cascade_flashinfer
from tiered_kv.plugin.attention.cascade import PlannedBatch
from tiered_kv.plugin.attention.flashinfer import CascadeFlashInferBackend

pytestmark = on_release.reads_shared_kv_on_gpus


class Updater:
    """As upstream's `FlashInferIndicesUpdaterDecode` plans a wrapper, in torch."""

    def __init__(self, slots: torch.Tensor) -> None:
        self.slots = slots

    def call_begin_forward(
        self,
        wrapper: PagedDecode,
        req_pool_indices: torch.Tensor,
        paged_kernel_lens: torch.Tensor,
        paged_kernel_lens_sum: int,
        kv_indptr: torch.Tensor,
        kv_start_idx: torch.Tensor,
        spec_info: None,
        seq_lens_cpu: torch.Tensor,
    ) -> None:
        assert paged_kernel_lens_sum == paged_kernel_lens.sum()
        assert torch.equal(seq_lens_cpu, paged_kernel_lens)
        assert seq_lens_cpu.device.type == "cpu"
        assert bool((paged_kernel_lens > 0).all())
        wrapper.slots = [
            self.slots[row, start : start + n].long()
            for row, start, n in zip(req_pool_indices, kv_start_idx, paged_kernel_lens, strict=True)
        ]


class Pool:
    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.written: list[torch.Tensor] = []

    def set_kv_buffer(self, layer: Any, where: Any, k: Any, v: Any, *scales: Any) -> None:
        assert where.swa_loc is None
        self.written.append(where.loc)

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch.keys, self.batch.values


class Rig:
    """A backend that was built without a GPU: with all that decoding needs, and nothing else."""

    def __init__(self, batch: Batch, planned: PlannedBatch | None) -> None:
        backend = object.__new__(CascadeFlashInferBackend)
        n_heads, head_dim = batch.query.shape[1:]
        shape = batch.kernel_shape()
        self.wrappers: list[PagedPrefill] = []

        def make_wrapper() -> PagedPrefill:
            self.wrappers.append(PagedPrefill())
            return self.wrappers[-1]

        self.pool = Pool(batch)
        for name, value in {
            "cascade": self,
            "_eager_levels": FlashInferLevels(shape, make_wrapper, merge_in_place),
            "_parts": None,
            "cascade_graphs": None,
            "req_to_token_pool": SimpleNamespace(req_to_token=batch.tables.slots),
            "token_to_kv_pool": self.pool,
            "indices_updater_decode": Updater(batch.tables.slots),
            "decode_wrappers": [PagedDecode()],
            "kv_indptr": [torch.zeros(32, dtype=torch.int32)],
            "kv_cache_quant_method": SimpleNamespace(needs_global_scale=lambda: True),
        }.items():
            setattr(backend, name, value)
        self.backend, self.batch, self.planned = backend, batch, planned
        self.forward_batch = SimpleNamespace(
            req_pool_indices=batch.tables.table_rows,
            seq_lens_cpu=torch.tensor(batch.tables.n_tokens),
            out_cache_loc=torch.tensor([5]),
        )
        self.layer = SimpleNamespace(
            layer_id=0,
            tp_q_head_num=n_heads,
            head_dim=head_dim,
            scaling=batch.scale,
            logit_cap=0.0,
            k_scale_float=None,
            v_scale_float=None,
        )

    def take(self) -> PlannedBatch | None:
        return self.planned

    def decode(self) -> torch.Tensor:
        self.backend.init_forward_metadata(self.forward_batch)
        q = self.batch.query.flatten(1)
        found = self.backend.forward_decode(q, q, q, self.layer, self.forward_batch)
        return found.view(self.batch.query.shape)


def draw(seed: int) -> tuple[Batch, CascadePlan]:
    """A batch with a plan that has levels."""
    while True:
        batch = draw_batch(random.Random(seed), torch.float64)
        plan = batch.plan(3)
        if plan.levels:
            return batch, plan
        seed += 1000


@pytest.mark.parametrize("seed", range(20))
def test_every_row_attends_to_all_of_its_context(seed: int) -> None:
    batch, plan = draw(seed)
    rig = Rig(batch, PlannedBatch(plan, batch.tables.n_tokens, is_new=True))
    assert worst_error(rig.decode(), in_float64(batch)) < 1e-12
    assert [where.tolist() for where in rig.pool.written] == [[5]]


def test_levels_are_planned_once_while_the_plan_holds() -> None:
    batch, plan = draw(1)
    n_tokens = batch.tables.n_tokens
    # The first pass is two tokens ago for each row that can spare them.
    earlier = tuple(
        max(n - 2, start + 1) for n, start in zip(n_tokens, plan.shared_tokens, strict=True)
    )
    rig = Rig(batch, PlannedBatch(plan, earlier, is_new=True))
    rig.decode()
    rig.planned = PlannedBatch(plan, n_tokens, is_new=False)
    assert worst_error(rig.decode(), in_float64(batch)) < 1e-12
    assert [wrapper.n_plans for wrapper in rig.wrappers] == [1] * len(plan.levels)


@pytest.mark.parametrize("case", ["no plan", "no levels", "padded batch", "no lengths"])
def test_other_passes_are_upstreams(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, plan = draw(2)
    rig = Rig(batch, PlannedBatch(plan, batch.tables.n_tokens, is_new=True))
    if case == "no plan":
        rig.planned = None
    elif case == "no levels":
        rig.planned = PlannedBatch(CascadePlan(plan.n_rows), batch.tables.n_tokens, is_new=True)
    elif case == "padded batch":
        rig.forward_batch.req_pool_indices = torch.zeros(plan.n_rows + 3, dtype=torch.int64)
    else:
        rig.forward_batch.seq_lens_cpu = None
    calls = []
    monkeypatch.setattr(
        FlashInferAttnBackend, "init_forward_metadata", lambda self, fb: calls.append("plan")
    )
    monkeypatch.setattr(
        FlashInferAttnBackend,
        "forward_decode",
        lambda self, *args: calls.append("decode") or batch.query,
    )
    rig.decode()
    assert calls == ["plan", "decode"]
    assert rig.wrappers == []


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"dispatch_reason": "SLIDING_WINDOW"}, "several kinds"),
        ({"is_dllm_model": True}, "diffusion"),
        ({"is_nvfp4_kvcache": True}, "FP4"),
        ({"heads": 128}, "128 query heads"),
        ({}, None),
    ],
)
def test_what_the_backend_does_not_support(state: dict[str, Any], words: str | None) -> None:
    backend = object.__new__(CascadeFlashInferBackend)
    heads = state.pop("heads", 32)
    backend.indices_updater_decode = SimpleNamespace(
        num_qo_heads=heads, head_dim=128, q_data_type=torch.bfloat16
    )
    defaults = {"dispatch_reason": None, "is_dllm_model": False, "is_nvfp4_kvcache": False}
    for name, value in (defaults | {"decode_uses_dequant_workspace": False} | state).items():
        setattr(backend, name, value)
    found = backend._why_not()
    assert (found is None) if words is None else (words in str(found))


def test_the_registered_backend_is_upstreams_unless_ours_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        attention_registry.ATTENTION_BACKENDS, "flashinfer", lambda runner: "theirs"
    )
    monkeypatch.setattr(
        cascade_flashinfer, "CascadeFlashInferBackend", lambda runner, new_workspace: "ours"
    )
    cascade_flashinfer.register()
    cascade_flashinfer.register()
    create = attention_registry.ATTENTION_BACKENDS["flashinfer"]

    def runner(mode: str, **fields: Any) -> Any:
        server_args = SimpleNamespace(
            tiered_kv=True,
            tiered_kv_cascade=mode,
            device="cuda",
            enable_deterministic_inference=False,
            enable_torch_compile=False,
            speculative_algorithm=None,
            enable_dp_attention=False,
            pp_size=1,
            get_attention_backends=lambda: ("flashinfer", "flashinfer"),
        )
        defaults = {"use_mla_backend": False, "is_draft_worker": False, "init_new_workspace": False}
        return SimpleNamespace(**{"server_args": server_args} | defaults | fields)

    assert create(runner("on")) == "ours"
    assert create(runner("auto")) == create(runner("off")) == "theirs"
    assert create(runner("on", is_draft_worker=True)) == "theirs"
    with pytest.raises(ConfigError, match="multi-head latent attention"):
        create(runner("on", use_mla_backend=True))
