"""Flushes, pauses, released memory and cleared disks, on SGLang's own scheduler loop.

Random histories are in test/property/test_administration_machine.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

pytest.importorskip("sglang")


from support_plugin.administration import (
    N_REUSABLE,
    OTHER,
    PROMPT,
    Administrator,
    ask,
    settle,
    versions_on_disk,
)
from support_plugin.decode_loop import DecodeLoop, PretendDisk
from support_plugin.decode_requests import Kind
from support_plugin.told import turns
from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency

MakeLoop = Callable[..., DecodeLoop]

# -- flush ---------------------------------------------------------------------------------------


def test_a_flush_while_pages_are_written_to_a_disk_that_hangs(
    make_loop: MakeLoop, disk: PretendDisk
) -> None:
    loop = make_loop(disk=disk)
    administrator = Administrator(loop)
    disk.writes.hold()
    ask(loop, PROMPT, "a")
    assert loop.is_fully_idle()
    started = time.monotonic()
    assert administrator.flush()
    assert time.monotonic() - started < 1.0
    loop.tree_cache.hierarchy.context.forest.check_integrity()
    disk.release()
    settle(loop)
    again = ask(loop, PROMPT, "b")
    assert again.cached_tokens_storage == N_REUSABLE
    settle(loop)


def test_a_flush_of_requests_that_are_paused(
    make_loop: MakeLoop, answers: Callable[[Kind], list[int]]
) -> None:
    loop = make_loop()
    administrator = Administrator(loop)
    reqs = [kind.request(str(i)) for i, kind in enumerate((PROMPT, OTHER))]
    for req in reqs:
        loop.arrive(req)
    loop.run(turns(4))
    assert not administrator.flush(), "they run"
    administrator.pause("in_place")
    assert not administrator.flush(), "their KV is in use"
    administrator.pause("retract")
    assert administrator.flush()
    assert loop.waiting_queue == reqs
    assert loop.token_to_kv_pool_allocator.available_size() == loop.max_total_num_tokens
    administrator.go_on()
    loop.run(lambda: not loop.is_at_rest)
    assert [list(req.output_ids) for req in reqs] == [answers(PROMPT), answers(OTHER)]
    loop.check_nothing_is_held()


def test_paused_requests_find_on_disk_what_a_flush_took_from_them(
    make_loop: MakeLoop, disk: PretendDisk
) -> None:
    loop = make_loop(disk=disk)
    administrator = Administrator(loop)
    ask(loop, PROMPT, "a")
    settle(loop)
    administrator.pause("retract")
    req = PROMPT.request("b")
    loop.arrive(req)
    assert not loop.tree_cache.hierarchy.progress.is_busy, "nothing is brought nearer in a pause"
    assert administrator.flush()
    administrator.go_on()
    loop.run(lambda: not loop.is_at_rest)
    assert req.cached_tokens_storage == N_REUSABLE
    settle(loop)


def test_transfers_are_acknowledged_while_everything_is_paused(
    make_loop: MakeLoop, disk: PretendDisk
) -> None:
    loop = make_loop(disk=disk)
    administrator = Administrator(loop)
    disk.writes.hold()
    ask(loop, PROMPT, "a")
    administrator.pause("retract")
    assert loop.tree_cache.hierarchy.progress.is_busy
    disk.release()
    deadline = time.monotonic() + 20
    loop.run(lambda: loop.tree_cache.hierarchy.progress.is_busy and time.monotonic() < deadline)
    assert not loop.tree_cache.hierarchy.progress.is_busy


def test_nobody_sleeps_on_transfers(
    make_loop: MakeLoop, disk: PretendDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(disk=disk)
    slept: list[bool] = []

    class Sleeper:
        def maybe_sleep(self) -> None:
            slept.append(loop.tree_cache.hierarchy.progress.is_busy)

    monkeypatch.setattr(loop, "idle_sleeper", Sleeper(), raising=False)
    disk.writes.hold()
    ask(loop, PROMPT, "a")
    loop.maybe_sleep_on_idle()
    assert slept == []
    disk.release()
    settle(loop)
    loop.maybe_sleep_on_idle()
    assert slept == [False]


# -- memory --------------------------------------------------------------------------------------


def test_memory_that_goes_and_comes(
    make_loop: MakeLoop, disk: PretendDisk, answers: Callable[[Kind], list[int]]
) -> None:
    loop = make_loop(disk=disk, n_host_pages=10)
    administrator = Administrator(loop)
    disk.writes.hold()
    ask(loop, PROMPT, "a")
    ask(loop, OTHER, "b")
    # Something waits for room on the host: it must not be copied from memory that is gone.
    assert administrator.release_memory()
    assert administrator.release_memory(), "a second time is no harm"
    administrator.resume_memory()
    administrator.resume_memory()
    disk.release()
    assert list(ask(loop, PROMPT, "c").output_ids) == answers(PROMPT)
    settle(loop)
    assert versions_on_disk(disk) == {1: {1.0}}


def test_memory_that_goes_while_requests_are_paused(
    make_loop: MakeLoop, answers: Callable[[Kind], list[int]]
) -> None:
    for mode in ("in_place", "retract"):
        loop = make_loop()
        administrator = Administrator(loop)
        req = PROMPT.request("a")
        loop.arrive(req)
        loop.run(turns(4))
        assert not administrator.release_memory(), "it runs"
        administrator.pause(mode)
        assert administrator.release_memory()
        administrator.resume_memory()
        administrator.go_on()
        loop.run(lambda loop=loop: not loop.is_at_rest)  # type: ignore[misc]
        assert list(req.output_ids) == answers(PROMPT)
        loop.check_nothing_is_held()


# -- clearing the disk ---------------------------------------------------------------------------


def test_clearing_a_disk_that_hangs(make_loop: MakeLoop, disk: PretendDisk) -> None:
    loop = make_loop(disk=disk)
    ask(loop, PROMPT, "a")
    settle(loop)
    disk.writes.hold()
    ask(loop, OTHER, "b")
    started = time.monotonic()
    assert loop.tree_cache.clear_storage_backend()
    assert time.monotonic() - started < 1.0
    forest = loop.tree_cache.hierarchy.context.forest
    assert all(node.state(Tier.DISK) is not Residency.RESIDENT for node in forest.nodes())
    disk.release()
    settle(loop)
    ask(loop, PROMPT, "c")
    settle(loop)
    assert loop.flush_cache()
    assert ask(loop, PROMPT, "d").cached_tokens_storage == N_REUSABLE
    settle(loop)
