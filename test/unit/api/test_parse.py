"""What a client may send, and the sentence it gets for everything else.

Guarantee: any JSON value whatever becomes terms whose numbers are in range, or a TermsError.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.api.fields import TermsError
from tiered_kv.api.hints import NO_HINTS, Hints
from tiered_kv.api.parse import KEYS, fields_in, fields_in_headers, parse_terms
from tiered_kv.api.slo import DEFAULT_CLASSES, NO_SLO, Slo, SloClass, SloClasses
from tiered_kv.api.terms import Terms

CLASSES = DEFAULT_CLASSES
PROMISED_NOTHING = SloClasses(default=None)


def terms(slo: object = None, hints: object = None) -> Terms:
    return parse_terms(slo, hints, CLASSES)


def test_nothing_asked_is_the_default_class() -> None:
    assert terms() == Terms(Slo("standard", 2.0, 0.1))
    assert terms({}, {}) == terms()
    assert parse_terms(None, None, PROMISED_NOTHING) == Terms(NO_SLO)


def test_a_class() -> None:
    assert terms({"class": "batch"}).slo == Slo("batch", 30.0, None)


def test_objectives_override_the_class() -> None:
    assert terms({"class": "interactive", "ttft_ms": 250}).slo == Slo("interactive", 0.25, 0.05)
    assert terms({"class": "batch", "tbt_ms": 1.5}).slo == Slo("batch", 30.0, 0.0015)
    assert terms({"ttft_ms": 900, "tbt_ms": 90}).slo == Slo("standard", 0.9, 0.09)


def test_tpot_is_tbt() -> None:
    assert terms({"tpot_ms": 90}).slo == terms({"tbt_ms": 90}).slo
    assert terms({"tpot_ms": 90, "tbt_ms": 80}).slo.tbt_s == 0.08
    assert fields_in({"slo": {"class": "batch", "tpot_ms": 90}}, CLASSES) == {
        "slo": {"class": "batch", "tbt_ms": 90}
    }


def test_a_task() -> None:
    assert terms({"class": "batch", "task_ms": 90_000}).slo == Slo("batch", 30.0, task_s=90.0)
    classes = SloClasses((SloClass("agent", task_s=60.0),), "agent")
    assert parse_terms(None, None, classes).slo == Slo("agent", task_s=60.0)


def test_a_session() -> None:
    said = {"session_id": "a", "parent_session_id": "b", "session_final": True, "priority": -3}
    found = terms(None, said).hints
    assert found == Hints(session_id="a", parent_session_id="b", session_final=True, priority=-3)


def test_the_bound_on_waiting_comes_from_the_class() -> None:
    classes = SloClasses((SloClass("patient", max_wait_s=60.0),), "patient")
    assert parse_terms({"ttft_ms": 500}, None, classes).slo == Slo("patient", 0.5, None, 60.0)


def test_null_is_not_given() -> None:
    assert terms({"class": None, "ttft_ms": None, "tenant": None, "report": None}) == terms()
    assert terms(None, {"next_call_in_s": None}).hints == NO_HINTS


def test_hints() -> None:
    assert terms(None, {"expected_output_tokens": 200}).hints == Hints(200)
    assert terms(None, {"next_call_in_s": 2.5, "next_call_probability": 0.25}).hints == Hints(
        None, 2.5, 0.25
    )
    assert terms(None, {"next_call_probability": 0}).hints.next_call_probability == 0.0


def test_tenant_and_report() -> None:
    asked = terms({"tenant": "team-a", "report": True})
    assert (asked.tenant, asked.report) == ("team-a", True)
    assert (terms().tenant, terms().report) == ("", False)


NAME = "a name of 1 to 512 characters"
MS = "a number of milliseconds above 0, at most 86400000"
SLO_KEYS = ", ".join(f"slo.{key}" for key in KEYS["slo"])
SLO_EXAMPLE = '{"class": "interactive", "ttft_ms": 500}'
HINTS_KEYS = ", ".join(f"hints.{key}" for key in KEYS["hints"])
HINTS_HEADERS = ", ".join(f"x-hints-{key.replace('_', '-')}" for key in KEYS["hints"])
REFUSED: list[tuple[object, object, str]] = [
    ({"ttft_ms": -1}, None, f"slo.ttft_ms must be {MS}, not -1."),
    ({"ttft_ms": 0}, None, f"slo.ttft_ms must be {MS}, not 0."),
    ({"ttft_ms": "500"}, None, f"slo.ttft_ms must be {MS}, not '500'."),
    ({"ttft_ms": True}, None, f"slo.ttft_ms must be {MS}, not True."),
    ({"tbt_ms": math.nan}, None, f"slo.tbt_ms must be {MS}, not nan."),
    ({"tbt_ms": math.inf}, None, f"slo.tbt_ms must be {MS}, not inf."),
    ({"tbt_ms": 86_400_001}, None, f"slo.tbt_ms must be {MS}, not 86400001."),
    ({"tbt_ms": [50]}, None, f"slo.tbt_ms must be {MS}, not [50]."),
    (
        {"class": "gold"},
        None,
        "slo.class must be one of interactive, standard, batch, not 'gold'.",
    ),
    ({"class": 3}, None, "slo.class must be one of interactive, standard, batch, not 3."),
    ({"tenant": ""}, None, "slo.tenant must be a name of 1 to 64 characters, not ''."),
    ({"tenant": 7}, None, "slo.tenant must be a name of 1 to 64 characters, not 7."),
    ({"report": 1}, None, "slo.report must be true or false, not 1."),
    (
        {"ttft": 500},
        None,
        f"slo.ttft is not known; the known ones are: {SLO_KEYS}.",
    ),
    (
        "interactive",
        None,
        f"slo must be an object such as {SLO_EXAMPLE}, not 'interactive'.",
    ),
    ([], None, f"slo must be an object such as {SLO_EXAMPLE}, not []."),
    (None, 5, 'hints must be an object such as {"expected_output_tokens": 200}, not 5.'),
    (
        None,
        {"expected_output_tokens": 0},
        "hints.expected_output_tokens must be a whole number from 1 to 10000000, not 0.",
    ),
    (
        None,
        {"expected_output_tokens": 1.5},
        "hints.expected_output_tokens must be a whole number from 1 to 10000000, not 1.5.",
    ),
    (
        None,
        {"next_call_in_s": -0.1},
        "hints.next_call_in_s must be a number of seconds from 0 to 604800, not -0.1.",
    ),
    (
        None,
        {"next_call_probability": 1.1},
        "hints.next_call_probability must be a number from 0 to 1, not 1.1.",
    ),
    (None, {"session_id": ""}, f"hints.session_id must be {NAME}, not ''."),
    (None, {"session_id": 7}, f"hints.session_id must be {NAME}, not 7."),
    (
        None,
        {"turns": 3},
        f"hints.turns is not known; the known ones are: {HINTS_KEYS}.",
    ),
]


@pytest.mark.parametrize(("slo", "hints", "sentence"), REFUSED)
def test_refused(slo: object, hints: object, sentence: str) -> None:
    with pytest.raises(TermsError) as error:
        terms(slo, hints)
    assert str(error.value) == sentence


def test_a_refusal_is_short_whatever_was_sent() -> None:
    for value in ("x" * 10_000, 10**400, ["x"] * 10_000, {"x" * 10_000: 1}):
        with pytest.raises(TermsError) as error:
            terms({"class": value})
        assert len(str(error.value)) < 300
    with pytest.raises(TermsError) as error:
        terms({"x" * 10_000: 1})
    assert len(str(error.value)) < 300


def test_fields_of_a_body() -> None:
    body: dict[str, object] = {"model": "m", "slo": {"class": "batch"}, "hints": None}
    assert fields_in(body, CLASSES) == {"slo": {"class": "batch"}}
    assert fields_in({"model": "m"}, CLASSES) == {}
    with pytest.raises(TermsError, match=r"hints\.turns"):
        fields_in({"hints": {"turns": 1}}, CLASSES)


# -- headers -----------------------------------------------------------------------------------


def test_headers() -> None:
    headers = {
        "content-type": "application/json",
        "x-slo-class": "interactive",
        "x-slo-ttft-ms": "1",
        "x-slo-tenant": "1",
        "x-slo-report": "True",
        "x-hints-expected-output-tokens": "120",
        "x-hints-next-call-in-s": "3.5",
    }
    found = fields_in_headers(headers, CLASSES)
    assert parse_terms(found["slo"], found["hints"], CLASSES) == Terms(
        Slo("interactive", 0.001, 0.05), Hints(120, 3.5), "1", True
    )


def test_other_headers_say_nothing() -> None:
    assert fields_in_headers({"x-request-id": "7", "slo": "x"}, CLASSES) == {}
    assert fields_in_headers({"x-slo-class": "batch"}, CLASSES) == {"slo": {"class": "batch"}}


@pytest.mark.parametrize(
    ("header", "value", "sentence"),
    [
        ("x-slo-ttft-ms", "soon", f"x-slo-ttft-ms must be {MS}, not 'soon'."),
        ("x-slo-ttft-ms", "nan", f"x-slo-ttft-ms must be {MS}, not nan."),
        ("x-slo-ttft-ms", "true", f"x-slo-ttft-ms must be {MS}, not 'true'."),
        ("x-slo-report", "maybe", "x-slo-report must be true or false, not 'maybe'."),
        (
            "x-slo-class",
            "gold",
            "x-slo-class must be one of interactive, standard, batch, not 'gold'.",
        ),
        (
            "x-hints-turns",
            "3",
            f"x-hints-turns is not known; the known ones are: {HINTS_HEADERS}.",
        ),
    ],
)
def test_refused_headers(header: str, value: str, sentence: str) -> None:
    with pytest.raises(TermsError) as error:
        fields_in_headers({header: value}, CLASSES)
    assert str(error.value) == sentence


# -- anything ----------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)


def mappings(field: str) -> st.SearchStrategy[Any]:
    return st.dictionaries(st.sampled_from(KEYS[field]), JSON) | JSON


@given(mappings("slo"), mappings("hints"))
def test_anything_is_understood_or_refused(slo: object, hints: object) -> None:
    try:
        found = terms(slo, hints)
    except TermsError:
        return
    for seconds in (found.slo.ttft_s, found.slo.tbt_s):
        assert seconds is None or 0 < seconds <= 86_400
    assert found.slo.slo_class in CLASSES.names()
    tokens = found.hints.expected_output_tokens
    assert tokens is None or (isinstance(tokens, int) and tokens >= 1)
    assert 0 <= found.hints.next_call_probability <= 1


@given(st.dictionaries(st.sampled_from([f"x-{f}-{k}" for f in KEYS for k in KEYS[f]]), st.text()))
def test_any_header_is_understood_or_refused(headers: dict[str, str]) -> None:
    try:
        found = fields_in_headers(
            {name.replace("_", "-"): text for name, text in headers.items()}, CLASSES
        )
    except TermsError:
        return
    parse_terms(found.get("slo"), found.get("hints"), CLASSES)
