"""Chat logs as clients write them: what is read of them, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tiered_kv.simulation.workload.catalog import open_workload
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.readers.chat_log import ChatLog, read_chat_log
from tiered_kv.simulation.workload.readers.chat_messages import message_text


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(tmp_path: Path, *records: Any) -> ChatLog:
    return read_chat_log(
        write(tmp_path / "log.jsonl", *records), tokenize=lambda text: [*map(ord, text)]
    )


def texts(log: ChatLog, request_id: int = 0) -> list[tuple[str, str]]:
    return [(said["role"], message_text(said)) for said in log.turns[request_id].messages]


def part(text: str, kind: str = "text") -> dict[str, str]:
    return {"type": kind, "text": text}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


CALL: dict[str, Any] = {
    "id": "c1",
    "type": "function",
    "function": {"name": "ls", "arguments": '{"path": "."}'},
}
SAID_CALL = 'ls({"path": "."})'


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": [part("ab"), part("cd")]}], [("user", "abcd")]),
        ([{"role": "user", "content": [part("ab", "input_text"), "cd"]}], [("user", "abcd")]),
        ([{"role": "developer", "content": "ab"}], [("developer", "ab")]),
        (
            [user("x"), assistant(None, tool_calls=[CALL])],
            [("user", "x"), ("assistant", SAID_CALL)],
        ),
        (
            [assistant("Wait.", tool_calls=[CALL]), user("y")],
            [("assistant", f"Wait.\n{SAID_CALL}"), ("user", "y")],
        ),
        (
            [{"role": "assistant", "function_call": CALL["function"]}, user("y")],
            [("assistant", SAID_CALL), ("user", "y")],
        ),
        ([{"role": "tool", "tool_call_id": "c1", "content": [part("a.txt")]}], [("tool", "a.txt")]),
        (
            [
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "Hm."},
                    {"type": "tool_use", "id": "t", "name": "ls", "input": {"path": "."}},
                ]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t", "content": [part("a.txt")]},
                    {"type": "tool_result", "tool_use_id": "u", "content": "b.txt"},
                ]},
            ],
            [("assistant", f"Hm.{SAID_CALL}"), ("user", "a.txtb.txt")],
        ),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
          {"role": "user", "content": "y"}], [("assistant", "No."), ("user", "y")]),
    ],
)  # fmt: skip
def test_messages(tmp_path: Path, messages: list[Any], expected: list[tuple[str, str]]) -> None:
    log = read(tmp_path, {"messages": messages, "output": "z"})
    assert texts(log) == expected
    assert log.requests[0].input_tokens == len("\n".join(text for _, text in expected))


def test_what_a_tool_call_is_answered_for_stays(tmp_path: Path) -> None:
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": [part("a.txt")]},
    ]
    call, result = read(tmp_path, {"messages": messages}).turns[0].messages
    assert call == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "a.txt"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "once upon"}, [("user", "once upon")]),
        ({"prompt": ["once upon"]}, [("user", "once upon")]),
        ({"input": "hello", "instructions": "Hm."}, [("system", "Hm."), ("user", "hello")]),
        (
            {"system": [part("Be brief.")], "messages": [{"role": "user", "content": "hello"}]},
            [("system", "Be brief."), ("user", "hello")],
        ),
        (
            {"input": [
                {"role": "user", "content": [part("hello", "input_text")]},
                {"type": "reasoning", "summary": [part("Hm.", "summary_text")]},
                {"type": "function_call", "call_id": "c", **CALL["function"]},
                {"type": "function_call_output", "call_id": "c", "output": "a.txt"},
            ]},
            [("user", "hello"), ("assistant", "Hm."), ("assistant", SAID_CALL), ("tool", "a.txt")],
        ),
    ],
)  # fmt: skip
def test_bodies_of_every_api(
    tmp_path: Path, body: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/some", "body": {"model": "m", **body}}
    assert texts(read(tmp_path, line)) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"output": "yes"}, "yes"),
        ({"output": [part("ye"), part("s")]}, "yes"),
        ({"output": {"role": "assistant", "content": "yes"}}, "yes"),
        ({"output": {"role": "assistant", "content": None, "tool_calls": [CALL]}}, SAID_CALL),
        ({"response": {"choices": [{"message": {"role": "assistant", "content": "yes"}}]}}, "yes"),
        ({"response": {"status_code": 200, "body": {"choices": [{"text": "yes"}]}}}, "yes"),
        ({"response": {"content": [part("yes")]}}, "yes"),
        (
            {"response": {"output": [
                {"type": "message", "role": "assistant", "content": [part("yes", "output_text")]}
            ]}},
            "yes",
        ),
        ({"completion": "yes"}, "yes"),
        ({}, ""),
    ],
)  # fmt: skip
def test_answers(tmp_path: Path, answer: dict[str, Any], expected: str) -> None:
    log = read(tmp_path, {"input": "hello", **answer})
    assert log.turns[0].output == expected
    assert log.requests[0].output_tokens == max(1, len(expected))


def test_a_conversation_for_training_ends_with_the_answer(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    log = read(tmp_path, {"messages": messages})
    assert texts(log) == [("user", "hello")]
    assert log.turns[0].output == "yes"


SHAREGPT = {
    "id": "x",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "hello"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "sure?"},
        {"from": "gpt", "value": "yes!"},
    ],
}


@pytest.mark.parametrize("compress", [False, True])
def test_an_array_of_conversations(tmp_path: Path, compress: bool) -> None:
    path = tmp_path / "sharegpt.json"
    data = json.dumps([SHAREGPT, {"conversations": SHAREGPT["conversations"][1:3]}], indent=1)
    path.write_bytes(gzip.compress(data.encode()) if compress else data.encode())
    log = read_chat_log(path, block_tokens=1)
    first, other = log.initial()
    second = log.follow_up(first, 7.5)
    assert second is not None
    assert (first.arrival_s, other.arrival_s, second.arrival_s) == (0, 0, 7.5)
    assert second.blocks[:3] == first.blocks[:3]
    assert second.session == first.session != other.session
    assert texts(log, second.request_id) == [
        ("system", "Be brief."), ("user", "hello"), ("assistant", "yes"), ("user", "sure?"),
    ]  # fmt: skip
    assert log.turns[second.request_id].output == "yes!"
    assert log.follow_up(second, 9.0) is None
    assert log.follow_up(other, 9.0) is None


def test_dates_in_words_and_in_numbers(tmp_path: Path) -> None:
    times = ["2026-05-01T10:00:00.5Z", "2026-05-01 12:00:03.5+02:00", "2026-05-01T10:00:05.500000"]
    records = [{"timestamp": time, "input": "hello"} for time in times]
    records.append({"created_at": 1777629607.5, "input": "hello"})
    records.append({"created": 1777629608500, "input": "hello"})
    log = read(tmp_path, *records)
    assert [request.arrival_s for request in log.initial()] == pytest.approx([0, 3, 5, 7, 8])


def test_halves_of_emojis_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"input": "cut \\ud83d", "output": "\\ude00"}\n')
    assert next(read_chat_log(path).initial()).input_tokens == 2


def test_a_directory_of_logs(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"input": "one", "timestamp": 5})
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"input": "two", "timestamp": 3}\n'))
    (tmp_path / "c.txt").write_text("not a log")
    workload = open_workload(f"chat_log:{tmp_path},block_tokens=4")
    assert [request.arrival_s for request in workload.initial()] == [0, 2]


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([{"messages": [user([{"type": "image_url"}])]}], "'image_url'"),
        ([{"messages": [user(7)]}], "content must be a text or a list"),
        ([{"messages": [{"content": "x"}]}], "item without a role"),
        ([{"messages": ["x"]}], "a message must be an object"),
        ([{"messages": [user([{"text": "x"}])]}], "type is missing"),
        ([{"messages": [{"role": "assistant", "tool_calls": ["ls"]}]}], "a tool call must be"),
        ([{"messages": [assistant("", tool_calls=[{"id": "c"}])]}], "function is missing"),
        ([{"messages": [{"role": "user", "content": None}]}], "the prompt is empty"),
        ([{"body": {"prompt": [1, 2, 3]}}], "prompt must be one text"),
        ([{"body": {"model": "m"}}], "input is missing"),
        ([{"url": "/v1/embeddings", "body": {"input": "x"}}], "generates nothing"),
        ([{"response": {"body": {}}}], "input is missing"),
        ([{"conversations": [{"from": "human", "value": "x"}]}], "no answer follows"),
        ([{"conversations": [{"from": "gpt", "value": "x"}]}], "no answer follows"),
        ([{"input": "x", "timestamp": "noon"}], "'noon' is no time"),
        ([{"input": "x", "timestamp": 1777629600}, {"input": "y"}], "timestamp is missing"),
        # One counts from 1970, the other from the start.
        ([{"input": "x", "timestamp": 1777629600}, {"input": "y", "timestamp": 5}], "56 years"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(tmp_path: Path, records: list[Any], says: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        read(tmp_path, *records)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
