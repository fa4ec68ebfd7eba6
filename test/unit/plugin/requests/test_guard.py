"""What a caller sends may cost the caller an error, and nobody else anything."""

from __future__ import annotations

import asyncio
import re
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from tiered_kv.plugin.requests import guard

VOCABULARY = 100


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [TypeError("a"), KeyError("a"), IndexError("a"), OverflowError("a"), re.error("a")],
    ids=lambda error: type(error).__name__,
)
def test_what_a_reader_trips_over_is_the_callers_fault(error: Exception) -> None:
    def reader() -> None:
        raise error

    async def later() -> None:
        raise error

    with pytest.raises(ValueError, match=r"cannot be read .*check its types"):
        guard.read_client(reader)
    with pytest.raises(ValueError, match=r"cannot be read .*check its types"):
        asyncio.run(guard.read_client(later))


@pytest.mark.parametrize("error", [ValueError("told already"), RuntimeError("ours"), OSError("a")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    def reader() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        guard.read_client(reader)
    assert raised.value is error


@pytest.mark.parametrize("n", [0, -2])
@pytest.mark.parametrize("ids", [[1, 2], [[1, 2], [3]]], ids=["one", "batch"])
def test_answers_are_one_or_more(n: int, ids: list[Any]) -> None:
    def sent(n: int) -> GenerateReqInput:
        return GenerateReqInput(input_ids=ids, sampling_params={"n": n})

    normalise = GenerateReqInput.normalize_batch_and_arguments
    with pytest.raises(ValueError, match=f"n must be at least 1, not {n}"):
        guard.read_batch(normalise, sent(n))
    guard.read_batch(normalise, sent(2))


@pytest.mark.parametrize("error", [StopIteration(), RuntimeError("no such image")], ids=repr)
def test_images_that_cannot_be_read_are_the_callers_fault(error: Exception) -> None:
    """SGLang reads them in a thread, from which an end of an iterator never comes back."""

    def reader() -> None:
        raise error

    async def later() -> None:
        await asyncio.sleep(0)
        raise RuntimeError("no such image")

    with pytest.raises(ValueError, match="images, videos or audio cannot be read"):
        guard.read_images(reader)
    with pytest.raises(ValueError, match="no such image"):
        asyncio.run(guard.read_images(later))


def test_images_that_can_be_read_are_passed_on() -> None:
    async def later(value: int) -> int:
        return value

    assert guard.read_images(lambda value: value, 3) == 3
    assert asyncio.run(guard.read_images(later, 3)) == 3


def test_what_can_be_read_is_passed_on() -> None:
    async def later(value: int) -> int:
        return value

    assert guard.read_client(lambda value: value, 3) == 3
    assert asyncio.run(guard.read_client(later, 3)) == 3


# -- what no model can compute ---------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[0], [99], [1, 2, 3]])
def test_prompts(ids: list[int]) -> None:
    guard.check_prompt(array("q", ids), VOCABULARY)


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([], "the prompt has no tokens; send at least one."),
        ([1, 100], "the prompt has the token id 100, but the model's are 0 to 99."),
        ([-1, 5], "the prompt has the token id -1, but the model's are 0 to 99."),
    ],
)
def test_prompts_that_no_model_can_compute(ids: list[int], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        guard.check_prompt(array("q", ids), VOCABULARY)


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"top_k": -1, "temperature": 0, "stop": ["a"], "logit_bias": {"5": 1}},
        {"sampling_seed": 2**40, "stop_token_ids": [0, 99], "regex": "a"},
        {"custom_params": {"slo": {"class": "batch", "ttft_ms": 5}, "x": [1, "a"]}},
        {"max_new_tokens": None, "top_p": None},
    ],
)
def test_sampling(sent: dict[str, Any]) -> None:
    guard.check_sampling(SamplingParams(**sent), VOCABULARY)


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ({"top_k": 2**31}, "top_k must fit 32 bits"),
        ({"max_new_tokens": 2**63}, "max_new_tokens must fit 32 bits"),
        ({"sampling_seed": 2**63}, "sampling_seed must fit 64 bits"),
        ({"stop_token_ids": [100]}, "stop_token_ids has 100"),
        ({"regex": 5}, "regex: Expected"),
        ({"top_k": "5"}, "top_k: Expected"),
        ({"min_new_tokens": 1.5}, "min_new_tokens: Expected"),
        ({"ignore_eos": "yes"}, "ignore_eos: Expected"),
    ],
)
def test_sampling_that_would_end_the_scheduler(sent: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        guard.check_sampling(SamplingParams(**sent), VOCABULARY)


def test_labels_of_metrics() -> None:
    told = SimpleNamespace(tokenizer_metrics_allowed_custom_labels=["team"])
    guard.check_labels(None, told)
    guard.check_labels({"team": "a"}, told)
    with pytest.raises(ValueError, match="custom_labels has model_name, which is not among"):
        guard.check_labels({"model_name": "forged"}, told)
    with pytest.raises(ValueError, match="custom_labels has a"):
        guard.check_labels(
            {"a": "b"}, SimpleNamespace(tokenizer_metrics_allowed_custom_labels=None)
        )


@pytest.mark.parametrize("field", guard.INTERNAL_FIELDS)
def test_fields_between_processes(field: str) -> None:
    guard.refuse_internal_fields({"text": "a", field: None})
    for body in ({"text": "a", field: "x"}, {"instances": [], "parameters": {field: "x"}}):
        with pytest.raises(ValueError, match=f"^{field} is not for clients to set"):
            guard.refuse_internal_fields(body)


# -- routes ----------------------------------------------------------------------------------------


def client_of(route: str, error: Exception) -> TestClient:
    app = FastAPI()

    @app.post(route)
    async def fails() -> None:
        raise error

    guard.answer_with_400(app)
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize("error", [ValueError("too long"), TypeError("no such field")])
def test_routes_that_generate_answer_400(error: Exception) -> None:
    answer = client_of("/vertex_generate", error).post("/vertex_generate")
    assert answer.status_code == 400
    assert str(error) in answer.json()["message"]


def test_a_fault_of_ours_is_still_500() -> None:
    assert (
        client_of("/vertex_generate", OSError("disk")).post("/vertex_generate").status_code == 500
    )
    assert client_of("/flush_cache", TypeError("ours")).post("/flush_cache").status_code == 500


def test_a_stream_that_cannot_begin_is_no_stream() -> None:
    async def chunks(n: int) -> Any:
        if n == 0:
            raise ValueError("too long")
        for i in range(n):
            yield str(i)

    async def response(n: int) -> StreamingResponse:
        return StreamingResponse(chunks(n))

    async def read(n: int) -> str:
        return "".join(
            [chunk async for chunk in (await guard.begin_stream(response, n)).body_iterator]
        )

    assert asyncio.run(read(3)) == "012"
    with pytest.raises(ValueError, match="too long"):
        asyncio.run(guard.begin_stream(response, 0))


# -- the scheduler ---------------------------------------------------------------------------------


def test_a_request_that_cannot_be_taken_in_ends_alone() -> None:
    told: list[Any] = []
    first, broken = SimpleNamespace(rid="a"), SimpleNamespace(rid="b")
    scheduler = SimpleNamespace(
        waiting_queue=[first],
        ipc_channels=SimpleNamespace(
            send_to_tokenizer=SimpleNamespace(send_output=lambda out, req: told.append(out))
        ),
    )

    def take_in(scheduler: Any, req: Any) -> None:
        scheduler.waiting_queue.append(req)
        if req is broken:
            raise TypeError("no such thing")

    assert guard.contain_arrival(take_in, scheduler, broken) is None
    assert scheduler.waiting_queue == [first]
    (abort,) = told
    assert abort.rid == "b"
    assert abort.finished_reason["status_code"] == 400
    assert "TypeError: no such thing" in abort.finished_reason["message"]
    guard.contain_arrival(take_in, scheduler, SimpleNamespace(rid="c"))
    assert [req.rid for req in scheduler.waiting_queue] == ["a", "c"]


# -- the score -------------------------------------------------------------------------------------


def test_a_score_of_no_labels() -> None:
    guard.check_score(None, query="a", label_token_ids=[1])
    for labels in ({}, {"label_token_ids": None}, {"label_token_ids": []}):
        with pytest.raises(ValueError, match="label_token_ids must name at least one token"):
            guard.check_score(None, query="a", **labels)
