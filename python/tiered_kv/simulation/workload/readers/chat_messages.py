"""What clients write for a prompt and an answer, as messages of plain text.

OpenAI's chat, completions and responses, Anthropic's messages, and ShareGPT's conversations:
content may be a text, a list of parts, or missing beside tool calls; tools' results may be parts.
What isn't text (images, sound) is refused, for nobody knows how many tokens it has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tiered_kv.simulation.workload.readers.lines import Line, shown

Message = dict[str, Any]
"""`role` and `content`, a text; `tool_calls`, `tool_call_id` and `name` where the log has them."""

_KEPT = ("tool_calls", "tool_call_id", "name")
_TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


def message_text(message: Mapping[str, Any]) -> str:
    """What a message has for a model to read: its content, and the calls that it makes."""
    said = [message["content"]] if message["content"] else []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        said.append(f"{function['name']}({function['arguments']})")
    return "\n".join(said)


def read_prompt(line: Line) -> tuple[Message, ...]:
    """The messages of a logged request. Raises WorkloadError."""
    messages = list(_instructions(line))
    if line.has("messages"):
        return (*messages, *_messages(line, line.items("messages")))
    if line.has("prompt"):
        return (*messages, {"role": "user", "content": _prompt_text(line)})
    value = line.value("input")
    if isinstance(value, list):
        # OpenAI's responses: messages, calls and their results in one list.
        return (*messages, *_messages(line, value))
    return (*messages, {"role": "user", "content": line.text("input")})


def read_answer(line: Line) -> str:
    """The logged answer of a request; empty if there is none. Raises WorkloadError."""
    for key in ("output", "response", "completion"):
        if line.has(key):
            return "\n".join(_answers(line, line.value(key), key))
    return ""


def read_conversation(line: Line) -> list[Message]:
    """The messages of a conversation in ShareGPT's form. Raises WorkloadError."""
    messages = list(_instructions(line))
    for item in line.items("conversations"):
        said = line.within(item, "a message")
        if said.has("from"):
            speaker = said.text("from").lower()
            content = _content(said, said.value("value")) if said.has("value") else ""
            messages.append({"role": _SPEAKERS.get(speaker, speaker), "content": content})
        else:
            messages += _messages(line, [item])
    return messages


def _instructions(line: Line) -> Iterator[Message]:
    for key in ("system", "instructions"):
        if line.has(key):
            yield {"role": "system", "content": _content(line, line.value(key))}


def _messages(line: Line, items: list[Any]) -> Iterator[Message]:
    for item in items:
        message = line.within(item, "a message")
        if message.has("role"):
            yield _message(message)
        else:
            yield _item(message)


def _message(line: Line) -> Message:
    content = line.value("content") if line.has("content") else ""
    message: Message = {"role": line.text("role"), "content": _content(line, content)}
    message.update({key: line.value(key) for key in _KEPT if line.has(key)})
    if line.has("tool_calls"):
        message["tool_calls"] = [_call(line, call) for call in line.items("tool_calls")]
    elif line.has("function_call"):
        # What tool calls were called before.
        message["tool_calls"] = [_call(line, {"function": line.value("function_call")})]
    return message


def _item(line: Line) -> Message:
    """An item of OpenAI's responses that is no message."""
    kind = line.text("type") if line.has("type") else "item without a role"
    if kind == "function_call":
        call = {"function": {"name": line.value("name"), "arguments": line.value("arguments")}}
        return {"role": "assistant", "content": "", "tool_calls": [_call(line, call)]}
    if kind == "function_call_output":
        return {"role": "tool", "content": _content(line, line.value("output"))}
    if kind == "reasoning":
        summary = line.value("summary") if line.has("summary") else []
        return {"role": "assistant", "content": _content(line, summary)}
    raise line.error(f"a {kind} can't be read as text; delete the line")


def _call(line: Line, value: Any) -> dict[str, Any]:
    call = line.within(value, "a tool call")
    # Calls to custom tools have a text for input instead of arguments.
    key = "custom" if call.has("custom") else "function"
    function = call.within(call.value(key), key)
    arguments = function.value("arguments" if key == "function" else "input")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    named = {"id": call.value("id")} if call.has("id") else {}
    return {
        **named,
        "type": "function",
        "function": {"name": function.text("name"), "arguments": text},
    }


def _content(line: Line, content: Any) -> str:
    """The text of a message's content: a text, or parts of it."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise line.error(f"content must be a text or a list of parts, not {shown(content)}")
    return "".join(_part(line, part) for part in content)


def _part(line: Line, part: Any) -> str:
    if isinstance(part, str):
        return part
    fields = line.within(part, "a part of a message")
    kind = fields.text("type")
    if kind in _TEXTS:
        return fields.text(_TEXTS[kind]) if fields.has(_TEXTS[kind]) else ""
    if kind == "tool_use":
        given = fields.value("input") if fields.has("input") else {}
        return f"{fields.text('name')}({json.dumps(given)})"
    if kind == "tool_result":
        return _content(fields, fields.value("content")) if fields.has("content") else ""
    if kind == "redacted_thinking":
        return ""
    raise line.error(
        f"a message has a part of the type {kind!r}, whose tokens can't be counted; delete the line"
    )


def _prompt_text(line: Line) -> str:
    prompt = line.value("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise line.error(f"prompt must be one text, not {shown(prompt)}; write a line for each")
    return prompt


def _answers(line: Line, value: Any, name: str) -> Iterator[str]:
    """The texts of an answer: itself a text, or a server's whole response."""
    if not isinstance(value, dict):
        yield _content(line, value)
        return
    answer = line.within(value, name)
    if answer.has("body"):
        yield from _answers(line, answer.value("body"), "body")
    elif answer.has("choices"):
        for item in answer.items("choices")[:1]:
            choice = answer.within(item, "a choice")
            if choice.has("message"):
                yield message_text(_message(choice.within(choice.value("message"), "message")))
            elif choice.has("text"):
                yield choice.text("text")
    elif answer.has("output"):
        for message in _messages(line, answer.items("output")):
            yield message_text(message)
    elif answer.has("content") or answer.has("tool_calls"):
        yield message_text(_message(answer.within({"role": "assistant", **value}, name)))
