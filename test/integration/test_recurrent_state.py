"""Recurrent state: answers from every tier are those of plain SGLang (docs/models.md).

A small random model some of whose layers are short convolutions. SGLang's Triton kernels run in
Triton's interpreter here, so prompts are few. The last two servers find their checkpoints damaged:
one on disk, which must not show in any answer; one on its way to the device, which must, or the
comparisons would say nothing.

Two tensor-parallel ranks have shares of each state; the disk of one of them is damaged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.client import generate_all
from harness.metrics import wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support import models
from support.damage import damage_segments
from support.injection import injected
from support.workload import differences, mixed_requests, serve

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(2400)]

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    # What SGLang compiles besides takes minutes on two cores, and computes the same.
    "TORCHDYNAMO_DISABLE": "1",
    # As the model: else cutting a prompt rounds what a convolution looks back to.
    "SGLANG_MAMBA_CONV_DTYPE": "float32",
}
POOL = ("--max-total-tokens", 1024, "--chunked-prefill-size", 128, "--max-mamba-cache-size", 48)
#: Its own tree wants pages of one token on a CPU.
PLAIN = (
    "--page-size",
    1,
    "--mamba-radix-cache-strategy",
    "no_buffer",
    "--disable-overlap-schedule",
)
#: An answer leaves a checkpoint every 16 tokens, a prompt where that saves as many.
CHECKPOINTS = ("--page-size", 16, "--mamba-track-interval", 16)
N_TOKENS = 300
N_REUSABLE = 288


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[Path, Path], Path]


CASES = (Case("short_convolution", models.tiny_short_convolution_model),)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_tier_gives_the_answers_of_plain_sglang(
    make_server: Callable[..., Server],
    demo_model: Path,
    prompts: PromptMaker,
    tmp_path: Path,
    case: Case,
) -> None:
    model = case.make(demo_model, tmp_path / "model")
    asked = [prompts.tokens(f"models {i}", N_TOKENS) for i in range(5)]
    load = mixed_requests(prompts, 40, seed=7)
    only_platform = {**ENVIRONMENT, "SGLANG_PLUGINS": "tiered_kv_cpu"}
    plain_args = (*FLOAT32, *POOL, *PLAIN)
    with make_server(f"{case.name}_plain", *plain_args, model=model, env=only_platform) as plain:
        truths = [answer.output_ids for answer in generate_all(plain, asked, concurrency=1)]
        alone = serve(plain, [one.alone(f"alone {i}") for i, one in enumerate(load)], 4)
    assert len(set(truths)) == 5, "the model ignores its prompts"

    args = [*FLOAT32, *POOL, *CHECKPOINTS, "--tiered-kv", *ALWAYS_LOAD]
    args += ["--tiered-kv-host-size", "4MB", "--enable-metrics"]
    args += ["--tiered-kv-disk-dir", tmp_path / "disk", "--tiered-kv-disk-size", "300MB"]
    watched = [*args, "--tiered-kv-debug-integrity"]
    with make_server(case.name, *watched, model=model, env=ENVIRONMENT) as server:
        computed = generate_all(server, asked, concurrency=1)
        from_device = generate_all(server, asked[-1:], concurrency=1)
        from_host = generate_all(server, asked[:2], concurrency=1)
        wait_for_disk(server)
        server.flush_cache()
        from_disk = generate_all(server, asked, concurrency=1)
        answers = serve(server, load, concurrency=12)
        again = generate_all(server, asked, concurrency=5)
        wait_for_disk(server)
    with make_server(f"{case.name}_restarted", *watched, model=model, env=ENVIRONMENT) as server:
        after_restart = generate_all(server, asked, concurrency=1)
    wrong = {**ENVIRONMENT, **injected("corrupt_states")}
    with make_server(f"{case.name}_wrong", *args, model=model, env=wrong) as server:
        with_wrong_states = generate_all(server, asked, concurrency=1)
    assert damage_segments(tmp_path / "disk")
    with make_server(f"{case.name}_damaged", *watched, model=model, env=ENVIRONMENT) as server:
        damaged = generate_all(server, asked, concurrency=1)

    assert [answer.cached_tokens for answer in computed] == [0] * 5
    assert [answer.device for answer in from_device] == [N_REUSABLE]
    assert [answer.host for answer in from_host] == [N_REUSABLE] * 2
    for from_cold in (from_disk, after_restart, with_wrong_states):
        assert [answer.disk for answer in from_cold] == [N_REUSABLE] * 5
    assert sum(answer.disk for answer in damaged) < N_REUSABLE * 5
    for some, true in (
        (computed, truths),
        (from_device, truths[-1:]),
        (from_host, truths[:2]),
        (from_disk, truths),
        (again, truths),
        (after_restart, truths),
        (damaged, truths),
    ):
        assert [answer.output_ids for answer in some] == true
    assert not differences(answers, [truth.output_ids for truth in alone])
    assert any(answer is not None and answer.cached_tokens for answer in answers)
    # A small model may say the same of a wrong state, but not five times.
    assert any(
        answer.output_ids != true for answer, true in zip(with_wrong_states, truths, strict=True)
    ), "a wrong state does not show in the answers"


#: Of each of two ranks, or replicas.
N_SHORT = 140
N_SHORT_REUSABLE = 128


def tiers_of_two(directory: Path) -> list[object]:
    """Two shards of a disk, and what each rank or replica has of the host."""
    args: list[object] = [*FLOAT32, *POOL, *CHECKPOINTS, "--tiered-kv", *ALWAYS_LOAD]
    args += ["--tiered-kv-host-size", "2MB", "--enable-metrics", "--tiered-kv-debug-integrity"]
    return [*args, "--tiered-kv-disk-dir", directory, "--tiered-kv-disk-size", "512MB"]


def test_two_ranks_go_on_from_their_shares_of_the_same_states(
    make_server: Callable[..., Server], demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    model = models.tiny_short_convolution_model(demo_model, tmp_path / "model")
    asked = [prompts.tokens(f"ranks {i}", N_SHORT) for i in range(3)]
    load = mixed_requests(prompts, 10, seed=11)
    ranks, only_platform = ("--tp", 2), {**ENVIRONMENT, "SGLANG_PLUGINS": "tiered_kv_cpu"}
    plain_args = (*ranks, *FLOAT32, *POOL, *PLAIN)
    with make_server("ranks_plain", *plain_args, model=model, env=only_platform) as plain:
        truths = [answer.output_ids for answer in generate_all(plain, asked, concurrency=1)]
        alone = serve(plain, [one.alone(f"alone {i}") for i, one in enumerate(load)], 4)
    assert len(set(truths)) == 3, "the model ignores its prompts"

    args = [*ranks, *tiers_of_two(tmp_path / "disk")]
    with make_server("ranks", *args, model=model, env=ENVIRONMENT) as server:
        computed = generate_all(server, asked, concurrency=1)
        from_device = generate_all(server, asked, concurrency=1)
        wait_for_disk(server)
        server.flush_cache()
        from_disk = generate_all(server, asked, concurrency=3)
        answers = serve(server, [*load, *load], concurrency=8)
        wait_for_disk(server)
        server.flush_cache()
        # What one rank cannot read, the other must not go on from.
        assert damage_segments(tmp_path / "disk" / "shard-1-of-2")
        damaged = generate_all(server, asked, concurrency=3)
        again = generate_all(server, asked, concurrency=3)
        # No rank has anything of it then, on host or disk.
        order = {"action": "drop", "token_ids": asked[0]}
        assert server.post("/tiered_kv/cache", order).status_code == 200
        after_drop = generate_all(server, asked[:2], concurrency=1)

    assert [answer.cached_tokens for answer in computed] == [0] * 3
    assert [answer.device for answer in from_device] == [N_SHORT_REUSABLE] * 3
    assert [answer.disk for answer in from_disk] == [N_SHORT_REUSABLE] * 3
    assert sum(answer.disk for answer in damaged) < N_SHORT_REUSABLE * 3
    assert [answer.cached_tokens for answer in again] == [N_SHORT_REUSABLE] * 3
    assert [answer.cached_tokens for answer in after_drop] == [0, N_SHORT_REUSABLE]
    for some in (computed, from_device, from_disk, damaged, again, after_drop):
        assert [answer.output_ids for answer in some] == truths[: len(some)]
    assert not differences(answers, [truth.output_ids for truth in (*alone, *alone)])
    assert any(answer is not None and answer.cached_tokens for answer in answers)


def test_replicas_have_checkpoints_of_their_own(
    make_server: Callable[..., Server], demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    model = models.tiny_short_convolution_model(demo_model, tmp_path / "model")
    asked = [prompts.tokens(f"replicas {i}", N_SHORT) for i in range(2)]
    args = ["--dp-size", 2, *tiers_of_two(tmp_path / "disk")]
    with make_server("replicas", *args, model=model, env=ENVIRONMENT) as server:
        computed = generate_all(server, asked, concurrency=1, routed_dp_rank=0)
        by_the_other = generate_all(server, asked[:1], concurrency=1, routed_dp_rank=1)
        wait_for_disk(server)
        server.flush_cache()
        from_disk = generate_all(server, asked, concurrency=2, routed_dp_rank=0)
        others_disk = generate_all(server, asked, concurrency=1, routed_dp_rank=1)

    assert [answer.cached_tokens for answer in (*computed, *by_the_other)] == [0] * 3
    assert [answer.disk for answer in from_disk] == [N_SHORT_REUSABLE] * 2
    assert [answer.disk for answer in others_disk] == [N_SHORT_REUSABLE, 0]
    for some in (by_the_other, from_disk, others_disk):
        assert [a.output_ids for a in some] == [a.output_ids for a in computed[: len(some)]]
    assert len({answer.output_ids for answer in computed}) == 2, "the model ignores its prompts"
