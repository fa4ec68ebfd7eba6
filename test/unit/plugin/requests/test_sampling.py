"""Rows of logits from which nothing can be drawn: the end token, and no other row is changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiered_kv.plugin.requests.sampling import (
    allow_the_end,
    leave_the_end,
    rows_without_tokens,
)

END = 3
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "row",
    [
        [-INF] * 5,
        [NAN] * 5,
        [0.0, 1.0, NAN, 2.0, 3.0],
        [0.0, INF, 1.0, 2.0, 3.0],
        [INF, -INF, 0.0, 0.0, 0.0],
    ],
)
@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e6])
def test_the_end_is_all_that_is_left(row: list[float], temperature: float) -> None:
    other = [0.5, -INF, 2.0, -1.0, 0.0]
    logits = torch.tensor([other, row, other])
    allow_the_end(logits, {END})
    assert torch.equal(logits[[0, 2]], torch.tensor([other, other]))
    probabilities = torch.softmax(logits / temperature, dim=-1)
    assert probabilities[1].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert int(logits[1].argmax()) == END


def test_a_model_without_an_end_token() -> None:
    logits = torch.full((1, 4), -INF)
    allow_the_end(logits, None)
    assert torch.softmax(logits, dim=-1).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def info(**changes: Any) -> SimpleNamespace:
    names = ("grammars", "logit_bias", "acc_additive_penalties", "acc_scaling_penalties")
    return SimpleNamespace(**dict.fromkeys((*names, "penalizer_orchestrator")) | changes)


@pytest.mark.parametrize(
    ("changes", "is_looked_at"),
    [
        ({}, False),
        ({"grammars": [None, None]}, False),
        ({"penalizer_orchestrator": SimpleNamespace(is_required=False)}, False),
        ({"grammars": [None, "a grammar"]}, True),
        ({"logit_bias": torch.zeros(1, 4)}, True),
        ({"acc_additive_penalties": torch.zeros(1, 4)}, True),
        ({"acc_scaling_penalties": torch.ones(1, 4)}, True),
        ({"penalizer_orchestrator": SimpleNamespace(is_required=True)}, True),
    ],
)
def test_only_batches_with_such_settings_are_looked_at(
    changes: dict[str, Any], is_looked_at: bool
) -> None:
    logits = torch.full((1, 4), -INF)
    runner = SimpleNamespace(model_config=SimpleNamespace(hf_eos_token_id={END}))
    called: list[object] = []

    def original(runner: object, output: object, sampling: Any) -> None:
        called.append(output)
        sampling.grammars = None  # as SGLang may, once they were applied

    output = SimpleNamespace(next_token_logits=logits)
    leave_the_end(original, runner, output, info(**changes))
    assert called == [output]
    assert (float(logits[0, END]) == 0.0) is is_looked_at


def test_rows_whose_request_asks_for_no_tokens() -> None:
    pytest.importorskip("sglang")
    from sglang.srt.layers.logprob_processor import OutputLogprobProcessor

    logprobs = torch.log_softmax(torch.arange(12.0).reshape(3, 4), dim=-1)
    asked: list[Any] = [[1, 2], None, [3]]
    result = OutputLogprobProcessor().compute_logprobs(
        logprobs, [0, 0, 0], asked, torch.tensor([0, 1, 2])
    )
    rows_without_tokens(result, None, logprobs)
    assert result.token_ids_logprobs_val is not None
    lists = [row.tolist() for row in result.token_ids_logprobs_val]
    assert lists == [logprobs[0, [1, 2]].tolist(), [], logprobs[2, [3]].tolist()]
