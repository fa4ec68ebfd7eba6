"""Puts reports (`api/report.py`) into OpenAI's responses, where standard clients ignore them.

A response, and the last chunk of a stream, have `metadata: {"tiered_kv": [...]}`: one report for
each choice, in their order.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from tiered_kv.api.report import NAMESPACE
from tiered_kv.plugin.requests.adapter import asks_report, classes_of

DONE = "data: [DONE]\n\n"
"""The end of a stream of server-sent events."""
_DATA = "data: "


def add_to_response(
    response: Any, serving: Any, request: Any, answers: list[dict[str, Any]], created: int
) -> None:
    """AFTER `_build_chat_response` and `_build_completion_response`: a report for each choice."""
    reports = [answer["meta_info"].get(NAMESPACE) for answer in answers]
    metadata = getattr(response, "metadata", None)
    if any(reports) and isinstance(metadata, dict):
        metadata[NAMESPACE] = reports


def add_to_stream(
    original: Callable[..., Any], serving: Any, adapted_request: Any, request: Any, raw_request: Any
) -> AsyncGenerator[str, None]:
    """AROUND `_generate_chat_stream` and `_generate_completion_stream`."""
    chunks: AsyncGenerator[str, None] = original(serving, adapted_request, request, raw_request)
    if classes_of(serving.tokenizer_manager.server_args) is None:
        return chunks
    if not asks_report(adapted_request, raw_request):
        return chunks
    return with_reports(chunks, adapted_request)


async def with_reports(chunks: AsyncGenerator[str, None], obj: Any) -> AsyncGenerator[str, None]:
    """`chunks`, the last of which has `metadata`.

    Which one is the last is known from the one after it, so chunks are held back by one; but only
    once all reports are there, when there are no more tokens to wait for.
    """
    held: str | None = None
    try:
        async for chunk in chunks:
            if held is not None:
                yield _with_metadata(held, obj.tiered_kv_reports) if chunk == DONE else held
                held = None
            if chunk != DONE and _all_reports_are_there(obj):
                held = chunk
            else:
                yield chunk
    finally:
        await chunks.aclose()
    if held is not None:
        yield held


def _all_reports_are_there(obj: Any) -> bool:
    reports = getattr(obj, "tiered_kv_reports", None)
    return reports is not None and len(reports) == obj.batch_size * obj.parallel_sample_num


def _with_metadata(chunk: str, reports: dict[int, Any]) -> str:
    content = json.loads(chunk.removeprefix(_DATA))
    by_choice = [reports[index] for index in sorted(reports)]
    content["metadata"] = {**(content.get("metadata") or {}), NAMESPACE: by_choice}
    return f"{_DATA}{json.dumps(content, ensure_ascii=False)}\n\n"
