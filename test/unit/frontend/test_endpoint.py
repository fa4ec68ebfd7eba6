"""Programs against a server that notes what it is sent, and answers every call alike."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import sglang as sgl

from tiered_kv.frontend.endpoint import ProgramEndpoint, pause


class Noting(BaseHTTPRequestHandler):
    """One of SGLang's servers, as far as its frontend asks it."""

    def _say(self, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._say({"model_path": "demo"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        texts = asked["text"]
        logprobs = [[-1.0, 5, " x"], [-1.0, 6, " y"]]
        answer = {
            "text": " word",
            "meta_info": {
                "prompt_tokens": 3,
                "input_token_logprobs": logprobs,
                "output_token_logprobs": logprobs,
            },
        }
        self._say([answer] * len(texts) if isinstance(texts, list) else answer)

    def log_message(self, *_: object) -> None:
        pass


class Noted:
    """A backend, and the hints of the calls that it was asked for, by the prompt."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.asked: list[dict[str, Any]] = server.asked  # type: ignore[attr-defined]
        self.backend = ProgramEndpoint(
            f"http://127.0.0.1:{server.server_port}", slo={"class": "batch"}
        )

    def hints(self) -> list[tuple[Any, dict[str, Any]]]:
        return [
            (call["text"], call["sampling_params"]["custom_params"]["hints"]) for call in self.asked
        ]


@pytest.fixture
def noted() -> Iterator[Noted]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Noting)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Noted(server)
    server.shutdown()
    thread.join()
    server.server_close()


@sgl.function
def forked(s: Any) -> None:
    s += "Begin."
    parts = s.fork(3)
    parts += lambda i: f" Part {i}:" + sgl.gen("part", max_tokens=4)
    parts.join()
    s += " All:" + sgl.gen("all", max_tokens=4)


def test_a_fork_announces_its_branches_and_sends_nothing_else(noted: Noted) -> None:
    state = forked.run(backend=noted.backend)
    assert state.text() == "Begin. All: word"
    said = noted.hints()
    assert len(said) == 4
    branches = [hints for text, hints in said if " Part" in text]
    assert [hints["branches"] for hints in branches] == [3, 3, 3]
    assert len({hints["session_id"] for hints in branches}) == 3
    (root,) = [hints for text, hints in said if " All:" in text]
    assert {hints["parent_session_id"] for hints in branches} == {root["session_id"]}
    assert noted.asked[0]["sampling_params"]["custom_params"]["slo"] == {"class": "batch"}
    assert noted.asked[0]["sampling_params"]["max_new_tokens"] == 4


@sgl.function
def with_a_tool(s: Any) -> None:
    s += pause(2.5)
    s += "Ask:" + sgl.gen("question", max_tokens=4)
    s += f" Tool: {len(s['question'])}." + sgl.gen("answer", max_tokens=4)


def test_a_pause_is_said_and_is_no_text(noted: Noted) -> None:
    assert with_a_tool.run(backend=noted.backend).text() == "Ask: word Tool: 5. word"
    (first, asks), (second, answers) = noted.hints()
    assert first == "Ask:"
    assert second == "Ask: word Tool: 5."
    assert asks["next_call_in_s"] == 2.5
    assert asks["session_id"] == answers["session_id"]
    # Nobody waits for the answer: it is the last call, if the function has returned by then.
    assert answers.get("session_final", True) is True


@sgl.function
def in_one_go(s: Any) -> None:
    s += "A:" + sgl.gen("a", max_tokens=4) + " B:" + sgl.gen("b", max_tokens=4)


def test_what_is_queued_behind_a_call_follows_it(noted: Noted) -> None:
    assert in_one_go.run(backend=noted.backend).text() == "A: word B: word"
    assert noted.hints()[0][1]["next_call_in_s"] == 0.0


def test_runs_of_a_batch_are_programs_of_their_own(noted: Noted) -> None:
    in_one_go.run_batch([{}, {}], backend=noted.backend, num_threads=2)
    sessions = [hints["session_id"] for _, hints in noted.hints()]
    assert len(sessions) == 4
    assert len(set(sessions)) == 2


@sgl.function
def choosing(s: Any) -> None:
    s += "Yes or no:" + sgl.select("choice", choices=[" yes", " no"])


def test_choices_are_calls_of_the_program_too(noted: Noted) -> None:
    assert choosing.run(backend=noted.backend)["choice"] in (" yes", " no")
    assert len({hints["session_id"] for _, hints in noted.hints()}) == 1


def test_other_backends_are_not_told_of_forks(noted: Noted) -> None:
    other = sgl.RuntimeEndpoint(noted.backend.base_url)
    assert forked.run(backend=other).text() == "Begin. All: word"
    assert all("custom_params" not in call["sampling_params"] for call in noted.asked)


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_a_pause_is_no_less_than_nothing(seconds: float) -> None:
    with pytest.raises(ValueError, match="0 seconds or more"):
        pause(seconds)
