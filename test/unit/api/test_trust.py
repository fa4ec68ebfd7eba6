"""Whose word counts: what bodies, headers and keys say under each choice of an operator's."""

from __future__ import annotations

from typing import Any

import pytest

from tiered_kv.api.fields import TermsError
from tiered_kv.api.trust import Trust

KEY = {"authorization": "Bearer sk-1"}


def tenants(trust: Trust, headers: dict[str, str], said: Any, own: Any) -> Any:
    return trust.laid_over(said, own, trust.tenant(headers, said)).get("slo", {}).get("tenant")


@pytest.mark.parametrize(
    ("source", "in_header", "in_body", "tenant"),
    [
        ("key", None, None, None),
        ("key", "h", "b", None),
        ("headers", "h", "b", "h"),
        ("headers", None, "b", None),
        ("body", "h", "b", "b"),
        ("body", "h", None, "h"),
    ],
)
def test_the_tenant_without_a_key(
    source: str, in_header: str | None, in_body: str | None, tenant: str | None
) -> None:
    said = {"slo": {"tenant": in_header}} if in_header else {}
    own = {"slo": {"tenant": in_body}} if in_body else {}
    assert tenants(Trust(tenant_from=source), {}, said, own) == tenant


def test_a_key_is_a_tenant_and_is_not_shown() -> None:
    trust = Trust()
    one = tenants(trust, KEY, {}, {"slo": {"tenant": "forged"}})
    assert one.startswith("key ")
    assert "sk-1" not in one
    assert one == tenants(trust, {"x-api-key": "sk-1"}, {}, {})
    assert one != tenants(trust, {"authorization": "Bearer sk-2"}, {}, {})
    assert tenants(trust, {"authorization": "Basic abc"}, {}, {}) is None
    assert tenants(trust, {"authorization": "Bearer "}, {}, {}) is None


@pytest.mark.parametrize("source", ["headers", "none"])
@pytest.mark.parametrize("asked", [{"class": "batch"}, {"ttft_ms": 5}, {"tbt_ms": 5}])
def test_objectives_that_are_not_for_callers(source: str, asked: dict[str, Any]) -> None:
    trust = Trust(slo_from=source)
    with pytest.raises(TermsError, match=rf"slo\.{next(iter(asked))} is not for callers to choose"):
        trust.check_body({"slo": asked})
    trust.check_body({"slo": {"report": True, "tenant": "a"}, "hints": {}})
    Trust().check_body({"slo": asked})


def test_headers_count_unless_nobody_does() -> None:
    said = {"slo": {"class": "interactive"}}
    Trust(slo_from="headers").check_headers(said)
    with pytest.raises(TermsError, match="every request the default class"):
        Trust(slo_from="none").check_headers(said)


def test_a_body_cannot_put_a_gateways_headers_out_of_force() -> None:
    trust = Trust(slo_from="headers", tenant_from="headers")
    said = {"slo": {"class": "batch", "tenant": "a"}}
    for own in ({}, {"slo": {}}, {"slo": {"report": True}}, {"slo": {"tenant": "b"}}):
        slo = trust.laid_over(said, own, trust.tenant({}, said))["slo"]
        assert slo["class"] == "batch"
        assert slo["tenant"] == "a"
        assert slo.get("report") == own.get("slo", {}).get("report")


def test_of_a_caller_the_most_specific_counts_as_a_whole() -> None:
    said = {"slo": {"class": "batch"}, "hints": {"next_call_in_s": 1}}
    own = {"slo": {"ttft_ms": 5}}
    assert Trust().laid_over(said, own, None) == {"slo": {"ttft_ms": 5}, "hints": said["hints"]}


def test_the_least_objective() -> None:
    trust = Trust(least_ttft_ms=100, least_tbt_ms=20)
    asked = {"slo": {"ttft_ms": 1, "tbt_ms": 50.5, "class": "interactive"}}
    assert trust.believed(asked, None)["slo"] == {
        "ttft_ms": 100,
        "tbt_ms": 50.5,
        "class": "interactive",
    }
    assert Trust().believed(asked, None) == asked
