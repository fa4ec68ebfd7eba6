"""Some of the running requests decode at a time, on the real server: same answers, nothing lost.

Gangs of requests share a prefix; interactive and batch classes are mixed. The policy round-robin
with an objective that no iteration meets has them take turns in nearly every iteration, whatever
this machine's speed: what is tested is the mechanism. The oracle is plain SGLang in float32.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from harness.client import Answer, generate, in_parallel
from harness.prompts import PromptMaker
from harness.server import Server
from support.oracle import Oracle
from support.selection import TIGHT_TBT_MS, selection_args
from support.workload import SHORT_OF_MEMORY

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

MakeServer = Callable[..., Server]
N_GANGS = 4
GANG_SIZE = 4
N_NEW = 12

PENALTIES: tuple[dict[str, Any], ...] = (
    {"frequency_penalty": 0.9},
    {"presence_penalty": 1.1},
    {"frequency_penalty": 0.3, "presence_penalty": 0.4, "min_new_tokens": N_NEW},
)


@dataclass(frozen=True)
class Asked:
    """One request."""

    prompt: tuple[int, ...]
    is_interactive: bool
    n_new: int = N_NEW
    extra: dict[str, Any] = field(default_factory=dict)

    def ask(self, server: Server) -> Answer:
        slo = {"class": "batch"}
        if self.is_interactive:
            slo = {"class": "interactive", "tbt_ms": TIGHT_TBT_MS}
        return generate(server, self.prompt, self.n_new, slo=slo, **self.extra)

    def ask_plain(self, server: Server) -> Answer:
        return generate(server, self.prompt, self.n_new, **self.extra)


def gangs(prompts: PromptMaker, n_prefix: int, **extra: Any) -> list[Asked]:
    asked = []
    for gang in range(N_GANGS):
        shared = prompts.tokens(f"gang {gang}", n_prefix)
        for i in range(GANG_SIZE):
            own = prompts.tokens(f"member {gang} {i}", 11 + 9 * i)
            asked.append(Asked((*shared, *own), is_interactive=(gang + i) % 2 == 0, extra=extra))
    return asked


def serve(server: Server, asked: list[Asked]) -> list[tuple[int, ...]]:
    answers = in_parallel(lambda one: one.ask(server), asked, len(asked))
    return [answer.output_ids for answer in answers]


def penalised(prompts: PromptMaker, n_new: int = N_NEW) -> list[Asked]:
    return [
        Asked(
            prompts.tokens(f"penalised {i}", 40 + 7 * i),
            is_interactive=i % 2 == 0,
            n_new=n_new,
            extra={"sampling_params": PENALTIES[i % len(PENALTIES)]},
        )
        for i in range(6)
    ]


def alone(oracle: Oracle, asked: list[Asked]) -> list[tuple[int, ...]]:
    """One after the other: plain SGLang's penalties depend on what else runs."""
    return [one.ask_plain(oracle.server).output_ids for one in asked]


def check_idle(server: Server) -> None:
    """SGLang and we check the books of an idle server."""
    server.flush_cache()
    time.sleep(1.2)
    assert not server.trouble(), "\n".join(server.trouble()) + server.tail()


def test_gangs_that_take_turns_say_what_plain_sglang_says(
    taking_turns: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    asked = gangs(prompts, 256)
    expected = oracle.all_output_ids([(one.prompt, one.n_new) for one in asked])
    before = len(taking_turns.decode_sizes())
    assert serve(taking_turns, asked) == expected
    sizes = taking_turns.decode_sizes()[before:]
    # All at once, it would be one iteration per token.
    assert len(sizes) > 2 * N_NEW, sizes
    assert max(sizes) < len(asked), sizes
    check_idle(taking_turns)


def test_penalties_count_every_token_once(
    taking_turns: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    asked = penalised(prompts)
    assert serve(taking_turns, asked) == alone(oracle, asked)
    check_idle(taking_turns)


def test_log_probabilities_and_stop_strings_survive_parking(
    taking_turns: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    plain = [Asked(prompts.tokens(f"detail {i}", 60), is_interactive=True) for i in range(4)]
    texts = [one.ask_plain(oracle.server).text for one in plain]
    stops = [text[len(text) // 2 :][:3] for text in texts]
    asked = [
        Asked(one.prompt, one.is_interactive, extra={"sampling_params": {"stop": [stop]}})
        if i % 2
        else Asked(one.prompt, one.is_interactive, extra={"return_logprob": True})
        for i, (one, stop) in enumerate(zip(plain, stops, strict=True))
    ]
    answers = in_parallel(lambda one: one.ask(taking_turns), asked, len(asked))
    for one, answer in zip(asked, answers, strict=True):
        expected = one.ask_plain(oracle.server)
        assert (answer.text, answer.output_ids) == (expected.text, expected.output_ids)
        if "return_logprob" in one.extra:
            ours = answer.meta_info["output_token_logprobs"]
            theirs = expected.meta_info["output_token_logprobs"]
            assert [token for _, token, *_ in ours] == [token for _, token, *_ in theirs]
            assert [p for p, *_ in ours] == pytest.approx([p for p, *_ in theirs], abs=1e-3)
    check_idle(taking_turns)


def abort_later(server: Server, rid: str) -> None:
    time.sleep(0.4)
    server.post("/abort_request", {"rid": rid}).raise_for_status()


def serve_and_abort_some(server: Server, asked: list[Asked]) -> list[Answer]:
    rids = [uuid.uuid4().hex for _ in asked]
    with ThreadPoolExecutor(2 * len(asked)) as pool:
        futures: list[Future[Answer]] = [
            pool.submit(
                Asked(a.prompt, a.is_interactive, a.n_new, {**a.extra, "rid": rid}).ask, server
            )
            for a, rid in zip(asked, rids, strict=True)
        ]
        for rid in rids[::3]:
            pool.submit(abort_later, server, rid)
        return [future.result() for future in futures]


@pytest.mark.long
@pytest.mark.parametrize(
    ("policy", "more"),
    [
        ("round-robin", ["--page-size", 1]),
        ("round-robin", ["--page-size", 64, "--disable-overlap-schedule"]),
        ("slack", ["--page-size", 64]),
    ],
    ids=["page-1", "no-overlap", "slack"],
)
def test_two_thousand_tokens_shared_and_some_aborted(
    make_server: MakeServer, oracle: Oracle, prompts: PromptMaker, policy: str, more: list[object]
) -> None:
    asked = gangs(prompts, 2048)
    expected = oracle.all_output_ids([(one.prompt, one.n_new) for one in asked], concurrency=4)
    with make_server(f"long-{policy}-{more[1]}", *selection_args(policy, 16384, *more)) as server:
        assert serve(server, asked) == expected
        for answer, whole in zip(serve_and_abort_some(server, asked), expected, strict=True):
            if answer.finish_reason == "abort":
                assert answer.output_ids == whole[: len(answer.output_ids)]
            else:
                assert answer.output_ids == whole
        check_idle(server)


@pytest.mark.long
def test_memory_that_runs_out_costs_no_recompute_and_no_penalty(
    make_server: MakeServer, oracle: Oracle, prompts: PromptMaker
) -> None:
    """The pool holds half of what six answers need: requests are retracted, and come back."""
    asked = penalised(prompts, n_new=160)
    expected = alone(oracle, asked)
    args = selection_args("slack", 768, "--page-size", 16, "--schedule-conservativeness", 0.1)
    with make_server("retraction", *args, env=SHORT_OF_MEMORY) as server:
        assert serve(server, asked) == expected
        assert "#retracted_reqs" in server.log.read_text()
        check_idle(server)
