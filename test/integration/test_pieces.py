"""Prompts that arrive in pieces: prefilled before they are whole, answered as if sent at once."""

from __future__ import annotations

import time
from typing import Any

import pytest
import requests

from harness.client import Answer, generate
from harness.prompts import PromptMaker, story
from harness.server import Server
from support.oracle import Oracle

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

PATH = "/tiered_kv/prompts"
SAMPLING = {"temperature": 0, "max_new_tokens": 8}


class Pieces:
    """A caller with one prompt."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        self.server = server
        answer = requests.post(server.url + PATH, json=body, timeout=60)
        assert answer.status_code == 201, answer.text
        self.url = f"{server.url}{PATH}/{answer.json()['id']}"

    def add(self, **body: Any) -> dict[str, Any]:
        answer = requests.patch(self.url, json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def wait_for(self, tokens: int) -> None:
        """Until so many are prefilled."""
        deadline = time.monotonic() + 60
        while (told := requests.get(self.url, timeout=60).json())["prefilled_tokens"] < tokens:
            assert told["refused"] is None, told
            assert time.monotonic() < deadline, told
            time.sleep(0.02)

    def finish(self, **body: Any) -> dict[str, Any]:
        answer = requests.post(f"{self.url}/finish", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


def test_all_but_the_last_piece_is_there_already(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    prompt = list(prompts.tokens("in pieces", 300))
    pieces = Pieces(three_tiers, {"input_ids": prompt[:100], "sampling_params": SAMPLING})
    pieces.wait_for(96)
    pieces.add(input_ids=prompt[100:260])
    pieces.wait_for(256)

    answer = Answer.of(pieces.finish(input_ids=prompt[260:]))

    assert answer.cached_tokens == 256
    assert answer.output_ids == oracle.output_ids(tuple(prompt))


def test_what_comes_before_a_replacement_survives_it(
    three_tiers: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    first, second = prompts.tokens("replaced", 260), prompts.tokens("instead", 120)
    pieces = Pieces(three_tiers, {"input_ids": first, "sampling_params": SAMPLING})
    pieces.wait_for(256)
    told = pieces.add(**{"input_ids": second, "from": 160})
    assert told["tokens"] == 280
    pieces.wait_for(272)

    answer = Answer.of(pieces.finish())

    whole = first[:160] + second
    assert answer.cached_tokens == 272
    assert answer.output_ids == oracle.output_ids(whole)
    again = generate(three_tiers, first)
    assert again.cached_tokens >= 160
    assert again.output_ids == oracle.output_ids(first)


def test_a_chat_whose_documents_come_one_by_one(three_tiers: Server) -> None:
    documents = [{"role": "user", "content": story(f"document {i}", 6)} for i in range(3)]
    question = {"role": "user", "content": "What did the captain do?"}
    asked = {"model": "default", "temperature": 0, "max_tokens": 8}
    pieces = Pieces(three_tiers, {**asked, "messages": documents[:1]})
    for document in documents[1:]:
        pieces.add(messages=[document])
    pieces.wait_for(300)

    answer = pieces.finish(messages=[question])

    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
    body = {**asked, "messages": [*documents, question]}
    at_once = three_tiers.post("/v1/chat/completions", body).json()
    content = [found["choices"][0]["message"]["content"] for found in (answer, at_once)]
    assert content[0] == content[1]


def test_a_caller_who_is_not_asked_for_gets_a_sentence(three_tiers: Server) -> None:
    pieces = Pieces(three_tiers, {"input_ids": [1, 2, 3]})
    answer = requests.post(f"{pieces.url}/finish", json={"sampling_params": 7}, timeout=60)
    assert answer.status_code == 400
    assert requests.get(pieces.url, timeout=60).status_code == 404
