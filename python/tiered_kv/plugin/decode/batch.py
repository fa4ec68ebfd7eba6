"""Some rows of a decode batch as a batch of their own, and back.

SGLang keeps everyone who decodes in one `ScheduleBatch` and reads it for much else: aborts, pauses,
admission budgets, the idle test. So that batch stays whole. To decode some of it, a copy is cut to
their rows by SGLang's own `filter_batch`, prepared and run, and what preparing changed is written
back. Nothing else needs to be: a request's next input token is kept by its slot in SGLang's
`FutureMap` (managers/overlap_utils.py), and its result goes to the request itself.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tiered_kv.plugin.decode import penalties as decode_penalties
from tiered_kv.plugin.upstream.current import request_kv

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.sampling.penaltylib.orchestrator import BatchedPenalizerOrchestrator

#: Per-request tensors that `ScheduleBatch.prepare_for_decode` advances.
_LENGTHS = ("seq_lens", "seq_lens_cpu", "orig_seq_lens")


def decode_part(whole: ScheduleBatch, rows: Sequence[int]) -> ScheduleBatch:
    """A batch of these rows of `whole`, prepared to decode; `whole` is as if they had decoded.

    rows: ascending, at least one and not all.
    """
    part = _cut(whole, rows)
    part.prepare_for_decode()
    _write_back(whole, part, rows)
    return part


def _cut(whole: ScheduleBatch, rows: Sequence[int]) -> ScheduleBatch:
    """Shares no list, tensor or penalty with `whole` that either of them changes in place."""
    part = copy.copy(whole)
    part.sampling_info = copy.copy(whole.sampling_info)
    penalties = whole.sampling_info.penalizer_orchestrator
    if penalties.is_required:
        part.sampling_info.penalizer_orchestrator = _copy_penalties(penalties, part)
    part.filter_batch(keep_indices=list(rows))
    return part


def _copy_penalties(
    penalties: BatchedPenalizerOrchestrator, part: ScheduleBatch
) -> BatchedPenalizerOrchestrator:
    own = copy.copy(penalties)
    own.batch = part
    own.penalizers = {kind: copy.copy(p) for kind, p in penalties.penalizers.items()}
    for penalizer in own.penalizers.values():
        penalizer._orchestrator_ref = weakref.ref(own)
    return own


def _write_back(whole: ScheduleBatch, part: ScheduleBatch, rows: Sequence[int]) -> None:
    at = torch.tensor(rows, dtype=torch.int64)
    at_device = at.to(whole.device, non_blocking=True)
    for name in _LENGTHS:
        lengths = getattr(whole, name)
        if lengths is None:
            continue  # the mirror on the host, which not every attention backend needs
        # A new tensor: the old one may be in use by a forward pass that is under way.
        index = at if lengths.device.type == "cpu" else at_device
        setattr(whole, name, lengths.index_copy(0, index, getattr(part, name)))
    whole.seq_lens_sum = None
    whole.out_cache_loc = None
    whole.input_embeds = None
    whole.forward_mode = part.forward_mode
    decode_penalties.write_back(whole, part, at_device)


def place_mixed_tokens(result: None, batch: ScheduleBatch, running_batch: ScheduleBatch) -> None:
    """AFTER `ScheduleBatch.mix_with_running`: decodes were mixed into a prefill.

    Under overlap SGLang counts on a result to come for each of them; who was parked has none.
    """
    if not getattr(batch.tree_cache, "resumes_requests", False):
        return
    decoding = running_batch.reqs
    prefills = batch.prefix_lens[: len(batch.prefix_lens) - len(decoding)]
    batch.prefix_lens = prefills + [request_kv.committed_tokens(req) - 1 for req in decoding]
