"""A language model that is all KV cache, for SGLang's scheduler to run.

The KV of a token is the token, its position, and the version of the weights. The next token depends
on every token before it, as read back from the cache by way of `req_to_token`: a slot that was
lost, shared or overwritten, or a page that came back wrong, changes what is said, or is noticed at
once. So is KV of other weights; what is said does not depend on these.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.utils import GenerationBatchResult

from tiered_kv.tiers.layer_gate import LayerGate

VOCABULARY = 48
_N_SENTENCES = 4096

_random = np.random.default_rng(20261121)
MIXER = _random.integers(1, 1 << 61, size=4096, dtype=np.int64)
#: Logits that lie close together, so that penalties decide often.
_LOGITS = torch.from_numpy(_random.normal(size=(_N_SENTENCES, VOCABULARY)).astype(np.float32))


def logits_after(tokens: np.ndarray) -> torch.Tensor:
    """What the model thinks of the next token; (VOCABULARY,) float32."""
    with np.errstate(over="ignore"):
        mixed = int((MIXER[: len(tokens)] * (tokens + 1)).sum())
    return _LOGITS[(mixed >> 7) % _N_SENTENCES]


class KvModel:
    """SGLang's model worker, as far as the scheduler asks."""

    def __init__(self, pool: Any, req_to_token_pool: Any, *, overlap: bool) -> None:
        self.model_runner = self
        self.prefill_aware_swa = False
        self.attn_backend = SimpleNamespace(needs_cpu_seq_lens=True)
        self._pool = pool
        self._req_to_token = req_to_token_pool.req_to_token
        self._gate = LayerGate(1)
        self._overlap = overlap
        self.batch_sizes: list[int] = []
        self.version = 1
        #: Whose KV may be read: that of the weights in use, unless an update asked for no flush.
        self.versions = {1}

    def forward_batch_generation(
        self, batch: Any, pp_proxy_tensors: None = None
    ) -> GenerationBatchResult:
        self._gate.set_consumer(batch.hicache_consumer_index)
        info = batch.sampling_info
        info.grammars = [req.grammar for req in batch.reqs] if batch.has_grammar else None
        if batch.forward_mode.is_decode():
            self.batch_sizes.append(len(batch.reqs))
        self._write(batch)
        rows = self._read(batch)
        if self._gate.has_failed(batch.hicache_consumer_index):
            # It has read whatever lay there.
            rows = [np.zeros_like(row) for row in rows]
        else:
            self._check(batch)
        logits = torch.stack([logits_after(row) for row in rows])
        output = LogitsProcessorOutput(logits, next_token_logprobs=torch.zeros(len(logits)))
        result = GenerationBatchResult(logits_output=output)

        def sample() -> GenerationBatchResult:
            info.update_regex_vocab_mask()
            info.apply_logits_bias(logits)
            result.next_token_ids = logits.argmax(dim=-1)
            return result

        if self._overlap and info.grammars is not None:
            result.delay_sample_func = sample
            return result
        return sample()

    def _write(self, batch: Any) -> None:
        keys, values = self._pool.get_kv_buffer(0)
        if batch.forward_mode.is_decode():
            positions = batch.seq_lens - 1
        else:
            ends = zip(batch.prefix_lens, batch.extend_lens, strict=True)
            positions = torch.cat([torch.arange(at, at + n) for at, n in ends])
        assert len(positions) == len(batch.input_ids) == len(batch.out_cache_loc)
        kv = torch.stack([batch.input_ids, positions], dim=1).to(torch.float32)
        keys[batch.out_cache_loc, 0, :2] = kv
        values[batch.out_cache_loc, 0, 0] = self.version
        values[batch.out_cache_loc, 0, 1] = -kv.sum(dim=1)

    def _slots(self, batch: Any) -> Iterator[torch.Tensor]:
        for slot, n in zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True):
            yield self._req_to_token[slot, :n].long()

    def _read(self, batch: Any) -> list[np.ndarray]:
        keys, _ = self._pool.get_kv_buffer(0)
        return [keys[at, 0, 0].numpy().astype(np.int64) for at in self._slots(batch)]

    def _check(self, batch: Any) -> None:
        keys, values = (buffer[:, 0].numpy() for buffer in self._pool.get_kv_buffer(0))
        for at in map(torch.Tensor.numpy, self._slots(batch)):
            assert (values[at, 1] == -keys[at].sum(axis=1)).all(), "keys and values do not match"
            assert (keys[at, 1] == np.arange(len(at))).all(), "a slot holds another position's KV"
            assert set(values[at, 0]) <= self.versions, "KV of other weights is used"

    # -- what else SGLang's scheduler asks of a worker ------------------------------------------

    def register_hicache_layer_transfer_counter(self, counter: Any) -> None:
        self._gate = counter
