"""SGLang's scheduler loop with its own EAGLE worker, over two models that are all KV cache.

The draft's KV of a position is the token behind it, the position, and what the model's hidden state
there is: a number made of all tokens until then. Before a draft is made, every row that it reads is
compared with the text that the model's own rows hold, so a row that was lost, is another prompt's,
or was left by a draft that was not accepted is noticed at once. Of what the draft says, some is
right, some not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from support_plugin.decode_loop import DecodeLoop
from support_plugin.kv_model import MIXER, VOCABULARY, logits_after
from support_plugin.speculating_loop import SpeculatingModel
from tiered_kv.plugin.cache import drafts
from tiered_kv.plugin.cache.device_pool import DeviceBuffers, buffers_of
from tiered_kv.plugin.upstream import cpu_speculation
from tiered_kv.plugin.upstream.current import arguments


def states_of(tokens: np.ndarray) -> np.ndarray:
    """The model's hidden state at each of `tokens`: of it and all before."""
    with np.errstate(over="ignore"):
        mixed = (MIXER[: len(tokens)] * (tokens + 1)).cumsum()
    return ((mixed >> 9) % 8192).astype(np.float32)


class DraftedModel(SpeculatingModel):
    """Gives its hidden states along."""

    kv_index_translator = None
    """Read by 0.5.23 alone."""

    def forward_batch_generation(
        self, batch: Any, forward_batch: Any = None, is_verify: bool = False, **kwargs: Any
    ) -> GenerationBatchResult:
        if not is_verify:
            index = batch.hicache_consumer_index
            result = super().forward_batch_generation(batch)
            parts = zip(self._read(batch), batch.prefix_lens, strict=True)
            states = [states_of(text)[start:] for text, start in parts]
            result.logits_output.hidden_states = torch.from_numpy(np.concatenate(states))[:, None]
            result.kv_loc_plan = None
            self.has_failed = self._gate.has_failed(index)
            return result
        result = super().forward_batch_generation(forward_batch, is_verify=True)
        n_nodes = forward_batch.spec_info.draft_token_num
        drafted = forward_batch.input_ids.view(-1, n_nodes).numpy()
        states = [
            states_of(np.concatenate((text, chain)))[len(text) :]
            for text, chain in zip(self._read(forward_batch), drafted, strict=True)
        ]
        result.logits_output.hidden_states = torch.from_numpy(np.concatenate(states))[:, None]
        return result


class Draft:
    """What runs the draft, as far as SGLang's worker asks."""

    canary_manager = kv_index_translator = None

    def __init__(self, model: DraftedModel, pool: Any, algorithm: Any) -> None:
        self.token_to_kv_pool, self.spec_algorithm, self._model = pool, algorithm, model
        self.attn_backend = SimpleNamespace(init_forward_metadata=lambda _: None)
        self.model_config = SimpleNamespace(
            hf_config=SimpleNamespace(architectures=["Draft"]),
            vocab_size=VOCABULARY,
            model_is_mrope=False,
        )
        self.tp_group = None
        self.n_checked = 0

    def forward(self, batch: Any) -> Any:
        """Writes a row for each token of `batch`, and says what it thinks comes behind it."""
        keys, values = self.token_to_kv_pool.get_kv_buffer(0)
        slots = batch.out_cache_loc
        kv = torch.stack([batch.input_ids, batch.positions], dim=1).float()
        keys[slots, 0, :2] = kv
        values[slots, 0, 0] = batch.spec_info.hidden_states[:, 0]
        values[slots, 0, 1] = -kv.sum(dim=1)
        is_extend = not batch.forward_mode.is_decode()
        every_row = batch.forward_mode.is_draft_extend_v2()
        logits = []
        tokens = batch.input_ids.view(batch.batch_size, -1) if every_row or not is_extend else None
        for i, row in enumerate(batch.req_pool_indices.tolist()):
            n = int(batch.seq_lens[i])
            if not is_extend:
                first = int(batch.positions[i])
                logits.append(self._said(row, first + 1))
            elif every_row:
                start = int(batch.prefix_lens[i])
                self._check(row, start)
                logits += [self._said(row, start + j + 1) for j in range(tokens.shape[1])]
            else:
                if not self._model.has_failed:
                    self._check(row, n)
                logits.append(self._said(row, n))
        output = LogitsProcessorOutput(torch.stack(logits))
        # As the model's own: of a state that no row may keep.
        output.hidden_states = torch.full((len(logits), 1), -1.0)
        return SimpleNamespace(logits_output=output)

    def _rows(self, row: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of the first `n` slots: the draft's keys and values, and the model's tokens."""
        at = self._model._req_to_token[row, :n].long()
        keys, values = (b[at, 0].numpy() for b in self.token_to_kv_pool.get_kv_buffer(0))
        of_model = self._model._pool.get_kv_buffer(0)[0][at, 0, 0].numpy().astype(np.int64)
        return keys, values, of_model, at.numpy()

    def _said(self, row: int, n: int) -> torch.Tensor:
        """By the first `n` rows, and the first token, which it has from the hidden states."""
        keys, _, of_model, _ = self._rows(row, n)
        text = np.concatenate((of_model[:1], keys[:, 0].astype(np.int64)))
        after = logits_after(text)
        return after.roll(1) if int(states_of(text)[-1]) % 10 < 3 else after

    def _check(self, row: int, n: int) -> None:
        """The first `n` rows are of the text that the model's rows hold."""
        keys, values, text, _ = self._rows(row, n)
        assert (values[:, 1] == -keys.sum(axis=1)).all(), "a draft's keys and values do not match"
        assert (keys[:, 1] == np.arange(n)).all(), "a slot holds another position's draft"
        assert (keys[:-1, 0] == text[1:]).all(), "a draft's row is of another token"
        assert (values[:, 0] == states_of(text)).all(), "a draft's row is of another hidden state"
        self.n_checked += n


def plain_batch(batch: Any, runner: Any, **kwargs: Any) -> Any:
    """In the place of `ForwardBatch.init_new`: what models of this kind need of a batch."""
    spec, mode = batch.spec_info, batch.forward_mode
    positions = getattr(spec, "positions", None)
    if positions is None:
        ends = zip(batch.prefix_lens, batch.extend_lens, strict=True)
        positions = torch.cat([torch.arange(at, at + n) for at, n in ends])
    return SimpleNamespace(
        batch_size=len(batch.req_pool_indices), forward_mode=mode, input_ids=batch.input_ids,
        seq_lens=batch.seq_lens, seq_lens_cpu=batch.seq_lens_cpu, positions=positions,
        out_cache_loc=batch.out_cache_loc, req_pool_indices=batch.req_pool_indices,
        spec_info=spec, sampling_info=batch.sampling_info, prefix_lens=batch.prefix_lens,
        mark_forward_metadata_ready=lambda: None, moe_num_token_non_padded=None,
    )  # fmt: skip


@contextlib.contextmanager
def plain_batches() -> Iterator[None]:
    with mock.patch.object(ForwardBatch, "init_new", plain_batch):
        yield


class DraftingLoop(DecodeLoop):
    """Runs within `plain_batches`. keeps_drafts: whether pages have the draft's rows; in_pairs:
    whether they are named by pairs of tokens."""

    def __init__(
        self, args: Any, *, keeps_drafts: bool = True, in_pairs: bool = True, **options: Any
    ) -> None:
        self._keeps_drafts = keeps_drafts
        cpu_speculation.register()
        algorithm = SpeculativeAlgorithm.from_string(args.speculative_algorithm)
        worker_class = algorithm.create_worker(args)
        self._algorithm = algorithm
        super().__init__(args, overlap=False, **options)
        self.tree_cache.is_eagle = self.tree_cache.hierarchy.context.names_pairs = in_pairs
        if keeps_drafts:
            drafts.register_gate(self.tree_cache.hierarchy.load_back.gate, self.draft_pool)
        model = self.tp_worker
        model.pools = (self.req_to_token_pool, self.token_to_kv_pool_allocator)
        model.model_config = arguments.model_config(args)
        model.spec_algorithm, model.decode_cuda_graph_runner = algorithm, None
        model.attn_backend.verify_mask = None
        self.draft = Draft(model, self.draft_pool, algorithm)
        worker = self._worker(worker_class, args)
        self.spec_algorithm = algorithm
        self.pp_group = SimpleNamespace(is_last_rank=True)
        self.draft_worker = self.model_worker = worker
        self.batch_result_processor = dataclasses.replace(
            self.batch_result_processor, model_worker=worker
        )

    def _worker(self, worker_class: Any, args: Any) -> Any:
        from sglang.srt.speculative.eagle_utils import default_tree_mask_mode
        from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

        n_steps = args.speculative_num_steps
        sizes = {
            "server_args": args, "topk": 1, "speculative_num_steps": n_steps, "device": "cpu",
            "speculative_num_draft_tokens": n_steps + 1, "plan_stream": None,
            "plan_stream_ctx": contextlib.nullcontext(),
            "req_to_token_pool": self.req_to_token_pool,
            "token_to_kv_pool_allocator": self.token_to_kv_pool_allocator,
            "speculative_algorithm": self._algorithm,
        }  # fmt: skip
        drafter = EagleDraftWorker.__new__(EagleDraftWorker)
        vars(drafter).update(
            sizes, draft_runner=self.draft, draft_worker=SimpleNamespace(model_runner=self.draft),
            target_worker=self.tp_worker, hot_token_id=None, cuda_graph_runner=None,
            cuda_graph_runner_for_draft_extend=None, index_share_for_mtp_iteration=False,
            seed_dsa_topk_from_draft_extend=False, dsa_extend_topk_buf=None, dsa_index_topk=None,
            tree_mask_mode=default_tree_mask_mode(), parallel_layout=SimpleNamespace(tp_group=None),
            draft_tp_context=lambda _: contextlib.nullcontext(),
            draft_attn_backend=SimpleNamespace(
                init_forward_metadata=lambda _: None, attn_backends=[None] * n_steps
            ),
        )  # fmt: skip
        drafter._rebuild_topk1_chain_buffers()
        worker = worker_class.__new__(worker_class)
        vars(worker).update(
            sizes, _target_worker=self.tp_worker, _draft_worker=drafter, page_size=self.page_size,
            adaptive_controller=None, enable_dp_spec_prefill_coordination=False,
        )  # fmt: skip
        return worker

    def paged_part(self, pool: Any) -> DeviceBuffers | None:
        self.draft_pool = MHATokenToKVPool(
            pool.size, pool.page_size, torch.float32, 1, 2, 1, "cpu",
            enable_memory_saver=False,
        )  # fmt: skip
        own = buffers_of(pool)
        return drafts.with_draft(own, self.draft_pool) if self._keeps_drafts else own

    def make_model(self, pool: Any, overlap: bool) -> DraftedModel:
        return DraftedModel(pool, self.req_to_token_pool, overlap=overlap)
