"""Fixtures of the hierarchy's tests; the pretend engine is in `support_tiers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support_tiers.tier_rig import Rig


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    """Makes rigs, and ends their threads."""
    made: list[Rig] = []

    def make(*args: Any, **options: Any) -> Rig:
        rig = Rig(*args, **options)
        made.append(rig)
        return rig

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def ranks() -> Iterator[Any]:
    """Two ranks that agree on what has happened."""
    from support_tiers.ranks import Ranks

    made = Ranks()
    yield made
    made.barrier.abort()
    for rig in made:
        rig.close()
