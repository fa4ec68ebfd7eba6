"""Texts that commute, on a real server: they go into the order that is cached, and the answer is
that of the same texts in that order without marks.
"""

from __future__ import annotations

from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from harness.client import generate, post_generate
from harness.prompts import story
from harness.server import Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

GREEDY: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 8}
DOCUMENTS = [story(f"document {i}", 4) for i in range(4)]


@pytest.fixture
def client(three_tiers: Server) -> OpenAI:
    return OpenAI(base_url=f"{three_tiers.url}/v1", api_key="none", timeout=120, max_retries=0)


def messages(order: list[int], commutes: bool | None) -> Any:
    parts: list[dict[str, Any]] = [{"type": "text", "text": DOCUMENTS[i]} for i in order]
    if commutes:
        parts = [{**part, "commutes": True} for part in parts]
    question = {"type": "text", "text": "Who came?"}
    return [{"role": "user", "content": [*parts, question]}]


def test_chat(three_tiers: Server, client: OpenAI) -> None:
    three_tiers.flush_cache()
    create = client.chat.completions.create
    first = create(messages=messages([0, 1, 2, 3], True), **GREEDY)
    second = create(messages=messages([2, 0, 3], True), **GREEDY)
    streamed = list(create(messages=messages([3, 0, 2], True), stream=True, **GREEDY))
    plain = create(messages=messages([0, 2, 3], None), **GREEDY)

    assert first.metadata["tiered_kv"] == [{"span_order": [[0, 1, 2, 3]]}]  # type: ignore[attr-defined]
    # Document 0 is where it was; 2 and 3 follow in the caller's order.
    assert second.metadata["tiered_kv"] == [{"span_order": [[1, 0, 2]]}]  # type: ignore[attr-defined]
    assert second.choices[0].message.content == plain.choices[0].message.content
    assert second.usage is not None
    assert second.usage.prompt_tokens == plain.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= 64
    assert streamed[-1].metadata["tiered_kv"] == [{"span_order": [[1, 2, 0]]}]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == plain.choices[0].message.content
    assert "tiered_kv" not in (plain.metadata or {})  # type: ignore[attr-defined]


def test_generate(three_tiers: Server) -> None:
    three_tiers.flush_cache()

    def ask(order: list[int], **more: Any) -> dict[str, Any]:
        spans: list[Any] = [{"text": DOCUMENTS[i], "commutes": True} for i in order]
        body = {"spans": ["Read this. ", *spans, " So"], **more}
        body["sampling_params"] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        response = post_generate(three_tiers, body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    ask([0, 1, 2])
    again = ask([2, 1, 0])
    apart = ask([2, 1, 0], cache_salt="another")
    plain = generate(three_tiers, "Read this. " + "".join(DOCUMENTS[:3]) + " So")

    assert again["meta_info"]["tiered_kv"] == {"span_order": [[2, 1, 0]]}
    assert again["meta_info"]["cached_tokens"] > 150
    assert again["text"] == plain.text
    assert apart["meta_info"]["tiered_kv"] == {"span_order": [[0, 1, 2]]}
    assert apart["meta_info"]["cached_tokens"] == 0


def test_what_cannot_commute_is_refused(three_tiers: Server, client: OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}, "commutes": True}
    with pytest.raises(BadRequestError, match="only texts can commute"):
        client.chat.completions.create(
            messages=[{"role": "user", "content": [image]}],  # type: ignore[list-item]
            **GREEDY,
        )
    refused = post_generate(three_tiers, {"spans": ["a"], "text": "b"})
    assert refused.status_code == 400
    assert "spans are the prompt" in refused.text
