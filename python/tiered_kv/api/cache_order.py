"""An administrator's order about the KV of a prompt or a session: from JSON, or one sentence why
not.

The words are those of the API: `text`, `messages` and `token_ids` as prompts, `session_id` (or
another word for it, `api/words.py`), `lora_path`, `cache_salt`, `extra_key`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tiered_kv.api.fields import Fields, TermsError, shortened
from tiered_kv.api.parse import SESSION_LENGTH_MAX, TENANT_LENGTH_MAX
from tiered_kv.api.words import BODY_WORDS

TIERS = {
    "inspect": (),
    "prefetch": ("host", "device"),
    "keep": ("host", "disk"),
    "demote": ("disk", "host"),
    "drop": (),
}
"""Actions, and the tiers that each can name; the first counts if it names none."""

PROMPTS = ("text", "messages", "token_ids")
SESSION = "session_id"
_SESSION_WORDS = tuple(
    word.path[0] for word in BODY_WORDS if word.key == SESSION and len(word.path) == 1
)
_OF_MESSAGES = ("tools", "chat_template_kwargs")
_TREE = ("lora_path", "cache_salt", "extra_key")
KNOWN = (
    *("action", *PROMPTS, *_OF_MESSAGES),
    *(SESSION, *(word for word in _SESSION_WORDS if word != SESSION)),
    *(*_TREE, "tenant", "tier", "seconds"),
)

MESSAGES_MAX = 10_000
TEXT_MAX = 8 << 20
NAME_MAX = 4096
TOKEN_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class CacheOrder:
    """One prompt, in one of three ways, or a session; tier: of `TIERS[action]`, if it has any."""

    action: str
    text: str | None = None
    messages: list[Any] | None = None
    token_ids: list[int] | None = None
    session_id: str | None = None
    chat: dict[str, Any] = field(default_factory=dict)
    """What else the chat template is given."""
    lora_path: str | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    tenant: str | None = None
    tier: str | None = None
    seconds: float = 0.0


def parse_order(body: object, *, most_seconds: float, most_tokens: int) -> CacheOrder:
    """The order that a decoded body is. Raises TermsError.

    most_seconds: that something can be kept. most_tokens: that a prompt of the server can have.
    """
    if not isinstance(body, Mapping):
        raise TermsError(
            'The body must be an object such as {"action": "inspect", "text": "..."}, '
            f"not {shortened(body)}."
        )
    fields = Fields(body, str)
    fields.refuse_unknown(KNOWN)
    action = body.get("action")
    if not isinstance(action, str) or action not in TIERS:
        raise TermsError(f"action must be one of {', '.join(TIERS)}, not {shortened(action)}.")
    order = CacheOrder(
        action,
        text=_text(fields, "text", TEXT_MAX),
        messages=_messages(fields),
        token_ids=_token_ids(fields, most_tokens),
        session_id=_session(fields),
        chat={key: body[key] for key in _OF_MESSAGES if body.get(key) is not None},
        lora_path=_text(fields, "lora_path", NAME_MAX),
        cache_salt=_text(fields, "cache_salt", NAME_MAX),
        extra_key=_text(fields, "extra_key", NAME_MAX),
        tenant=_text(fields, "tenant", TENANT_LENGTH_MAX),
        tier=_tier(fields, action),
        seconds=_seconds(fields, action, most_seconds),
    )
    _check_subject(order)
    return order


def _check_subject(order: CacheOrder) -> None:
    given = [name for name in (*PROMPTS, SESSION) if getattr(order, name) is not None]
    if len(given) != 1:
        raise TermsError(
            f"Give exactly one of {', '.join((*PROMPTS, SESSION))}: what the order is about; "
            f"{' and '.join(given) or 'none'} came."
        )
    if order.chat and order.messages is None:
        raise TermsError(f"{next(iter(order.chat))} goes with messages; leave it out.")
    for name in _TREE:
        if order.session_id is not None and getattr(order, name) is not None:
            raise TermsError(
                f"{name} goes with a prompt, and a session knows its own; leave it out."
            )


def _text(fields: Fields, key: str, longest: int) -> str | None:
    value = fields.values.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise fields.error(key, f"a text of 1 to {longest} characters")
    return value


def _messages(fields: Fields) -> list[Any] | None:
    value = fields.values.get("messages")
    if value is None:
        return None
    if not isinstance(value, list) or not 0 < len(value) <= MESSAGES_MAX:
        raise fields.error("messages", f"a list of 1 to {MESSAGES_MAX} messages")
    return value


def _token_ids(fields: Fields, longest: int) -> list[int] | None:
    value = fields.values.get("token_ids")
    if value is None:
        return None
    if not isinstance(value, list) or not 0 < len(value) <= longest:
        raise fields.error("token_ids", f"a list of 1 to {longest} token ids")
    for one in value:
        if type(one) is not int or not 0 <= one <= TOKEN_MAX:
            raise TermsError(
                f"token_ids must be whole numbers from 0 to {TOKEN_MAX}; {shortened(one)} is none."
            )
    return value


def _session(fields: Fields) -> str | None:
    given = [key for key in _SESSION_WORDS if fields.values.get(key) is not None]
    if len(given) > 1:
        raise TermsError(f"{' and '.join(given)} name the same thing; give one of them.")
    return _text(fields, given[0], SESSION_LENGTH_MAX) if given else None


def _tier(fields: Fields, action: str) -> str | None:
    allowed: Sequence[str] = TIERS[action]
    value = fields.values.get("tier")
    if value is None:
        return allowed[0] if allowed else None
    if not allowed:
        raise TermsError(f"tier does not go with {action}; leave it out.")
    if not isinstance(value, str) or value not in allowed:
        raise fields.error("tier", f"one of {', '.join(allowed)} for {action}")
    return value


def _seconds(fields: Fields, action: str, most: float) -> float:
    if action != "keep":
        if fields.values.get("seconds") is not None:
            raise TermsError(f"seconds does not go with {action}; leave it out.")
        return 0.0
    if not most:
        raise TermsError("This server keeps nothing on order (--tiered-kv-keep-seconds is 0).")
    value = fields.between("seconds", 0, most, "a number of seconds (0: keep it no longer)")
    if value is None:
        raise TermsError(f"keep wants seconds, from 0 (keep it no longer) to {most:g}.")
    return value


def merged(outcomes: Sequence[Mapping[str, Any]], *, is_session: bool) -> dict[str, Any]:
    """What the replicas of a server did, as one: tokens of all together.

    Each has the same prompt, unless it was about a session.
    """
    found: dict[str, Any] = {"replicas": len(outcomes)}
    for name in outcomes[0]:
        values = [outcome[name] for outcome in outcomes]
        if name == "kept":
            found[name] = _kept(values)
        elif isinstance(values[0], Mapping):
            found[name] = {key: sum(value[key] for value in values) for key in values[0]}
        elif name.startswith("next_use"):
            soonest = min(outcomes, key=lambda o: (o["next_use_s"] is None, o["next_use_s"] or 0.0))
            found[name] = soonest[name]
        elif name == "ends_in_s" or (name in ("prompts", "tokens") and not is_session):
            found[name] = max(values)
        else:
            found[name] = sum(values)
    return found


def _kept(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for value in values:
        for tier, one in value.items():
            known = kept.setdefault(tier, {"tokens": 0, "ends_in_s": 0.0})
            known["tokens"] += one["tokens"]
            known["ends_in_s"] = max(known["ends_in_s"], one["ends_in_s"])
    return kept
