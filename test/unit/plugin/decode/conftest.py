"""Fixtures of the tests of who decodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def make_loop(args: Any) -> Iterator[Callable[..., Any]]:
    """Of loops with overlap, unless they are told otherwise."""
    from support_plugin.decode_loop import DecodeLoop

    made: list[DecodeLoop] = []

    def make(**options: Any) -> DecodeLoop:
        options.setdefault("overlap", True)
        made.append(DecodeLoop(args, **options))
        return made[-1]

    yield make
    for loop in made:
        loop.close()
