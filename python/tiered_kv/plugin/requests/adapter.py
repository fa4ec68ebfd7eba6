"""Brings what a caller asked for (`api/`) from wherever it was said to the scheduler's `Req`.

`sampling_params.custom_params` is what SGLang carries from every front end to the scheduler as it
is, so `slo` and `hints` travel in there. `TokenizerManager.generate_request` is where every front
end comes together: there they are checked, before anything is queued, and what was said elsewhere
(body fields, headers) is put in. In the scheduler they leave `custom_params` again and become
`req.tiered_kv_terms`, because custom logit processors read what remains.
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from tiered_kv.api.fields import TermsError
from tiered_kv.api.parse import KEYS, fields_in, fields_in_body, fields_in_headers, parse_terms
from tiered_kv.api.report import RequestReport
from tiered_kv.api.slo import SloClasses
from tiered_kv.api.trust import Trust, tenant_in
from tiered_kv.api.words import HINTS, SLO, merged
from tiered_kv.plugin.requests import guard, salts, spans
from tiered_kv.plugin.requests import reports as request_reports

logger = logging.getLogger(__name__)

SCOPE_KEY = "tiered_kv"
"""Under which the fields of an HTTP request's body and headers wait in its ASGI scope."""

RECEIVED_KEY = "tiered_kv_received_s"
"""Under which the time waits there at which the server had read the body."""

AHEAD_KEY = "tiered_kv_ahead"
"""There in the scope of a request that nobody waits for."""

CUSTOM_PARAMS = "custom_params"
_REQ_KEY = "__req__"
"""SGLang adds the request itself to `custom_params` in the scheduler."""

#: The scheduler's table; None in a process that has no scheduler of ours.
_classes: SloClasses | None = None


def classes_of(server_args: Any) -> SloClasses | None:
    """The server's table of classes, or None if it runs without `--tiered-kv`."""
    if not getattr(server_args, "tiered_kv", False):
        return None
    classes: SloClasses = server_args.slo_classes()
    return classes


# -- HTTP: body and headers ----------------------------------------------------------------------


def fields_of_http(
    body: object, headers: Mapping[str, str], classes: SloClasses, trust: Trust
) -> dict[str, object]:
    """Our fields of an HTTP request, as far as the server believes them.

    Checks `custom_params` as well, wherever a route takes them. Raises TermsError.
    """
    said = fields_in_headers(headers, classes)
    trust.check_headers(said)
    own: dict[str, object] = {}
    if isinstance(body, Mapping):
        own = fields_in_body(body, classes)
        sampling = body.get("sampling_params")
        for holder in (body, *(sampling if isinstance(sampling, list) else (sampling,))):
            custom = _custom_params(holder)
            if custom is not None:
                trust.check_body(fields_in(custom, classes))
    trust.check_body(own)
    return trust.laid_over(said, own, trust.tenant(headers, said))


def _custom_params(holder: object) -> Mapping[str, Any] | None:
    """Those of a body or of `sampling_params`. Raises TermsError."""
    custom = holder.get(CUSTOM_PARAMS) if isinstance(holder, Mapping) else None
    if custom is not None and not isinstance(custom, Mapping):
        raise TermsError(f"custom_params must be an object, not {str(custom)[:60]}.")
    return custom


def without_hurry(fields: Mapping[str, object], classes: SloClasses) -> dict[str, object]:
    """`fields` of a request that nobody waits for, and that is no call of a session."""
    tenant, least = tenant_in(fields), classes.least_urgent()
    slo = {"class": least} if least is not None else {}
    return {SLO: slo | ({"tenant": tenant} if tenant is not None else {})}


async def check_http_request(original: Callable[..., Any], request: Any) -> Any:
    """AROUND `ORJSONRequest.json`, which FastAPI calls for every JSON body before the route runs.

    The one place where a bad value can still be an HTTP 400 when the answer is to be streamed.
    """
    body = await original(request)
    from fastapi import HTTPException
    from sglang.srt.entrypoints.http_server import get_global_state

    state = get_global_state()
    classes = None if state is None else classes_of(state.tokenizer_manager.server_args)
    if classes is not None and SCOPE_KEY not in request.scope:
        request.scope[RECEIVED_KEY] = time.perf_counter()
        try:
            guard.refuse_internal_fields(body)
            trust = state.tokenizer_manager.server_args.trust()
            fields = fields_of_http(body, request.headers, classes, trust)
            is_ahead = request.scope.get(AHEAD_KEY, False)
            request.scope[SCOPE_KEY] = without_hurry(fields, classes) if is_ahead else fields
            request.scope[salts.SCOPE_KEY] = salts.key_of_body(body)
            salts.forget_unknown(body)
            spans.put_in_order(body, request.scope, request.scope[SCOPE_KEY])
        except ValueError as error:
            raise HTTPException(status_code=400, detail=str(error)) from None
    return body


# -- all front ends ------------------------------------------------------------------------------


def lift_fields(
    original: Callable[..., Any], manager: Any, obj: Any, request: Any = None
) -> AsyncGenerator[Any, None]:
    """AROUND `TokenizerManager.generate_request`. Raises TermsError (a ValueError)."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    classes = classes_of(manager.server_args)
    if classes is None or not isinstance(obj, GenerateReqInput):
        return original(manager, obj, request)
    # What a client says about it would put its requests before everybody else's.
    scope = getattr(request, "scope", None) or {}
    obj.received_time = scope.get(RECEIVED_KEY) or time.perf_counter()
    trust = manager.server_args.trust()
    sent = _fields_sent_with(request, classes, trust)
    salts.put_key(obj, request)
    # In a stream, what is no ValueError would end the connection.
    obj.sampling_params = guard.read_client(
        place,
        obj.sampling_params,
        _with_session(obj, sent, classes),
        classes,
        manager.preferred_sampling_params,
        None if sent is None else trust,
    )
    answers = original(manager, obj, request)
    if not asks_report(obj, request):
        return answers
    return request_reports.unfold(answers, obj, scope.get(spans.SCOPE_KEY))


def place(
    sampling: Any,
    sent: Mapping[str, object] | None,
    classes: SloClasses,
    preferred: Mapping[str, Any] | None,
    trust: Trust | None = None,
) -> Any:
    """`sampling` with `sent` among the `custom_params`, where fields it has itself count instead.

    It is what a client gives as `sampling_params`: None, a mapping, or a list of them for a batch.
    `preferred` are the server's for requests that give none: `custom_params` replace theirs whole.
    trust: how far the request's own fields count; None for a caller within this process. Raises
    TermsError.
    """
    if isinstance(sampling, list):
        return [place(one, sent, classes, preferred, trust) for one in sampling]
    own = _custom_params(sampling)
    fields = fields_in(own, classes) if own is not None else {}
    sent = sent or {}
    if trust is not None:
        fields = trust.laid_over(sent, fields, tenant_in(sent))
    else:
        said, fields = fields, merged(sent, fields)
        if fields == said:
            return sampling
    if trust is not None and not fields and not _names_ours(own):
        return sampling
    if own is None and preferred:
        own = preferred.get(CUSTOM_PARAMS)
    rest = {key: value for key, value in (own or {}).items() if key not in KEYS}
    return {**(sampling or {}), CUSTOM_PARAMS: {**rest, **fields}}


def _with_session(
    obj: Any, sent: Mapping[str, object] | None, classes: SloClasses
) -> Mapping[str, object] | None:
    """`sent`, and the session that SGLang's own field names. Raises TermsError."""
    session_id = getattr(obj, "session_id", None)
    if session_id is None:
        return sent
    return merged(fields_in({HINTS: {"session_id": session_id}}, classes), sent or {})


def _names_ours(custom: object) -> bool:
    return isinstance(custom, Mapping) and not KEYS.keys().isdisjoint(custom)


def asks_report(obj: Any, request: Any) -> bool:
    """Whether a `GenerateReqInput` asks for a report, or has texts whose order is told in one."""
    scope = getattr(request, "scope", None) or {}
    if spans.SCOPE_KEY in scope:
        return True
    slo = (scope.get(SCOPE_KEY) or {}).get(SLO)
    sampling = obj.sampling_params
    items = sampling if isinstance(sampling, list) else [sampling]
    return (isinstance(slo, Mapping) and slo.get("report") is True) or any(map(_asks_report, items))


def _asks_report(sampling: Any) -> bool:
    custom = sampling.get(CUSTOM_PARAMS) if isinstance(sampling, Mapping) else None
    slo = custom.get(SLO) if isinstance(custom, Mapping) else None
    return isinstance(slo, Mapping) and slo.get("report") is True


def _fields_sent_with(request: Any, classes: SloClasses, trust: Trust) -> dict[str, object] | None:
    """What came with the HTTP request around a generation; None without one."""
    scope = getattr(request, "scope", None)
    if not isinstance(scope, dict):
        return None
    if SCOPE_KEY not in scope:  # a body that is no JSON, such as a form
        scope[SCOPE_KEY] = fields_of_http(None, request.headers, classes, trust)
    fields: dict[str, object] = scope[SCOPE_KEY]
    return fields


def take_engine_fields(
    original: Callable[..., Any],
    engine: Any,
    *args: Any,
    slo: object = None,
    hints: object = None,
    **kwargs: Any,
) -> Any:
    """AROUND `Engine.generate` and `Engine.async_generate`: they take `slo=` and `hints=`."""
    sent = {field: value for field, value in ((SLO, slo), (HINTS, hints)) if value is not None}
    if not sent:
        return original(engine, *args, **kwargs)
    classes = classes_of(engine.server_args)
    if classes is None:
        return original(engine, *args, **kwargs, **sent)  # SGLang's TypeError
    fields_in(sent, classes)
    bound = inspect.signature(original).bind(engine, *args, **kwargs)
    sampling = bound.arguments.get("sampling_params")
    preferred = engine.tokenizer_manager.preferred_sampling_params
    bound.arguments["sampling_params"] = place(sampling, sent, classes, preferred)
    return original(*bound.args, **bound.kwargs)


# -- the scheduler -------------------------------------------------------------------------------


def learn_classes(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.__init__`."""
    global _classes
    _classes = classes_of(scheduler.server_args)


def attach_terms(result: None, req: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Req.__init__`: sets `tiered_kv_terms` and, if it was asked for, `tiered_kv_report`."""
    if _classes is None or hasattr(req, "tiered_kv_terms"):
        return  # another server's, or read already: the fields are gone from where they came
    custom = req.sampling_params.custom_params
    slo = hints = None
    if isinstance(custom, dict) and (SLO in custom or HINTS in custom):
        slo, hints = custom.get(SLO), custom.get(HINTS)
        rest = {key: value for key, value in custom.items() if key not in (SLO, HINTS)}
        # Not every release of SGLang gives each request parameters of its own.
        req.sampling_params = copy.copy(req.sampling_params)
        req.sampling_params.custom_params = rest if rest.keys() - {_REQ_KEY} else None
    try:
        terms = parse_terms(slo, hints, _classes)
    except TermsError as error:
        # Front ends outside Python do not pass through `lift_fields`.
        logger.warning("Tiered KV: request %s gets the default class: %s", req.rid, error)
        terms = parse_terms(None, None, _classes)
    req.tiered_kv_terms = terms
    req.tiered_kv_report = RequestReport(terms.slo, hints=terms.hints) if terms.report else None
    if terms.report:
        request_reports.expect(req)
