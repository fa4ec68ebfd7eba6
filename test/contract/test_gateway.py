"""What the cluster's gateway does with a request, as docs/cluster.md says it.

The gateway is the real one, with the flags of docker/compose.yaml; the workers are made up, and say
what arrived. `test/integration/test_cluster.py` has real ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from harness.gateway import Gateway, compose_flags
from harness.stub_workers import StubWorker

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
ROUTES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "demo", "messages": MESSAGES},
    "/v1/completions": {"model": "demo", "prompt": "Hello"},
    "/v1/messages": {"model": "demo", "messages": MESSAGES, "max_tokens": 3},
    "/generate": {"text": "Hello", "sampling_params": {"custom_params": {"slo": {"class": "a"}}}},
}
FIELDS: dict[str, Any] = {
    "slo": {"class": "interactive", "ttft_ms": 300.5, "report": True},
    "hints": {"expected_output_tokens": 200, "next_call_in_s": 2.5},
    "custom_params": {"slo": {"class": "batch"}},
    "session_id": "conversation 1",
    "priority": 3,
    "extra_key": "tenant a",
    "cache_salt": "salt",
    "nobody_knows_it": {"a": [1, None, "ä"]},
}
ARRIVE = {
    "authorization": "Bearer key",
    "x-request-id": "request-1",
    "x-correlation-id": "1",
    "x-smg-routing-key": "conversation 1",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}
DROPPED = {
    "x-slo-class": "batch",
    "x-slo-ttft-ms": "300",
    "x-slo-tbt-ms": "30",
    "x-slo-tenant": "a",
    "x-slo-report": "true",
    "x-hints-expected-output-tokens": "200",
    "x-hints-next-call-in-s": "2.5",
    "x-hints-next-call-probability": "0.9",
    "x-session-id": "conversation 1",
    "x-api-key": "key",
    "x-data-parallel-rank": "0",
}


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, StubWorker]]:
    with StubWorker("a") as a, StubWorker("b") as b:
        yield {"a": a, "b": b}


@pytest.fixture(scope="module")
def gateway(
    workers: dict[str, StubWorker], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    urls = {worker.url for worker in workers.values()}
    with Gateway(sorted(urls), tmp_path_factory.mktemp("gateway") / "log") as up:
        up.wait_healthy(urls, 20)
        yield up


def last_received(workers: dict[str, StubWorker], answer: requests.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return workers[answer.json()["text"]].received()[-1]


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_of_the_body_arrives(
    path: str, gateway: Gateway, workers: dict[str, StubWorker]
) -> None:
    sent = {**ROUTES[path], **FIELDS}
    received = last_received(workers, gateway.post(path, sent))
    assert received["path"] == path
    assert {name: received["body"].get(name) for name in sent} == sent


def test_marks_of_what_commutes_arrive_on_generate_alone(
    gateway: Gateway, workers: dict[str, StubWorker]
) -> None:
    """When this fails because they do in messages, docs/cluster.md and docs/slo.md may say so."""
    part = {"type": "text", "text": "A document."}
    marked = {**part, "commutes": True}
    chat = {"model": "demo", "messages": [{"role": "user", "content": [marked]}]}
    (message,) = last_received(workers, gateway.post(CHAT, chat))["body"]["messages"]
    assert message["content"] == [part]
    spans = {"model": "demo", "spans": ["Read ", marked]}
    body = last_received(workers, gateway.post("/generate", spans))["body"]
    assert {name: body.get(name) for name in spans} == spans
    # `spans` are the prompt: what would be one beside them is refused.
    assert body.get("text") is None
    assert body.get("input_ids") is None


@pytest.mark.parametrize("path", ROUTES)
def test_which_headers_arrive(path: str, gateway: Gateway, workers: dict[str, StubWorker]) -> None:
    """Neither objectives nor hints. When this fails because some do, docs/cluster.md may say so."""
    answer = gateway.post(path, ROUTES[path], headers={**ARRIVE, **DROPPED})
    received = last_received(workers, answer)["headers"]
    assert {name: received.get(name) for name in ARRIVE} == ARRIVE
    assert not DROPPED.keys() & received.keys()


def test_the_responses_api_takes_no_field_that_it_does_not_know(
    gateway: Gateway, workers: dict[str, StubWorker]
) -> None:
    body = {"model": "demo", "input": "Hello", "priority": FIELDS["priority"]}
    received = last_received(workers, gateway.post("/v1/responses", body, headers=ARRIVE))
    assert received["body"]["priority"] == FIELDS["priority"]
    assert {name: received["headers"].get(name) for name in ARRIVE} == ARRIVE
    for name in FIELDS.keys() - {"priority"}:
        answer = gateway.post("/v1/responses", {**body, name: FIELDS[name]})
        assert answer.status_code == 400
        assert f"unknown field `{name}`" in answer.text


def test_a_model_that_no_worker_has_is_refused(gateway: Gateway) -> None:
    """Where a worker alone would take any name."""
    answer = gateway.post(CHAT, {**ROUTES[CHAT], "model": "other"})
    assert answer.status_code == 404
    assert "No worker available for model 'other'" in answer.text


def test_the_report_comes_back(gateway: Gateway) -> None:
    plain = gateway.post(CHAT, ROUTES[CHAT]).json()
    assert plain["metadata"]["tiered_kv"][0]["slo"] == {"class": "interactive"}
    stream = gateway.post(CHAT, {**ROUTES[CHAT], "stream": True}).text
    assert '"tiered_kv": [{"slo": {"class": "interactive"}' in stream
    assert "[DONE]" in stream


def test_nothing_that_computes_is_asked_of_a_worker_unasked(
    gateway: Gateway, workers: dict[str, StubWorker]
) -> None:
    """/health_generate waits behind a long prompt: a busy worker would be called sick."""
    before = {name: len(worker.received()) for name, worker in workers.items()}
    n_checks = {name: list(worker.asked()).count("/health") for name, worker in workers.items()}
    a = workers["a"]
    gateway.wait_until(lambda: list(a.asked()).count("/health") > n_checks["a"], 15)
    assert not any("generate" in path for path in a.asked())
    assert before == {name: len(worker.received()) for name, worker in workers.items()}


SHARED = "You are a helpful assistant of few words. " * 40


def talk(gateway: Gateway, name: str, session: str | None, n_turns: int = 4) -> list[str]:
    """Which workers answered the turns, one after the other."""
    prompt = SHARED if session else f"{name} {SHARED}"
    messages = [{"role": "system", "content": prompt}]
    answered_by = []
    for turn in range(n_turns):
        messages = [*messages, {"role": "user", "content": f"{name}, turn {turn}. " * 10}]
        body = {"model": "demo", "messages": messages, "tokens_after_s": 0.02}
        answer = gateway.post(CHAT, body, session)
        answered_by.append(answer.json()["text"])
        messages = [*messages, {"role": "assistant", "content": "Indeed. " * 10}]
    return answered_by


@pytest.mark.parametrize("says_which", [True, False], ids=["with a header", "by its prefix"])
def test_a_conversation_stays_with_its_worker(gateway: Gateway, *, says_which: bool) -> None:
    """With a header even those that share a long prompt are spread over both."""
    names = [f"conversation {says_which} {n}" for n in range(16)]
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda n: talk(gateway, n, n if says_which else None), names))
    assert all(len(set(turns)) == 1 for turns in told)
    if says_which:
        homes = [turns[0] for turns in told]
        assert {"a", "b"} == set(homes)
        assert min(homes.count("a"), homes.count("b")) >= 4


@pytest.mark.long
def test_workers_that_come_later_or_again_are_found(tmp_path: Path) -> None:
    late = StubWorker("late")
    with StubWorker("first") as first, Gateway([first.url, late.url], tmp_path / "log") as gateway:
        gateway.wait_healthy({first.url}, 10)
        time.sleep(0.5)  # the first check of the other has failed
        with late:
            assert gateway.wait_healthy({first.url, late.url}, 30) < 10
            first.kill_9()
            assert gateway.wait_healthy({late.url}, 30) < 20
            with first:
                assert gateway.wait_healthy({first.url, late.url}, 30) < 10


def test_no_turn_fails_when_a_worker_is_killed(tmp_path: Path) -> None:
    """But a stream that has begun ends with an error: its first tokens are with the client."""
    with (
        StubWorker("a") as a,
        StubWorker("b") as b,
        Gateway([a.url, b.url], tmp_path / "log") as gateway,
        ThreadPoolExecutor(32) as pool,
    ):
        gateway.wait_healthy({a.url, b.url}, 20)
        sessions = [f"conversation {n}" for n in range(8)]
        homes = dict(zip(sessions, pool.map(lambda s: ask(gateway, s), sessions), strict=True))
        assert set(homes.values()) == {"a", "b"}
        orphans = [session for session in sessions if homes[session] == "a"]

        slow = {"tokens_after_s": 1.0}
        begun = {s: pool.submit(stream, gateway, s, **slow) for s in orphans}
        waiting = {s: pool.submit(ask, gateway, s, **slow) for s in sessions}
        prefilling = {s: pool.submit(stream, gateway, s, headers_after_s=1.0) for s in sessions}
        time.sleep(0.6)
        a.kill_9()
        assert {f.result() for f in waiting.values()} == {"b"}
        assert all(ended_well(f) for f in prefilling.values())
        assert not all(ended_well(f) for f in begun.values())
        assert [ask(gateway, session) for session in sessions] == ["b"] * len(sessions)


def ask(gateway: Gateway, session: str, **fields: float) -> str:
    """Who answered."""
    answer = gateway.post(CHAT, {**ROUTES[CHAT], **fields}, session)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["text"])


def stream(gateway: Gateway, session: str, **fields: float) -> str:
    answer = gateway.post(CHAT, {**ROUTES[CHAT], **fields, "stream": True}, session)
    assert answer.status_code == 200, answer.text
    return answer.text


def ended_well(text: Future[str]) -> bool:
    return '"error"' not in text.result() and '"content"' in text.result()


def test_blocks_are_as_long_as_pages() -> None:
    from tiered_kv.plugin.options.tiers import PAGE_SIZE_DEFAULT

    flags = compose_flags()
    assert flags[flags.index("--block-size") + 1] == str(PAGE_SIZE_DEFAULT)
