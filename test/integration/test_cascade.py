"""Gangs on a real server: what they share is read once, and the answers are plain SGLang's.

The oracle is plain SGLang in float32. `--tiered-kv-debug-integrity` has every plan checked against
the page tables: a group whose requests do not share their slots stops the server.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.client import generate_all
from harness.demo_model import host_size
from harness.metrics import scrape
from harness.prompts import PromptMaker
from harness.server import FLOAT32, Server
from support.models import tiny_model_for_two_ranks
from support.oracle import Oracle, Prompt
from support.workload import SHORT_OF_MEMORY, Request, differences, serve
from tiered_kv.metrics import names

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

NEW_TOKENS = 12
TIERS = ("--tiered-kv", "--tiered-kv-disk-dir", "none", "--tiered-kv-host-size", host_size(4096))
WATCH = ("--tiered-kv-debug-integrity", "--enable-metrics")


def gang_prompts(
    prompts: PromptMaker, n_gangs: int, n_members: int, shared: int, own: int = 40
) -> list[Prompt]:
    """Interleaved, as they would arrive: the first of every gang, then the second of every, ..."""
    return [
        prompts.tokens(f"gang {gang}", shared) + prompts.tokens(f"member {gang} {member}", own)
        for member in range(n_members)
        for gang in range(n_gangs)
    ]


def equal_prompts(prompts: PromptMaker, shared: int) -> list[Prompt]:
    """Some share the whole prompt, which ends with a page; others part in the token after it."""
    base = prompts.tokens(f"equal {shared}", shared)
    others = [base + prompts.tokens(f"last {i}", 1) for i in range(4)]
    return [*[base] * 8, *others, *[base[:64]] * 2]


def read_share(server: Server) -> float:
    """Tokens read per token attended to, in all decoding so far."""
    now = scrape(server)
    return now.of(names.DECODE_READ_TOKENS) / now.of(names.DECODE_CONTEXT_TOKENS)


@pytest.mark.parametrize("shared", [512, pytest.param(2048, marks=pytest.mark.long)])
def test_four_gangs_of_four(
    make_server: Callable[..., Server], oracle: Oracle, prompts: PromptMaker, shared: int
) -> None:
    asked = gang_prompts(prompts, n_gangs=4, n_members=4, shared=shared)
    args = ["--page-size", 64, "--max-total-tokens", 16384, "--chunked-prefill-size", 512]
    with make_server(f"cascade-{shared}", *FLOAT32, *args, *TIERS, *WATCH) as server:
        answers = generate_all(server, asked, NEW_TOKENS, concurrency=16)
        share = read_share(server)
        equals = equal_prompts(prompts, shared)
        said = generate_all(server, equals, NEW_TOKENS, concurrency=16)
    truths = oracle.all_output_ids([(prompt, NEW_TOKENS) for prompt in asked + equals])
    assert [answer.output_ids for answer in answers + said] == truths
    # All sixteen together would read 4 x (shared + 4 x own) of 16 x (shared + own) tokens: 0.27
    # of 2,048 shared, 0.30 of 512. On a busy machine they start and end further apart; with two
    # of the four gangs alone it would be 0.64.
    assert share < 0.6


@pytest.mark.long
@pytest.mark.parametrize(("page_size", "n_ranks"), [(1, 1), (16, 1), (16, 2)])
def test_under_pressure(
    make_server: Callable[..., Server],
    demo_model: Path,
    prompts: PromptMaker,
    tmp_path: Path,
    page_size: int,
    n_ranks: int,
) -> None:
    """A pool too small for all, so that requests are retracted, and clients that abort theirs.

    On a small random model. Its truth is what the same server answers to the same prompts under
    keys of their own, which share nothing: there are no groups.
    """
    model = tiny_model_for_two_ranks(demo_model, tmp_path / "model")
    asked = gang_prompts(prompts, n_gangs=3, n_members=5, shared=768, own=60)
    args = ["--tp", n_ranks, "--page-size", page_size, "--max-total-tokens", 3584]
    # Admission by SGLang's estimate, made far too hopeful: decoding runs out of room.
    args += ["--schedule-conservativeness", "0.01", "--tiered-kv-policy", "upstream"]
    args += ["--chunked-prefill-size", 256, "--tiered-kv-cascade", "on"]
    name = f"cascade_{page_size}_{n_ranks}"
    load = [Request(p, 120, "abort" if i % 7 == 3 else None, 1.5) for i, p in enumerate(asked)]
    env = SHORT_OF_MEMORY
    with make_server(name, *FLOAT32, *args, *TIERS, *WATCH, model=model, env=env) as server:
        answers = serve(server, load, concurrency=15)
        share = read_share(server)
        truths = serve(server, [r.alone(f"alone {i}") for i, r in enumerate(load)], 2)
        assert "#retracted_reqs" in server.log_text()
    assert not differences(answers, [truth.output_ids for truth in truths if truth is not None])
    assert sum(answer is not None for answer in answers) == 13
    assert share < 0.75
