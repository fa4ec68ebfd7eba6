"""From the front ends to the scheduler's `Req`: where an slo may be said, and what comes of it.

Guarantee: wherever it is said it ends in `custom_params`, checked before SGLang sees the request;
a `Req` has it as terms, and custom logit processors see `custom_params` as if it had not been.
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("sglang")

import msgspec
from fastapi import Request as HTTPRequest
from fastapi.routing import APIRoute
from sglang.srt.managers.io_struct import FinishReasonDict, GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from tiered_kv.api.fields import TermsError
from tiered_kv.api.slo import DEFAULT_CLASSES
from tiered_kv.api.trust import Trust
from tiered_kv.plugin.requests import adapter as request_adapter
from tiered_kv.plugin.requests.adapter import fields_of_http, lift_fields, place

ON = SimpleNamespace(tiered_kv=True, slo_classes=lambda: DEFAULT_CLASSES, trust=Trust)
OFF = SimpleNamespace(tiered_kv=False)
SLO = {"class": "interactive"}
HINTS = {"expected_output_tokens": 8}


# -- HTTP --------------------------------------------------------------------------------------


def test_body_counts_instead_of_headers_field_by_field() -> None:
    anyone = Trust(tenant_from="body")
    headers = {"x-slo-class": "batch", "x-slo-tenant": "a", "x-hints-next-call-in-s": "2"}
    assert fields_of_http({"text": "x"}, headers, DEFAULT_CLASSES, anyone) == {
        "slo": {"class": "batch", "tenant": "a"},
        "hints": {"next_call_in_s": 2.0},
    }
    assert fields_of_http({"slo": SLO}, headers, DEFAULT_CLASSES, anyone) == {
        "slo": SLO,
        "hints": {"next_call_in_s": 2.0},
    }


def test_others_words_count_unless_ours_do() -> None:
    headers = {"x-dynamo-session-id": "gateway's", "x-slo-tpot-ms": "40"}
    body = {"nvext": {"agent_hints": {"osl": 8}}, "hints": {"priority": 1}}
    assert fields_of_http(body, headers, DEFAULT_CLASSES, Trust()) == {
        "slo": {"tbt_ms": 40.0},
        "hints": {"session_id": "gateway's", "expected_output_tokens": 8, "priority": 1},
    }
    found = fields_of_http({**body, "session_id": "own"}, headers, DEFAULT_CLASSES, Trust())
    assert found["hints"]["session_id"] == "own"  # type: ignore[index]


def test_limits_hold_in_others_words() -> None:
    limited = Trust(least_ttft_ms=100, least_tbt_ms=20)
    body = {"slo": {"tpot_ms": 1, "task_ms": 1}}
    assert fields_of_http(body, {}, DEFAULT_CLASSES, limited)["slo"] == {
        "tbt_ms": 20,
        "task_ms": 100,
    }
    with pytest.raises(TermsError, match="for callers to choose"):
        fields_of_http({"slo": {"tpot_ms": 1}}, {}, DEFAULT_CLASSES, Trust(slo_from="headers"))


def test_a_body_need_not_be_an_object() -> None:
    assert fields_of_http([1, 2], {}, DEFAULT_CLASSES, Trust()) == {}
    assert fields_of_http({"sampling_params": 5}, {}, DEFAULT_CLASSES, Trust()) == {}


@pytest.mark.parametrize(
    "body",
    [
        {"slo": {"class": "gold"}},
        {"custom_params": {"slo": {"class": "gold"}}},
        {"sampling_params": {"custom_params": {"slo": {"class": "gold"}}}},
        {"sampling_params": [{}, {"custom_params": {"slo": {"class": "gold"}}}]},
    ],
)
def test_a_bad_value_anywhere_in_a_body_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(TermsError, match=r"^slo\.class must be one of"):
        fields_of_http(body, {}, DEFAULT_CLASSES, Trust())


class Request:
    """As much of an HTTP request as the hook on its `json` uses."""

    def __init__(self, body: Any, headers: dict[str, str] | None = None) -> None:
        self.body = body
        self.headers = headers or {}
        self.scope: dict[str, Any] = {}

    async def json(self) -> Any:
        return self.body


@pytest.fixture
def http_server(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The state of an HTTP server; set `server_args` in it."""
    from sglang.srt.entrypoints import http_server

    manager = SimpleNamespace(server_args=ON)
    monkeypatch.setattr(http_server, "_global_state", SimpleNamespace(tokenizer_manager=manager))
    return manager


def read(request: Request) -> Any:
    return asyncio.run(request_adapter.check_http_request(Request.json, request))


def test_a_request_keeps_its_fields_in_its_scope(http_server: SimpleNamespace) -> None:
    request = Request({"text": "x", "slo": SLO}, {"x-hints-expected-output-tokens": "8"})
    assert read(request) is request.body
    assert request.scope["tiered_kv"] == {"slo": SLO, "hints": {"expected_output_tokens": 8.0}}


def test_a_bad_request_is_refused_before_its_route_runs(http_server: SimpleNamespace) -> None:
    from fastapi import HTTPException

    with pytest.raises(HTTPException) as error:
        read(Request({"stream": True, "slo": {"ttft_ms": -1}}))
    assert error.value.status_code == 400
    assert error.value.detail.startswith("slo.ttft_ms must be a number of milliseconds")


def test_a_stock_server_reads_bodies_as_ever(http_server: SimpleNamespace) -> None:
    http_server.server_args = OFF
    request = Request({"slo": "anything"})
    assert read(request) == {"slo": "anything"}
    assert request.scope == {}


def test_fastapi_answers_a_bad_request_with_400(http_server: SimpleNamespace) -> None:
    """The way that counts: FastAPI reads a body by `json`, and lets an HTTPException through."""
    from fastapi import FastAPI
    from sglang.srt.entrypoints.http_server import ORJSONRequest
    from starlette.testclient import TestClient

    class HookedRequest(ORJSONRequest):
        async def json(self) -> Any:
            return await request_adapter.check_http_request(ORJSONRequest.json, self)

    class Route(APIRoute):
        def get_route_handler(self) -> Any:
            handler = super().get_route_handler()

            async def hooked(request: HTTPRequest) -> Any:
                return await handler(HookedRequest(request.scope, request.receive))

            return hooked

    app = FastAPI()
    app.router.route_class = Route

    @app.post("/generate")
    async def generate(obj: GenerateReqInput, request: HTTPRequest) -> Any:
        return {"text": obj.text, "fields": request.scope["tiered_kv"]}

    with TestClient(app) as client:
        good = client.post("/generate", json={"text": "x"}, headers={"X-SLO-Class": "batch"})
        bad = client.post("/generate", json={"text": "x", "stream": True, "slo": {"class": "gold"}})
    assert good.json() == {"text": "x", "fields": {"slo": {"class": "batch"}}}
    assert bad.status_code == 400
    assert bad.json()["detail"].startswith("slo.class must be one of interactive, standard, batch")


# -- into custom_params ------------------------------------------------------------------------


def placed(sampling: Any, sent: dict[str, object], preferred: Any = None) -> Any:
    before = copy.deepcopy(sampling)
    after = place(sampling, sent, DEFAULT_CLASSES, preferred)
    assert sampling == before, "what the client holds was changed"
    return after


def test_sent_fields_join_custom_params() -> None:
    sent: dict[str, object] = {"slo": SLO}
    assert placed(None, sent) == {"custom_params": {"slo": SLO}}
    assert placed({"n": 2}, sent) == {"n": 2, "custom_params": {"slo": SLO}}
    assert placed({"custom_params": {"a": 1}}, sent) == {"custom_params": {"a": 1, "slo": SLO}}


@pytest.mark.parametrize("custom", [1.5, "slo", [{}], True], ids=str)
def test_custom_params_of_another_kind_are_refused(custom: object) -> None:
    sampling, wanted = [{}, {"custom_params": custom}], "custom_params must be an object"
    with pytest.raises(TermsError, match=wanted):
        place(sampling, {}, DEFAULT_CLASSES, None)
    with pytest.raises(TermsError, match=wanted):
        fields_of_http({"sampling_params": sampling}, {}, DEFAULT_CLASSES, Trust())


def test_nothing_sent_changes_nothing() -> None:
    for sampling in ({"n": 2, "custom_params": {"bias": 1}}, None):
        assert place(sampling, {}, DEFAULT_CLASSES, None) is sampling


def test_custom_params_are_more_specific() -> None:
    own = {"custom_params": {"slo": SLO}}
    assert placed(own, {"slo": {"class": "batch"}}) is own
    assert placed(own, {"slo": {"class": "batch"}, "hints": HINTS}) == {
        "custom_params": {"slo": SLO, "hints": HINTS}
    }


def test_a_batch() -> None:
    sent: dict[str, object] = {"slo": SLO}
    one, two = {"n": 1}, {"custom_params": {"slo": {"class": "batch"}}}
    assert placed([one, two], sent) == [{"n": 1, "custom_params": {"slo": SLO}}, two]


def test_the_servers_preferred_custom_params_are_not_lost() -> None:
    preferred = {"custom_params": {"bias": 1}}
    assert placed({}, {"slo": SLO}, preferred) == {"custom_params": {"bias": 1, "slo": SLO}}
    assert placed({"custom_params": {}}, {"slo": SLO}, preferred) == {"custom_params": {"slo": SLO}}


# -- generate_request --------------------------------------------------------------------------


class Manager:
    """A tokenizer manager that answers with what it was asked."""

    def __init__(self, server_args: Any = ON) -> None:
        self.server_args = server_args
        self.preferred_sampling_params = None

    async def generate_request(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        yield {"sampling_params": obj.sampling_params, "meta_info": {"finish_reason": None}}


def ask(manager: Manager, obj: Any, request: Any = None) -> Any:
    async def first() -> Any:
        return await lift_fields(Manager.generate_request, manager, obj, request).__anext__()

    return asyncio.run(first())["sampling_params"]


def http_request(**scope: Any) -> Any:
    return SimpleNamespace(scope=scope, headers={"x-slo-class": "batch"})


def test_fields_of_the_http_request_are_lifted() -> None:
    obj = GenerateReqInput(text="x", sampling_params={"n": 1})
    request = http_request(tiered_kv={"slo": SLO, "hints": HINTS})
    assert ask(Manager(), obj, request) == {
        "n": 1,
        "custom_params": {"slo": SLO, "hints": HINTS},
    }


def test_sglangs_own_field_names_a_session() -> None:
    """As `sgl.Engine` has it, and what the HTTP request says instead."""
    obj = GenerateReqInput(text="x", session_id="a")
    assert ask(Manager(), obj) == {"custom_params": {"hints": {"session_id": "a"}}}
    obj = GenerateReqInput(text="x", session_id="a")
    request = http_request(tiered_kv={"hints": {"session_id": "b", "priority": 1}})
    assert ask(Manager(), obj, request) == {
        "custom_params": {"hints": {"session_id": "b", "priority": 1}}
    }


def test_no_client_says_when_its_request_arrived(http_server: SimpleNamespace) -> None:
    """One that claimed to have waited for minutes would come before everybody."""
    before_s = time.perf_counter()
    body = Request({"text": "x", "received_time": 1.0})
    read(body)
    read_s = time.perf_counter()
    obj = GenerateReqInput(text="x", received_time=1.0)
    ask(Manager(), obj, http_request(**body.scope))
    assert before_s <= obj.received_time <= read_s, "when the server had read it"
    within = GenerateReqInput(text="x", received_time=1.0)
    ask(Manager(), within)
    assert within.received_time >= read_s, "without a request around it, now"
    stock = GenerateReqInput(text="x", received_time=1.0)
    ask(Manager(OFF), stock)
    assert stock.received_time == 1.0


def test_headers_of_a_request_without_a_json_body_are_lifted() -> None:
    obj = GenerateReqInput(text="x")
    assert ask(Manager(), obj, http_request()) == {"custom_params": {"slo": {"class": "batch"}}}


def test_every_item_of_a_batch_is_checked_before_the_first_is_sent() -> None:
    bad = {"custom_params": {"hints": {"expected_output_tokens": 0}}}
    obj = GenerateReqInput(text=["x", "y"], sampling_params=[{}, bad])
    with pytest.raises(ValueError, match=r"^hints\.expected_output_tokens must be"):
        lift_fields(Manager.generate_request, Manager(), obj)


def test_a_stock_server_gets_requests_as_they_are() -> None:
    sampling = {"custom_params": {"slo": "anything"}}
    obj = GenerateReqInput(text="x", sampling_params=sampling)
    assert ask(Manager(OFF), obj, http_request(tiered_kv={"slo": SLO})) is sampling


def test_fields_survive_sglangs_msgpack_ipc() -> None:
    fields = {
        "slo": {"class": "chat", "ttft_ms": 5, "report": True},
        "hints": {"next_call_in_s": 2.5},
    }
    sent = msgspec.msgpack.encode(SamplingParams(custom_params=fields))
    received = msgspec.msgpack.decode(sent, type=SamplingParams)
    assert received.custom_params == fields
    # The report's way back: a finish reason's entries are plain values.
    reason = {"type": "stop", "tiered_kv": json.dumps({"wait_ms": 1.0})}
    encoded = msgspec.msgpack.encode(reason)
    assert msgspec.msgpack.decode(encoded, type=FinishReasonDict) == reason


# -- sgl.Engine --------------------------------------------------------------------------------


class Engine:
    def __init__(self, server_args: Any = ON) -> None:
        self.server_args = server_args
        self.tokenizer_manager = Manager(server_args)

    def generate(self, prompt: Any = None, sampling_params: Any = None, **other: Any) -> Any:
        return sampling_params

    def with_hook(self, *args: Any, **kwargs: Any) -> Any:
        return request_adapter.take_engine_fields(Engine.generate, self, *args, **kwargs)


def test_the_engine_takes_slo_and_hints() -> None:
    engine = Engine()
    assert engine.with_hook("x", slo=SLO) == {"custom_params": {"slo": SLO}}
    assert engine.with_hook("x", {"n": 1}, hints=HINTS) == {
        "n": 1,
        "custom_params": {"hints": HINTS},
    }
    assert engine.with_hook(["x", "y"], sampling_params=[{}, {"n": 1}], slo=SLO) == [
        {"custom_params": {"slo": SLO}},
        {"n": 1, "custom_params": {"slo": SLO}},
    ]
    assert engine.with_hook("x", {"n": 1}) == {"n": 1}


def test_the_engine_refuses_bad_values() -> None:
    with pytest.raises(ValueError, match=r"^slo\.ttft_ms must be"):
        Engine().with_hook("x", slo={"ttft_ms": "soon"})


def test_a_stock_engine_knows_no_slo() -> None:
    def generate(engine: Any, prompt: str) -> None:
        raise AssertionError

    with pytest.raises(TypeError, match="slo"):
        request_adapter.take_engine_fields(generate, Engine(OFF), "x", slo=SLO)


# -- whose word counts -----------------------------------------------------------------------------


class TestTrust:
    """`place` for the rows of a batch, below what was believed of the request around them."""

    CLASSES = DEFAULT_CLASSES

    def placed(self, sampling: Any, sent: dict[str, object], **trust: Any) -> Any:
        return place(sampling, sent, self.CLASSES, None, Trust(**trust))["custom_params"]

    def test_a_row_cannot_choose_a_tenant(self) -> None:
        sampling = {"custom_params": {"slo": {"tenant": "forged", "class": "batch"}, "x": 1}}
        placed = self.placed(sampling, {"slo": {"tenant": "key 1"}})
        assert placed == {"slo": {"tenant": "key 1", "class": "batch"}, "x": 1}
        assert self.placed(sampling, {}) == {"slo": {"class": "batch"}, "x": 1}
        placed = self.placed(sampling, {}, tenant_from="body")
        assert placed == sampling["custom_params"]

    def test_a_row_is_within_limits(self) -> None:
        sampling = {"custom_params": {"slo": {"ttft_ms": 1}}}
        assert self.placed(sampling, {}, least_ttft_ms=50)["slo"] == {"ttft_ms": 50}

    def test_a_row_of_a_gateways_request_keeps_its_objectives(self) -> None:
        sampling = {"custom_params": {"slo": {"report": True}}}
        placed = self.placed(sampling, {"slo": {"class": "batch"}}, slo_from="headers")
        assert placed["slo"] == {"class": "batch", "report": True}

    def test_what_is_not_believed_is_taken_out(self) -> None:
        placed = self.placed({"custom_params": {"slo": {"tenant": "forged"}}}, {})
        assert placed == {}

    def test_without_anything_of_ours_nothing_is_changed(self) -> None:
        for sampling in (None, {}, {"custom_params": {"x": 1}}, {"top_k": 1}):
            assert place(sampling, {}, self.CLASSES, None, Trust()) is sampling
