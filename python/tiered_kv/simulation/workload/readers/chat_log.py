"""Logs of chat requests as text, one JSON object a line.

Either {"timestamp", "input", "output", "session_id"} as in lmcache-agent-trace, or with OpenAI's
`messages` (at the top or in `body`, as in a batch file) in place of `input`. `timestamp` may be
seconds, milliseconds, microseconds or nanoseconds since 1970, or seconds from 0; without any, all
arrive at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiered_kv.simulation.workload.readers.lines import Line, json_lines, require_some
from tiered_kv.simulation.workload.request import RecordedWorkload, Request

Tokenize = Callable[[str], Sequence[int]]
Message = dict[str, str]


def four_bytes_a_token(text: str) -> Sequence[int]:
    """A stand-in for a tokenizer: English takes about four bytes a token."""
    data = text.encode()
    return [int.from_bytes(data[at : at + 4]) for at in range(0, len(data), 4)]


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """What was said in one logged request."""

    messages: tuple[Message, ...]
    """The prompt, in OpenAI's form."""
    output: str
    """The logged answer."""


class ChatLog(RecordedWorkload):
    """Logged requests at their recorded times, with their texts."""

    def __init__(
        self,
        name: str,
        block_tokens: int,
        requests: list[Request],
        turns: dict[int, ChatTurn],
    ) -> None:
        """`turns` by request id."""
        super().__init__(name, block_tokens, requests)
        self.turns = turns


class _Blocks:
    """Numbers blocks by their content and all that stands before them."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._ids: dict[tuple[int, tuple[int, ...]], int] = {}

    def ids(self, tokens: Sequence[int]) -> array[int]:
        """One id per block, the last perhaps partly filled."""
        ids: array[int] = array("q")
        parent = -1
        for at in range(0, len(tokens), self._block_tokens):
            key = (parent, tuple(tokens[at : at + self._block_tokens]))
            parent = self._ids.setdefault(key, len(self._ids))
            ids.append(parent)
        return ids


def read_chat_log(
    path: Path, block_tokens: int = 16, tokenize: Tokenize = four_bytes_a_token
) -> ChatLog:
    """The log at `path`, or all `*.jsonl` in a directory, the first arrival at 0.

    `tokenize` makes tokens of a prompt's text; its messages are joined by line breaks, so lengths
    leave out a chat template's own tokens. Requests without an output count as one token. Raises
    WorkloadError.
    """
    paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    blocks = _Blocks(block_tokens)
    sessions: dict[str, int] = {}
    requests: list[Request] = []
    turns: dict[int, ChatTurn] = {}
    for line in (line for file in paths for line in json_lines(file)):
        turn = ChatTurn(_messages(line), _output(line))
        tokens = tokenize("\n".join(message["content"] for message in turn.messages))
        if not tokens:
            raise line.error("the prompt is empty; delete the line")
        session = None
        if line.has("session_id"):
            session = sessions.setdefault(str(line.value("session_id")), len(sessions))
        turns[len(requests)] = turn
        requests.append(
            Request(
                request_id=len(requests),
                arrival_s=_seconds(line.number_of("timestamp")) if line.has("timestamp") else 0.0,
                blocks=blocks.ids(tokens),
                input_tokens=len(tokens),
                output_tokens=max(1, len(tokenize(turn.output))),
                session=session,
                slo_class="standard",
                ttft_slo_s=None,
                tbt_slo_s=None,
            )
        )
    require_some(requests, path)
    first_s = min(request.arrival_s for request in requests)
    for request in requests:
        request.arrival_s -= first_s
    return ChatLog(path.stem, block_tokens, requests, turns)


def _messages(line: Line) -> tuple[Message, ...]:
    if line.has("body"):
        line = line.within(line.value("body"), "body")
    if not line.has("messages"):
        return ({"role": "user", "content": line.text("input")},)
    messages = []
    for item in line.items("messages"):
        message = line.within(item, "a message")
        # An assistant's message that only calls tools has no content.
        content = message.text("content") if message.has("content") else ""
        messages.append({"role": message.text("role"), "content": content})
    return tuple(messages)


def _output(line: Line) -> str:
    return line.text("output") if line.has("output") else ""


def _seconds(timestamp: float) -> float:
    """Seconds, from whichever unit the size of the number betrays (times after 1973)."""
    for threshold, factor in ((1e17, 1e-9), (1e14, 1e-6), (1e11, 1e-3)):
        if timestamp >= threshold:
            return timestamp * factor
    return timestamp
