"""Logs of chat requests as text, one JSON object a line, or an array of them.

Either {"timestamp", "input", "output", "session_id"} as in lmcache-agent-trace, or with what a
client sent (`messages`, `prompt` or `input`, at the top or in `body`, as in a batch file) in place
of `input`. `timestamp` may be a date in ISO 8601, seconds, milliseconds, microseconds or
nanoseconds since 1970, or seconds from 0; without any, all arrive at once. Or ShareGPT's
{"conversations"}, whose turns follow each other.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tiered_kv.simulation.workload.readers.chat_messages import (
    Message,
    message_text,
    read_answer,
    read_conversation,
    read_prompt,
)
from tiered_kv.simulation.workload.readers.lines import Line, json_lines, start_at_zero
from tiered_kv.simulation.workload.request import RecordedWorkload, Request

Tokenize = Callable[[str], Sequence[int]]

_TIMES = ("timestamp", "created_at", "created")


def four_bytes_a_token(text: str) -> Sequence[int]:
    """A stand-in for a tokenizer: English takes about four bytes a token."""
    # Logs cut emojis in halves, which have no bytes of their own.
    data = text.encode(errors="surrogatepass")
    return [int.from_bytes(data[at : at + 4]) for at in range(0, len(data), 4)]


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """What was said in one logged request."""

    messages: tuple[Message, ...]
    """The prompt, in OpenAI's form, all contents texts."""
    output: str
    """The logged answer."""


class ChatLog(RecordedWorkload):
    """Logged requests with their texts, at their recorded times or after the answer before."""

    def __init__(
        self,
        name: str,
        block_tokens: int,
        requests: list[Request],
        turns: dict[int, ChatTurn],
        following: Mapping[int, Request],
    ) -> None:
        """`turns` by request id. `following`: what is sent once that request is answered."""
        super().__init__(name, block_tokens, requests)
        self.turns = turns
        self._following = following

    def follow_up(self, finished: Request, finish_s: float) -> Request | None:
        """The conversation's next turn, at once."""
        following = self._following.get(finished.request_id)
        return None if following is None else replace(following, arrival_s=finish_s)


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
    """The log at `path`, or all `*.jsonl`, `*.json` and these with `.gz` in a directory.

    The first arrival is at 0. `tokenize` makes tokens of a prompt's text; its messages are joined
    by line breaks, so lengths leave out a chat template's own tokens and the descriptions of tools.
    Requests without an output count as one token. Raises WorkloadError.
    """
    log = _Log(block_tokens, tokenize)
    for file in _files(path):
        for line in json_lines(file):
            log.add(line)
    log.require_times()
    start_at_zero(log.requests, path)
    return ChatLog(path.stem, block_tokens, log.requests, log.turns, log.following)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    endings = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
    return sorted(file for file in path.iterdir() if file.name.endswith(endings))


class _Log:
    """The requests read so far."""

    def __init__(self, block_tokens: int, tokenize: Tokenize) -> None:
        self.requests: list[Request] = []
        self.turns: dict[int, ChatTurn] = {}
        self.following: dict[int, Request] = {}
        self._blocks = _Blocks(block_tokens)
        self._tokenize = tokenize
        self._sessions: dict[str, int] = {}
        self._timeless: Line | None = None
        self._is_timed = False

    def add(self, line: Line) -> None:
        """Add what one record has. Raises WorkloadError."""
        key = next((key for key in _TIMES if line.has(key)), None)
        arrival_s = 0.0 if key is None else line.time_s(key)
        if key is None:
            self._timeless = self._timeless or line
        self._is_timed = self._is_timed or key is not None
        if line.has("conversations"):
            self._add_conversation(line, arrival_s)
            return
        turn = _turn(line)
        session = None
        if line.has("session_id"):
            name = str(line.value("session_id"))
            session = self._sessions.setdefault(name, len(self._sessions))
        self.requests.append(self._request(line, turn, arrival_s, session))

    def require_times(self) -> None:
        """Raise WorkloadError if only some records have a time."""
        if self._is_timed and self._timeless is not None:
            raise self._timeless.error(
                "timestamp is missing, but other records have one; add it, or delete all"
            )

    def _add_conversation(self, line: Line, arrival_s: float) -> None:
        messages = read_conversation(line)
        session = self._sessions.setdefault(f"conversation {len(self.turns)}", len(self._sessions))
        before: Request | None = None
        for end, message in enumerate(messages):
            if message["role"] != "assistant" or not any(map(message_text, messages[:end])):
                continue
            turn = ChatTurn(tuple(messages[:end]), message_text(message))
            request = self._request(line, turn, arrival_s, session)
            if before is None:
                self.requests.append(request)
            else:
                self.following[before.request_id] = request
            before = request
        if before is None:
            raise line.error("no answer follows a prompt in its conversation; delete the record")

    def _request(
        self, line: Line, turn: ChatTurn, arrival_s: float, session: int | None
    ) -> Request:
        tokens = self._tokenize("\n".join(map(message_text, turn.messages)))
        if not tokens:
            raise line.error("the prompt is empty; delete the line")
        request_id = len(self.turns)
        self.turns[request_id] = turn
        return Request(
            request_id=request_id,
            arrival_s=arrival_s,
            blocks=self._blocks.ids(tokens),
            input_tokens=len(tokens),
            output_tokens=max(1, len(self._tokenize(turn.output))),
            session=session,
            slo_class="standard",
            ttft_slo_s=None,
            tbt_slo_s=None,
        )


def _turn(line: Line) -> ChatTurn:
    if line.has("url") and line.text("url").endswith(("/embeddings", "/moderations")):
        raise line.error(f"{line.text('url')} generates nothing; delete the line")
    answer = read_answer(line)
    asked = line
    for key in ("body", "request"):
        if line.has(key):
            asked = line.within(line.value(key), key)
            break
    messages = read_prompt(asked)
    if not answer and not line.has("body") and len(messages) > 1:
        last = messages[-1]
        if last["role"] == "assistant":
            # Conversations for training end with the answer.
            return ChatTurn(messages[:-1], message_text(last))
    return ChatTurn(messages, answer)
