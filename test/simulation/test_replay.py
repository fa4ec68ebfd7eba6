"""The replay client against a small OpenAI-compatible server, over real HTTP.

The server counts tokens with a tokenizer made here (one token a word, plus a begin token), keeps a
prefix cache of whole 8-token pages, and takes a known time per token: so what the client reports
can be checked against what the server did.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from benchmark.replay.__main__ import is_local, main
from benchmark.replay.prompts import PromptError, PromptMaker, load_tokenizer
from benchmark.replay.records import Record, request_cost, summarise
from tiered_kv.core.device_spec import DEVICES
from tiered_kv.core.model_spec import MODELS
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.simulation.workload.catalog import open_workload

PAGE = 8
FIRST_S = 0.03
TOKEN_S = 0.004
N_WORDS = 300


def make_tokenizer() -> Tokenizer:
    """Words of letters with a space in front are one token each; <s> begins a text."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [f"Ġ{letters[n // 26]}{letters[n % 26]}word" for n in range(N_WORDS)]
    vocabulary = {token: n for n, token in enumerate(["<s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


class FakeServer:
    """Streams words, one at a time, and remembers prefixes and bodies."""

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()
        self.bodies: list[dict[str, Any]] = []
        self.pages: set[tuple[int, ...]] = set()
        self.refuse_after: int | None = None
        self.in_flight = 0
        self.most_in_flight = 0
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/completions")(self.complete)
        self.app.post("/v1/chat/completions")(self.chat)

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "fake", "object": "model"}]}

    async def complete(self, request: Request) -> Any:
        body = await request.json()
        return self._answer(body, self.tokenizer.encode(body["prompt"]).ids, is_chat=False)

    async def chat(self, request: Request) -> Any:
        body = await request.json()
        text = "".join(f" <{m['role']}>{m['content']}" for m in body["messages"])
        return self._answer(body, self.tokenizer.encode(text).ids, is_chat=True)

    def _answer(self, body: dict[str, Any], tokens: list[int], *, is_chat: bool) -> Any:
        self.bodies.append(body)
        if self.refuse_after is not None and len(self.bodies) > self.refuse_after:
            return JSONResponse({"error": {"message": "too much"}}, status_code=503)
        return StreamingResponse(
            self._stream(body, tokens, is_chat=is_chat), media_type="text/event-stream"
        )

    def _hit(self, tokens: list[int]) -> int:
        hit = 0
        while hit + PAGE < len(tokens) and tuple(tokens[: hit + PAGE]) in self.pages:
            hit += PAGE
        for end in range(PAGE, len(tokens) + 1, PAGE):
            self.pages.add(tuple(tokens[:end]))
        return hit

    async def _stream(
        self, body: dict[str, Any], tokens: list[int], *, is_chat: bool
    ) -> AsyncIterator[str]:
        hit = self._hit(tokens)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for index in range(body["max_tokens"]):
            if is_chat and not index:
                yield self._event([{"index": 0, "delta": {"role": "assistant", "content": ""}}])
            await asyncio.sleep(TOKEN_S if index else FIRST_S)
            piece = {"delta": {"content": " w"}} if is_chat else {"text": " w"}
            yield self._event([{"index": 0, **piece}])
        usage = {
            "prompt_tokens": len(tokens),
            "completion_tokens": body["max_tokens"],
            "total_tokens": len(tokens) + body["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": hit},
        }
        extra = {}
        if body.get("return_cached_tokens_details"):
            extra["sglext"] = {
                "cached_tokens_details": {"device": 0, "host": hit, "storage_backend": "disk"}
            }
        yield self._event([], usage=usage, **extra)
        yield "data: [DONE]\n\n"
        self.in_flight -= 1

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        chunk = {"id": "1", "object": "x", "created": 0, "model": "fake", "choices": choices}
        return f"data: {json.dumps({**chunk, **more})}\n\n"


@pytest.fixture
def server() -> Iterator[tuple[FakeServer, str]]:
    fake = FakeServer()
    runner = uvicorn.Server(uvicorn.Config(fake.app, port=0, log_level="error"))
    thread = threading.Thread(target=runner.run)
    thread.start()
    until = time.monotonic() + 30
    while not runner.started and time.monotonic() < until:
        time.sleep(0.01)
    port = runner.servers[0].sockets[0].getsockname()[1]
    yield fake, f"http://127.0.0.1:{port}"
    runner.should_exit = True
    thread.join(30)


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    make_tokenizer().save(str(path))
    return path


def run(url: str, out: Path, *options: str) -> dict[str, Any]:
    assert main(["--url", url, "--json", str(out), *options]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def mooncake_trace(path: Path) -> Path:
    lines = [
        {"timestamp": 100 * n, "input_length": length, "output_length": 5, "hash_ids": ids}
        for n, (length, ids) in enumerate([(30, [1, 2]), (40, [1, 2, 3]), (32, [1, 9])])
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_an_open_loop_reports_what_the_server_did(
    server: tuple[FakeServer, str], tokenizer_file: Path, tmp_path: Path
) -> None:
    fake, url = server
    trace = mooncake_trace(tmp_path / "trace.jsonl")
    result = run(
        url, tmp_path / "out.json",
        "--workload", f"mooncake:{trace},block_tokens=16", "--tokenizer", str(tokenizer_file),
        "--cached-by-tier", "--slo-mix", "a:1:10:10", "--rate", "2", "--send-slo",
    )  # fmt: skip
    records, summary = result["records"], result["summary"]
    # Lengths include the begin token, which the server adds.
    assert [record["prompt_tokens"] for record in records] == [30, 40, 32]
    assert summary["wrong_lengths"] == 0
    # Shared: nothing; one whole block and 14 tokens of the second; the first block.
    assert [record["cached_tokens"] for record in records] == [0, 24, 16]
    assert [record["cached_by_tier"] for record in records] == [
        {"device": 0, "host": hit} for hit in (0, 24, 16)
    ]
    assert summary["cached_share"] == pytest.approx(40 / 102)
    for record, due_s in zip(records, (0.0, 0.05, 0.1), strict=True):
        assert record["scheduled_s"] == pytest.approx(due_s)
        # An event loop may wake up a tick of its clock early.
        assert due_s - 1e-3 <= record["sent_s"] < due_s + 5
        assert record["output_tokens"] == 5
        assert record["ttft_s"] >= FIRST_S
        assert len(record["gaps_s"]) == 4
        assert record["e2e_s"] >= record["ttft_s"] + sum(record["gaps_s"])
        assert sum(record["gaps_s"]) >= 4 * TOKEN_S * 0.9
    body = fake.bodies[-1]
    assert body["ignore_eos"] is True
    assert body["slo"] == {"class": "a", "ttft_ms": 10_000, "tbt_ms": 10_000}
    assert summary["slo"]["a"]["attainment"] == 1.0
    assert result["settings"]["rate"] == "2.0"


def test_sessions_wait_for_answers_and_pauses(
    server: tuple[FakeServer, str], tokenizer_file: Path, tmp_path: Path
) -> None:
    _, url = server
    result = run(
        url, tmp_path / "out.json",
        "--workload",
        "chat,sessions=6,turns=3,system_tokens=64,message_tokens=40,output_tokens=5,think_s=0.05,"
        "block_tokens=16,arrivals=poisson:50",
        "--tokenizer", str(tokenizer_file),
    )  # fmt: skip
    records = result["records"]
    workload = open_workload(
        "chat,sessions=6,turns=3,system_tokens=64,message_tokens=40,output_tokens=5,think_s=0.05,"
        "block_tokens=16,arrivals=poisson:50"
    )
    assert len(records) == workload.n_requests  # type: ignore[attr-defined]
    ended: dict[int, float] = {}
    followed = 0
    for record in records:
        session = record["session"]
        if session in ended:
            followed += 1
            assert record["sent_s"] > ended[session]
            # The whole prompt before comes again, so its pages hit.
            assert record["cached_tokens"] > 0
        if session is not None:
            ended[session] = record["sent_s"] + record["e2e_s"]
    assert followed > 3


def test_a_closed_loop_keeps_so_many_in_flight(
    server: tuple[FakeServer, str], tokenizer_file: Path, tmp_path: Path
) -> None:
    fake, url = server
    result = run(
        url, tmp_path / "out.json",
        "--workload", "best_of_n,prompts=3,samples=5,examples_tokens=64,prompt_tokens=20,"
        "output_tokens=8,arrivals=poisson:0.001,block_tokens=16",
        "--tokenizer", str(tokenizer_file), "--in-flight", "4",
    )  # fmt: skip
    assert len(result["records"]) == 15
    assert fake.most_in_flight == 4
    # At the recorded rate this would have taken most of an hour.
    assert result["summary"]["span_s"] < 60


def test_a_chat_log_is_sent_as_messages(server: tuple[FakeServer, str], tmp_path: Path) -> None:
    fake, url = server
    messages = [{"role": "system", "content": " abword"}, {"role": "user", "content": " acword"}]
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"timestamp": 0, "messages": messages, "output": "12345678"}) + "\n")
    result = run(url, tmp_path / "out.json", "--workload", f"chat_log:{log}", "--chat")
    assert fake.bodies[-1]["messages"] == messages
    assert fake.bodies[-1]["max_tokens"] == 2
    record = result["records"][0]
    # The empty piece that opens a chat's stream is no token.
    assert record["ttft_s"] >= FIRST_S
    assert len(record["gaps_s"]) == 1


def test_a_server_on_this_machine_is_asked_without_a_proxy(
    server: tuple[FakeServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, url = server
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    messages = [{"role": "user", "content": " acword"}]
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"timestamp": 0, "messages": messages, "output": "1234"}) + "\n")
    run(url, tmp_path / "out.json", "--workload", f"chat_log:{log}", "--chat")
    assert fake.bodies


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:30000", True),
        ("http://localhost/v1", True),
        ("https://[::1]:8443", True),
        ("http://10.0.0.7:30000", False),
        ("http://llm.example.com", False),
    ],
)
def test_which_servers_are_on_this_machine(url: str, expected: bool) -> None:
    assert is_local(url) is expected


def test_failures_are_recorded_and_end_their_session(
    server: tuple[FakeServer, str],
    tokenizer_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake, url = server
    # The two probes and the first request are answered.
    fake.refuse_after = 3
    out = tmp_path / "out.json"
    spec = f"mooncake:{mooncake_trace(tmp_path / 'trace.jsonl')},block_tokens=16"
    options = ["--url", url, "--tokenizer", str(tokenizer_file), "--json", str(out)]
    assert main(["--workload", spec, *options]) == 1
    result = json.loads(out.read_text())
    assert result["summary"]["errors"] == 2
    assert [record["error"] is None for record in result["records"]] == [True, False, False]
    assert "HTTP 503" in capsys.readouterr().err
    assert result["summary"]["slo"]["standard"]["attainment"] == pytest.approx(1 / 3)


def test_a_wrong_tokenizer_and_no_server_are_one_sentence(
    server: tuple[FakeServer, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, url = server
    path = tmp_path / "tokenizer.json"
    make_tokenizer().save(str(path))
    # The server makes three tokens of each word.
    fake.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("word", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    options = ["--workload", "rag,requests=1", "--tokenizer", str(path)]
    assert main([*options, "--url", url]) == 2
    assert "give the served model's tokenizer" in capsys.readouterr().err
    assert main([*options, "--url", "http://127.0.0.1:9"]) == 2
    assert "No server answers" in capsys.readouterr().err
    assert main(["--workload", "rag,requests=1", "--url", url]) == 2
    assert "give --tokenizer" in capsys.readouterr().err


def test_prompts_are_equal_where_ids_are(tokenizer_file: Path) -> None:
    maker = PromptMaker(load_tokenizer(tokenizer_file), 16)
    requests = list(open_workload("best_of_n,prompts=2,samples=2,block_tokens=16").initial())
    first, again, other = (maker.text(request) for request in (*requests[:2], requests[2]))
    n_shared = 16 * (len(requests[0].blocks) - 1)
    assert first.split()[:n_shared] == again.split()[:n_shared]
    # The examples in front of all prompts are 2,048 tokens; then the prompts part.
    assert first.split()[:2048] == other.split()[:2048]
    assert first.split()[2048:2064] != other.split()[2048:2064]
    for request in requests:
        maker.check(request)
        assert maker.count(maker.text(request, 5)) == request.input_tokens - 5
    assert maker.text(requests[0], 5).split() == first.split()[5:]
    assert PromptMaker(load_tokenizer(tokenizer_file), 16, seed=1).text(requests[0]) != first


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(PromptError, match="0 plain words"):
        PromptMaker(tokenizer, 16)
    with pytest.raises(PromptError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def record(**change: Any) -> Record:
    values: dict[str, Any] = {
        "request_id": 0, "session": None, "slo_class": "a", "ttft_slo_s": 1.0, "tbt_slo_s": 0.1,
        "scheduled_s": 0.0, "sent_s": 0.0, "input_tokens": 1000, "ttft_s": 0.5, "e2e_s": 1.5,
        "gaps_s": [0.1] * 10, "prompt_tokens": 1000, "output_tokens": 11, "cached_tokens": 600,
    }  # fmt: skip
    return Record(**{**values, **change})


@pytest.mark.parametrize(
    ("change", "meets"),
    [
        ({}, True),
        ({"ttft_s": 1.1, "e2e_s": 1.5}, False),
        ({"e2e_s": 1.6}, False),
        ({"e2e_s": 1.6, "tbt_slo_s": None}, True),
        ({"e2e_s": 9.0, "output_tokens": 1}, True),
        ({"error": "HTTP 500"}, False),
    ],
)
def test_when_a_request_meets_its_targets(change: dict[str, Any], meets: bool) -> None:
    assert record(**change).meets_slo is meets


def test_the_work_of_a_request() -> None:
    model, device = MODELS["Llama-3.1-8B"], DEVICES["H100-80"]
    cost = CostModel(model, device, {})
    work = request_cost(cost, record())
    assert work is not None
    # 400 computed prompt tokens; eleven tokens after a context of 1000.
    gamma = (131072 / (3.35e12 * 0.8)) / (2 * 8030261248 / (989.4e12 * 0.55))
    assert work.prefill_token_equivalents == pytest.approx(400 + gamma * 1000 * 11)
    alone_s = cost.prefill_s(1000) + sum(
        cost.iteration_s([], context, 1) for context in range(1001, 1011)
    )
    assert work.idealized_s == pytest.approx(alone_s, rel=1e-3)
    assert request_cost(cost, record(prompt_tokens=None)) is None


def test_a_summary_of_nothing_answered() -> None:
    failed = record(error="no connection", ttft_s=None, e2e_s=2.0, cached_tokens=None)
    summary = summarise([failed])
    assert summary["errors"] == 1
    assert summary["ttft_s"] is None
    assert summary["cached_share"] is None
    assert summary["slo"]["a"]["attainment"] == 0
