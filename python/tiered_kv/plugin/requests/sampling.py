"""What a request's own settings make of a pass's logits costs that request alone.

A grammar that allows nothing but the end, and `min_new_tokens` that forbids it; biases that add up
to infinity. Nothing can be drawn from what is left, and SGLang's scheduler ends when it tries. It
ends, too, when one request of a batch wants log-probabilities of some tokens, and another does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def leave_the_end(
    original: Callable[..., None],
    runner: Any,
    logits_output: Any,
    sampling_info: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """AROUND `ModelRunner._preprocess_logits`: a row in which nothing is left ends its request.

    Nothing waits for the device, and batches without such settings are left alone.
    """
    may_leave_none = _changes_logits(sampling_info)
    original(runner, logits_output, sampling_info, *args, **kwargs)
    if may_leave_none:
        allow_the_end(logits_output.next_token_logits, runner.model_config.hf_eos_token_id)


def allow_the_end(logits: torch.Tensor, end_ids: set[int] | None) -> None:
    """In place, in each row of `logits` (batch, vocabulary) that has no finite maximum."""
    is_empty = ~torch.isfinite(logits.amax(dim=-1))
    end = min(end_ids) if end_ids else 0
    logits.masked_fill_(is_empty[:, None], float("-inf"))
    logits[:, end] = torch.where(is_empty, 0.0, logits[:, end])


def _changes_logits(info: Any) -> bool:
    return bool(
        (info.grammars and any(info.grammars))
        or info.logit_bias is not None
        or info.acc_additive_penalties is not None
        or info.acc_scaling_penalties is not None
        or (info.penalizer_orchestrator and info.penalizer_orchestrator.is_required)
    )


def rows_without_tokens(result: Any, processor: Any, logprobs: torch.Tensor, *_: Any) -> None:
    """AFTER `OutputLogprobProcessor.compute_logprobs`: no values are an empty tensor, not a list.

    Whoever moves them off the device asks each row's for `tolist`.
    """
    if result.token_ids_logprobs_val is not None:
        result.token_ids_logprobs_val = [
            row if torch.is_tensor(row) else logprobs.new_empty(0)
            for row in result.token_ids_logprobs_val
        ]
