"""Fixtures of the tests on SGLang's queue in miniature, and on its own scheduler loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@pytest.fixture(params=[True, False], ids=["overlap", "no-overlap"])
def overlap(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def make_loop(args: Any, overlap: bool) -> Iterator[Callable[..., Any]]:
    """Of SGLang's own scheduler loop with the plugin; all are closed."""
    from support_plugin.decode_loop import DecodeLoop

    made: list[DecodeLoop] = []

    def make(**options: Any) -> DecodeLoop:
        made.append(DecodeLoop(args, overlap=overlap, **options))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


@pytest.fixture
def answers(args: Any, overlap: bool) -> Iterator[Callable[[Any], list[int]]]:
    """What plain SGLang answers to a `Kind`."""
    from support_plugin.decode_requests import Oracle

    oracle = Oracle(args, overlap=overlap)
    yield oracle.answer
    oracle.close()


@pytest.fixture
def disk() -> Iterator[Any]:
    """A disk in memory, whose reads and writes can be held back; they go on at the end."""
    from support_plugin.decode_loop import PretendDisk

    disk = PretendDisk()
    yield disk
    disk.release()
