"""Texts that commute (`api/spans.py`): put in order where a body has been read and not yet checked.

What was sent before is remembered in each process that serves HTTP; with several of them
(`--tokenizer-worker-num`) each knows its own share.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from tiered_kv.api import spans
from tiered_kv.api.span_orders import SpanOrders
from tiered_kv.api.trust import tenant_in
from tiered_kv.plugin.requests import salts

SCOPE_KEY = "tiered_kv_span_order"
"""Under which the orders that were chosen wait in an HTTP request's ASGI scope."""

_orders = SpanOrders()


def put_in_order(body: Any, http: MutableMapping[str, Any], fields: Mapping[str, object]) -> None:
    """Puts what commutes in `body` in order, in place. http: the request's scope, with the key of
    its KV. fields: what it says of itself, as far as it is believed. Raises TermsError."""
    if not isinstance(body, dict):
        return
    # All that keeps KV apart: what others sent is not to be seen in an order either.
    scope = {
        "tenant": tenant_in(fields),
        "key": http[salts.SCOPE_KEY],
        **{name: body.get(name) for name in ("model", "lora_path")},
    }
    found = spans.put_in_order(body, http.get("path", ""), scope, _orders)
    if found is not None:
        http[SCOPE_KEY] = found
