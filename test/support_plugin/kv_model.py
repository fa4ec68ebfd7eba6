"""A language model that is all KV cache, for SGLang's scheduler to run.

The KV of a token is the token and its position. The next token depends on every token before it,
as read back from the cache by way of `req_to_token`: a slot that was lost, shared or overwritten,
or a page that came back wrong, changes what is said, or is noticed at once.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.utils import GenerationBatchResult

VOCABULARY = 48
_N_SENTENCES = 4096

_random = np.random.default_rng(20261121)
_MIXER = _random.integers(1, 1 << 61, size=4096, dtype=np.int64)
#: Logits that lie close together, so that penalties decide often.
_LOGITS = torch.from_numpy(_random.normal(size=(_N_SENTENCES, VOCABULARY)).astype(np.float32))


def logits_after(tokens: np.ndarray) -> torch.Tensor:
    """What the model thinks of the next token; (VOCABULARY,) float32."""
    with np.errstate(over="ignore"):
        mixed = int((_MIXER[: len(tokens)] * (tokens + 1)).sum())
    return _LOGITS[(mixed >> 7) % _N_SENTENCES]


class KvModel:
    """SGLang's model worker, as far as the scheduler asks."""

    def __init__(self, pool: Any, req_to_token_pool: Any, gate: Any, *, overlap: bool) -> None:
        self.model_runner = self
        self.prefill_aware_swa = False
        self.attn_backend = SimpleNamespace(needs_cpu_seq_lens=True)
        self._pool = pool
        self._req_to_token = req_to_token_pool.req_to_token
        self._gate = gate
        self._overlap = overlap
        self.batch_sizes: list[int] = []

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
        logits = torch.stack([logits_after(row) for row in rows])
        result = GenerationBatchResult(logits_output=LogitsProcessorOutput(logits))

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
        values[batch.out_cache_loc, 0, :2] = -kv

    def _read(self, batch: Any) -> list[np.ndarray]:
        keys, values = self._pool.get_kv_buffer(0)
        rows = []
        for slot, n in zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True):
            at = self._req_to_token[slot, :n].long()
            kv = keys[at, 0, :2].numpy()
            assert (values[at, 0, :2].numpy() == -kv).all(), "keys and values are of other tokens"
            assert (kv[:, 1] == np.arange(n)).all(), "a slot holds another position's KV"
            rows.append(kv[:, 0].astype(np.int64))
        return rows

    # -- what else SGLang's scheduler asks of a worker ------------------------------------------

    def register_hicache_layer_transfer_counter(self, counter: Any) -> None:
        self._gate = counter
