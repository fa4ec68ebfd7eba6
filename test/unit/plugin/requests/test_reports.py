"""A report's way from the scheduler into `meta_info` and into OpenAI's responses.

Guarantee: whoever asked finds it there once, nobody else's response changes, and no token of a
stream is held back.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tiered_kv.api.report import RequestReport
from tiered_kv.api.slo import DEFAULT_CLASSES, Slo
from tiered_kv.api.trust import Trust
from tiered_kv.plugin.requests import openai_responses
from tiered_kv.plugin.requests import reports as request_reports

ON = SimpleNamespace(tiered_kv=True, slo_classes=lambda: DEFAULT_CLASSES, trust=Trust)
OFF = SimpleNamespace(tiered_kv=False)
DONE = "data: [DONE]\n\n"


class Times:
    """SGLang's record of a request; 0.0 where it has not come so far."""

    def __init__(self, received: float, started: float, first_token: float) -> None:
        self.wait_queue_entry_time = received
        self.forward_entry_time = started
        self.prefill_finished_time = first_token


class Req:
    def __init__(self, rid: str, times: Times) -> None:
        self.rid = rid
        self.origin_input_ids = [1] * 100
        self.cached_tokens_device, self.cached_tokens_host, self.cached_tokens_storage = 48, 32, 16
        self.time_stats = times
        self.tiered_kv_report = RequestReport(Slo("chat", ttft_s=1.0))


@pytest.fixture(autouse=True)
def nobody_else_asks() -> Iterator[None]:
    request_reports._expected.clear()
    yield
    request_reports._expected.clear()


def payload_of(**reasons: dict[str, Any] | None) -> Any:
    return SimpleNamespace(rids=list(reasons), finished_reasons=list(reasons.values()))


def add(payload: Any, *, rust: bool = False) -> None:
    request_reports.add_reports(payload, SimpleNamespace(rust_server_mode=rust), dp_rank=0)


def test_a_finished_request_takes_its_report_along() -> None:
    req = Req("a", Times(10.0, 10.25, 11.5))
    request_reports.expect(req)
    running = payload_of(a=None, b={"type": "stop"})
    add(running)
    assert running.finished_reasons == [None, {"type": "stop"}]

    payload = payload_of(a={"type": "length"}, b={"type": "stop"})
    add(payload)
    mine, others = payload.finished_reasons
    assert others == {"type": "stop"}
    assert json.loads(mine["tiered_kv"]) == {
        "slo": {"class": "chat", "ttft_ms": 1000.0, "tbt_ms": None},
        "prompt_tokens": 100,
        "cached_tokens": {"device": 48, "host": 32, "disk": 16, "store": 0},
        "wait_ms": 250.0,
        "ttft_ms": 1500.0,
        "ttft_slack_ms": -500.0,
    }


def test_nothing_is_expected_of_a_request_that_is_gone() -> None:
    request_reports.expect(Req("a", Times(1, 2, 3)))
    gc.collect()
    assert not request_reports._expected


def test_the_rust_server_reads_finish_reasons_itself() -> None:
    req = Req("a", Times(1, 2, 3))
    request_reports.expect(req)
    payload = payload_of(a={"type": "stop"})
    add(payload, rust=True)
    assert payload.finished_reasons == [{"type": "stop"}]


def test_no_payload_no_report() -> None:
    req = Req("a", Times(1, 2, 3))
    request_reports.expect(req)
    add(None)
    assert "a" in request_reports._expected


def test_what_the_scheduler_measured_itself_stays() -> None:
    req = Req("a", Times(10.0, 10.25, 11.5))
    req.tiered_kv_report.wait_s = 3.0
    req.tiered_kv_report.ttft_s = 4.0
    report = request_reports.finished(req)
    assert (report.wait_s, report.ttft_s) == (3.0, 4.0)


def test_a_request_that_never_ran() -> None:
    report = request_reports.finished(Req("a", Times(10.0, 0.0, 0.0)))
    assert (report.wait_s, report.ttft_s, report.ttft_slack_s) == (None, None, None)


# -- meta_info ---------------------------------------------------------------------------------

REPORT = {"wait_ms": 1.0}


def answer(report: dict[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
    reason: dict[str, Any] = {"type": "stop"}
    if report is not None:
        reason["tiered_kv"] = json.dumps(report)
    return {"meta_info": {"finish_reason": reason}, **extra}


class Source:
    """An async generator of `items` that knows whether it was closed."""

    def __init__(self, *items: Any) -> None:
        self.items = items
        self.closed = False

    async def stream(self) -> AsyncGenerator[Any, None]:
        try:
            for item in self.items:
                yield item
        finally:
            self.closed = True


def collect(stream: AsyncGenerator[Any, None]) -> list[Any]:
    async def all_of() -> list[Any]:
        return [item async for item in stream]

    return asyncio.run(all_of())


def test_reports_move_from_the_finish_reason_to_meta_info() -> None:
    obj = SimpleNamespace()
    running = {"meta_info": {"finish_reason": None}}
    answers = collect(request_reports.unfold(Source(running, answer(REPORT)).stream(), obj))
    assert answers == [
        {"meta_info": {"finish_reason": None}},
        {"meta_info": {"finish_reason": {"type": "stop"}, "tiered_kv": REPORT}},
    ]
    assert obj.tiered_kv_reports == {0: REPORT}


def test_every_answer_of_a_batch_has_its_own() -> None:
    obj = SimpleNamespace()
    batch = [answer({"wait_ms": 1.0}), answer(), answer({"wait_ms": 2.0})]
    (answers,) = collect(request_reports.unfold(Source(batch).stream(), obj))
    assert [a["meta_info"].get("tiered_kv") for a in answers] == [
        {"wait_ms": 1.0},
        None,
        {"wait_ms": 2.0},
    ]
    assert obj.tiered_kv_reports == {0: {"wait_ms": 1.0}, 2: {"wait_ms": 2.0}}


def test_streams_of_a_batch_are_told_apart_by_index() -> None:
    obj = SimpleNamespace()
    source = Source(answer({"wait_ms": 2.0}, index=1), answer({"wait_ms": 1.0}, index=0))
    collect(request_reports.unfold(source.stream(), obj))
    assert obj.tiered_kv_reports == {0: {"wait_ms": 1.0}, 1: {"wait_ms": 2.0}}


@pytest.mark.parametrize(
    "wrap",
    [
        request_reports.unfold,
        openai_responses.with_reports,
    ],
)
def test_closing_a_stream_closes_what_is_under_it(wrap: Any) -> None:
    source = Source(answer(), answer())
    obj = SimpleNamespace(batch_size=1, parallel_sample_num=1)

    async def first() -> None:
        stream = wrap(source.stream(), obj)
        await stream.__anext__()
        await stream.aclose()

    asyncio.run(first())
    assert source.closed


# -- OpenAI ------------------------------------------------------------------------------------


def test_a_response_has_a_report_for_each_choice() -> None:
    response = SimpleNamespace(metadata={"weight_version": "default"})
    answers = [{"meta_info": {"tiered_kv": REPORT}}, {"meta_info": {}}]
    openai_responses.add_to_response(response, None, None, answers, 0)
    assert response.metadata == {"weight_version": "default", "tiered_kv": [REPORT, None]}


def test_other_responses_stay_as_they_are() -> None:
    response = SimpleNamespace(metadata={"weight_version": "default"})
    openai_responses.add_to_response(response, None, None, [{"meta_info": {}}], 0)
    assert response.metadata == {"weight_version": "default"}
    error = SimpleNamespace(status_code=400)
    openai_responses.add_to_response(error, None, None, [{"meta_info": {"tiered_kv": REPORT}}], 0)
    assert not hasattr(error, "metadata")


def chunk(**content: Any) -> str:
    return f"data: {json.dumps(content)}\n\n"


class Serving:
    """SGLang's side of a stream: two tokens, the finish reason, the usage, the end."""

    def __init__(self, server_args: Any, n: int = 1) -> None:
        self.tokenizer_manager = SimpleNamespace(server_args=server_args)
        self.obj = SimpleNamespace(
            batch_size=1,
            parallel_sample_num=n,
            sampling_params={"custom_params": {"slo": {"report": True}}},
            tiered_kv_reports={},
        )

    async def stream(self, obj: Any, request: Any, raw_request: Any) -> AsyncGenerator[str, None]:
        yield chunk(token="a")
        for index in range(obj.parallel_sample_num):
            obj.tiered_kv_reports[index] = {"wait_ms": float(index)}
            yield chunk(token="é")
        yield chunk(finish="stop")
        yield chunk(usage=3)
        yield DONE

    def with_hook(self) -> AsyncGenerator[str, None]:
        return openai_responses.add_to_stream(Serving.stream, self, self.obj, None, None)


@pytest.mark.parametrize("n", [1, 2])
def test_the_last_chunk_of_a_stream_has_the_reports(n: int) -> None:
    *others, last, done = collect(Serving(ON, n).with_hook())
    assert done == DONE
    assert others == [chunk(token="a"), *[chunk(token="é")] * n, chunk(finish="stop")]
    assert json.loads(last.removeprefix("data: ")) == {
        "usage": 3,
        "metadata": {"tiered_kv": [{"wait_ms": float(index)} for index in range(n)]},
    }


def test_a_token_that_is_not_the_last_is_not_held_back() -> None:
    async def reaches_me_at_once() -> list[str]:
        serving = Serving(ON, 2)
        stream = serving.with_hook()
        first = [await stream.__anext__(), await stream.__anext__()]
        assert len(serving.obj.tiered_kv_reports) == 1
        await stream.aclose()
        return first

    assert asyncio.run(reaches_me_at_once()) == [chunk(token="a"), chunk(token="é")]


def test_a_stream_that_breaks_off_loses_nothing() -> None:
    obj = SimpleNamespace(batch_size=1, parallel_sample_num=1, tiered_kv_reports={0: REPORT})
    chunks = [chunk(token="a"), chunk(token="b")]
    assert collect(openai_responses.with_reports(Source(*chunks).stream(), obj)) == chunks


def test_streams_without_a_report_are_not_wrapped() -> None:
    stock, silent = Serving(OFF), Serving(ON)
    silent.obj.sampling_params = {"custom_params": {"slo": {"class": "batch"}}}
    for serving in (stock, silent):
        stream = serving.with_hook()
        assert stream.__name__ == "stream"
        assert collect(stream)[-2:] == [chunk(usage=3), DONE]
