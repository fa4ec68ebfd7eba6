"""Flushes, updates of the weights, pauses and released memory, on SGLang's own scheduler loop.

Random histories are in test/property/test_administration_machine.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.managers.schedule_batch import Req

from support_plugin.administration import Administrator, versions_on_disk
from support_plugin.decode_loop import DecodeLoop, PretendDisk
from support_plugin.decode_requests import Kind, Oracle, publish_arguments
from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency

MakeLoop = Callable[..., DecodeLoop]
PROMPT = Kind(family=2, seed=0, n_own=20, max_new_tokens=8, sampling={"ignore_eos": True})
OTHER = Kind(family=1, seed=1, n_own=14, max_new_tokens=8, sampling={"ignore_eos": True})
#: Of the 31 tokens of PROMPT: whole pages, and one token to be computed.
N_REUSABLE = 28


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.compiler.set_stance("force_eager")
    yield publish_arguments(tmp_path_factory.mktemp("model"))
    torch.compiler.set_stance("default")


@pytest.fixture(params=[True, False], ids=["overlap", "no-overlap"])
def overlap(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def disk() -> Iterator[PretendDisk]:
    disk = PretendDisk()
    yield disk
    disk.release()


@pytest.fixture
def make_loop(args: Any, overlap: bool) -> Iterator[MakeLoop]:
    made: list[DecodeLoop] = []

    def make(**options: Any) -> DecodeLoop:
        made.append(DecodeLoop(args, overlap=overlap, **options))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


@pytest.fixture
def answers(args: Any, overlap: bool) -> Iterator[Callable[[Kind], list[int]]]:
    oracle = Oracle(args, overlap=overlap)
    yield oracle.answer
    oracle.close()


def turns(n: int) -> Callable[[], bool]:
    left = iter(range(n))
    return lambda: next(left, None) is not None


def ask(loop: DecodeLoop, kind: Kind, rid: str) -> Req:
    req = kind.request(rid)
    loop.serve(req)
    return req


def settle(loop: DecodeLoop) -> None:
    """Until nothing is on its way, the disk included."""
    loop.run(lambda: loop.tree_cache.hierarchy.progress.is_busy)
    loop.check_nothing_is_held()


def drop_from_device(loop: DecodeLoop) -> None:
    loop.tree_cache.hierarchy.evict_device(10_000)


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


# -- weights -------------------------------------------------------------------------------------


def test_an_update_right_behind_a_request(make_loop: MakeLoop, disk: PretendDisk) -> None:
    """Pages of its answer are still on their way, and arrive under the old weights' name."""
    loop = make_loop(disk=disk)
    administrator = Administrator(loop)
    disk.writes.hold()
    ask(loop, PROMPT, "a")
    assert administrator.update() == (True, "loaded")
    disk.release()
    assert ask(loop, PROMPT, "b").cached_tokens == 0
    settle(loop)
    assert administrator.flush()
    assert ask(loop, PROMPT, "c").cached_tokens_storage == N_REUSABLE
    # Back at the old ones, these are found again.
    loop.tp_worker.version = 0
    assert administrator.update() == (True, "loaded")
    assert ask(loop, PROMPT, "d").cached_tokens_storage == N_REUSABLE
    settle(loop)


@pytest.mark.parametrize("path", ["not there", "half of it", "another shape"])
@pytest.mark.parametrize("flush", [True, False])
def test_an_update_that_fails(
    make_loop: MakeLoop, disk: PretendDisk, path: str, flush: bool
) -> None:
    loop = make_loop(disk=disk)
    administrator = Administrator(loop)
    ask(loop, PROMPT, "a")
    settle(loop)
    drop_from_device(loop)
    success, message = administrator.update(path, flush=flush)
    assert not success
    assert message in ("no such folder", "loaded", "ValueError: a tensor of another shape")
    again = ask(loop, PROMPT, "b")
    if path == "not there":
        assert again.cached_tokens_host == N_REUSABLE, "nothing has changed"
    elif flush:
        assert again.cached_tokens == 0
    else:
        assert again.cached_tokens_host == N_REUSABLE, "as the update asked for"
        assert loop.tree_cache.hierarchy.colds[0].store is None
        assert administrator.flush()
        ask(loop, PROMPT, "c")
    assert loop.tree_cache.hierarchy.colds[0].store is not None
    settle(loop)
    assert administrator.flush()
    assert ask(loop, PROMPT, "d").cached_tokens_storage == N_REUSABLE
    settle(loop)


def test_an_update_without_a_flush_keeps_kv_but_not_its_name(
    make_loop: MakeLoop, disk: PretendDisk
) -> None:
    loop = make_loop(disk=disk)
    administrator = Administrator(loop)
    ask(loop, PROMPT, "a")
    settle(loop)
    n_stored = n_pages(disk)
    assert administrator.update(flush=False)[0]
    assert ask(loop, PROMPT, "b").cached_tokens_device == N_REUSABLE, "as the update asked for"
    ask(loop, OTHER, "c")
    settle(loop)
    assert n_pages(disk) == n_stored, "what is mixed has no name"
    assert administrator.update(flush=False)[0]
    ask(loop, OTHER, "d")
    assert administrator.flush()
    ask(loop, OTHER, "e")
    settle(loop)
    assert n_pages(disk) > n_stored
    assert versions_on_disk(disk) == {1: {1.0}, 3: {3.0}}


def test_many_parts_of_an_update_after_a_flush_are_named_once(
    make_loop: MakeLoop, disk: PretendDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainers pause, flush, send the weights in buckets without a flush, and go on."""
    loop = make_loop(disk=disk)
    administrator = Administrator(loop)
    ask(loop, PROMPT, "a")
    settle(loop)
    req = OTHER.request("b")
    loop.arrive(req)
    loop.run(turns(4))
    administrator.pause("retract")
    assert administrator.flush()
    named: list[int] = []
    weights = loop.tree_cache.weights
    name_weights = weights._name_weights
    monkeypatch.setattr(
        weights, "_name_weights", lambda: (named.append(loop.tp_worker.version), name_weights())[1]
    )
    for _ in range(3):
        assert administrator.update(flush=False)[0]
    assert named == []
    loop.tp_worker.versions = {loop.tp_worker.version}
    administrator.go_on()
    loop.run(lambda: not loop.is_at_rest)
    assert named == [4]
    settle(loop)
    assert administrator.flush()
    assert ask(loop, OTHER, "c").cached_tokens_storage > 0
    settle(loop)


def test_the_same_weights_again_keep_their_cache(make_loop: MakeLoop, disk: PretendDisk) -> None:
    loop = make_loop(disk=disk)
    administrator = Administrator(loop)
    ask(loop, PROMPT, "a")
    settle(loop)
    assert administrator.update("the same", flush=False)[0]
    assert ask(loop, PROMPT, "b").cached_tokens_device == N_REUSABLE
    assert loop.tree_cache.hierarchy.colds[0].store is not None
    settle(loop)


def test_there_and_back_without_a_flush_is_not_the_same(
    make_loop: MakeLoop, disk: PretendDisk
) -> None:
    loop = make_loop(disk=disk)
    administrator = Administrator(loop)
    ask(loop, PROMPT, "a")
    settle(loop)
    assert administrator.update(flush=False)[0]
    ask(loop, OTHER, "b")
    loop.tp_worker.version = 0
    assert administrator.update(flush=False)[0]
    assert loop.tp_worker.version == 1
    ask(loop, PROMPT, "c")
    settle(loop)
    assert loop.tree_cache.hierarchy.colds[0].store is None
    assert versions_on_disk(disk) == {1: {1.0}}
    assert administrator.flush()
    assert loop.tree_cache.hierarchy.colds[0].store is not None


def test_an_update_while_requests_are_paused(
    make_loop: MakeLoop, disk: PretendDisk, answers: Callable[[Kind], list[int]]
) -> None:
    """Who runs waits again, and is computed anew with the new weights."""
    for mode in ("in_place", "retract"):
        loop = make_loop(disk=disk)
        administrator = Administrator(loop)
        reqs = [kind.request(str(i)) for i, kind in enumerate((PROMPT, OTHER))]
        for req in reqs:
            loop.arrive(req)
        loop.run(turns(4))
        administrator.pause(mode)
        assert administrator.update() == (True, "loaded")
        assert administrator.update() == (True, "loaded")
        administrator.go_on()
        loop.run(lambda loop=loop: not loop.is_at_rest)  # type: ignore[misc]
        assert [list(req.output_ids) for req in reqs] == [answers(PROMPT), answers(OTHER)]
        settle(loop)


def test_an_update_that_flushes_is_refused_while_requests_run(
    make_loop: MakeLoop, answers: Callable[[Kind], list[int]]
) -> None:
    loop = make_loop()
    administrator = Administrator(loop)
    req = PROMPT.request("a")
    loop.arrive(req)
    loop.run(turns(4))
    success, message = administrator.update()
    assert not success
    assert "requests are running" in message
    assert loop.tp_worker.version == 1
    loop.run(lambda: not loop.is_at_rest)
    assert list(req.output_ids) == answers(PROMPT)
    assert administrator.update()[0]
    loop.check_nothing_is_held()


def test_an_update_is_refused_while_a_copy_hangs(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop()
    administrator = Administrator(loop)
    ask(loop, PROMPT, "a")
    hierarchy = loop.tree_cache.hierarchy
    monkeypatch.setattr(hierarchy, "drain", lambda: False)
    assert not administrator.flush()
    success, message = administrator.update()
    assert not success
    assert "hangs" in message
    assert loop.tp_worker.version == 1
    assert not administrator.release_memory()
    monkeypatch.undo()
    assert ask(loop, PROMPT, "b").cached_tokens_device == N_REUSABLE


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


def n_pages(disk: PretendDisk) -> int:
    return len(disk.store._pages)
