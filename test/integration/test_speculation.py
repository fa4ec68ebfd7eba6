"""N-gram speculative decoding: answers from every tier are those of plain SGLang (docs/models.md).

Guarantee: plain SGLang with and without drafts and `--tiered-kv` with drafts say the same, under
mixed requests on a small pool too; and drafts are accepted, or that would say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from harness.client import Answer, generate, generate_all
from harness.demo_model import host_size
from harness.metrics import wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support.oracle import Oracle
from support.workload import differences, mixed_requests, serve
from support_plugin import on_release

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1800)]

N_TOKENS = 300
N_REUSABLE = 288
N_NEW = 24
NGRAMS = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", 6)
POOL = ("--max-total-tokens", 1024, "--chunked-prefill-size", 256)


def ids(answers: Sequence[Answer]) -> list[tuple[int, ...]]:
    return [answer.output_ids for answer in answers]


def accepted_drafts(answers: Sequence[Answer]) -> int:
    return sum(answer.meta_info["spec_num_correct_drafts"] for answer in answers)


def ask(server: Server, some: Sequence[tuple[int, ...]], concurrency: int = 1) -> list[Answer]:
    return generate_all(server, some, N_NEW, concurrency=concurrency)


@pytest.fixture
def asked(prompts: PromptMaker) -> list[tuple[int, ...]]:
    return [prompts.tokens(f"drafts {i}", N_TOKENS) for i in range(5)]


@pytest.fixture
def truths(oracle: Oracle, asked: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return oracle.all_output_ids([(prompt, N_NEW) for prompt in asked])


@pytest.mark.parametrize(
    "shape",
    [
        ("--page-size", 16, "--speculative-ngram-max-bfs-breadth", 1),
        ("--page-size", 1, "--speculative-ngram-max-bfs-breadth", 4),
    ],
    ids=["chains", "trees"],
)
def test_the_cpu_platform_speculates_as_it_decodes(
    make_server: Callable[..., Server],
    asked: list[tuple[int, ...]],
    truths: list[tuple[int, ...]],
    shape: tuple[object, ...],
) -> None:
    only_platform = {"SGLANG_PLUGINS": "tiered_kv_cpu"}
    args = (*FLOAT32, *POOL, *NGRAMS, *shape)
    with make_server(f"drafts_plain_{shape[1]}", *args, env=only_platform) as plain:
        answers = ask(plain, [*asked, *asked])
    assert ids(answers) == [*truths, *truths]
    assert accepted_drafts(answers[5:]) > 5 * N_NEW / 2


def test_every_tier_gives_the_answers_of_plain_sglang(
    make_server: Callable[..., Server],
    oracle: Oracle,
    prompts: PromptMaker,
    tmp_path: Path,
    asked: list[tuple[int, ...]],
    truths: list[tuple[int, ...]],
) -> None:
    load = mixed_requests(prompts, 60, seed=5)
    load_truths = oracle.all_output_ids([(one.prompt, one.max_new_tokens) for one in load])

    args = [*FLOAT32, *POOL, *NGRAMS, "--page-size", 16, "--tiered-kv", *ALWAYS_LOAD]
    args += ["--tiered-kv-host-size", host_size(2048), "--tiered-kv-debug-integrity"]
    args += ["--tiered-kv-disk-dir", tmp_path / "disk", "--tiered-kv-disk-size", "300MB"]
    args += ["--enable-metrics"]
    with make_server("drafts", *args) as server:
        computed = ask(server, asked)
        from_device = ask(server, asked[-1:])
        from_host = ask(server, asked[:2])
        wait_for_disk(server)
        server.flush_cache()
        from_disk = ask(server, asked)
        answers = serve(server, load, concurrency=16)
        again = ask(server, asked, concurrency=5)
        wait_for_disk(server)
        if on_release.IS_0_5_17:
            refused = server.post("/update_weights_from_disk", {"model_path": "anything"})
            assert refused.status_code == 400
            assert "NGRAM" in refused.json()["message"]
        goes_on = generate(server, asked[0], N_NEW)
    with make_server("drafts_restarted", *args) as server:
        after_restart = ask(server, asked)

    assert [answer.cached_tokens for answer in computed] == [0] * 5
    assert [answer.device for answer in from_device] == [N_REUSABLE]
    assert [answer.host for answer in from_host] == [N_REUSABLE] * 2
    for from_cold in (from_disk, after_restart):
        assert [answer.disk for answer in from_cold] == [N_REUSABLE] * 5
    for some, true in (
        (computed, truths),
        (from_device, truths[-1:]),
        (from_host, truths[:2]),
        (from_disk, truths),
        (again, truths),
        ([goes_on], truths[:1]),
        (after_restart, truths),
    ):
        assert ids(some) == true
    assert accepted_drafts([*from_device, *from_host]) > 3 * N_NEW / 2
    assert not differences(answers, load_truths)
    assert any(answer is not None and answer.cached_tokens for answer in answers)
