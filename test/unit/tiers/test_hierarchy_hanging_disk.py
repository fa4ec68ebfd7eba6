"""A disk that hangs keeps nothing of the host pool, and closing comes to an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from support_tiers.engine import N_LAYERS, NAMESPACE, PAGE_SIZE, tokens_of
from support_tiers.page_codec import page_layout
from support_tiers.tier_rig import Rig, new_disk, on_disk
from tiered_kv.core.ids import Tier
from tiered_kv.tiers.disk import stall_watch
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.store import DiskStore

MakeRig = Callable[..., Rig]
PATIENCE_S = 20.0


class HangingIo(IoOps):
    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert self.answers.wait(PATIENCE_S)
        return super().pwritev(fd, buffers, offset)


@pytest.fixture
def io() -> Iterator[HangingIo]:
    io = HangingIo()
    yield io
    io.answers.set()


@pytest.fixture
def store(tmp_path: Path, io: HangingIo) -> Iterator[DiskStore]:
    with DiskStore.open(tmp_path / "disk", capacity_bytes=1 << 24, io_ops=io) as store:
        yield store
        io.answers.set()


@pytest.fixture
def rig(make_rig: MakeRig, store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(stall_watch, "STALL_AFTER_S", 0.3)
    page_bytes = page_layout("raw", PAGE_SIZE, N_LAYERS).page_bytes
    return make_rig(64, 64, store.namespace(NAMESPACE, page_bytes))


def poll_until(rig: Rig, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        rig.hierarchy.poll()
        time.sleep(0.005)


def test_the_writes_behind_one_that_hangs_let_go_of_their_pages(rig: Rig, io: HangingIo) -> None:
    io.answers.clear()
    for n in range(10):
        rig.serve(tokens_of(n, n + 1))
    poll_until(rig, lambda: rig.forest.protected_tokens(Tier.HOST) > 0)
    poll_until(rig, lambda: rig.forest.protected_tokens(Tier.HOST) == 0)
    assert not io.answers.is_set(), "while it hangs"
    assert rig.writes.in_flight == 0, "and the server is idle"
    io.answers.set()
    poll_until(rig, lambda: not rig.disk.is_stalled())  # type: ignore[union-attr]
    prompt = tokens_of(77, 78)
    rig.serve(prompt)
    poll_until(rig, lambda: rig.stored_pages(prompt) == 2)


def test_closing_while_it_hangs(rig: Rig, io: HangingIo, store: DiskStore) -> None:
    io.answers.clear()
    for n in range(5):
        rig.serve(tokens_of(n))
    started = time.monotonic()
    rig.hierarchy.close(0.2, end_s=0.2)
    store.close(0.2)
    assert time.monotonic() - started < 2.0


def test_a_flush_lets_go_whoever_waited_for_a_disk_that_hangs(make_rig: MakeRig) -> None:
    """The queue asks `done` again only for those of whom there is news."""
    rig = make_rig(64, 16, new_disk())
    prompt = tokens_of(10, 11, 12, tail=1)
    on_disk(rig, prompt)
    rig.disk.reads.hold()
    rig.arrive("waits", prompt)
    prefetch = rig.hierarchy.prefetch
    assert not prefetch.done("waits")
    prefetch.take_news()
    rig.flush()
    assert prefetch.done("waits")
    assert "waits" in prefetch.take_news()
    rig.disk.reads.release()
    rig.drain()
    rig.check_idle()
