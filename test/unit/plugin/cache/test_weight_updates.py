"""Updates of the weights, with and without a flush, on SGLang's own scheduler loop.

Random histories are in test/property/test_administration_machine.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")


from support_plugin import on_release
from support_plugin.administration import (
    N_REUSABLE,
    OTHER,
    PROMPT,
    Administrator,
    ask,
    drop_from_device,
    settle,
    versions_on_disk,
)
from support_plugin.decode_loop import DecodeLoop, PretendDisk
from support_plugin.decode_requests import Kind
from support_plugin.told import turns

MakeLoop = Callable[..., DecodeLoop]


def n_pages(disk: PretendDisk) -> int:
    return len(disk.store._pages)


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


def test_where_ranks_cannot_name_weights_together_those_that_changed_have_no_name(
    make_loop: MakeLoop, disk: PretendDisk, caplog: pytest.LogCaptureFixture
) -> None:
    """With DP attention: the disk is left alone, also by prompts that have been there before."""
    loop = make_loop(disk=disk)
    loop.tree_cache.weights._name_weights = None
    administrator = Administrator(loop)
    ask(loop, PROMPT, "a")
    settle(loop)
    before = n_pages(disk)
    for _ in range(2):
        assert administrator.update() == (True, "loaded")
        assert ask(loop, PROMPT, "b").cached_tokens == 0
        assert ask(loop, PROMPT, "c").cached_tokens_device == N_REUSABLE
        settle(loop)
        assert administrator.flush()
    assert n_pages(disk) == before
    assert caplog.text.count("nothing is read from disk or store") == 1


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


@pytest.mark.skipif(not on_release.IS_0_5_17, reason="0.5.23 knows workers without a model")
def test_an_update_is_refused_where_sglang_would_look_for_a_draft_model(
    make_loop: MakeLoop, answers: Callable[[Kind], list[int]]
) -> None:
    loop = make_loop()
    administrator = Administrator(loop)
    loop.draft_worker = SimpleNamespace(draft_worker=None)
    success, message = administrator.update()
    assert not success
    assert "NGRAM" in message
    assert loop.tp_worker.version == 1
    loop.draft_worker = None
    assert list(ask(loop, PROMPT, "a").output_ids) == answers(PROMPT)
    assert administrator.update()[0]
    settle(loop)


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
