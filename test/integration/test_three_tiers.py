"""A prefix comes back from the tier it is in, and the answer is the same as plain SGLang's.

The device has room for 1,024 tokens: four prompts of 400 push out whatever was there before.
"""

from __future__ import annotations

import pytest

from harness.client import Answer, generate, generate_all, post_generate, request_body
from harness.metrics import scrape, wait_for_disk
from harness.prompts import PromptMaker
from harness.server import Server
from support.kv_events import KvEventListener
from support.oracle import Oracle
from tiered_kv.metrics import names

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

DEVICE_TOKENS = 1024
N_TOKENS = 400
#: Of 400 tokens the last one is always computed, so 24 whole pages of 16 can be reused.
N_REUSABLE = 384


def push_out_of_device(server: Server, prompts: PromptMaker, seed: str) -> None:
    others = [prompts.tokens(f"other {seed} {i}", N_TOKENS) for i in range(4)]
    generate_all(server, others, max_new_tokens=1, concurrency=1)


def empty_device_and_host(server: Server) -> None:
    wait_for_disk(server)
    server.flush_cache()


def cached_by_tier(answer: Answer) -> tuple[int, int, int]:
    return (answer.device, answer.host, answer.disk)


def test_a_prefix_that_was_pushed_out_of_the_device_comes_back_from_host(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    prompt = prompts.tokens("host", N_TOKENS)
    truth = oracle.output_ids(prompt)

    first = generate(three_tiers, prompt)
    from_device = generate(three_tiers, prompt)
    push_out_of_device(three_tiers, prompts, "host")
    from_host = generate(three_tiers, prompt)

    assert first.cached_tokens == 0
    assert cached_by_tier(from_device) == (N_REUSABLE, 0, 0)
    assert cached_by_tier(from_host) == (0, N_REUSABLE, 0)
    assert from_host.cached_tokens == N_REUSABLE
    assert [first.output_ids, from_device.output_ids, from_host.output_ids] == [truth] * 3


@pytest.mark.parametrize("missing", [0, 1, 8, 20])
def test_a_prompt_that_never_fits_is_refused_and_nobody_waits_behind_it(
    three_tiers: Server, prompts: PromptMaker, missing: int
) -> None:
    """Admission wants a page more than the prompt, and less than the pool."""
    longest = DEVICE_TOKENS - 16 - 1
    prompt = prompts.tokens("never fits", longest + 1 + missing)
    refused = post_generate(three_tiers, request_body(prompt, 4))
    assert refused.status_code == 400
    assert f"maximum allowed length ({longest + 1} tokens)" in refused.text
    assert generate(three_tiers, prompts.tokens("behind it", 20), 2).finish_reason == "length"
    fits = generate(three_tiers, prompt[:longest], 4)
    assert fits.prompt_tokens == longest


def test_a_longer_prompt_reuses_host_pages_and_computes_the_rest(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    short, long = prompts.tokens("longer", 200), prompts.tokens("longer", 500)
    assert long[:200] == short

    generate(three_tiers, short, max_new_tokens=1)
    push_out_of_device(three_tiers, prompts, "longer")
    answer = generate(three_tiers, long)

    assert cached_by_tier(answer) == (0, 192, 0)
    assert answer.output_ids == oracle.output_ids(long)


def test_generated_tokens_are_cached_as_well(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    prompt = prompts.tokens("turn", 100)
    turn = generate(three_tiers, prompt, max_new_tokens=60)
    push_out_of_device(three_tiers, prompts, "turn")
    next_turn = (*prompt, *turn.output_ids, *prompts.tokens("reply", 20))
    answer = generate(three_tiers, next_turn)

    # 159 of these 160 tokens were the input of a step that was needed, hence 9 whole pages at
    # least; under overlap the last one was the input of a step that had been launched already.
    assert answer.host in (144, 160)
    assert (answer.device, answer.disk) == (0, 0)
    assert turn.output_ids == oracle.output_ids(prompt, 60)
    assert answer.output_ids == oracle.output_ids(next_turn)


def test_after_a_flush_the_disk_serves(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    prompt = prompts.tokens("flush", N_TOKENS)
    generate(three_tiers, prompt)
    empty_device_and_host(three_tiers)

    answer = generate(three_tiers, prompt)

    assert cached_by_tier(answer) == (0, 0, N_REUSABLE)
    assert answer.output_ids == oracle.output_ids(prompt)


def test_after_the_disk_is_cleared_as_well_nothing_serves(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    prompt = prompts.tokens("clear", N_TOKENS)
    generate(three_tiers, prompt)
    empty_device_and_host(three_tiers)
    cleared = three_tiers.post("/hicache/storage-backend/clear")
    assert cleared.status_code == 200, cleared.text
    assert wait_for_disk(three_tiers) == 0

    answer = generate(three_tiers, prompt)

    assert answer.cached_tokens == 0
    assert answer.output_ids == oracle.output_ids(prompt)


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_prompts_of_different_keys_share_nothing(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker, tier: str
) -> None:
    prompt = prompts.tokens(f"tenants {tier}", 200)  # 3 of them fit the device
    truth = oracle.output_ids(prompt)
    mine = generate(three_tiers, prompt, extra_key="tenant a")
    if tier == "disk":
        empty_device_and_host(three_tiers)

    no_key = generate(three_tiers, prompt)
    other_key = generate(three_tiers, prompt, extra_key="tenant b")
    same_key = generate(three_tiers, prompt, extra_key="tenant a")

    assert (no_key.cached_tokens, other_key.cached_tokens) == (0, 0)
    assert same_key.cached_tokens == 192
    assert (same_key.disk if tier == "disk" else same_key.device) == 192
    assert {a.output_ids for a in (mine, no_key, other_key, same_key)} == {truth}


def test_metrics_count_hits_transfers_and_residency(
    three_tiers: Server, prompts: PromptMaker
) -> None:
    wait_for_disk(three_tiers)
    before = scrape(three_tiers)
    prompt = prompts.tokens("metrics", N_TOKENS)
    generate(three_tiers, prompt)
    push_out_of_device(three_tiers, prompts, "metrics")
    generate(three_tiers, prompt)
    empty_device_and_host(three_tiers)
    generate(three_tiers, prompt)
    wait_for_disk(three_tiers)
    after = scrape(three_tiers)

    for metric in names.ALL:
        is_there = any(name.startswith(metric.name) for name in after.sample_names)
        assert is_there == (metric not in names.OF_THE_STORE), metric.name

    def moved(metric: names.Metric, **labels: str) -> float:
        return after.of(metric, **labels) - before.of(metric, **labels)

    assert moved(names.PROMPT_TOKENS) == 7 * N_TOKENS
    assert moved(names.HIT_TOKENS, tier="device") == 0
    assert moved(names.HIT_TOKENS, tier="host") == N_REUSABLE
    assert moved(names.HIT_TOKENS, tier="disk") == N_REUSABLE
    for source, target in [
        ("device", "host"), ("host", "disk"), ("disk", "host"), ("host", "device")
    ]:  # fmt: skip
        assert moved(names.TRANSFER_BYTES, source=source, target=target) > 0, (source, target)
    assert after.of(names.CAPACITY_TOKENS, tier="device") == 1024
    assert after.of(names.CAPACITY_TOKENS, tier="host") == 4096
    assert after.of(names.RESIDENT_TOKENS, tier="host") >= N_TOKENS
    assert after.of(names.DISK_DEGRADED) == 0


#: Of SGLang's own metrics, what boards made for it read.
ON_BOARDS = {
    *("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:gen_throughput"),
    *("sglang:token_usage", "sglang:cache_hit_rate", "sglang:num_used_tokens"),
    *("sglang:time_to_first_token_seconds_bucket", "sglang:inter_token_latency_seconds_bucket"),
    *("sglang:e2e_request_latency_seconds_bucket", "sglang:hicache_host_used_tokens"),
}


def test_sglang_s_own_metrics_say_what_answers_say(
    three_tiers: Server, prompts: PromptMaker
) -> None:
    """Boards that were made for SGLang read its names, not ours. Health checks are in neither."""
    wait_for_disk(three_tiers)
    before = scrape(three_tiers)
    assert three_tiers.get("/health_generate").status_code == 200
    prompt = prompts.tokens("boards", N_TOKENS)
    answers = [generate(three_tiers, prompt), generate(three_tiers, prompt)]
    wait_for_disk(three_tiers)
    host_used = scrape(three_tiers).value("sglang:hicache_host_used_tokens")
    push_out_of_device(three_tiers, prompts, "boards")
    answers.append(generate(three_tiers, prompt))
    empty_device_and_host(three_tiers)
    answers.append(generate(three_tiers, prompt + prompts.tokens("boards, longer", 40)))
    wait_for_disk(three_tiers)
    after = scrape(three_tiers)

    def moved(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    n_others = 4
    assert moved("sglang:num_requests_total") == len(answers) + n_others
    n_prompt = sum(answer.prompt_tokens for answer in answers) + n_others * N_TOKENS
    assert moved("sglang:prompt_tokens_total") == n_prompt
    assert moved(names.PROMPT_TOKENS.name) == n_prompt
    assert moved(f"{names.WAIT_SECONDS.name}_count") == len(answers) + n_others
    assert moved("sglang:generation_tokens_total") == 8 * len(answers) + n_others
    for source, tier in (("device", "device"), ("host", "host"), ("storage", "disk")):
        said = sum(getattr(answer, tier) for answer in answers)
        assert said > 0, tier
        found = sum(
            moved("sglang:cached_tokens_total", cache_source=name)
            for name in after.values_of("sglang:cached_tokens_total", "cache_source")
            if name.startswith(source)
        )
        assert found == said, source
        assert moved(names.HIT_TOKENS.name, tier=tier) == said
    assert after.sample_names >= ON_BOARDS
    for name in ("sglang:token_usage", "sglang:cache_hit_rate"):
        assert 0 <= after.value(name) <= 1
    assert N_TOKENS - 16 <= host_used <= after.value("sglang:hicache_host_total_tokens")


def test_kv_events_name_the_tier(
    three_tiers: Server, prompts: PromptMaker, kv_events: KvEventListener
) -> None:
    wait_for_disk(three_tiers)
    three_tiers.flush_cache()
    kv_events.collect()
    kv_events.stored.clear()
    kv_events.removed.clear()

    generate(three_tiers, prompts.tokens("events", N_TOKENS), max_new_tokens=1)
    wait_for_disk(three_tiers)
    kv_events.collect()
    stored = {medium: list(hashes) for medium, hashes in kv_events.stored.items()}
    push_out_of_device(three_tiers, prompts, "events")
    kv_events.collect()

    assert set(stored) == {"GPU", "CPU_PINNED", "DISK"}
    assert len(stored["GPU"]) == N_TOKENS // 16
    assert sorted(stored["GPU"]) == sorted(stored["CPU_PINNED"]) == sorted(stored["DISK"])
    assert set(stored["GPU"]) <= set(kv_events.removed["GPU"])
    assert not set(stored["GPU"]) & set(kv_events.removed["CPU_PINNED"])
