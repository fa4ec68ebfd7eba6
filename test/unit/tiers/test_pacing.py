"""What must wait for decoding waits, and goes as soon as decoding ends or somebody needs it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support_tiers.tier_rig import NAMESPACE, Rig, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.tiers.hierarchy import KVHierarchy
from tiered_kv.tiers.in_memory import InMemoryStore
from tiered_kv.tiers.interference import QUIET_STEPS_MIN, RATE_MIN, InterferenceBudget
from tiered_kv.tiers.pacing import IDLE_S, PORTION_BYTES, WriteBackPacer

pytestmark = pytest.mark.timeout(60)

A_MOMENT_S = 0.05
PATIENCE_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class ScriptedBudget(InterferenceBudget):
    """A rate and a wish for quiet that the test sets."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__(0.03)
        self.rate = bytes_per_s
        self.is_quiet_wanted = False
        self.seen: list[tuple[str, int]] = []

    @property
    def bytes_per_s(self) -> float:
        return self.rate

    @property
    def wants_quiet(self) -> bool:
        return self.is_quiet_wanted

    def observe_quiet(self, seconds: float, expected_s: float) -> None:
        self.seen.append(("quiet", 0))

    def observe_busy(self, seconds: float, expected_s: float, n_bytes: int) -> None:
        self.seen.append(("busy", n_bytes))

    def pass_by(self) -> None:
        self.seen.append(("neither", 0))


class Mover:
    """Takes one turn on a thread of its own."""

    def __init__(self, pacer: WriteBackPacer, n_bytes: int) -> None:
        def move() -> None:
            with pacer.turn(n_bytes):
                pass

        self._thread = threading.Thread(target=move, daemon=True)
        self._thread.start()

    @property
    def waits(self) -> bool:
        self._thread.join(A_MOMENT_S)
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "it was held up for ever"


def limited(bytes_per_s: float = 1000.0) -> tuple[WriteBackPacer, ScriptedBudget, Clock]:
    """A pacer under a limit, while requests decode."""
    budget, clock = ScriptedBudget(bytes_per_s), Clock()
    pacer = WriteBackPacer(budget, clock)
    pacer.observe_decode(0.01, 0.01)
    budget.seen.clear()
    return pacer, budget, clock


def test_without_a_budget_everything_goes_at_once_and_whole() -> None:
    pacer = WriteBackPacer()
    pacer.observe_decode(0.01, 0.01)
    assert list(pacer.portions(1000, 1 << 20)) == [slice(0, 1000)]
    assert math.isinf(pacer.bytes_per_s)
    with pacer.turn(1 << 40) as held_up_s:
        assert held_up_s == 0


@given(n_pages=st.integers(0, 200), page_bytes=st.integers(1, 2 * PORTION_BYTES))
def test_portions_are_all_the_pages_in_order_and_bounded(n_pages: int, page_bytes: int) -> None:
    portions = list(WriteBackPacer(InterferenceBudget(0.03)).portions(n_pages, page_bytes))
    assert [page for part in portions for page in range(part.start, part.stop)] == list(
        range(n_pages)
    )
    for part in portions:
        n = part.stop - part.start
        assert n == 1 or n * page_bytes <= PORTION_BYTES


def test_turns_are_spaced_by_the_rate() -> None:
    pacer, _, clock = limited(bytes_per_s=1000.0)
    with pacer.turn(100) as held_up_s:
        assert held_up_s == 0
    second = Mover(pacer, 100)
    assert second.waits
    clock.now_s += 0.11
    pacer.observe_decode(0.01, 0.01)
    second.join()
    third = Mover(pacer, 100)
    assert third.waits
    clock.now_s += 0.11
    pacer.observe_decode(0.01, 0.01)
    third.join()


@pytest.mark.parametrize("release", ["idle", "hurry", "press", "stop"])
def test_what_is_held_up_goes_when_it_harms_nobody_or_somebody_waits(release: str) -> None:
    pacer, budget, clock = limited()
    budget.is_quiet_wanted = True
    mover = Mover(pacer, 100)
    assert mover.waits
    if release == "idle":
        # What it sleeps is of its own clock's seconds: by then this one has moved as well.
        clock.now_s += IDLE_S + 1
        mover.join()
    elif release == "hurry":
        with pacer.hurry():
            mover.join()
        assert Mover(pacer, 100).waits
    elif release == "press":
        pacer.press(True)
        mover.join()
        pacer.press(False)
        assert Mover(pacer, 100).waits
    else:
        pacer.stop()
        mover.join()
        Mover(pacer, 100).join()
    pacer.stop()


def test_time_without_a_limit_earns_and_owes_nothing() -> None:
    pacer, _, clock = limited(bytes_per_s=1000.0)
    with pacer.hurry():
        for _ in range(10):
            with pacer.turn(100):
                pass
    clock.now_s += 0.11
    pacer.observe_decode(0.01, 0.01)
    with pacer.turn(100) as held_up_s:
        assert held_up_s == 0
    assert Mover(pacer, 100).waits
    pacer.stop()


def test_a_step_is_quiet_only_if_nothing_moved_shortly_before() -> None:
    pacer, budget, clock = limited(bytes_per_s=math.inf)

    def step() -> None:
        clock.now_s += 0.021
        pacer.observe_decode(0.02, 0.01)

    step()
    clock.now_s += 0.01  # into the next step
    with pacer.turn(70):
        clock.now_s -= 0.005
        step()
        step()  # still under way, its bytes counted
        clock.now_s += 0.01
    step()
    step()
    kinds = [("quiet", 0), ("busy", 70), ("neither", 0), ("neither", 0), ("quiet", 0)]
    assert budget.seen == kinds


def test_what_moves_between_decode_steps_is_not_their_harm() -> None:
    pacer, budget, clock = limited(bytes_per_s=math.inf)
    for _ in range(3):
        clock.now_s += 0.1  # a prefill
        with pacer.turn(70):
            clock.now_s += 0.1
        clock.now_s += 0.1
        pacer.observe_decode(0.05, 0.01)
    assert budget.seen == [("quiet", 0)] * 3


# -- in a hierarchy ---------------------------------------------------------------------------


@pytest.fixture
def paced() -> Iterator[tuple[Rig, ScriptedBudget]]:
    """A rig with an unlimited budget, and a disk."""
    rig = Rig(n_device_pages=64, n_host_pages=64)
    rig.use(InMemoryStore().namespace(NAMESPACE, rig.page_format.slot_bytes))
    budget = ScriptedBudget(math.inf)
    rig.hierarchy.close(0)
    rig.context.pacer = WriteBackPacer(budget)
    rig.hierarchy = KVHierarchy(rig.context, NAMESPACE)
    yield rig, budget
    rig.hierarchy.close(0)


def decode_forever(pacer: WriteBackPacer) -> Callable[[], None]:
    """Steps that end all the time, until the function returned is called."""
    over = threading.Event()

    def decode() -> None:
        while not over.wait(0.005):
            pacer.observe_decode(0.005, 0.005)

    pacer.observe_decode(0.005, 0.005)
    thread = threading.Thread(target=decode, daemon=True)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return end


def test_writes_wait_for_decoding_and_go_when_it_is_over(
    paced: tuple[Rig, ScriptedBudget],
) -> None:
    rig, budget = paced
    budget.is_quiet_wanted = True
    end_decoding = decode_forever(rig.context.pacer)
    prompt = tokens_of(*range(6))
    rig.serve(prompt)
    time.sleep(2 * IDLE_S)
    rig.hierarchy.poll()
    assert rig.usable(prompt) == (6, 0)
    assert rig.hierarchy.write_back.to_host.in_flight == 1
    end_decoding()
    rig.drain()
    assert rig.stored_pages(prompt) == 6


def test_an_eviction_does_not_wait_for_the_budget(paced: tuple[Rig, ScriptedBudget]) -> None:
    rig, budget = paced
    budget.is_quiet_wanted = True
    end_decoding = decode_forever(rig.context.pacer)
    rig.serve(tokens_of(*range(6)))
    started = time.monotonic()
    assert rig.hierarchy.evict_device(6 * rig.page_size) == 6 * rig.page_size
    assert time.monotonic() - started < PATIENCE_S / 2
    end_decoding()


def test_copies_that_hold_much_of_the_device_are_not_held_back(
    paced: tuple[Rig, ScriptedBudget],
) -> None:
    rig, budget = paced
    budget.is_quiet_wanted = True
    end_decoding = decode_forever(rig.context.pacer)
    prompt = tokens_of(*range(40))
    rig.serve(prompt)
    # What is left then holds little enough to wait.
    rig.poll_until(lambda: rig.forest.resident_tokens(Tier.HOST) >= 16 * rig.page_size)
    end_decoding()
    rig.drain()
    assert rig.stored_pages(prompt) == 40


def test_a_shutdown_in_the_middle_of_decoding_loses_nothing(
    paced: tuple[Rig, ScriptedBudget],
) -> None:
    rig, budget = paced
    budget.is_quiet_wanted = True
    end_decoding = decode_forever(rig.context.pacer)
    prompts = [tokens_of(*range(10 * i, 10 * i + 3)) for i in range(4)]
    for prompt in prompts:
        rig.serve(prompt)
    root = rig.hierarchy.root()
    rig.hierarchy.close(PATIENCE_S)
    end_decoding()
    for prompt in prompts:
        assert rig.disk.count_prefix(rig.hashes(root, prompt)) == 3


@settings(max_examples=10, deadline=None)
@given(
    runs=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    slowdown=st.floats(0.0, 5.0),
)
def test_under_a_real_budget_everything_arrives_while_decoding_goes_on(
    runs: list[int], slowdown: float
) -> None:
    rig = Rig(n_device_pages=128, n_host_pages=128)
    rig.use(InMemoryStore().namespace(NAMESPACE, rig.page_format.slot_bytes))
    rig.hierarchy.close(0)
    pacer = rig.context.pacer = WriteBackPacer(InterferenceBudget(0.03))
    rig.hierarchy = KVHierarchy(rig.context, NAMESPACE)
    for _ in range(QUIET_STEPS_MIN + 2):
        pacer.observe_decode(0.001, 0.001)
    prompts = [tokens_of(*range(10 * i, 10 * i + n)) for i, n in enumerate(runs)]
    for prompt in prompts:
        rig.serve(prompt)
    deadline = time.monotonic() + PATIENCE_S
    while rig.in_flight:
        assert time.monotonic() < deadline
        pacer.observe_decode(0.001 * (1 + slowdown), 0.001)
        rig.hierarchy.poll()
        time.sleep(0.001)
    assert pacer.bytes_per_s >= RATE_MIN
    for prompt, n in zip(prompts, runs, strict=True):
        assert rig.stored_pages(prompt) == n
    assert rig.forest.protected_tokens(Tier.DEVICE) == 0
    rig.hierarchy.close(1)
