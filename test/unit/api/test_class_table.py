"""A server's own classes: what a table may hold, and what is said of a bad one."""

from __future__ import annotations

import pytest

from tiered_kv.api.class_table import parse_classes, with_default
from tiered_kv.api.fields import TermsError
from tiered_kv.api.slo import DEFAULT_CLASSES, NO_SLO, SloClass


def test_classes_in_the_order_of_the_table() -> None:
    table = {"chat": {"ttft_ms": 400, "tbt_ms": 40}, "bulk": {"max_wait_ms": 600_000}, "best": {}}
    assert parse_classes(table) == (
        SloClass("chat", 0.4, 0.04),
        SloClass("bulk", max_wait_s=600.0),
        SloClass("best"),
    )


EXAMPLE = '{"chat": {"ttft_ms": 500, "tbt_ms": 50}, "batch": {"ttft_ms": 30000}}'

KNOWN = "a.ttft_ms, a.tbt_ms, a.max_wait_ms, a.task_ms"


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ([], f"it must map names of classes to objectives, such as {EXAMPLE}."),
        ({}, f"it must map names of classes to objectives, such as {EXAMPLE}."),
        (
            {"a": 5},
            "the class a must be an object with ttft_ms, tbt_ms, max_wait_ms, task_ms, not 5.",
        ),
        (
            {"a": {"ttft": 5}},
            f"a.ttft is not known; the known ones are: {KNOWN}.",
        ),
        (
            {"a": {"tbt_ms": -5}},
            "a.tbt_ms must be a number of milliseconds above 0, at most 86400000, not -5.",
        ),
        (
            {"none": {}},
            "the name of a class must have 1 to 64 characters and not be 'none': 'none'.",
        ),
        ({"": {}}, "the name of a class must have 1 to 64 characters and not be 'none': ''."),
        (
            {str(i): {} for i in range(65)},
            "it has 65 classes, but at most 64 are allowed.",
        ),
    ],
)
def test_refused(table: object, sentence: str) -> None:
    with pytest.raises(TermsError) as error:
        parse_classes(table)
    assert str(error.value) == sentence


def test_the_default_class() -> None:
    built_in = DEFAULT_CLASSES.classes
    assert with_default(built_in, None) == DEFAULT_CLASSES
    assert with_default(built_in, "batch").default_slo().slo_class == "batch"
    assert with_default(built_in, "none").default_slo() == NO_SLO


def test_a_default_class_that_does_not_exist() -> None:
    with pytest.raises(TermsError) as error:
        with_default((SloClass("chat"), SloClass("bulk")), None)
    assert str(error.value) == "there is no class 'standard'; name one of chat, bulk, or none."
