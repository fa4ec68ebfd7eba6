"""Keeps penalties for tokens already produced right where requests skip iterations or come back.

SGLang counts a request's last token whenever it prepares its next decode
(`ScheduleBatch.cumulate_penalty_output_tokens`). Under overlap that is the token before the last,
whose result is still on its way, as long as the request decodes in every iteration; if it does not,
a token is missed and another counted twice. And a request that was retracted comes back with
nothing counted. Here the token is picked by its position, and what was counted is counted again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tiered_kv.plugin.upstream.current import request_kv

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

#: What each penalizer of SGLang's keeps per request (sampling/penaltylib), by the class's name.
_STATES = {
    "BatchedFrequencyPenalizer": "cumulated_frequency_penalties",
    "BatchedPresencePenalizer": "cumulated_presence_penalties",
    "BatchedRepetitionPenalizer": "cumulated_repetition_penalties",
    "BatchedMinNewTokensPenalizer": "len_output_tokens",
}
_BY_REQUEST = {
    "BatchedPresencePenalizer": "presence_penalties",
    "BatchedRepetitionPenalizer": "repetition_penalties",
}


def write_back(whole: ScheduleBatch, part: ScheduleBatch, rows: torch.Tensor) -> None:
    """What was counted for `part`, which is these rows of `whole`, counts for `whole`."""
    theirs = part.sampling_info.penalizer_orchestrator
    ours = whole.sampling_info.penalizer_orchestrator
    if theirs is ours or not theirs.is_required:
        return
    for kind, penalizer in theirs.penalizers.items():
        # One that none of these rows needs was left out, and would have counted nothing.
        if penalizer.is_prepared():
            state = _STATES[kind.__name__]
            getattr(ours.penalizers[kind], state)[rows] = getattr(penalizer, state)


def count_by_position(
    original: Callable[..., None], batch: ScheduleBatch, *args: Any, **kwargs: Any
) -> None:
    """AROUND `ScheduleBatch.cumulate_penalty_output_tokens`."""
    if not getattr(batch.tree_cache, "resumes_requests", False):
        original(batch, *args, **kwargs)
        return
    tokens = torch.tensor([_token_to_count(req, batch) for req in batch.reqs], dtype=torch.int64)
    batch.sampling_info.penalizer_orchestrator.cumulate_output_tokens(
        tokens.to(batch.device, non_blocking=True)
    )


def _token_to_count(req: Req, batch: ScheduleBatch) -> int:
    """What the next decode counts: under overlap it lags by one, and begins with the prompt's end.

    The request's KV covers its prompt and all tokens but the last, which is what decodes next.
    """
    committed = request_kv.committed_tokens(req)
    position = committed - len(req.origin_input_ids) - int(batch.enable_overlap)
    outputs = req.output_ids
    if position < 0 or not outputs:
        return int(req.origin_input_ids[-1])
    return int(outputs[min(position, len(outputs) - 1)])


def count_again(result: None, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> None:
    """AFTER `ScheduleBatch.prepare_for_extend`: for requests that had produced tokens before.

    As many as would have been counted by now had they never been away.
    """
    if not getattr(batch.tree_cache, "resumes_requests", False):
        return
    penalties = batch.sampling_info.penalizer_orchestrator
    if not penalties.is_required:
        return
    for row, req in enumerate(batch.reqs):
        if req.output_ids:
            _count(penalties.penalizers.values(), row, _tokens_counted(req, batch))


def _tokens_counted(req: Req, batch: ScheduleBatch) -> torch.Tensor:
    tokens = list(req.output_ids)
    if batch.enable_overlap:
        tokens = [req.origin_input_ids[-1], *tokens[:-1]]
    return torch.tensor(tokens, dtype=torch.int64).to(batch.device, non_blocking=True)


def _count(penalizers: Any, row: int, tokens: torch.Tensor) -> None:
    for penalizer in penalizers:
        if not penalizer.is_prepared():
            continue
        kind = type(penalizer).__name__
        state = getattr(penalizer, _STATES[kind])[row]
        if kind == "BatchedMinNewTokensPenalizer":
            state += len(tokens)
        elif kind == "BatchedFrequencyPenalizer":
            state.scatter_add_(0, tokens, penalizer.frequency_penalties[row].expand(len(tokens)))
        else:
            by_request = getattr(penalizer, _BY_REQUEST[kind])[row]
            state.scatter_(0, tokens, by_request.expand(len(tokens)))
