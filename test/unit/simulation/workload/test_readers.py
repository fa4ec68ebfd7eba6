"""Trace readers: what they take from small files, and what they say of bad ones."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiered_kv.simulation.workload.arrivals import Arrivals
from tiered_kv.simulation.workload.catalog import open_workload
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.readers.agent_sessions import read_agent_sessions
from tiered_kv.simulation.workload.readers.chat_log import read_chat_log
from tiered_kv.simulation.workload.readers.length_csv import read_azure, read_burstgpt
from tiered_kv.simulation.workload.readers.mooncake import read_mooncake
from tiered_kv.simulation.workload.request import Request, Workload


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def mooncake_line(**change: Any) -> dict[str, Any]:
    return {
        "timestamp": 1500,
        "input_length": 1100,
        "output_length": 7,
        "hash_ids": [0, 5, 9],
        **change,
    }


def test_mooncake(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "trace.jsonl", mooncake_line(timestamp=3000), mooncake_line(output_length=0)
    )
    workload = read_mooncake(path)
    first, second = workload.initial()
    assert (first.arrival_s, second.arrival_s) == (1.5, 3.0)
    assert first.blocks.tolist() == [0, 5, 9]
    assert (first.input_tokens, first.output_tokens) == (1100, 1)
    assert (workload.name, workload.block_tokens) == ("trace", 512)
    assert workload.follow_up(first, 9.0) is None


def mooncake_times(tmp_path: Path, *times: Any, **options: Any) -> list[float]:
    path = jsonl(tmp_path / "times.jsonl", *(mooncake_line(timestamp=time) for time in times))
    return [request.arrival_s for request in read_mooncake(path, **options).initial()]


@pytest.mark.parametrize(
    ("times", "arrivals_s"),
    [
        ([0, 3000, 6000], [0, 3, 6]),
        ([0, 0, 0], [0, 0, 0]),
        ([0, 1, 2, 3], [0, 0.001, 0.002, 0.003]),
        ([0.0, 125.5, 900.25], [0, 0.1255, 0.90025]),
        # Since 1970, in milliseconds, seconds and words.
        ([1700158546680, 1700158547680], [0, 1]),
        ([1700158546, 1700158549.5], [0, 3.5]),
        (["2023-11-16T18:15:46Z", "2023-11-16T18:15:48Z"], [0, 2]),
        # The third day of a trace.
        ([200_000_000, 200_003_000], [200_000, 200_003]),
    ],
)
def test_mooncakes_times(tmp_path: Path, times: list[Any], arrivals_s: list[float]) -> None:
    assert mooncake_times(tmp_path, *times) == pytest.approx(arrivals_s)


@pytest.mark.parametrize(
    ("times", "unit", "last_s"),
    [
        ([0.0, 0.5, 1.25, 3.0], "s", 3.0),
        ([0, 1, 2, 5, 7], "s", 7.0),
        ([0, 1_500_000_000, 3_600_000_000], "us", 3600.0),
        ([0, 2, 3, 4, 5], "ms", 0.005),
        ([0, 0.25], "s", 0.25),
    ],
)
def test_times_that_are_hardly_milliseconds_need_a_unit(
    tmp_path: Path, times: list[float], unit: str, last_s: float
) -> None:
    with pytest.raises(WorkloadError, match="hardly be milliseconds"):
        mooncake_times(tmp_path, *times)
    assert mooncake_times(tmp_path, *times, unit=unit)[-1] == pytest.approx(last_s)
    path = tmp_path / "times.jsonl"
    assert next(open_workload(f"mooncake:{path},unit={unit}").initial()).arrival_s == 0
    with pytest.raises(WorkloadError, match="unit must be one of"):
        open_workload(f"mooncake:{path},unit=hours")


def test_hashes_of_any_length_are_told_apart(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "trace.jsonl",
        mooncake_line(hash_ids=[2**64 - 1, 2**200, 7]),
        mooncake_line(hash_ids=[2**64 - 1, 2**200 + 1, -1]),
        mooncake_line(hash_ids=[2**64 - 1, 2**200, 7]),
    )
    first, second, third = read_mooncake(path).initial()
    assert first.blocks == third.blocks
    assert first.blocks[0] == second.blocks[0]
    assert len({*first.blocks, *second.blocks}) == 5


@pytest.mark.parametrize("name", ["trace.jsonl.gz", "trace"])
def test_compressed_traces(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(json.dumps(mooncake_line()).encode()))
    assert len(read_mooncake(path)) == 1
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(WorkloadError, match="damaged gzip file"):
        read_mooncake(path)
    path.write_bytes(gzip.compress(b"Timestamp,Request tokens,Response tokens\n5,40,2\n"))
    assert next(read_burstgpt(path).initial()).input_tokens == 40


def test_an_array_of_records(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps([mooncake_line(), mooncake_line()], indent=2))
    assert len(read_mooncake(path)) == 2
    path.write_text(json.dumps([mooncake_line(), 7]))
    with pytest.raises(WorkloadError, match="entry 2: a JSON object is expected"):
        read_mooncake(path)
    path.write_text(json.dumps([mooncake_line(), mooncake_line(hash_ids=[1])]))
    with pytest.raises(WorkloadError, match=r"entry 2: 1 hash_ids don't fit.*block_tokens="):
        read_mooncake(path)
    path.write_text("[1,")
    with pytest.raises(WorkloadError, match="not JSON"):
        read_mooncake(path)


def agent_call(at_s: float, n_in: int, n_out: int, lcp: int, *new: list[int]) -> dict[str, Any]:
    return {"t": at_s, "in": n_in, "out": n_out, "think_time": 2.5, "lcp": lcp, "new": list(new)}


def agent_session(*requests: Any, system: int = 70) -> dict[str, Any]:
    return {
        "block_size": 64,
        "tool_tokens": 64,
        "system_tokens": system,
        "requests": list(requests),
    }


def play(workload: Workload, request: Request, answer_s: float = 1.0) -> list[Request]:
    """The session that `request` starts."""
    played = [request]
    while (
        following := workload.follow_up(played[-1], played[-1].arrival_s + answer_s)
    ) is not None:
        played.append(following)
    return played


def test_agent_sessions_keep_prefixes_and_pauses(tmp_path: Path) -> None:
    session = agent_session(
        agent_call(0, 200, 130, 0, [1, 3]),
        agent_call(9, 400, 10, 3, [4, 3]),
        agent_call(20, 128, 10, 1, [40, 1]),
    )
    workload = read_agent_sessions(jsonl(tmp_path / "a.jsonl", session), Arrivals(1.0))
    first, second, third = play(workload, next(workload.initial()))
    assert second.arrival_s == first.arrival_s + 1.0 + 2.5
    assert second.blocks[:3] == first.blocks
    assert len(set(second.blocks)) == 6
    assert third.blocks[0] == first.blocks[0]
    assert third.blocks[1] not in second.blocks
    # 200 + 130 tokens fill blocks 3 and 4, with which the second prompt goes on.
    assert first.output_blocks == second.blocks[3:5]
    assert first.next_use_hint_s == 2.5
    # The third prompt dropped what the second and its answer added.
    assert not second.output_blocks
    assert third.next_use_hint_s is None


def test_agent_sessions_share_only_equal_instructions(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        agent_session(agent_call(0, 256, 1, 0, [1, 4])),
        agent_session(agent_call(0, 256, 1, 0, [1, 4])),
        agent_session(agent_call(0, 256, 1, 0, [1, 4]), system=71),
    )
    same, also, other = read_agent_sessions(path).initial()
    # 64 + 70 tokens of tools and system prompt are two whole blocks.
    assert same.blocks[:2] == also.blocks[:2]
    assert not set(same.blocks[2:]) & set(also.blocks[2:])
    assert not set(same.blocks) & set(other.blocks)


def test_sub_agents_are_sessions_of_their_own(tmp_path: Path) -> None:
    sub = {
        "t": 5.0,
        "tool_tokens": 0,
        "system_tokens": 64,
        "sub": [agent_call(0, 64, 1, 0, [9, 1])],
    }
    session = agent_session(agent_call(0, 64, 1, 0, [1, 1]), sub, agent_call(9, 128, 1, 1, [2, 1]))
    workload = read_agent_sessions(jsonl(tmp_path / "a.jsonl", session))
    main, sub_agent = workload.initial()
    assert sub_agent.arrival_s == main.arrival_s + 5.0
    assert (len(play(workload, main)), len(play(workload, sub_agent))) == (2, 1)


def test_calls_asked_out_of_order_are_the_same(tmp_path: Path) -> None:
    calls = [agent_call(turn, 64 * (turn + 1), 1, turn, [turn + 1, 1]) for turn in range(6)]
    workload = read_agent_sessions(jsonl(tmp_path / "a.jsonl", agent_session(*calls)))
    session = workload.sessions[0]
    in_order = [session.call(turn).blocks.tolist() for turn in range(6)]
    assert [session.call(turn).blocks.tolist() for turn in (4, 1, 5)] == [
        in_order[turn] for turn in (4, 1, 5)
    ]


def test_azure_times_have_seven_digits(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9951690,130,109\r\n"
    )
    first, second = read_azure(path).initial()
    assert first.arrival_s == 0
    assert second.arrival_s == pytest.approx(4.314579)
    assert (second.input_tokens, second.output_tokens) == (130, 109)
    assert len(second.blocks) == 3
    assert not set(first.blocks) & set(second.blocks)


def test_burstgpt_leaves_out_failures(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "45,ChatGPT,1087,0,1087,Conversation log\n"
        "118,GPT-4,417,276,693,API log\n"
    )
    requests = list(read_burstgpt(path).initial())
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in requests] == [
        (0.0, 472, 18),
        (113.0, 417, 276),
    ]


def test_cells_that_are_empty_and_headers_with_spaces(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    header = "Timestamp, Model, Request tokens ,Response tokens\n"
    path.write_text(f"{header}5,ChatGPT,472,18\n6,ChatGPT,40,\n1700000000000,ChatGPT,30,2\n")
    with pytest.raises(WorkloadError, match="54 years"):
        read_burstgpt(path)
    path.write_text(f"{header}5,ChatGPT,472,18\n6,ChatGPT,40,\n\n9,ChatGPT,30,2\n")
    # A row without a response is a failure of the recorded service.
    assert [request.arrival_s for request in read_burstgpt(path).initial()] == [0, 4]
    path.write_text(f"{header}5,ChatGPT,,18\n")
    with pytest.raises(WorkloadError, match="line 2: Request tokens is missing"):
        read_burstgpt(path)
    path.write_text(f"{header}5,ChatGPT\n,ChatGPT,3,4\n")
    with pytest.raises(WorkloadError, match="line 3: Timestamp is missing"):
        read_burstgpt(path)
    path.write_text(f'{header}5,"{"x" * 200_000}",3,4\n')
    with pytest.raises(WorkloadError, match="line 2: not CSV"):
        read_burstgpt(path)


def test_a_chat_log_shares_what_its_texts_share(tmp_path: Path) -> None:
    hello = "You are a helpful assistant with many tools. " * 10
    path = jsonl(
        tmp_path / "log.jsonl",
        {"timestamp": 1760587666000000, "input": hello, "output": "Hi!", "session_id": "a"},
        {"timestamp": 1760587668500000, "input": hello + "More.", "output": "", "session_id": "a"},
        {"timestamp": 1760587668500000, "input": "Else. " + hello, "session_id": "b"},
    )
    workload = read_chat_log(path, block_tokens=8)
    first, second, third = workload.initial()
    assert second.arrival_s == pytest.approx(2.5)
    n_whole = len(hello) // 4 // 8
    assert second.blocks[:n_whole] == first.blocks[:n_whole]
    assert not set(third.blocks) & set(first.blocks)
    assert (first.session, second.session, third.session) == (0, 0, 1)
    assert workload.turns[first.request_id].output == "Hi!"


def test_a_batch_file_of_messages(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "abcd"}, {"role": "user", "content": "efg"}]
    path = jsonl(tmp_path / "batch.jsonl", {"custom_id": "1", "body": {"messages": messages}})
    workload = read_chat_log(path, tokenize=lambda text: [ord(letter) for letter in text])
    request = next(workload.initial())
    assert request.input_tokens == len("abcd\nefg")
    assert list(workload.turns[0].messages) == messages


BAD_LINES: list[tuple[Callable[[Path], object], str, str]] = [
    (read_mooncake, '{"timestamp": 0', "line 2: not JSON"),
    (read_mooncake, "[1]", "line 2: a JSON object is expected"),
    (read_mooncake, json.dumps(mooncake_line(input_length=-4)), "line 2: input_length must be"),
    (
        read_mooncake,
        json.dumps(mooncake_line(input_length=2.5)),
        "line 2: input_length must be a w",
    ),
    (read_mooncake, json.dumps(mooncake_line(timestamp=None)), "line 2: timestamp is missing"),
    (read_mooncake, json.dumps(mooncake_line(hash_ids=[1])), "line 2: 1 hash_ids don't fit 1100"),
    (read_mooncake, json.dumps(mooncake_line(hash_ids=["a"] * 3)), "line 2: hash_ids must be"),
    (read_mooncake, json.dumps(mooncake_line(input_length=1e12)), "line 2: input_length must"),
    (read_mooncake, json.dumps(mooncake_line(input_length=10**400)), "line 2: input_length must"),
    (read_mooncake, '{"timestamp": ' + "9" * 5000 + "}", "line 2: not a record"),
    (read_mooncake, "[" * 100_000, "line 2: not"),
    (read_mooncake, json.dumps(mooncake_line(timestamp="soon")), "line 2: timestamp 'soon' is no"),
    (read_mooncake, json.dumps(mooncake_line(output_length=True)), "line 2: output_length must"),
]


@pytest.mark.parametrize(("reader", "line", "says"), BAD_LINES)
def test_a_bad_line_is_named(
    tmp_path: Path, reader: Callable[[Path], object], line: str, says: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(mooncake_line()) + "\n" + line + "\n")
    with pytest.raises(WorkloadError) as caught:
        reader(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("session", "says"),
    [
        (agent_session(agent_call(0, 64, 1, 2, [1, 1])), "lcp is 2"),
        (agent_session(agent_call(0, 640, 1, 0, [1, 1])), "make 1 blocks"),
        (agent_session({**agent_call(0, 64, 1, 0), "new": [3]}), "pairs"),
        (agent_session("call"), "must be an object"),
        ({"block_size": 64, "requests": 3}, "must be a list"),
    ],
)
def test_a_bad_session_is_named(tmp_path: Path, session: Any, says: str) -> None:
    with pytest.raises(WorkloadError, match=r"line 1: .*") as caught:
        read_agent_sessions(jsonl(tmp_path / "a.jsonl", session))
    assert says in str(caught.value)


def test_a_bad_time_and_a_bad_header_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n")
    with pytest.raises(WorkloadError, match="line 2: TIMESTAMP 'yesterday' is no time"):
        read_azure(path)
    with pytest.raises(WorkloadError, match="lacks the column 'Timestamp'"):
        read_burstgpt(path)


@pytest.mark.parametrize("reader", [read_mooncake, read_agent_sessions, read_chat_log])
def test_an_empty_and_a_missing_file_are_refused(
    tmp_path: Path, reader: Callable[[Path], object]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(WorkloadError, match="holds no requests"):
        reader(empty)
    with pytest.raises(WorkloadError, match="can't be read"):
        reader(tmp_path / "none.jsonl")
    empty.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match="no UTF-8"):
        reader(empty)
