"""The ways in which people talk to the server all work over the tiers, and report cached tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
from openai import OpenAI

from harness.client import Answer, generate, generate_all, post_generate, request_body
from harness.metrics import wait_for_disk
from harness.prompts import PromptMaker, story
from harness.server import Server
from support.oracle import Oracle
from support.workload import Request, serve

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


@pytest.fixture
def client(three_tiers: Server) -> OpenAI:
    return OpenAI(base_url=f"{three_tiers.url}/v1", api_key="none", timeout=120, max_retries=0)


def chat_messages(seed: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "You retell stories. " + story(seed, 12)},
        {"role": "user", "content": "What did the captain do?"},
    ]


GREEDY: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 12}


def evict(server: Server) -> None:
    """Device and host emptied: what comes next comes from disk."""
    wait_for_disk(server)
    server.flush_cache()


def test_openai_chat(three_tiers: Server, client: OpenAI) -> None:
    messages = chat_messages("chat")
    first = client.chat.completions.create(messages=messages, **GREEDY)
    evict(three_tiers)
    second = client.chat.completions.create(messages=messages, **GREEDY)

    assert first.usage is not None
    assert second.usage is not None
    assert cached_tokens(first.usage) == 0
    assert 0.8 * second.usage.prompt_tokens < cached_tokens(second.usage)
    assert cached_tokens(second.usage) < second.usage.prompt_tokens
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].message.content


def cached_tokens(usage: Any) -> int:
    """An answer of which nothing was cached may leave the details out."""
    details = usage.prompt_tokens_details
    return details.cached_tokens or 0 if details else 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_several_choices_of_one_prompt_call_cached(
    three_tiers: Server, client: OpenAI, stream: bool
) -> None:
    prompts = [story(f"choices {stream} {i}", 12) for i in range(2)]

    def cached() -> int:
        asked: dict[str, Any] = {**GREEDY, "prompt": prompts, "n": 3}
        if not stream:
            return cached_tokens(client.completions.create(**asked).usage)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return cached_tokens(list(client.completions.create(**asked, **options))[-1].usage)

    assert cached() == 0
    assert cached() > 0


def test_several_choices_by_tier_and_in_reports(three_tiers: Server) -> None:
    prompt = story("choices by tier", 12)
    body = request_body(prompt, 4, sampling_params={"n": 3}, slo={"report": True})

    def accounts() -> list[tuple[int, int, dict[str, int]]]:
        found = [Answer.of(one) for one in three_tiers.post("/generate", body).json()]
        return [
            (
                one.cached_tokens,
                (one.meta_info["cached_tokens_details"] or {}).get("storage", 0),
                one.meta_info["tiered_kv"]["cached_tokens"],
            )
            for one in found
        ]

    assert accounts() == [(0, 0, {"device": 0, "host": 0, "disk": 0, "store": 0})] * 3
    evict(three_tiers)
    again = accounts()
    n = again[0][0]
    assert n > 0
    assert again == [(n, n, {"device": 0, "host": 0, "disk": n, "store": 0})] * 3


def test_openai_chat_streaming(three_tiers: Server, client: OpenAI) -> None:
    messages = chat_messages("chat streaming")
    whole = client.chat.completions.create(messages=messages, **GREEDY)
    evict(three_tiers)
    stream = client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert sum(bool(chunk.choices) for chunk in chunks) > 2
    usage = chunks[-1].usage
    assert 0.8 * usage.prompt_tokens < cached_tokens(usage) < usage.prompt_tokens


def test_openai_completions(three_tiers: Server, client: OpenAI, oracle: Oracle) -> None:
    prompt = story("completions", 12)
    truth = oracle.server.post("/generate", request_body(prompt, 12)).json()["text"]
    answers = []
    for _ in range(2):
        answers.append(client.completions.create(prompt=prompt, **GREEDY))
        evict(three_tiers)

    assert [cached_tokens(a.usage) > 0 for a in answers] == [False, True]
    assert all(truth.startswith(a.choices[0].text) for a in answers)
    assert answers[0].choices[0].text == answers[1].choices[0].text != ""


def test_openai_cache_salt_separates_tenants(three_tiers: Server, client: OpenAI) -> None:
    messages = chat_messages("salt")

    def ask(salt: str) -> int:
        answer = client.chat.completions.create(
            messages=messages, extra_body={"cache_salt": salt}, **GREEDY
        )
        return cached_tokens(answer.usage)

    assert ask("one") == 0
    evict(three_tiers)
    assert ask("two") == 0
    assert ask("one") > 0


def test_several_answers_to_one_prompt(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    prompt = prompts.tokens("n", 200)
    truth = oracle.output_ids(prompt)
    for _ in range(2):
        body = request_body(prompt, 8, sampling_params={"n": 3})
        answers = post_generate(three_tiers, body).json()
        assert [tuple(answer["output_ids"]) for answer in answers] == [truth] * 3
        evict(three_tiers)


def test_logprobs_of_prompt_tokens_are_computed_from_where_they_are_asked(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    prompt = prompts.tokens("logprob", 300)
    generate(three_tiers, prompt)
    evict(three_tiers)

    asked = {"return_logprob": True, "logprob_start_len": 100}
    plain = generate(oracle.server, prompt, **asked)
    tiered = generate(three_tiers, prompt, **asked)

    assert tiered.cached_tokens == 96
    assert tiered.output_ids == plain.output_ids
    ours, theirs = (a.meta_info["input_token_logprobs"] for a in (tiered, plain))
    assert len(ours) == 200
    # The first one has no logprob: its predecessor is not asked for.
    assert [entry[1] for entry in ours] == [entry[1] for entry in theirs]
    assert [e[0] for e in ours[1:]] == pytest.approx([e[0] for e in theirs[1:]], abs=1e-3)


def test_a_session_goes_on_where_it_was(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    turns = [prompts.tokens(f"session {i}", 90) for i in range(3)]

    def talk(server: Server, cached: list[int]) -> list[tuple[int, ...]]:
        session = server.post("/open_session", {"capacity_of_str_len": 4096}).json()
        said, last = [], None
        for turn in turns:
            answer = generate(server, turn, session_params={"id": session, "rid": last})
            said.append(answer.output_ids)
            cached.append(answer.cached_tokens)
            last = answer.meta_info["id"]
        assert server.post("/close_session", {"session_id": session}).status_code == 200
        return said

    cached: list[int] = []
    assert talk(three_tiers, cached) == talk(oracle.server, [])
    assert cached[0] == 0
    assert cached[1] >= 80
    assert cached[2] > cached[1]


def test_a_program_with_fork(three_tiers: Server) -> None:
    import sglang as sgl

    from tiered_kv.frontend.endpoint import ProgramEndpoint

    # The function's parameter must be called `s`: SGLang's own rule.
    @sgl.function
    def two_endings(s: Any, beginning: str) -> None:
        s += beginning
        forks = s.fork(2)
        forks += lambda i: f" Ending {i + 1}:" + sgl.gen("ending", max_tokens=8, temperature=0)
        s += f" 1.{forks[0]['ending']} 2.{forks[1]['ending']}"

    backend = sgl.RuntimeEndpoint(three_tiers.url)
    beginning = "A story. " + story("fork", 12)
    first = two_endings.run(beginning=beginning, backend=backend).text()
    evict(three_tiers)
    second = two_endings.run(beginning=beginning, backend=backend).text()

    assert first == second
    assert len(first) > len(beginning) + 10

    evict(three_tiers)
    programs = ProgramEndpoint(three_tiers.url, slo={"report": True})
    state = two_endings.run(beginning=beginning, backend=programs)
    assert state.text() == first


def test_branches_of_a_fork_are_computed_in_one_pass(three_tiers: Server) -> None:
    import sglang as sgl

    from tiered_kv.frontend.endpoint import ProgramEndpoint

    reports: list[dict[str, Any]] = []

    @sgl.function
    def branching(s: Any, name: str) -> None:
        s += f"{name}:"
        forks = s.fork(4)
        forks += lambda i: f" Ending {i}:" + sgl.gen("ending", max_tokens=2, temperature=0)
        reports.extend(forks[i].get_meta_info("ending")["tiered_kv"] for i in range(4))

    def is_one_pass(name: str) -> bool:
        before = len(three_tiers.log_text())
        branching.run(name=name, backend=ProgramEndpoint(three_tiers.url, slo={"report": True}))
        return "#new-seq: 4," in three_tiers.log_text()[before:]

    # On a busy machine they may come too far apart; by themselves they never come together.
    assert any(is_one_pass(f"Try {i}") for i in range(8))
    assert len({report["hints"]["parent_session_id"] for report in reports[:4]}) == 1
    assert [report["hints"]["branches"] for report in reports[:4]] == [4] * 4


def test_an_abort_storm_leaves_nothing_behind(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    rng = random.Random(7)
    gone = [
        Request(prompts.tokens(f"storm {i % 12}", 300), 60, rng.choice(["disconnect", "abort"]),
                rng.uniform(0, 1.5))
        for i in range(40)
    ]  # fmt: skip
    serve(three_tiers, gone, concurrency=20)
    three_tiers.post("/abort_request", {"abort_all": True})

    asked = [prompts.tokens(f"storm {i}", 300) for i in range(4)]
    answers = generate_all(three_tiers, asked)
    evict(three_tiers)

    truths = oracle.all_output_ids([(prompt, 8) for prompt in asked])
    assert [answer.output_ids for answer in answers] == truths
