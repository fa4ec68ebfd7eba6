"""Whatever the routes that generate are sent: nobody is answered with 500, and the server lives.

A tiny model of random weights behind the demo model's tokenizer, in a pool of 64 pages, so that
most of the time goes into reading requests and finding room for them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from harness.server import FLOAT32, Server, ServerError
from support import bodies

pytestmark = pytest.mark.server

AT_ONCE = 16
ANSWER_WITHIN_S = 120.0
PROMPT = {"input_ids": list(range(100, 180)), "sampling_params": {"max_new_tokens": 8}}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}


@pytest.fixture(scope="module")
def tiny_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    for file in demo_model.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = json.loads((demo_model / "config.json").read_text())
    config.pop("head_dim", None)
    (folder / "config.json").write_text(json.dumps(config | SIZES | HEADS))
    return folder


@pytest.fixture(scope="module")
def server(
    make_server: Callable[..., Server], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    args = ["--load-format", "dummy", "--served-model-name", "tiny", "--page-size", 16]
    args += ["--max-total-tokens", 1024, "--chunked-prefill-size", 256, "--enable-metrics"]
    args += ["--tiered-kv", "--tiered-kv-host-size", "4MB", "--tiered-kv-disk-size", "200MB"]
    args += ["--tiered-kv-disk-dir", tmp_path_factory.mktemp("disk"), "--tiered-kv-debug-integrity"]
    # What a caller did wrong is in the log, some of it with where SGLang noticed.
    with make_server(
        "any_request", *FLOAT32, *args, model=tiny_model, expected=[r"Traceback", r"ERROR"]
    ) as server:
        yield server


def send(server: Server, sent: bodies.Body) -> str | None:
    """What is wrong with the answer, or None."""
    path, body = sent
    try:
        answer = requests.post(f"{server.url}{path}", json=body, timeout=ANSWER_WITHIN_S)
    except requests.RequestException as error:
        return f"{path} {json.dumps(body)}: {type(error).__name__} {error}"
    if answer.status_code >= 500:
        return f"{path} {json.dumps(body)}: {answer.status_code} {answer.text[:300]}"
    return None


def greedy(server: Server) -> Any:
    body = {**PROMPT, "sampling_params": {**PROMPT["sampling_params"], "temperature": 0}}
    return server.post("/generate", body).json()["output_ids"]


def check_any(server: Server, n_bodies: int) -> None:
    before = greedy(server)

    @settings(
        max_examples=n_bodies // AT_ONCE,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(st.lists(bodies.ANY, min_size=AT_ONCE, max_size=AT_ONCE))
    def check(batch: list[bodies.Body]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            wrong = [told for told in pool.map(lambda one: send(server, one), batch) if told]
        if wrong:
            raise ServerError("\n".join(wrong) + server.tail())

    check()
    assert greedy(server) == before
    wait_until_idle(server)
    assert "hit an exception" not in server.log_text()


def wait_until_idle(server: Server) -> None:
    """Nobody is left over: a request without an end would run or queue for ever."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        (load,) = server.get("/v1/loads").json()["loads"]
        if load["num_running_reqs"] == load["num_waiting_reqs"] == 0:
            return
        time.sleep(0.5)
    raise ServerError(f"requests that never end: {load}{server.tail()}")


#: What ended the server once: each leaves no token to draw, or makes one of its numbers infinite.
ENDED_IT = [
    {"regex": "[ab]{2}", "min_new_tokens": 6, "max_new_tokens": 8},
    {"json_schema": '{"type": "boolean"}', "min_new_tokens": 20, "max_new_tokens": 24},
    {"logit_bias": {"5": 3e38, "6": 3e38}, "repetition_penalty": 1e-6, "max_new_tokens": 4},
    {"logit_bias": {"5": 1e39}, "max_new_tokens": 4},
    {"repetition_penalty": 1e-300, "max_new_tokens": 4},
    {"temperature": 1e300, "regex": "[ab]{2}", "max_new_tokens": 4},
    {"logit_bias": {str(token): -3e38 for token in range(50)}, "max_new_tokens": 4},
]


@pytest.mark.parametrize("drawn", [{"temperature": 0}, {"top_p": 0.4}, {"min_p": 0.5}, {}])
@pytest.mark.parametrize("settings", ENDED_IT, ids=",".join)
def test_settings_that_leave_no_token(
    server: Server, settings: dict[str, Any], drawn: dict[str, Any]
) -> None:
    bodies = [{"input_ids": [5, 6, 7] * 10, "sampling_params": {**drawn, **settings}}, PROMPT]
    with ThreadPoolExecutor(2) as pool:
        odd, plain = pool.map(lambda body: server.post("/generate", body), bodies)
    assert odd.status_code in (200, 400), odd.text
    assert plain.status_code == 200
    assert len(plain.json()["output_ids"]) == 8 or plain.json()["meta_info"]["finish_reason"]
    if odd.status_code == 200:
        assert odd.json()["meta_info"]["finish_reason"]["type"] in ("stop", "length")


def test_some_ask_for_the_probabilities_of_tokens(server: Server) -> None:
    """In one batch with others that want plain ones, or none."""
    wishes: list[Any] = [[5, 6], None, [], [7]] * 3
    kinds = [True, True, True, True, True, False, True, True, False, True, True, True]

    def ask(number: int) -> Any:
        body = {
            "input_ids": [5, 6, 7 + number] * 10,
            "sampling_params": {"max_new_tokens": 24, "ignore_eos": True},
            "return_logprob": kinds[number],
            "token_ids_logprob": wishes[number],
        }
        return server.post("/generate", body)

    with ThreadPoolExecutor(len(wishes)) as pool:
        answers = list(pool.map(ask, range(len(wishes))))
    for answer, ids, is_told in zip(answers, wishes, kinds, strict=True):
        assert answer.status_code == 200, answer.text
        told = answer.json()["meta_info"].get("output_token_ids_logprobs") or []
        assert [len(row or []) for row in told] == [len(ids or [])] * len(told)
        assert len(told) == 24 or not (ids and is_told)


def test_two_thousand(server: Server) -> None:
    check_any(server, 2_000)


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
def test_a_hundred_thousand(server: Server) -> None:
    check_any(server, int(os.environ.get("TIERED_KV_ANY_REQUESTS", "100000")))
