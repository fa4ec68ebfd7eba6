"""Where the boundary between loading and computing falls, against a search over all boundaries."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from tiered_kv.memory.load_policy import TOLERANCE, LoadQuestion, pages_to_load


def question(
    n_pages: int = 10,
    *,
    start: int = 0,
    extra_tokens: int = 64,
    latency_s: float = 0.0,
    page_s: float = 1.0,
    token_s: float = 0.1,
    depth_s: float = 0.0,
    overlapped: bool = True,
    wait_s: float = 0.0,
) -> LoadQuestion:
    """token_s, depth_s: a token costs token_s + depth_s * its position to compute."""
    return LoadQuestion(
        n_pages=n_pages,
        page_tokens=64,
        start=start,
        prompt_tokens=start + n_pages * 64 + extra_tokens,
        load_s=lambda k: latency_s + k * page_s,
        recompute_s=lambda a, b: (b - a) * (token_s + depth_s * (a + b) / 2),
        overlapped=overlapped,
        wait_s=wait_s,
    )


def test_a_fast_tier_is_read_to_the_end() -> None:
    assert pages_to_load(question(page_s=0.001)) == 10
    assert pages_to_load(question(page_s=0.001, overlapped=False)) == 10


def test_a_slow_tier_is_left_alone() -> None:
    assert pages_to_load(question(page_s=1e6)) == 0
    assert pages_to_load(question(page_s=1e6, overlapped=False)) == 0


def test_with_overlap_the_boundary_falls_where_both_meet() -> None:
    # Loading k pages takes 6.4 k, computing the others 6.4 (11 - k).
    assert pages_to_load(question(page_s=6.4)) in (5, 6)


def test_a_full_queue_moves_the_boundary() -> None:
    assert pages_to_load(question(page_s=1.0, latency_s=0.0)) == 10
    assert pages_to_load(question(page_s=1.0, latency_s=30.0)) < 10
    assert pages_to_load(question(page_s=1.0, latency_s=500.0)) == 0


def test_what_loads_while_the_request_waits_is_free() -> None:
    slow = question(page_s=10.0, overlapped=False)
    assert pages_to_load(slow) == 0
    assert pages_to_load(question(page_s=10.0, overlapped=False, wait_s=40.0)) == 4
    # The fifth page is half hidden, which is enough: 5 s of its 10 against 6.4 to compute it.
    assert pages_to_load(question(page_s=10.0, overlapped=False, wait_s=45.0)) == 5


def test_nothing_to_load() -> None:
    assert pages_to_load(question(0)) == 0


@given(
    n_pages=st.integers(0, 60),
    start=st.integers(0, 10_000),
    extra_tokens=st.integers(1, 2000),
    latency_s=st.floats(0, 1),
    page_s=st.floats(1e-5, 1),
    token_s=st.floats(1e-6, 1e-2),
    depth_s=st.floats(0, 1e-6),
    overlapped=st.booleans(),
    wait_s=st.sampled_from([0.0, 0.0, 0.3, 5.0]),
)
@example(
    n_pages=1,
    start=0,
    extra_tokens=1,
    latency_s=0.0,
    page_s=0.01,
    token_s=0.001,
    depth_s=0.0,
    overlapped=True,
    wait_s=0.0,
)
@example(
    n_pages=6,
    start=0,
    extra_tokens=1,
    latency_s=0.25,
    page_s=1.0,
    token_s=0.0078125,
    depth_s=0.0,
    overlapped=False,
    wait_s=5.0,
)
def test_no_boundary_is_better(
    *,
    n_pages: int,
    start: int,
    extra_tokens: int,
    latency_s: float,
    page_s: float,
    token_s: float,
    depth_s: float,
    overlapped: bool,
    wait_s: float,
) -> None:
    asked = question(
        n_pages,
        start=start,
        extra_tokens=extra_tokens,
        latency_s=latency_s,
        page_s=page_s,
        token_s=token_s,
        depth_s=depth_s,
        overlapped=overlapped,
        # With a wait that overlaps a pass that overlaps the load, only one of both is modelled.
        wait_s=0.0 if overlapped else wait_s,
    )
    best_s = min(asked.ready_s(k) for k in range(n_pages + 1))
    assert asked.ready_s(pages_to_load(asked)) <= best_s * (1 + TOLERANCE) + 1e-12
