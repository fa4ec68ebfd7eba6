"""Texts of a prompt that commute: where a body says so, and the body with them in order.

On OpenAI's chat route a content part may have `"commutes": true`, and neighbours that do are a set.
`/generate` takes `spans` in the place of `text`: a list of strings, and of objects with `text` and
`commutes`. The sets of a prompt are put in order one after the other, each for what comes before it
then (`span_orders.py`), and the body goes on as if its caller had sent it so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from tiered_kv.api.fields import TermsError, shortened
from tiered_kv.api.span_orders import SpanOrders, chain, name_of

COMMUTES = "commutes"
SPANS = "spans"
#: Texts of one set.
TEXTS_MAX = 64
#: Sets of one prompt.
SETS_MAX = 16

CHAT = "/chat/completions"
GENERATE = "/generate"

Orders: TypeAlias = list[list[int]]
"""Of each set, in the order of the prompt: which of the caller's texts is at which place."""


def put_in_order(
    body: object, path: str, scope: Mapping[str, object], orders: SpanOrders
) -> Orders | None:
    """Puts the sets of `body` in order, in place; None if it has none.

    path: of the route. scope: who may share KV with it, as JSON has it: what others sent is not
    looked at. Raises TermsError where texts cannot commute, and for what is no mark.
    """
    if not isinstance(body, dict):
        return None
    if path.endswith(GENERATE):
        return _generate(body, scope, orders)
    if SPANS in body:
        raise TermsError(f"{SPANS} belong to {GENERATE}; mark content parts of messages instead.")
    messages = body.get("messages")
    if not isinstance(messages, list) or not any(map(_is_marked, messages)):
        return None
    if not path.endswith(CHAT):
        raise TermsError(f"{COMMUTES} is known on {CHAT} and {GENERATE} only; leave it out here.")
    around = {key: value for key, value in body.items() if key != "messages"}
    return _Sets(_name(scope), orders).of_messages(messages, around)


def _generate(
    body: dict[str, Any], scope: Mapping[str, object], orders: SpanOrders
) -> Orders | None:
    spans = body.get(SPANS)
    if spans is None:
        return None
    if body.get("text") is not None or body.get("input_ids") is not None:
        raise TermsError(f"{SPANS} are the prompt; leave out text and input_ids.")
    if not isinstance(spans, list) or not spans:
        raise TermsError(f"{SPANS} must be a list of texts, not {shortened(spans)}.")
    parts = [{"text": one} if isinstance(one, str) else one for one in spans]
    for part in parts:
        is_object = isinstance(part, dict) and not part.keys() - {"text", COMMUTES}
        if not is_object or not isinstance(part.get("text"), str):
            raise TermsError(
                f'{SPANS} must be texts, or objects such as {{"text": "...", "{COMMUTES}": true}}, '
                f"not {shortened(part)}."
            )
    sets = _Sets(_name(scope), orders)
    sets.of_parts(parts)
    del body[SPANS]
    body["text"] = "".join(part["text"] for part in parts)
    return sets.found


def _is_marked(message: object) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    return isinstance(content, list) and any(
        isinstance(part, Mapping) and COMMUTES in part for part in content
    )


class _Sets:
    """The sets of one prompt, from its beginning on."""

    def __init__(self, scope: bytes, orders: SpanOrders) -> None:
        self.found: Orders = []
        self._scope = scope
        self._orders = orders
        self._before = scope

    def of_messages(self, messages: list[Any], around: Mapping[str, object]) -> Orders:
        """around: the rest of the body, of which a template may make text before them."""
        self._pass(_text({key: around.get(key) for key in _IN_TEMPLATES if key in around}))
        for message in messages:
            if not _is_marked(message):
                self._pass(_text(message))
                continue
            self._pass(_text({key: message[key] for key in message if key != "content"}))
            self.of_parts(message["content"])
        return self.found

    def of_parts(self, parts: list[Any]) -> None:
        """Puts the sets among `parts` in order, in place, and takes the marks away."""
        for start, end in _runs(parts):
            if start == end:
                self._pass(_text(parts[start]))
                continue
            texts = [part["text"] for part in parts[start:end]]
            if len(texts) > TEXTS_MAX or len(self.found) == SETS_MAX:
                raise TermsError(
                    f"at most {TEXTS_MAX} neighbouring texts may commute, in {SETS_MAX} sets of a "
                    "prompt; mark fewer."
                )
            order = self._orders.arrange(self._scope, self._before, texts)
            parts[start:end] = [parts[start + i] for i in order]
            self.found.append(list(order))
            for i in order:
                self._pass(texts[i])

    def _pass(self, text: str) -> None:
        self._before = chain(self._before, name_of(text))


#: Of a chat's body what templates put before, or around, its messages.
_IN_TEMPLATES = ("tools", "tool_choice", "chat_template_kwargs", "reasoning_effort")


def _runs(parts: list[Any]) -> Iterator[tuple[int, int]]:
    """(i, i) for a part that does not commute, (start, end) for a set. Takes the marks away."""
    start: int | None = None
    for i, part in enumerate(parts):
        if _take_mark(part):
            start = i if start is None else start
            continue
        if start is not None:
            yield start, i
            start = None
        yield i, i
    if start is not None:
        yield start, len(parts)


def _take_mark(part: object) -> bool:
    if not isinstance(part, dict):
        return False
    mark = part.pop(COMMUTES, None)
    if mark is not None and not isinstance(mark, bool):
        raise TermsError(f"{COMMUTES} must be true or false, not {shortened(mark)}.")
    text, kind = part.get("text"), part.get("type", "text")
    if mark and (kind != "text" or not isinstance(text, str)):
        raise TermsError(
            f"only texts can commute; leave {COMMUTES} out of {shortened(kind)} parts."
        )
    if not mark:
        return False
    if part.keys() - {"type", "text"}:
        raise TermsError(f"a text that commutes has a type and a text only, not {sorted(part)}.")
    return True


def _name(scope: Mapping[str, object]) -> bytes:
    return name_of(_text(scope))


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
