"""The words of others: where callers already say what we call `slo` and `hints`.

Each row of the two tables is somebody's field or header and the field of ours that it stands for
(docs/slo.md has them with their sources). What is said in our own words counts instead; of several
words for one field, the first of the table does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tiered_kv.api.fields import Fields

SLO = "slo"
HINTS = "hints"
#: Of a tool's name; OpenAI's are no longer.
TOOL_LENGTH_MAX = 64


@dataclass(frozen=True, slots=True)
class Word:
    """Another word for one of our fields."""

    path: tuple[str, ...]
    """Keys from the top of a request's body; or the one name of a header, in lower case."""
    field: str
    key: str

    @property
    def name(self) -> str:
        """As whoever sent it calls it."""
        return ".".join(self.path)


BODY_WORDS = (
    Word(("program_id",), HINTS, "session_id"),
    Word(("session_id",), HINTS, "session_id"),
    Word(("prompt_cache_key",), HINTS, "session_id"),
    Word(("nvext", "agent_hints", "osl"), HINTS, "expected_output_tokens"),
    Word(("nvext", "agent_hints", "priority"), HINTS, "priority"),
)
HEADER_WORDS = (
    Word(("x-dynamo-session-id",), HINTS, "session_id"),
    Word(("x-dynamo-parent-session-id",), HINTS, "parent_session_id"),
    Word(("x-dynamo-session-final",), HINTS, "session_final"),
    Word(("x-slo-tpot-ms",), SLO, "tbt_ms"),
)


@dataclass(frozen=True, slots=True)
class Said:
    """Our fields by key, as others' words gave them, and how each was called there."""

    values: dict[str, object]
    names: dict[str, str]

    def fields(self) -> Fields:
        """For reading them, with errors in the caller's words."""
        return Fields(self.values, lambda key: self.names.get(key, key))


def said_in_body(body: Mapping[str, object]) -> dict[str, Said]:
    """What the body of a request says in others' words, by our field; unchecked."""
    found = {SLO: Said({}, {}), HINTS: Said({}, {})}
    for word in BODY_WORDS:
        value: object = body
        for key in word.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        _take(found, word, value)
    tool = _tool_of(body.get("messages"))
    if tool is not None:
        _take(found, Word(("messages",), HINTS, "tool"), tool)
    return found


def _tool_of(messages: object) -> str | None:
    """Whose result OpenAI's `messages` end with: the tool that was called last before it.

    They are SGLang's to check; what is not as it should be, or too long, says nothing.
    """
    if not isinstance(messages, list) or not messages:
        return None
    for message in reversed(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role == "tool":
            continue
        if role != "assistant" or message is messages[-1]:
            return None
        calls = message.get("tool_calls")
        call = calls[-1] if isinstance(calls, list) and calls else None
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        is_name = isinstance(name, str) and 0 < len(name) <= TOOL_LENGTH_MAX
        return name if is_name else None
    return None


def said_in_header(header: str) -> Word | None:
    """The word that a header is, or None."""
    return next((word for word in HEADER_WORDS if word.path == (header,)), None)


def merged(outer: Mapping[str, object], inner: Mapping[str, object]) -> dict[str, object]:
    """Our fields said in two places, of which the inner is the more specific.

    Its `slo` counts as a whole, because class and objectives belong together; its `hints` one by
    one, because a session may be named by whoever sits around the caller.
    """
    hints = [side[HINTS] for side in (outer, inner) if isinstance(side.get(HINTS), Mapping)]
    both: dict[str, object] = {}
    for one in hints:
        assert isinstance(one, Mapping)
        both |= {key: value for key, value in one.items() if value is not None}
    found = {**outer, **inner}
    return {**found, HINTS: both} if hints else found


def _take(found: dict[str, Said], word: Word, value: object) -> None:
    said = found[word.field]
    if value is not None and word.key not in said.values:
        said.values[word.key] = value
        said.names[word.key] = word.name
