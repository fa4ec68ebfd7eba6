"""Fixtures of the tests of a policy over SGLang's queue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def rig() -> Iterator[Any]:
    """A hierarchy over a pretend engine, with a disk tier that can be held back."""
    from support_tiers.tier_rig import Rig, new_disk

    rig = Rig(disk=new_disk())
    yield rig
    rig.hierarchy.close(1.0)


@pytest.fixture
def spy() -> Any:
    """A policy that remembers what it is told."""
    from support_plugin.mini_scheduler import Spy

    return Spy()


@pytest.fixture
def scheduler(rig: Any, spy: Any) -> Any:
    """SGLang's scheduler in miniature, with `spy` in charge of its queue."""
    from support_plugin.mini_scheduler import MiniScheduler

    scheduler = MiniScheduler(rig, spy)
    scheduler.tick(100.0)
    return scheduler
