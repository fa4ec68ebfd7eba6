"""What clients of OpenAI's interface count on, whatever tier the prompt's KV comes from.

Every kind of call is made cold, from disk and with a report asked for; counts, shapes and, where
the answer is greedy, texts are the same all three times.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI

from harness.metrics import wait_for_disk
from harness.prompts import PromptMaker, story
from harness.server import Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

MODEL = "default"
REPORT = {"slo": {"class": "interactive", "report": True}, "hints": {"expected_output_tokens": 4}}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
VOWELS = ["a", "e", "i", "o"]


class Calls:
    """One of every kind; each says what must not depend on where the KV came from."""

    def __init__(self, url: str, prompts: PromptMaker) -> None:
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
        self._text = story("openai counts", 12)
        self._ids = [list(prompts.tokens(f"openai counts {i}", 90 + i)) for i in range(2)]
        self.cached = 0
        self.logprobs: list[float] = []

    def all_of(self, extra: dict[str, Any]) -> dict[str, Any]:
        self.cached = 0
        calls = (
            self._parts, self._batch, self._echo, self._stopped, self._streamed, self._schema
        )  # fmt: skip
        return {call.__name__: call(extra) for call in calls}

    def _complete(self, extra: dict[str, Any], **asked: Any) -> Any:
        return self._client.completions.create(model=MODEL, extra_body=extra, **asked)

    def _count(self, usage: Any) -> None:
        details = usage.prompt_tokens_details
        self.cached += (details.cached_tokens or 0) if details else 0

    def _parts(self, extra: dict[str, Any]) -> Any:
        """Content as a text, and as a list of parts."""
        half = len(self._text) // 2
        parts = [{"type": "text", "text": t} for t in (self._text[:half], self._text[half:])]
        found = []
        for content in (self._text, parts):
            answer = self._client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
                max_completion_tokens=5,
                temperature=0,
                extra_body=extra,
            )
            assert answer.usage is not None
            self._count(answer.usage)
            assert answer.usage.completion_tokens <= 5
            found.append((answer.usage.prompt_tokens, answer.choices[0].message.content))
        return found

    def _batch(self, extra: dict[str, Any]) -> Any:
        """Two prompts as token ids, two choices of each: in the order of the prompts."""
        full = {**extra, "ignore_eos": True}  # drawn, so they might end anywhere
        answer = self._complete(full, prompt=self._ids, n=2, max_tokens=3, temperature=0.7)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == sum(map(len, self._ids))
        return answer.usage.completion_tokens

    def _echo(self, extra: dict[str, Any]) -> Any:
        """The prompt's own log-probabilities, one for each token, the first unknown."""
        ids = self._ids[0]
        answer = self._complete(
            extra, prompt=ids, echo=True, logprobs=1, max_tokens=3, temperature=0
        )
        values = answer.choices[0].logprobs.token_logprobs
        assert values[0] is None
        assert None not in values[1:]
        assert len(values) == len(ids) + answer.usage.completion_tokens
        self.logprobs = values[1 : len(ids)]
        return answer.choices[0].text

    def _stopped(self, extra: dict[str, Any]) -> Any:
        answer = self._complete(
            extra, prompt=self._ids[1], stop=VOWELS, max_tokens=20, temperature=0
        )
        assert not any(letter in answer.choices[0].text for letter in VOWELS)
        return (answer.choices[0].text, answer.choices[0].finish_reason, answer.usage.prompt_tokens)

    def _streamed(self, extra: dict[str, Any]) -> Any:
        """Two choices, interleaved; the usage alone in the last chunk."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *others, last = self._complete(
            extra, prompt=self._ids[0], n=2, max_tokens=4, temperature=0, **options
        )
        assert last.choices == []
        assert last.usage.prompt_tokens == len(self._ids[0])
        self._count(last.usage)
        texts = ["", ""]
        for chunk in others:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        return texts, last.usage.completion_tokens

    def _schema(self, extra: dict[str, Any]) -> Any:
        answer = self._client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": self._text + " Is that ok?"}],
            max_tokens=60,
            temperature=0,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
            },
            extra_body=extra,
        )
        assert isinstance(json.loads(answer.choices[0].message.content or "")["ok"], bool)
        return answer.choices[0].message.content


def test_every_call_is_the_same_from_every_tier(three_tiers: Server, prompts: PromptMaker) -> None:
    calls = Calls(three_tiers.url, prompts)
    cold = calls.all_of({})
    cold_logprobs = calls.logprobs
    wait_for_disk(three_tiers)
    three_tiers.flush_cache()
    from_disk = calls.all_of({})
    assert calls.cached > 0
    assert calls.logprobs == pytest.approx(cold_logprobs, abs=1e-3)
    wait_for_disk(three_tiers)
    three_tiers.flush_cache()
    with_report = calls.all_of(REPORT)

    assert from_disk == cold
    assert with_report == cold
