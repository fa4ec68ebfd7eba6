"""What the scheduler's `Req` has of an slo, and what custom logit processors see of it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("sglang")

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from tiered_kv.api.hints import Hints
from tiered_kv.api.slo import DEFAULT_CLASSES, Slo
from tiered_kv.api.terms import Terms
from tiered_kv.api.trust import Trust
from tiered_kv.plugin.requests import adapter as request_adapter
from tiered_kv.plugin.requests import reports as request_reports

ON = SimpleNamespace(tiered_kv=True, slo_classes=lambda: DEFAULT_CLASSES, trust=Trust)
OFF = SimpleNamespace(tiered_kv=False)
SLO = {"class": "interactive"}
HINTS = {"expected_output_tokens": 8}


@pytest.fixture
def scheduler() -> Iterator[None]:
    """Makes this process the scheduler of a server of ours."""
    request_adapter.learn_classes(None, SimpleNamespace(server_args=ON))
    yield
    request_adapter.learn_classes(None, SimpleNamespace(server_args=OFF))


def made(custom_params: Any, rid: str = "r") -> Any:
    sampling = SamplingParams(custom_params=custom_params)
    # With a processor every release puts the request itself among the parameters.
    req = Req(rid, "", array("q", [1, 2]), sampling, custom_logit_processor="some processor")
    request_adapter.attach_terms(None, req)
    assert sampling.custom_params == custom_params, "what others may hold was changed"
    return req


@pytest.mark.usefixtures("scheduler")
def test_a_req_gets_its_terms() -> None:
    req = made({"slo": {"class": "interactive", "tenant": "a"}, "hints": HINTS})
    assert req.tiered_kv_terms == Terms(Slo("interactive", 0.5, 0.05), Hints(8), "a")
    assert req.tiered_kv_report is None
    assert made(None).tiered_kv_terms == Terms(Slo("standard", 2.0, 0.1))
    request_adapter.attach_terms(None, req)
    assert req.tiered_kv_terms.tenant == "a", "terms are read once"


@pytest.mark.usefixtures("scheduler")
def test_a_report_is_made_for_those_who_ask() -> None:
    req = made({"slo": {"report": True}}, rid="asks")
    assert req.tiered_kv_report.slo == req.tiered_kv_terms.slo
    assert request_reports._expected["asks"] is req


@pytest.mark.usefixtures("scheduler")
def test_logit_processors_see_custom_params_as_without_us() -> None:
    assert made({"slo": SLO, "hints": HINTS}).sampling_params.custom_params is None
    req = made({"slo": SLO, "bias": 1})
    assert req.sampling_params.custom_params == {"bias": 1, "__req__": req}
    assert made(None).sampling_params.custom_params is None
    req = made({})
    assert req.sampling_params.custom_params == {"__req__": req}


@pytest.mark.usefixtures("scheduler")
def test_what_no_front_end_checked_gets_the_default(caplog: pytest.LogCaptureFixture) -> None:
    assert made({"slo": {"class": "gold"}}).tiered_kv_terms == made(None).tiered_kv_terms
    assert "slo.class must be one of" in caplog.text


def test_another_servers_requests_are_left_alone() -> None:
    req = made({"slo": "anything"})
    assert not hasattr(req, "tiered_kv_terms")
    assert req.sampling_params.custom_params == {"slo": "anything", "__req__": req}
