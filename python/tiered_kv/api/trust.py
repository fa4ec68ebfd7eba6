"""Whose word counts for what a request says of itself.

What a client says is a wish: whoever runs the server decides from whom objectives and tenants are
taken, and how tight an objective may be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from tiered_kv.api.fields import TermsError
from tiered_kv.api.words import SLO, merged

SLO_SOURCES = ("body", "headers", "none")
TENANT_SOURCES = ("key", "headers", "body")

_OBJECTIVES = ("class", "ttft_ms", "tbt_ms", "task_ms")
_TENANT = "tenant"


@dataclass(frozen=True, slots=True)
class Trust:
    """What is believed of whom; the fields it takes are checked already (`api/parse.py`)."""

    slo_from: str = "body"
    """body: of callers, in bodies and headers; headers: of a gateway; none: of nobody."""
    tenant_from: str = "key"
    """key: the API key is the tenant; headers: of a gateway; body: of callers, headers too."""
    least_ttft_ms: float | None = None
    least_tbt_ms: float | None = None

    def check_headers(self, fields: Mapping[str, object]) -> None:
        """Raise TermsError if headers name objectives that nobody may name."""
        if self.slo_from == "none":
            _refuse_objectives(fields, "this server gives every request the default class")

    def check_body(self, fields: Mapping[str, object]) -> None:
        """Raise TermsError if a body, or its `custom_params`, names objectives that it may not."""
        if self.slo_from == "headers":
            _refuse_objectives(fields, "this server takes it from its gateway's headers only")
        elif self.slo_from == "none":
            _refuse_objectives(fields, "this server gives every request the default class")

    def tenant(self, headers: Mapping[str, str], said: Mapping[str, object]) -> str | None:
        """The tenant of a request with these headers, which name the fields `said`.

        None if it has none, or if that is for its body to say.
        """
        if self.tenant_from == "key":
            return _tenant_of_key(headers)
        return tenant_in(said) if self.tenant_from == "headers" else None

    def laid_over(
        self, whole: Mapping[str, object], own: Mapping[str, object], tenant: str | None
    ) -> dict[str, object]:
        """The fields of a request of `tenant` that says `own`, where around it `whole` was said.

        Its `slo` counts instead of the whole's, but where objectives are not for it to choose: then
        what it may still say is added to them.
        """
        fields = merged(whole, own)
        inner, outer = own.get(SLO), whole.get(SLO)
        if self.slo_from != "body" and isinstance(inner, Mapping) and isinstance(outer, Mapping):
            fields[SLO] = {**outer, **inner}
        return self.believed(fields, tenant)

    def believed(self, fields: Mapping[str, object], tenant: str | None) -> dict[str, object]:
        """`fields` of a request of `tenant` as they count: within limits, and with that tenant."""
        slo = fields.get(SLO)
        slo = dict(slo) if isinstance(slo, Mapping) else {}
        if self.tenant_from != "body":
            slo.pop(_TENANT, None)
        if tenant is not None:
            slo.setdefault(_TENANT, tenant)
        # A task ends no sooner than its first token comes.
        limits = {"ttft_ms": self.least_ttft_ms, "task_ms": self.least_ttft_ms}
        for name, least in {**limits, "tbt_ms": self.least_tbt_ms}.items():
            asked = slo.get(name)
            if least is not None and isinstance(asked, int | float):
                slo[name] = max(asked, least)
        rest = {name: value for name, value in fields.items() if name != SLO}
        return {**rest, SLO: slo} if slo else rest


def _refuse_objectives(fields: Mapping[str, object], why: str) -> None:
    slo = fields.get(SLO)
    for name in _OBJECTIVES:
        if isinstance(slo, Mapping) and slo.get(name) is not None:
            raise TermsError(f"{SLO}.{name} is not for callers to choose: {why}; leave it out.")


def tenant_in(fields: Mapping[str, object]) -> str | None:
    """The tenant that checked fields name, or None."""
    slo = fields.get(SLO)
    tenant = slo.get(_TENANT) if isinstance(slo, Mapping) else None
    return tenant if isinstance(tenant, str) else None


def _tenant_of_key(headers: Mapping[str, str]) -> str | None:
    """A name for the API key that came with a request; the key itself goes nowhere."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        key = headers.get("x-api-key", "")
    key = key.strip()
    return f"key {hashlib.sha256(key.encode()).hexdigest()[:32]}" if key else None
