"""Fixtures of the hierarchy's tests; the pretend engine is `support_tiers/tier_rig.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Test modules are imported by path (importlib mode), so what they share needs this to be found.
sys.path.insert(0, str(Path(__file__).parents[2] / "support_tiers"))

from tier_rig import Rig


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
