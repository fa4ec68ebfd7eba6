"""What callers may ask for, on a real server: by every way in, and what comes back.

Guarantee: an slo changes no output; a bad one is HTTP 400, for streams too, and nothing of its
request was queued; whoever asks is told from which tier the prompt came and how long it waited.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import requests
from openai import OpenAI

from harness.client import generate, post_generate, request_body
from harness.demo_model import host_size
from harness.metrics import wait_for_disk
from harness.prompts import PromptMaker, story
from harness.server import ALWAYS_LOAD, FLOAT32, Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

CLASSES = """
[chat]
ttft_ms = 60000
tbt_ms = 5000

[hurried]
ttft_ms = 0.001

[standard]
ttft_ms = 2000
"""
GREEDY: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 8}
REPORT: dict[str, Any] = {"class": "chat", "report": True}


@pytest.fixture(scope="module")
def server(
    make_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Three small tiers; classes of its own; processors of logits allowed."""
    folder = tmp_path_factory.mktemp("slo")
    (folder / "classes.toml").write_text(CLASSES)
    args = ["--page-size", 16, "--max-total-tokens", 2048, "--chunked-prefill-size", 256]
    args += ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", host_size(4096)]
    args += ["--tiered-kv-disk-dir", folder / "disk", "--tiered-kv-disk-size", "1GB"]
    args += ["--tiered-kv-slo-classes", folder / "classes.toml", "--enable-metrics"]
    args += ["--enable-custom-logit-processor"]
    # SGLang logs whatever it answers with 400 because of a ValueError.
    refusals = r"ERROR.*Error: (slo|hints|nvext)\."
    with make_server("slo", *FLOAT32, *args, expected=[refusals]) as started:
        yield started


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)


def messages(seed: str) -> list[Any]:
    return [{"role": "user", "content": "Retell this. " + story(seed, 8)}]


def reports_of(response: Any) -> list[dict[str, Any]]:
    """What OpenAI's client kept of the field that it doesn't know."""
    reports: list[dict[str, Any]] = response.metadata["tiered_kv"]
    return reports


def check(report: dict[str, Any], slo_class: str = "chat") -> None:
    """A report of a request that was served in time."""
    assert report["slo"]["class"] == slo_class
    assert 0 <= report["wait_ms"] <= report["ttft_ms"]
    assert report["ttft_ms"] > 0
    slack_ms = report["slo"]["ttft_ms"] - report["ttft_ms"]
    assert report["ttft_slack_ms"] == pytest.approx(slack_ms, abs=0.01)


# -- ways in -----------------------------------------------------------------------------------


def test_openai_chat(client: OpenAI) -> None:
    plain = client.chat.completions.create(messages=messages("chat"), **GREEDY)
    asked = client.chat.completions.create(
        messages=messages("chat"),
        extra_body={"slo": REPORT, "hints": {"expected_output_tokens": 8}},
        **GREEDY,
    )
    assert asked.choices[0].message.content == plain.choices[0].message.content
    (report,) = reports_of(asked)
    check(report)
    assert report["slo"] == {"class": "chat", "ttft_ms": 60_000.0, "tbt_ms": 5_000.0}
    assert asked.usage is not None
    assert report["prompt_tokens"] == asked.usage.prompt_tokens
    assert "tiered_kv" not in (plain.metadata or {})  # type: ignore[attr-defined]


def test_openai_chat_streaming(client: OpenAI) -> None:
    whole = client.chat.completions.create(messages=messages("stream"), **GREEDY)
    stream = client.chat.completions.create(
        messages=messages("stream"),
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"slo": REPORT},
        **GREEDY,
    )
    *others, last = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in others if c.choices)
    assert text == whole.choices[0].message.content
    assert last.usage is not None
    check(reports_of(last)[0])
    assert not any(hasattr(chunk, "metadata") for chunk in others)


def test_openai_completions_with_several_choices(client: OpenAI) -> None:
    plain = client.completions.create(prompt=story("choices", 6), n=2, **GREEDY)
    asked = client.completions.create(
        prompt=story("choices", 6),
        n=2,
        extra_body={"slo": {"class": "hurried", "report": True}},
        **GREEDY,
    )
    assert [c.text for c in asked.choices] == [c.text for c in plain.choices]
    reports = reports_of(asked)
    assert len(reports) == 2
    for report in reports:
        check(report, "hurried")
        assert report["ttft_slack_ms"] < 0


def test_openai_completions_streaming(client: OpenAI) -> None:
    stream = client.completions.create(
        prompt=story("completions stream", 6), stream=True, extra_body={"slo": REPORT}, **GREEDY
    )
    *others, last = list(stream)
    assert len(others) > 2
    check(reports_of(last)[0])


def test_headers_for_those_who_cannot_send_fields(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=messages("headers"),
        extra_headers={"x-slo-class": "chat", "x-slo-ttft-ms": "30000", "x-slo-report": "true"},
        **GREEDY,
    )
    (report,) = reports_of(answer)
    assert report["slo"] == {"class": "chat", "ttft_ms": 30_000.0, "tbt_ms": 5_000.0}


def test_words_of_others(client: OpenAI, server: Server, prompts: PromptMaker) -> None:
    """Every word of docs/slo.md's table, as OpenAI's own client sends it."""
    plain = client.chat.completions.create(messages=messages("words"), **GREEDY)
    said: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"extra_body": {"session_id": "a", "priority": 3}}, {"session_id": "a"}),
        ({"extra_body": {"program_id": "a"}}, {"session_id": "a"}),
        ({"prompt_cache_key": "a"}, {"session_id": "a"}),
        (
            {"extra_body": {"nvext": {"agent_hints": {"osl": 8, "priority": 5}}}},
            {"expected_output_tokens": 8, "priority": 5},
        ),
        (
            {
                "extra_headers": {
                    "X-Dynamo-Session-ID": "a",
                    "X-Dynamo-Parent-Session-ID": "b",
                    "X-Dynamo-Session-Final": "true",
                }
            },
            {"session_id": "a", "parent_session_id": "b", "session_final": True},
        ),
    ]
    for sent, understood in said:
        body = {**sent.get("extra_body", {}), "slo": REPORT}
        asked = client.chat.completions.create(
            messages=messages("words"), **{**sent, "extra_body": body}, **GREEDY
        )
        assert asked.choices[0].message.content == plain.choices[0].message.content
        assert reports_of(asked)[0]["hints"] == understood
    headers = {"x-slo-class": "chat", "x-slo-tpot-ms": "70", "x-slo-report": "true"}
    timed = client.chat.completions.create(
        messages=messages("words"), extra_headers=headers, **GREEDY
    )
    assert reports_of(timed)[0]["slo"]["tbt_ms"] == 70.0
    prompt = prompts.tokens("words", 40)
    native = generate(server, prompt, session_id="a", slo={**REPORT, "task_ms": 60_000})
    assert native.meta_info["tiered_kv"]["hints"] == {"session_id": "a"}
    assert native.meta_info["tiered_kv"]["slo"]["task_ms"] == 60_000.0


def test_custom_params_of_openai_and_of_generate(
    server: Server, client: OpenAI, prompts: PromptMaker
) -> None:
    custom = {"slo": {"class": "hurried", "report": True}}
    answer = client.chat.completions.create(
        messages=messages("custom"), extra_body={"custom_params": custom, "slo": REPORT}, **GREEDY
    )
    assert reports_of(answer)[0]["slo"]["class"] == "hurried"
    native = generate(
        server, prompts.tokens("custom", 40), sampling_params={"custom_params": custom}
    )
    check(native.meta_info["tiered_kv"], "hurried")
    assert native.meta_info["finish_reason"] == {"type": "length", "length": 8}


def test_a_batch_whose_items_have_classes_of_their_own(
    server: Server, prompts: PromptMaker
) -> None:
    def sampling(slo_class: str) -> dict[str, Any]:
        slo = {"class": slo_class, "report": True}
        return {"temperature": 0, "max_new_tokens": 4, "custom_params": {"slo": slo}}

    body = {
        "input_ids": [list(prompts.tokens(f"batch {i}", 40)) for i in range(3)],
        "sampling_params": [sampling("chat"), sampling("standard"), {"max_new_tokens": 4}],
        "hints": {"next_call_in_s": 1},
    }
    response = post_generate(server, body)
    assert response.status_code == 200, response.text
    metas = [answer["meta_info"] for answer in response.json()]
    assert [meta.get("tiered_kv", {}).get("slo", {}).get("class") for meta in metas] == [
        "chat",
        "standard",
        None,
    ]


def test_generate_streaming(server: Server, prompts: PromptMaker) -> None:
    body = request_body(prompts.tokens("native stream", 40), 6, stream=True, slo=REPORT)
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=120) as response:
        assert response.status_code == 200
        lines = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
    assert lines.pop() == b"[DONE]"
    metas = [json.loads(line)["meta_info"] for line in lines]
    assert ["tiered_kv" in meta for meta in metas] == [False] * (len(metas) - 1) + [True]
    check(metas[-1]["tiered_kv"])


def test_processors_of_logits_have_their_parameters(server: Server, prompts: PromptMaker) -> None:
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    prompt = prompts.tokens("processor", 60)
    forbidden = generate(server, prompt, 4).output_ids[0]
    answers = [
        generate(
            server,
            prompt,
            4,
            custom_logit_processor=DisallowedTokensLogitsProcessor.to_str(),
            sampling_params={"custom_params": {"token_ids": [forbidden]}},
            **extra,
        )
        for extra in ({}, {"slo": REPORT})
    ]
    assert answers[0].output_ids == answers[1].output_ids
    assert forbidden not in answers[1].output_ids


# -- what comes back ---------------------------------------------------------------------------


def test_the_tier_of_each_cached_run(server: Server, prompts: PromptMaker) -> None:
    prompt = prompts.tokens("tiers", 200)

    def cached_tokens() -> dict[str, int]:
        answer = generate(server, prompt, slo=REPORT)
        report: dict[str, Any] = answer.meta_info["tiered_kv"]
        assert report["prompt_tokens"] == 200
        assert sum(report["cached_tokens"].values()) == answer.cached_tokens
        found: dict[str, int] = report["cached_tokens"]
        return found

    assert cached_tokens() == {"device": 0, "host": 0, "disk": 0, "store": 0}
    assert cached_tokens() == {"device": 192, "host": 0, "disk": 0, "store": 0}
    wait_for_disk(server)
    server.flush_cache()
    assert cached_tokens() == {"device": 0, "host": 0, "disk": 192, "store": 0}


def test_a_long_prompt_in_no_danger_is_not_computed_before_the_disk_was_asked(
    server: Server, prompts: PromptMaker
) -> None:
    """It is looked up on a thread; meanwhile it could be computed, well in time."""
    prompt = prompts.tokens("long", 1000)
    generate(server, prompt)
    for _ in range(3):
        wait_for_disk(server)
        server.flush_cache()
        answer = generate(server, prompt, slo=REPORT)
        assert answer.meta_info["tiered_kv"]["cached_tokens"]["disk"] == 992


def test_no_client_says_when_its_request_arrived(server: Server, prompts: PromptMaker) -> None:
    """Whoever claimed to have waited would be served before everybody, and found overdue."""
    body = request_body(prompts.tokens("backdated", 64), 4, received_time=1.0, slo=REPORT)
    answer = post_generate(server, body).json()
    assert 0 < answer["meta_info"]["e2e_latency"] < 60
    check(answer["meta_info"]["tiered_kv"])
    assert answer["meta_info"]["tiered_kv"]["ttft_ms"] < 60_000


# -- mistakes ----------------------------------------------------------------------------------

BAD_TTFT = "slo.ttft_ms must be a number of milliseconds above 0, at most 86400000, not -5."
BAD_CLASS = "slo.class must be one of chat, hurried, standard, not 'gold'."
BAD_HINT = "hints.expected_output_tokens must be a whole number from 1 to 10000000, not 0.5."
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"slo": {"ttft_ms": -5}}, BAD_TTFT),
    ({"slo": {"class": "gold"}}, BAD_CLASS),
    ({"hints": {"expected_output_tokens": 0.5}}, BAD_HINT),
]
BAD_OSL = "nvext.agent_hints.osl must be a whole number from 1 to 10000000, not 0."


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("fields", "sentence"), MISTAKES)
def test_mistakes_are_400_and_nothing_is_queued(
    server: Server,
    client: OpenAI,
    prompts: PromptMaker,
    fields: dict[str, Any],
    sentence: str,
    stream: bool,
) -> None:
    prompt = prompts.tokens(f"{stream} {sentence}", 64)
    custom = {"sampling_params": {"custom_params": fields}}
    for extra in (fields, custom):
        response = post_generate(server, request_body(prompt, 4, stream=stream, **extra))
        assert response.status_code == 400
        assert sentence in response.text
        assert response.headers["content-type"] == "application/json"
    for create, what in (
        (client.chat.completions.create, {"messages": messages("mistake")}),
        (client.completions.create, {"prompt": list(prompt)}),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            create(**what, stream=stream, extra_body=fields, **GREEDY)  # type: ignore[operator]
        assert sentence in str(error.value)
    assert generate(server, prompt).cached_tokens == 0


def test_a_mistake_in_anothers_words(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            messages=messages("osl"),
            extra_body={"nvext": {"agent_hints": {"osl": 0}}},
            **GREEDY,
        )
    assert BAD_OSL in str(error.value)


def test_a_mistake_in_a_header(server: Server, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="x-slo-ttft-ms must be a number of") as error:
        client.chat.completions.create(
            messages=messages("header"), extra_headers={"x-slo-ttft-ms": "soon"}, **GREEDY
        )
    assert "not 'soon'" in str(error.value)


def test_one_mistake_refuses_a_whole_batch(server: Server, prompts: PromptMaker) -> None:
    prompt = prompts.tokens("batch mistake", 64)
    bad = {"custom_params": {"slo": {"class": "gold"}}}
    body = {"input_ids": [list(prompt), list(prompt)], "sampling_params": [{}, bad]}
    response = post_generate(server, body)
    assert response.status_code == 400
    assert BAD_CLASS in response.text
    assert generate(server, prompt).cached_tokens == 0


def test_the_server_says_which_classes_it_has(server: Server) -> None:
    info = server.get("/server_info").json()
    assert set(json.loads(info["tiered_kv_slo_classes"])) == {"chat", "hurried", "standard"}
