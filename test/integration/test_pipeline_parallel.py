"""Stages of a pipeline, over gloo: each keeps its layers' KV, and all do the same.

The model is a small random one of five layers, of which one stage has two and the other three. The
truth is what plain SGLang answers with the same stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness.client import Answer, generate_all
from harness.metrics import scrape, wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support.damage import damage_segments
from support.every_tier import RETRACTED
from support.injection import injected
from support.models import tiny_model_for_two_stages
from support.workload import Request, differences, mixed_requests, serve
from tiered_kv.metrics import names
from tiered_kv.plugin.upstream.installed import installed

pytestmark = [
    pytest.mark.server,
    pytest.mark.long,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(installed() != "0.5.23", reason="refused: docs/models.md"),
]

#: SGLang's loop of a pipeline does not look whether the server shuts down; it is killed after 15 s.
PLAIN = {"SGLANG_PLUGINS": "tiered_kv_cpu"}
#: Of a page on the stage with three layers: 16 tokens of keys and values of 2 heads of 64 floats.
PAGE_BYTES = 16 * 2 * 2 * 64 * 4 * 3
N_HOST_PAGES = 100
N_REUSABLE = 288
#: Little, so that more requests are admitted than fit and some must be retracted.
CONSERVATIVENESS = 0.05

Outputs = list[tuple[int, ...]]


def base_args(*ranks: object) -> list[object]:
    args = [*FLOAT32, *ranks, "--page-size", 16, "--max-total-tokens", 400]
    args += ["--chunked-prefill-size", 64, "--enable-metrics"]
    return [*args, "--schedule-conservativeness", CONSERVATIVENESS]


def tiers(disk: Path) -> list[object]:
    args = ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", f"{N_HOST_PAGES * PAGE_BYTES}B"]
    args += ["--tiered-kv-disk-dir", disk, "--tiered-kv-disk-size", "600MB"]
    return [*args, "--tiered-kv-debug-integrity"]


def outputs(answers: list[Answer]) -> Outputs:
    return [answer.output_ids for answer in answers]


def truths_of(
    server: Server, asked: list[tuple[int, ...]], load: list[Request]
) -> tuple[Outputs, Outputs]:
    """What `server` answers to each alone, and to each of `load` that does not give up."""
    alone = [request.alone(f"alone {i}") for i, request in enumerate(load)]
    answers = serve(server, alone, 4)
    assert all(answer is not None for answer in answers)
    return outputs(generate_all(server, asked, concurrency=1)), [a.output_ids for a in answers if a]


def test_two_stages_answer_from_every_tier(
    make_server: Callable[..., Server], demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    model = tiny_model_for_two_stages(demo_model, tmp_path / "model")
    args, disk = base_args("--pp-size", 2), tmp_path / "disk"
    asked = [prompts.tokens(f"stages {i}", 300) for i in range(5)]
    load = [
        # Long answers outgrow a pool that has room for the prompts.
        replace(request, max_new_tokens=2 * request.max_new_tokens)
        for request in mixed_requests(prompts, 120, seed=11)
    ]

    with make_server("stages_plain", *args, model=model, env=PLAIN) as server:
        truths, load_truths = truths_of(server, asked, load)
    assert len(set(truths)) == 5, "the model ignores its prompts"

    with make_server("stages", *args, *tiers(disk), model=model, env=RETRACTED) as server:
        computed = generate_all(server, asked, concurrency=1)
        on_device = generate_all(server, asked[4:], concurrency=1)
        from_host = generate_all(server, asked[:2], concurrency=1)
        wait_for_disk(server)
        server.flush_cache()
        # Two at once are what the host holds for those who wait.
        from_disk = generate_all(server, asked, concurrency=2)
        mixed = serve(server, load, concurrency=16)
        wait_for_disk(server)
        metrics = scrape(server)
    assert [answer.cached_tokens for answer in computed] == [0] * 5
    assert [answer.device for answer in on_device] == [N_REUSABLE]
    assert [answer.host for answer in from_host] == [N_REUSABLE] * 2
    assert [answer.disk + answer.device for answer in from_disk] == [N_REUSABLE] * 5
    assert sum(answer.disk for answer in from_disk) > 3 * N_REUSABLE
    served = outputs([*computed, *on_device, *from_host, *from_disk])
    assert served == [*truths, truths[4], *truths[:2], *truths]

    assert not differences(mixed, load_truths)
    completed = [answer for answer in mixed if answer is not None]
    assert len(completed) > 80
    assert sum(answer.meta_info["num_retractions"] for answer in completed) > 0
    for stage in ("0", "1"):
        capacity = metrics.of(names.CAPACITY_TOKENS, tier="host", pp_rank=stage)
        assert capacity == N_HOST_PAGES * 16
        assert metrics.of(names.DISK_IO_BYTES, operation="write", pp_rank=stage) > 0
    shards = sorted(path.name for path in disk.iterdir() if path.is_dir())
    assert shards == ["shard-0-of-2", "shard-1-of-2"]

    with make_server("stages_again", *args, *tiers(disk), model=model) as server:
        after_restart = generate_all(server, asked, concurrency=2)
    assert outputs(after_restart) == truths
    assert sum(answer.disk for answer in after_restart) > 3 * N_REUSABLE

    # What one stage finds damaged all of them compute again.
    assert damage_segments(disk / "shard-1-of-2") > 0
    trouble = ("damaged", "checksum")
    expected = tuple(f"(?i){word}" for word in trouble)
    with make_server(
        "stages_damaged", *args, *tiers(disk), model=model, expected=expected
    ) as server:
        after_damage = generate_all(server, asked, concurrency=2)
    assert outputs(after_damage) == truths
    assert sum(answer.disk for answer in after_damage) < sum(a.disk for a in after_restart)


def test_wrong_bytes_on_a_stage_would_be_noticed(
    make_server: Callable[..., Server], demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    model = tiny_model_for_two_stages(demo_model, tmp_path / "model")
    args = [*base_args("--pp-size", 2), *tiers(tmp_path / "disk")]
    asked = [prompts.tokens(f"wrong {i}", 300) for i in range(4)]

    with make_server("stages_wrong", *args, model=model, env=injected("corrupt_host")) as server:
        computed = generate_all(server, asked, concurrency=1)
        from_host = generate_all(server, asked[:2], concurrency=1)

    assert sum(answer.host for answer in from_host) > 0
    assert outputs(from_host) != outputs(computed[:2])


def test_two_stages_of_two_ranks(
    make_server: Callable[..., Server], demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    model = tiny_model_for_two_stages(demo_model, tmp_path / "model")
    args, disk = base_args("--pp-size", 2, "--tp-size", 2), tmp_path / "disk"
    asked = [prompts.tokens(f"both {i}", 300) for i in range(4)]
    load = mixed_requests(prompts, 40, seed=12)

    with make_server("both_plain", *args, model=model, env=PLAIN) as server:
        truths, load_truths = truths_of(server, asked, load)
    with make_server("both", *args, *tiers(disk), model=model) as server:
        computed = generate_all(server, asked, concurrency=1)
        from_host = generate_all(server, asked[:2], concurrency=1)
        mixed = serve(server, load, concurrency=16)
        wait_for_disk(server)
    with make_server("both_again", *args, *tiers(disk), model=model) as server:
        from_disk = generate_all(server, asked, concurrency=2)

    assert [answer.host for answer in from_host] == [N_REUSABLE] * 2
    assert sum(answer.disk for answer in from_disk) > 2 * N_REUSABLE
    assert outputs(computed) == outputs(from_disk) == truths
    assert outputs(from_host) == truths[:2]
    assert not differences(mixed, load_truths)
    shards = sorted(path.name for path in disk.iterdir() if path.is_dir())
    assert shards == [f"shard-{index}-of-4" for index in range(4)]


def test_stages_and_ranks_with_as_many_shards_find_nothing_of_each_other(
    make_server: Callable[..., Server], demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    model, disk = tiny_model_for_two_stages(demo_model, tmp_path / "model"), tmp_path / "disk"
    asked = [prompts.tokens(f"whose {i}", 300) for i in range(2)]
    answers = []
    for name, ranks in (("stages", "--pp-size"), ("ranks", "--tp-size"), ("again", "--pp-size")):
        with make_server(
            f"whose_{name}", *base_args(ranks, 2), *tiers(disk), model=model
        ) as server:
            answers.append(generate_all(server, asked, concurrency=1))
            wait_for_disk(server)

    found = [[answer.disk for answer in some] for some in answers]
    assert found == [[0, 0], [0, 0], [N_REUSABLE] * 2]
    assert len({tuple(outputs(some)) for some in answers}) == 1
