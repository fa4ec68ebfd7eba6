"""Brings a request's report (`api/report.py`) from the scheduler into its response.

It travels as one more entry of the finish reason, which SGLang passes on as it is, and as text,
because the entries of a finish reason are typed as plain values. In the tokenizer
manager it moves to `meta_info`; `openai_responses.py` takes it from there.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import AsyncGenerator
from typing import Any

from tiered_kv.api.report import NAMESPACE, RequestReport
from tiered_kv.api.spans import Orders
from tiered_kv.plugin.requests.view import store_tokens

#: Requests in this scheduler that asked for a report. Weak: aborted ones are forgotten by everyone.
_expected: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


# -- the scheduler -------------------------------------------------------------------------------


def expect(req: Any) -> None:
    """Have the response to `req` carry `req.tiered_kv_report`."""
    _expected[req.rid] = req


def add_reports(payload: Any, accumulator: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `_GenerationStreamAccumulator.to_payload`: once per batch of outputs."""
    if not _expected or payload is None or accumulator.rust_server_mode:
        return
    for rid, reason in zip(payload.rids, payload.finished_reasons, strict=True):
        req = None if reason is None else _expected.pop(rid, None)
        if req is not None:
            reason[NAMESPACE] = json.dumps(finished(req).as_fields())


def finished(req: Any) -> RequestReport:
    """The report of a request that has all its tokens; what nobody measured is filled in.

    SGLang notes the times of a request whether or not it publishes them, on one clock.
    """
    report: RequestReport = req.tiered_kv_report
    report.prompt_tokens = len(req.origin_input_ids)
    report.device_tokens = req.cached_tokens_device
    report.host_tokens = req.cached_tokens_host
    report.store_tokens = store_tokens(req)
    report.disk_tokens = req.cached_tokens_storage - report.store_tokens
    times = req.time_stats
    received = times.wait_queue_entry_time
    if report.wait_s is None and times.forward_entry_time > received > 0:
        report.wait_s = times.forward_entry_time - received
    if report.ttft_s is None and times.prefill_finished_time > received > 0:
        report.ttft_s = times.prefill_finished_time - received
    return report


def tell_stores_apart(details: Any, streamer: Any, req: Any) -> None:
    """AFTER `SchedulerOutputStreamer.get_cached_tokens_details`: "storage" is disk and store.

    SGLang counts hits by `storage_backend`, and OpenAI's usage has no other field for it.
    """
    parts = getattr(streamer.tree_cache, "parts", None)
    if not details or "storage" not in details or parts is None or parts.store is None:
        return
    details["store"] = n_store = store_tokens(req)
    n_disk = details["storage"] - n_store
    used = [name for name, n in (("disk", n_disk), ("store", n_store)) if n]
    details["storage_backend"] = "+".join(used) or "none"


# -- the tokenizer manager -----------------------------------------------------------------------


async def unfold(
    answers: AsyncGenerator[Any, None], obj: Any, span_order: Orders | None = None
) -> AsyncGenerator[Any, None]:
    """The answers of `generate_request`, the last ones with the report in `meta_info`.

    span_order: the order of texts that commute, if there are any: for the report.
    `obj.tiered_kv_reports` collects them by index, for whoever builds another response of them.
    """
    obj.tiered_kv_reports = {}
    try:
        async for answer in answers:
            several = answer if isinstance(answer, list) else [answer]
            for position, one in enumerate(several):
                report = _moved_to_meta_info(one["meta_info"], span_order)
                if report is not None:
                    obj.tiered_kv_reports[one.get("index", position)] = report
            yield answer
    finally:
        await answers.aclose()


def _moved_to_meta_info(
    meta_info: dict[str, Any], span_order: Orders | None
) -> dict[str, Any] | None:
    reason = meta_info.get("finish_reason")
    if not isinstance(reason, dict):
        return None
    report: dict[str, Any] = json.loads(reason.pop(NAMESPACE, "{}"))
    if span_order is not None:
        report["span_order"] = span_order
    if not report:
        return None
    meta_info[NAMESPACE] = report
    return report
