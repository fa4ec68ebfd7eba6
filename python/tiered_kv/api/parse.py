"""From what a client sent (JSON fields or HTTP headers) to `Terms`, or one sentence why not.

Values arrive from anywhere, so nothing is believed: unknown keys, other types, numbers that are no
numbers and absurd ones are refused, each with the field's name and what is allowed instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from tiered_kv.api.fields import Fields, TermsError, shortened
from tiered_kv.api.hints import NO_HINTS, Hints
from tiered_kv.api.slo import Slo, SloClasses
from tiered_kv.api.terms import Terms
from tiered_kv.api.words import (
    HINTS,
    SLO,
    TOOL_LENGTH_MAX,
    merged,
    said_in_body,
    said_in_header,
)

KEYS = {
    SLO: ("class", "ttft_ms", "tbt_ms", "tpot_ms", "task_ms", "tenant", "report"),
    HINTS: (
        *("expected_output_tokens", "next_call_in_s", "next_call_probability"),
        *("session_id", "parent_session_id", "branches", "session_final", "tool", "priority"),
    ),
}
"""The fields of a request that are ours, and what each takes."""

OUTPUT_TOKENS_MAX = 10_000_000
NEXT_CALL_S_MAX = 7 * 86_400
TENANT_LENGTH_MAX = 64
SESSION_LENGTH_MAX = 512
BRANCHES_MAX = 1024
PRIORITY_MAX = 2**31 - 1

_EXAMPLES = {
    SLO: '{"class": "interactive", "ttft_ms": 500}',
    HINTS: '{"expected_output_tokens": 200}',
}
_MILLISECONDS = ("ttft_ms", "tbt_ms", "tpot_ms", "task_ms")
_TEXTS = ("class", "tenant", "session_id", "parent_session_id", "tool")
_FLAGS = ("report", "session_final")
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def parse_terms(slo: object, hints: object, classes: SloClasses) -> Terms:
    """The terms of a request with these fields, as decoded from JSON; None where one is missing.

    `ttft_ms` and `tbt_ms` override what the class says, or the default class if none is named.
    Raises TermsError.
    """
    if slo is None and hints is None:
        return Terms(classes.default_slo())
    return _terms(_fields_of(SLO, slo), _fields_of(HINTS, hints), classes)


def fields_in(body: Mapping[str, object], classes: SloClasses) -> dict[str, object]:
    """Our fields out of what a request calls so, such as its `custom_params`: checked.

    They are left as they are, but for other names of the same thing. Raises TermsError.
    """
    found = {field: body[field] for field in KEYS if body.get(field) is not None}
    if found:
        parse_terms(found.get(SLO), found.get(HINTS), classes)
    slo = found.get(SLO)
    if isinstance(slo, Mapping) and "tpot_ms" in slo:
        own = {key: value for key, value in slo.items() if key != "tpot_ms"}
        if own.get("tbt_ms") is None:
            own["tbt_ms"] = slo["tpot_ms"]
        found[SLO] = own
    return found


def fields_in_body(body: Mapping[str, object], classes: SloClasses) -> dict[str, object]:
    """The same out of the body of an HTTP request, where others' words count as well."""
    said = said_in_body(body)
    _terms(said[SLO].fields(), said[HINTS].fields(), classes)
    others = {field: one.values for field, one in said.items() if one.values}
    return merged(others, fields_in(body, classes))


def fields_in_headers(headers: Mapping[str, str], classes: SloClasses) -> dict[str, object]:
    """What the headers `x-slo-*` and `x-hints-*` say, in the shape of a body's fields.

    Names of headers are in lower case. Raises TermsError, which names the header.
    """
    sent: dict[str, dict[str, object]] = {field: {} for field in KEYS}
    others: dict[str, dict[str, object]] = {field: {} for field in KEYS}
    names: dict[str, str] = {}
    for header, text in headers.items():
        word = said_in_header(header)
        if word is not None:
            others[word.field][word.key] = _typed(word.key, text.strip())
            names[word.key] = header
            continue
        for field, values in sent.items():
            prefix = _prefix(field)
            if header.startswith(prefix):
                key = header.removeprefix(prefix).replace("-", "_")
                values[key] = _typed(key, text.strip())
    for field, values in sent.items():
        Fields(values, _header_name(field)).refuse_unknown(KEYS[field])
        for key in values:
            names.pop(key, None)
        sent[field] = {**others[field], **values}
    if not any(sent.values()):
        return {}
    slo, hints = (Fields(sent[field], _header_name(field, names)) for field in KEYS)
    _terms(slo, hints, classes)
    return {field: values for field, values in sent.items() if values}


def _prefix(field: str) -> str:
    return f"x-{field}-"


def _header_name(field: str, others: Mapping[str, str] | None = None) -> Callable[[str], str]:
    known = others or {}
    return lambda key: known.get(key) or _prefix(field) + key.replace("_", "-")


def _typed(key: str, text: str) -> object:
    """A header's text as JSON would have the value; the text itself if it would be refused."""
    if key in _FLAGS:
        return _TRUTHS.get(text.lower(), text)
    if key in _TEXTS:
        return text
    try:
        return float(text)
    except ValueError:
        return text


def _fields_of(field: str, value: object) -> Fields:
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise TermsError(
            f"{field} must be an object such as {_EXAMPLES[field]}, not {shortened(value)}."
        )
    fields = Fields(value, lambda key: f"{field}.{key}")
    fields.refuse_unknown(KEYS[field])
    return fields


def _terms(slo: Fields, hints: Fields, classes: SloClasses) -> Terms:
    return Terms(_slo(slo, classes), _hints(hints), _tenant(slo), slo.flag("report"))


def _slo(fields: Fields, classes: SloClasses) -> Slo:
    name = fields.values.get("class")
    if name is None:
        slo = classes.default_slo()
    else:
        found = classes.find(name) if isinstance(name, str) else None
        if found is None:
            raise fields.error("class", f"one of {', '.join(classes.names())}")
        slo = found.slo()
    ttft_s, tbt_s, tpot_s, task_s = map(fields.seconds_of_ms, _MILLISECONDS)
    if ttft_s is not None:
        slo = replace(slo, ttft_s=ttft_s)
    if tbt_s is not None or tpot_s is not None:
        slo = replace(slo, tbt_s=tpot_s if tbt_s is None else tbt_s)
    return slo if task_s is None else replace(slo, task_s=task_s)


def _hints(fields: Fields) -> Hints:
    if not fields.values:
        return NO_HINTS
    probability = fields.between("next_call_probability", 0, 1, "a number")
    return Hints(
        expected_output_tokens=fields.whole("expected_output_tokens", 1, OUTPUT_TOKENS_MAX),
        next_call_in_s=fields.between("next_call_in_s", 0, NEXT_CALL_S_MAX, "a number of seconds"),
        next_call_probability=(
            NO_HINTS.next_call_probability if probability is None else probability
        ),
        session_id=_name(fields, "session_id", SESSION_LENGTH_MAX),
        parent_session_id=_name(fields, "parent_session_id", SESSION_LENGTH_MAX),
        branches=fields.whole("branches", 1, BRANCHES_MAX) or NO_HINTS.branches,
        session_final=fields.flag("session_final"),
        tool=_name(fields, "tool", TOOL_LENGTH_MAX),
        priority=fields.whole("priority", -PRIORITY_MAX - 1, PRIORITY_MAX),
    )


def _tenant(fields: Fields) -> str:
    return _name(fields, "tenant", TENANT_LENGTH_MAX) or ""


def _name(fields: Fields, key: str, longest: int) -> str | None:
    name = fields.values.get(key)
    if name is not None and (not isinstance(name, str) or not 0 < len(name) <= longest):
        raise fields.error(key, f"a name of 1 to {longest} characters")
    return name
