"""Sends one request to an OpenAI-compatible server, and times what streams back."""

from __future__ import annotations

import time
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI

from benchmark.replay.prompts import PromptMaker
from benchmark.replay.records import Record
from tiered_kv.core.errors import TieredKVError
from tiered_kv.simulation.workload.readers.chat_messages import message_text
from tiered_kv.simulation.workload.request import Request

_PROBES = (8, 40)


class ServerError(TieredKVError):
    """The server can't be replayed against; one sentence for the user."""


Prompt = str | Sequence[dict[str, Any]]
"""A text, or the messages of a chat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to ask."""

    model: str
    """Name of the served model."""
    chat: bool = False
    """Use the chat endpoint; the other completes texts."""
    ignore_eos: bool = True
    """Ask for exactly the workload's number of output tokens; most servers know this extension."""
    send_slo: bool = False
    """Send class and targets as `slo`, and the priority."""
    body: dict[str, Any] = field(default_factory=dict)
    """More fields for each request's body."""


class Client:
    """One server."""

    def __init__(self, connection: AsyncOpenAI, options: Options) -> None:
        """`connection` should not retry: a retry would be measured as a slow answer."""
        self._connection = connection
        self._options = options

    async def send(self, request: Request, prompt: Prompt, start_s: float) -> Record:
        """Send `request` and take the answer to its end; a failure is noted in the record.

        start_s: the replay's start on `time.perf_counter`.
        """
        sent_s = time.perf_counter()
        record = Record(
            request_id=request.request_id,
            session=request.session,
            slo_class=request.slo_class,
            ttft_slo_s=request.ttft_slo_s,
            tbt_slo_s=request.tbt_slo_s,
            scheduled_s=request.arrival_s,
            sent_s=sent_s - start_s,
            input_tokens=request.input_tokens,
        )
        last_s = sent_s
        try:
            stream = await self._open(prompt, request.output_tokens, self._slo_fields(request))
            async for chunk in stream:
                _note_usage(chunk, record)
                if not _has_text(chunk):
                    continue
                now_s = time.perf_counter()
                if record.ttft_s is None:
                    record.ttft_s = now_s - sent_s
                else:
                    record.gaps_s.append(now_s - last_s)
                last_s = now_s
        except (APIError, OSError) as error:
            record.error = _sentence(error)
        record.e2e_s = time.perf_counter() - sent_s
        if record.error is None and record.ttft_s is None:
            # An answer without visible text, such as a lone end token.
            record.ttft_s = record.e2e_s
        return record

    async def overhead_tokens(self, maker: PromptMaker) -> int:
        """Tokens that the server adds to a prompt: a begin token, a chat template.

        Found by asking about two prompts of known lengths. Raises ServerError if the server can't
        be reached, doesn't count, or counts with another tokenizer.
        """
        found = []
        for n_tokens in _PROBES:
            request = Request(-1, 0.0, array("q"), n_tokens, 1, None, "standard", None, None)
            record = await self.send(request, maker.probe(n_tokens), 0.0)
            if record.error is not None:
                raise ServerError(f"The server refused a first request: {record.error}")
            if record.prompt_tokens is None:
                raise ServerError(
                    "The server reports no usage when streaming, so lengths can't be checked; "
                    "switch that on."
                )
            found.append(record.prompt_tokens - n_tokens)
        if len(set(found)) > 1 or found[0] < 0:
            raise ServerError(
                f"The server counts {_PROBES[0] + found[0]} and {_PROBES[1] + found[1]} tokens in "
                f"prompts of {_PROBES[0]} and {_PROBES[1]}; give the served model's tokenizer."
            )
        return found[0]

    def _slo_fields(self, request: Request) -> dict[str, Any]:
        if not self._options.send_slo:
            return {}
        slo: dict[str, Any] = {"class": request.slo_class}
        if request.ttft_slo_s is not None:
            slo["ttft_ms"] = 1000 * request.ttft_slo_s
        if request.tbt_slo_s is not None:
            slo["tbt_ms"] = 1000 * request.tbt_slo_s
        return {"slo": slo, "priority": request.priority}

    async def _open(
        self, prompt: Prompt, n_output: int, fields: dict[str, Any]
    ) -> AsyncIterator[Any]:
        options = self._options
        body = {**fields, **options.body}
        if options.ignore_eos:
            body["ignore_eos"] = True
        common: dict[str, Any] = {
            "model": options.model,
            "max_tokens": n_output,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": body,
        }
        # The overloads of `create` can't be told apart by fields in a dict.
        endpoint: Any = self._connection.completions
        if options.chat:
            endpoint = self._connection.chat.completions
            common["messages"] = _as_messages(prompt)
        else:
            common["prompt"] = prompt if isinstance(prompt, str) else _joined(prompt)
        stream: AsyncIterator[Any] = await endpoint.create(**common)
        return stream


def _as_messages(prompt: Prompt) -> Sequence[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _joined(messages: Sequence[dict[str, Any]]) -> str:
    return "\n".join(map(message_text, messages))


def _has_text(chunk: Any) -> bool:
    for choice in chunk.choices:
        delta = getattr(choice, "delta", None)
        if delta is None:
            if choice.text:
                return True
        elif delta.content or getattr(delta, "reasoning_content", None) or delta.tool_calls:
            return True
    return False


def _note_usage(chunk: Any, record: Record) -> None:
    """Takes token counts, and SGLang's cached tokens by tier, from a chunk that has them."""
    usage = chunk.usage
    if usage is not None:
        record.prompt_tokens = usage.prompt_tokens
        record.output_tokens = usage.completion_tokens
        details = usage.prompt_tokens_details
        if details is not None and details.cached_tokens is not None:
            record.cached_tokens = details.cached_tokens
    extension = (chunk.model_extra or {}).get("sglext")
    tiers = (extension or {}).get("cached_tokens_details")
    if tiers:
        record.cached_by_tier = {
            tier: tokens for tier, tokens in tiers.items() if isinstance(tokens, int)
        }
        if record.cached_tokens is None:
            record.cached_tokens = sum(record.cached_by_tier.values())


def _sentence(error: Exception) -> str:
    if isinstance(error, APIConnectionError):
        return f"no connection ({error.__cause__ or error})"
    if isinstance(error, APIStatusError):
        return f"HTTP {error.status_code}: {error.message}"
    return str(error) or type(error).__name__
