"""Random administration of a server under load, on SGLang's own loop, batches and weight updater.

Method: requests arrive at random; in every turn of the loop chance pauses and goes on, flushes,
updates the weights (some updates fail, some ask for no flush), releases and resumes memory, clears
the disk, lets the disk hang or fail, copies to the device fail, and pages be evicted. KV says which
weights it was computed with. Guarantee: every call answers at once; every request is answered as by
plain SGLang alone; KV of other weights is never read, but where an update asked for it, and never
goes to the disk under another name; afterwards no slot, pin or page is missing, and after a flush
the disk tier is in use.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.managers.schedule_batch import Req

from support_plugin.administration import Administrator, versions_on_disk
from support_plugin.decode_loop import DecodeLoop, PretendDisk
from support_plugin.decode_requests import Kind, Oracle, kinds, light_costs, publish_arguments

N_HISTORIES = int(os.environ.get("TIERED_KV_PROPERTY_EXAMPLES", "60"))
TURNS_MAX = 3000
#: Nothing here waits for anything but copies of some pages; the machine may be busy.
ANSWER_S = 15.0
#: (overlap, device pages, host pages, chunk, decodes mixed in, who is in charge of the queue).
SHAPES: list[tuple[bool, int, int, int | None, bool, str | None]] = [
    (True, 40, 60, None, False, None),
    (False, 40, 60, None, False, None),
    (True, 30, 20, 8, False, "slack"),
    (False, 30, 20, 8, False, "slack"),
    (True, 40, 30, 8, True, "fcfs"),
]
OUTCOMES = ("others", "others", "others", "the same", "not there", "half of it", "another shape")


class History:
    def __init__(self, loop: DecodeLoop, disk: PretendDisk, number: int) -> None:
        self.loop, self.disk = loop, disk
        self.dice = random.Random(number)
        self.administrator = Administrator(loop)
        chosen = self.dice.sample(kinds(), self.dice.randint(4, 12))
        self.coming = [(f"{number}-{i}.", kind) for i, kind in enumerate(chosen)]
        self.reqs: list[tuple[Kind, Req]] = []
        self.happened: Counter[str] = Counter()
        self.log: list[str] = []
        self._n_turns = 0
        self._is_paused = False
        self._steps: list[tuple[float, Callable[[], str]]] = [
            (2.0, self._arrive),
            (0.4, self._pause),
            (0.8, self._go_on),
            (0.5, self._flush),
            (0.6, self._update),
            (0.2, self._release_memory),
            (0.2, self._clear_disk),
            (0.3, self._trouble_the_disk),
            (0.3, self._repair_the_disk),
            (0.3, self._fail_a_load),
            (0.6, self._evict),
            (8.0, lambda: "nothing"),
        ]

    def turn(self) -> bool:
        self._n_turns += 1
        assert self._n_turns < TURNS_MAX, "it never ends"
        weights = [weight for weight, _ in self._steps]
        (step,) = self.dice.choices([step for _, step in self._steps], weights)
        began = time.monotonic()
        done = step()
        took = time.monotonic() - began
        assert took < ANSWER_S, f"{done} took {took:.1f} s"
        self.log.append(done)
        self.happened[done] += 1
        if self.coming or not self.loop.is_at_rest:
            return True
        if self._is_paused:
            self._go_on()
            return True
        return False

    def _arrive(self) -> str:
        if not self.coming:
            return "nobody comes"
        rid, kind = self.coming.pop()
        self.reqs.append((kind, kind.request(rid)))
        self.loop.arrive(self.reqs[-1][1])
        return "arrival"

    def _pause(self) -> str:
        self._is_paused = True
        mode = self.dice.choice(("in_place", "retract"))
        self.administrator.pause(mode)
        return f"pause {mode}"

    def _go_on(self) -> str:
        if not self._is_paused:
            return "nothing"
        self._is_paused = False
        self.administrator.go_on()
        return "go on"

    def _flush(self) -> str:
        return "flush" if self.administrator.flush() else "flush refused"

    def _update(self) -> str:
        outcome, flush = self.dice.choice(OUTCOMES), self.dice.random() < 0.7
        success, message = self.administrator.update(outcome, flush=flush)
        if "requests are running" in message:
            assert not self._is_paused
            return "update refused"
        assert success is (outcome in ("others", "the same")), message
        return f"update {'with' if flush else 'without'} flush: {outcome}"

    def _release_memory(self) -> str:
        if not self.administrator.release_memory():
            assert not self._is_paused
            return "memory stays"
        self.administrator.resume_memory()
        return "memory went and came"

    def _clear_disk(self) -> str:
        self.loop.tree_cache.clear_storage_backend()
        return "disk cleared"

    def _trouble_the_disk(self) -> str:
        faults = self.dice.choice((self.disk.reads, self.disk.writes))
        if self.dice.random() < 0.5:
            faults.hold()
            return "disk hangs"
        faults.error = OSError("disk full")
        return "disk fails"

    def _repair_the_disk(self) -> str:
        self.disk.release()
        return "disk works"

    def _fail_a_load(self) -> str:
        self.loop.tree_cache.hierarchy.context.copier.n_to_fail += 1
        return "a load will fail"

    def _evict(self) -> str:
        self.loop.tree_cache.hierarchy.evict_device(self.dice.randint(1, 60))
        return "eviction"


def let_loads_fail(loop: DecodeLoop) -> None:
    """As many as `copier.n_to_fail` says."""
    copier: Any = loop.tree_cache.hierarchy.context.copier
    to_device = copier.to_device
    copier.n_to_fail = 0

    def copy(*args: Any) -> None:
        if copier.n_to_fail:
            copier.n_to_fail -= 1
            raise OSError("no such luck")
        to_device(*args)

    copier.to_device = copy


def run(loop: DecodeLoop, disk: PretendDisk, oracle: Oracle, number: int) -> Counter[str]:
    """One history, checked; what happened in it."""
    history = History(loop, disk, number)
    hierarchy = loop.tree_cache.hierarchy
    failed: list[int] = []
    loop.tree_cache.parts.metrics.failed_load = lambda: failed.append(1)
    try:
        loop.run(history.turn)
        disk.release()
        loop.check_nothing_is_held()
        for kind, req in history.reqs:
            assert list(req.output_ids) == oracle.answer(kind), kind
        for version, found in versions_on_disk(disk).items():
            assert found == {float(version)}
        assert history.administrator.flush()
        assert hierarchy.colds[0].store is not None
        assert loop.tree_cache.weights.is_named
        assert len(hierarchy.context.forest) == 0
        loop.check_nothing_is_held()
    except BaseException:
        print(f"history {number}:", *history.log, sep="\n  ")
        raise
    return history.happened + Counter(failed=len(failed))


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.compiler.set_stance("force_eager")
    gc.freeze()  # A flush collects garbage; what is imported here is much, and none.
    yield publish_arguments(tmp_path_factory.mktemp("model"))
    gc.unfreeze()
    torch.compiler.set_stance("default")


def test_whatever_happens_answers_are_right_and_the_tiers_whole(args: Any) -> None:
    totals: Counter[str] = Counter()
    for shape, (overlap, n_device, n_host, chunk, is_mixed, policy) in enumerate(SHAPES):
        disk = PretendDisk()
        loop = DecodeLoop(
            args,
            overlap=overlap,
            n_pages=n_device,
            n_host_pages=n_host,
            chunk_tokens=chunk,
            is_mixed=is_mixed,
            disk=disk,
        )
        loop.tree_cache.resumes_requests = True
        if policy is not None:
            loop.govern(policy, "round-robin" if policy == "slack" else "all", light_costs())
        let_loads_fail(loop)
        oracle = Oracle(args, overlap=overlap)
        try:
            for number in range(shape, N_HISTORIES, len(SHAPES)):
                totals += run(loop, disk, oracle, number)
        finally:
            disk.release()
            loop.close()
            oracle.close()
    # They did happen.
    print(totals)
    for what in (
        "flush",
        "flush refused",
        "update refused",
        "update with flush: others",
        "update without flush: others",
        "update with flush: another shape",
        "memory went and came",
        "disk cleared",
        "disk hangs",
        "failed",
    ):
        assert totals[what] > 0, totals
