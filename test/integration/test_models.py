"""What models are made of: KV from every tier gives the answers of plain SGLang (docs/models.md).

Small random models in the shapes of real ones. The last servers of each have a fault on purpose:
what they load is wrong, and so must their answers be, or the comparisons would say nothing.
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
from support.injection import injected
from support.workload import differences, mixed_requests, serve

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1200)]

POOL = ("--page-size", 16, "--max-total-tokens", 1024, "--chunked-prefill-size", 128)
N_TOKENS = 300
N_REUSABLE = 288


@dataclass(frozen=True)
class Case:
    """make: writes the model, given the demo model. args: of every server of it. faults: on
    purpose, of the servers that are to answer wrongly."""

    name: str
    make: Callable[[Path, Path], Path]
    args: tuple[object, ...] = ()
    faults: tuple[str, ...] = ("corrupt_host",)


CASES = (
    Case("window", models.tiny_window_model, faults=("corrupt_windows", "corrupt_host")),
    Case("fp8_e4m3", models.tiny_model_for_two_ranks, ("--kv-cache-dtype", "fp8_e4m3")),
    Case("fp8_e5m2", models.tiny_model_for_two_ranks, ("--kv-cache-dtype", "fp8_e5m2")),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_tier_gives_the_answers_of_plain_sglang(
    make_server: Callable[..., Server],
    demo_model: Path,
    prompts: PromptMaker,
    tmp_path: Path,
    case: Case,
) -> None:
    model = case.make(demo_model, tmp_path / "model")
    args = [*FLOAT32, *POOL, *case.args]
    asked = [prompts.tokens(f"models {i}", N_TOKENS) for i in range(5)]
    load = mixed_requests(prompts, 60, seed=7)
    # What SGLang compiles of Gemma takes minutes on two cores, and computes the same.
    uncompiled = {"TORCHDYNAMO_DISABLE": "1"}
    only_platform = {**uncompiled, "SGLANG_PLUGINS": "tiered_kv_cpu"}
    with make_server(f"{case.name}_plain", *args, model=model, env=only_platform) as plain:
        truths = [answer.output_ids for answer in generate_all(plain, asked, concurrency=1)]
        alone = serve(plain, [one.alone(f"alone {i}") for i, one in enumerate(load)], 4)
    assert len(set(truths)) == 5, "the model ignores its prompts"

    args += ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", "4MB", "--enable-metrics"]
    args += ["--tiered-kv-disk-dir", tmp_path / "disk", "--tiered-kv-disk-size", "300MB"]
    watch = "--tiered-kv-debug-integrity"
    with make_server(case.name, *args, watch, model=model, env=uncompiled) as server:
        computed = generate_all(server, asked, concurrency=1)
        from_device = generate_all(server, asked[-1:], concurrency=1)
        from_host = generate_all(server, asked[:2], concurrency=1)
        wait_for_disk(server)
        server.flush_cache()
        from_disk = generate_all(server, asked, concurrency=1)
        answers = serve(server, load, concurrency=16)
        wait_for_disk(server)
    with make_server(f"{case.name}_again", *args, watch, model=model, env=uncompiled) as server:
        after_restart = generate_all(server, asked, concurrency=1)
    wrong_answers = []
    for fault in case.faults:
        wrong = {**uncompiled, **injected(fault)}
        with make_server(fault, *args, model=model, env=wrong) as server:
            wrong_answers.append(generate_all(server, asked, concurrency=1))

    assert [answer.cached_tokens for answer in computed] == [0] * 5
    assert [answer.device for answer in from_device] == [N_REUSABLE]
    assert [answer.host for answer in from_host] == [N_REUSABLE] * 2
    for from_cold in (from_disk, after_restart, *wrong_answers):
        assert [answer.disk for answer in from_cold] == [N_REUSABLE] * 5
    for some, true in (
        (computed, truths),
        (from_device, truths[-1:]),
        (from_host, truths[:2]),
        (from_disk, truths),
        (after_restart, truths),
    ):
        assert [answer.output_ids for answer in some] == true
    assert not differences(answers, [truth.output_ids for truth in alone])
    # A small model may say the same of wrong KV, but not five times.
    for wrong_ones in wrong_answers:
        said = [answer.output_ids for answer in wrong_ones]
        assert said != truths, "wrong KV does not show in the answers"
