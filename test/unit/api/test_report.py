"""What a report says, and what it leaves open."""

from __future__ import annotations

import pytest

from tiered_kv.api.hints import Hints
from tiered_kv.api.report import RequestReport
from tiered_kv.api.slo import Slo


def test_a_report() -> None:
    report = RequestReport(Slo("chat", 0.5, 0.05), 300, 96, 64, 32, wait_s=0.125, ttft_s=0.75)
    assert report.as_fields() == {
        "slo": {"class": "chat", "ttft_ms": 500.0, "tbt_ms": 50.0},
        "prompt_tokens": 300,
        "cached_tokens": {"device": 96, "host": 64, "disk": 32, "store": 0},
        "wait_ms": 125.0,
        "ttft_ms": 750.0,
        "ttft_slack_ms": -250.0,
    }


def test_what_was_not_measured_is_null() -> None:
    fields = RequestReport().as_fields()
    assert (fields["wait_ms"], fields["ttft_ms"], fields["ttft_slack_ms"]) == (None, None, None)


@pytest.mark.parametrize(
    ("ttft_slo_s", "ttft_s", "slack_s"),
    [(2.0, 0.5, 1.5), (0.5, 2.0, -1.5), (None, 1.0, None), (1.0, None, None)],
)
def test_slack_at_the_first_token(
    ttft_slo_s: float | None, ttft_s: float | None, slack_s: float | None
) -> None:
    assert RequestReport(Slo(ttft_s=ttft_slo_s), ttft_s=ttft_s).ttft_slack_s == slack_s


def test_hints_are_repeated_as_they_were_understood() -> None:
    assert "hints" not in RequestReport().as_fields()
    report = RequestReport(hints=Hints(7, session_id="a"))
    assert report.as_fields()["hints"] == {"expected_output_tokens": 7, "session_id": "a"}


def test_the_deadline_of_a_task() -> None:
    slo = RequestReport(Slo("agent", task_s=60.0)).as_fields()["slo"]
    assert slo == {"class": "agent", "ttft_ms": None, "tbt_ms": None, "task_ms": 60_000.0}
