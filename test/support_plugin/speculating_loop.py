"""SGLang's scheduler loop with its own n-gram worker, over the model that is all KV cache.

Drafts come from what the model is going to say, with mistakes, so that anything from no draft to
all of them is accepted; the nodes of a draft are verified by what the cache holds of their path.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from support_plugin.decode_loop import DecodeLoop
from support_plugin.kv_model import VOCABULARY, KvModel, logits_after
from tiered_kv.plugin.upstream import cpu_speculation
from tiered_kv.plugin.upstream.current import arguments


class SpeculatingModel(KvModel):
    """Verifies draft trees, too."""

    watermark_state = None
    """Read by 0.5.23 alone."""

    def forward_batch_generation(
        self, batch: Any, pp_proxy_tensors: None = None, is_verify: bool = False
    ) -> GenerationBatchResult:
        if not is_verify:
            return super().forward_batch_generation(batch)
        n_nodes = batch.spec_info.draft_token_num
        keys, values = self._pool.get_kv_buffer(0)
        slots, positions = batch.out_cache_loc, batch.spec_info.positions
        keys[slots, 0, 0] = batch.input_ids.float()
        keys[slots, 0, 1] = positions.float()
        values[slots, 0, 0] = self.version
        values[slots, 0, 1] = -(batch.input_ids + positions).float()
        self._check(batch)
        masks = batch.spec_info.custom_mask.view(-1, n_nodes, n_nodes).bool().numpy()
        logits = []
        trees = slots.view(-1, n_nodes)
        for before, tree, mask in zip(self._read(batch), trees, masks, strict=True):
            nodes = keys[tree, 0, 0].numpy().astype(np.int64)
            logits += [logits_after(np.concatenate((before, nodes[seen]))) for seen in mask]
        return GenerationBatchResult(
            logits_output=LogitsProcessorOutput(torch.stack(logits)), can_run_cuda_graph=False
        )

    def get_memory_pool(self) -> tuple[Any, Any]:
        return self.pools


class Foreseeing:
    """In the place of SGLang's collection of n-grams; breadth: children of a node, at most."""

    def __init__(self, loop: DecodeLoop, n_nodes: int, breadth: int) -> None:
        self._loop, self._n_nodes, self._breadth = loop, n_nodes, breadth
        self._dice = random.Random("drafts")

    def batch_get(
        self, rids: Sequence[str], tails: Sequence[list[int]], lengths: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        reqs = {req.rid: req for req in self._loop.running_batch.reqs}
        drafts, masks = [], []
        for rid, tail, length in zip(rids, tails, lengths, strict=True):
            text = [*reqs[rid].origin_input_ids, *reqs[rid].output_ids]
            assert len(text) == length
            assert text[-len(tail) :] == tail
            tokens, mask = self._tree(text)
            drafts += tokens
            masks.append(mask)
        return np.array(drafts), np.stack(masks).flatten().astype(np.int64)

    def _tree(self, text: list[int]) -> tuple[list[int], np.ndarray]:
        """The last token of `text`, and guesses at what follows on it."""
        tokens, parents = [text[-1]], [-1]
        mask = np.eye(self._n_nodes, dtype=bool)
        while len(tokens) < self._n_nodes:
            last = len(tokens) - 1
            parent = last if self._breadth == 1 else self._dice.randint(max(0, last - 2), last)
            if parents.count(parent) >= self._breadth:
                continue
            node = len(tokens)
            mask[node] |= mask[parent]
            path = [tokens[i] for i in np.flatnonzero(mask[node]) if 0 < i < node]
            after = logits_after(np.array([*text, *path]))
            is_wrong = self._dice.random() < 0.3
            tokens.append(self._dice.randrange(VOCABULARY) if is_wrong else int(after.argmax()))
            parents.append(parent)
        return tokens, mask

    def __getattr__(self, name: str) -> Any:
        """It learns and forgets nothing."""
        return lambda *args, **kwargs: None


class SpeculatingLoop(DecodeLoop):
    """breadth: of a draft tree; 1 is a chain. Only pages of one token take more."""

    def __init__(self, args: Any, *, breadth: int = 1, **options: Any) -> None:
        cpu_speculation.register()
        algorithm = SpeculativeAlgorithm.from_string(args.speculative_algorithm)
        worker_class = algorithm.create_worker(args)
        super().__init__(args, overlap=False, **options)
        self.tp_worker.pools = (self.req_to_token_pool, self.token_to_kv_pool_allocator)
        self.tp_worker.model_config = arguments.model_config(args)
        self.tp_worker.max_running_requests = self.max_running_requests
        n_nodes = args.speculative_num_draft_tokens
        worker = worker_class.__new__(worker_class)
        vars(worker).update(
            server_args=args, enable_overlap=False, _target_worker=self.tp_worker,
            model_runner=self.tp_worker, draft_token_num=n_nodes, device="cpu",
            max_trie_depth=args.speculative_ngram_max_trie_depth, adaptive_controller=None,
            speculative_num_draft_tokens=n_nodes, _prev_decode_rids=set(), grammar_tree_host=None,
            ngram_corpus=Foreseeing(self, n_nodes, breadth),
        )  # fmt: skip
        worker.alloc_memory_pool()
        self.spec_algorithm = algorithm
        # Read by 0.5.23 alone.
        self.pp_group = SimpleNamespace(is_last_rank=True)
        self.draft_worker = self.model_worker = worker
        self.batch_result_processor = dataclasses.replace(
            self.batch_result_processor, model_worker=worker
        )

    def make_model(self, pool: Any, overlap: bool) -> SpeculatingModel:
        return SpeculatingModel(pool, self.req_to_token_pool, overlap=overlap)
