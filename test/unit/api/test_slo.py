"""The class table: what a request that names a class, or none, was promised."""

from __future__ import annotations

from tiered_kv.api.slo import DEFAULT_CLASSES, NO_SLO, Slo, SloClass, SloClasses
from tiered_kv.scheduler import request


def test_a_class_gives_its_objectives() -> None:
    urgent = SloClass("urgent", ttft_s=0.1, max_wait_s=1.0)
    assert urgent.slo() == Slo("urgent", ttft_s=0.1, tbt_s=None, max_wait_s=1.0)


def test_the_default_table() -> None:
    assert DEFAULT_CLASSES.names() == ("interactive", "standard", "batch")
    assert [(c.ttft_s, c.tbt_s) for c in DEFAULT_CLASSES.classes] == [
        (0.5, 0.05),
        (2.0, 0.1),
        (30.0, None),
    ]
    assert DEFAULT_CLASSES.default_slo() == Slo("standard", 2.0, 0.1)


def test_a_table_without_a_default_promises_nothing() -> None:
    assert SloClasses(default=None).default_slo() is NO_SLO


def test_an_unknown_class_is_not_found() -> None:
    assert DEFAULT_CLASSES.find("Interactive") is None
    assert DEFAULT_CLASSES.find("batch") is DEFAULT_CLASSES.classes[2]


def test_the_scheduler_means_the_same_slo() -> None:
    assert request.Slo is Slo
    assert request.NO_SLO is NO_SLO
