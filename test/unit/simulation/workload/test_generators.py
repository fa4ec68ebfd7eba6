"""Laws of generated and adapted workloads, over random options and seeds."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.simulation.hit_bound import in_order
from tiered_kv.simulation.workload.adapt import Adaptation, AdaptedWorkload
from tiered_kv.simulation.workload.arrivals import parse_arrivals
from tiered_kv.simulation.workload.catalog import open_workload
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import Request, Workload, whole_blocks
from tiered_kv.simulation.workload.slo_mix import parse_slo_mix

SMALL = {
    "agents": "agents,sessions=6,system_tokens=500,steps=4",
    "best_of_n": "best_of_n,prompts=5,samples=3",
    "chat": "chat,sessions=8,turns=3",
    "chat users": "chat,sessions=8,turns=3,users=3",
    "flood": "flood,duration_s=4,hot=poisson:5,cold=poisson:1",
    "rag": "rag,requests=12,documents=5",
    "multi-turn": "shared_context,contexts=4,questions=3,context_tokens=2000",
    "multi-request": "shared_context,mode=multi-request,contexts=4,questions=3",
}


def requests_of(workload: Workload, answer_s: float = 1.0) -> list[Request]:
    return list(in_order(workload, lambda _: answer_s))


def facts(request: Request) -> tuple[object, ...]:
    """What doesn't depend on when the session's earlier answers came."""
    return (
        request.request_id,
        request.blocks.tolist(),
        request.input_tokens,
        request.output_tokens,
        request.session,
        request.output_blocks.tolist(),
        request.next_use_hint_s,
    )


@given(spec=st.sampled_from(sorted(SMALL)), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_every_workload_keeps_the_rules(spec: str, seed: int) -> None:
    workload = open_workload(SMALL[spec], seed)
    size = workload.block_tokens
    requests = requests_of(workload)
    assert requests
    assert len({request.request_id for request in requests}) == len(requests)
    arrivals = [request.arrival_s for request in requests]
    assert arrivals == sorted(arrivals)
    last: dict[int, Request] = {}
    for request in requests:
        assert request.input_tokens >= 1
        assert request.output_tokens >= 1
        assert (
            request.input_tokens // size <= len(request.blocks) <= -(-request.input_tokens // size)
        )
        n_whole = request.input_tokens // size
        end = (request.input_tokens + request.output_tokens) // size
        assert len(request.output_blocks) in {0, end - n_whole}
        before = last.get(request.session) if request.session is not None else None
        if before is not None:
            assert request.arrival_s >= before.arrival_s + 1.0
            # The prompt begins with the one before and its answer.
            said = whole_blocks(before, size) + before.output_blocks
            assert request.blocks[: len(said)] == said
        if request.session is not None:
            last[request.session] = request


@given(spec=st.sampled_from(sorted(SMALL)), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_same_seed_gives_the_same_whatever_the_server_does(spec: str, seed: int) -> None:
    workload = open_workload(SMALL[spec], seed)
    quick = sorted(map(facts, requests_of(workload, 0.1)))
    slow = sorted(map(facts, requests_of(workload, 1000.0)))
    again = sorted(map(facts, requests_of(open_workload(SMALL[spec], seed), 0.1)))
    assert quick == slow == again
    others = sorted(map(facts, requests_of(open_workload(SMALL[spec], seed + 1))))
    assert others != quick


@given(
    spec=st.sampled_from(sorted(SMALL)),
    seed=st.integers(0, 2**32),
    divisor=st.sampled_from([1, 2, 4, 16, 32]),
    rate=st.floats(0.1, 10),
    pause=st.floats(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_scaling_keeps_reuse(spec: str, seed: int, divisor: int, rate: float, pause: float) -> None:
    workload = open_workload(SMALL[spec], seed)
    change = Adaptation(rate=rate, length=Fraction(1, divisor), pause=pause)
    scaled = AdaptedWorkload(workload, change)
    assert scaled.block_tokens * divisor == workload.block_tokens
    full = {request.request_id: request for request in requests_of(workload)}
    for request in requests_of(scaled):
        original = full[request.request_id]
        assert whole_blocks(request, scaled.block_tokens) == whole_blocks(
            original, workload.block_tokens
        )
        n_whole = request.input_tokens // scaled.block_tokens
        end = (request.input_tokens + request.output_tokens) // scaled.block_tokens
        assert len(request.output_blocks) <= end - n_whole
        assert request.input_tokens == max(1, original.input_tokens // divisor)
    starts = [request.arrival_s for request in workload.initial()]
    assert [request.arrival_s for request in scaled.initial()] == pytest.approx(
        [start / rate for start in starts]
    )


def test_pauses_scale_and_the_limit_counts_sessions() -> None:
    workload = open_workload("chat,sessions=20,turns=4", 1)
    halved = AdaptedWorkload(workload, Adaptation(pause=0.5, limit=7))
    firsts = list(halved.initial())
    assert len(firsts) == 7
    first = next(request for request in firsts if request.session is not None)
    following = halved.follow_up(first, 100.0)
    original = workload.follow_up(first, 100.0)
    assert following is not None
    assert original is not None
    assert following.arrival_s - 100.0 == pytest.approx((original.arrival_s - 100.0) / 2)
    assert first.next_use_hint_s == 15.0


def test_lengths_that_break_blocks_are_refused() -> None:
    with pytest.raises(WorkloadError, match="1/64"):
        AdaptedWorkload(open_workload("chat"), Adaptation(length=Fraction(1, 3)))


def test_users_talk_one_conversation_after_another() -> None:
    workload = open_workload("chat,sessions=9,turns=2,users=2", 3)
    requests = requests_of(workload)
    assert sum(1 for _ in workload.initial()) == 2
    assert len(requests) == len(requests_of(open_workload("chat,sessions=9,turns=2", 3)))


def test_best_of_n_asks_the_same_at_once() -> None:
    requests = requests_of(open_workload("best_of_n,prompts=2,samples=4"))
    first = requests[:4]
    assert len({request.arrival_s for request in first}) == 1
    assert all(request.blocks[:-1] == first[0].blocks[:-1] for request in first)
    # The server must have something of its own to compute for each.
    assert all(request.input_tokens % 64 == 1 for request in first)


def test_a_flood_has_hot_requests_that_share_and_cold_ones_that_do_not() -> None:
    requests = requests_of(open_workload("flood,duration_s=20,prefixes=1"))
    hot = [request for request in requests if request.slo_class == "hot"]
    cold = [request for request in requests if request.slo_class == "cold"]
    assert len(hot) > 20 * len(cold) > 0
    assert len({request.blocks[127] for request in hot}) == 1
    assert len({request.blocks[0] for request in cold}) == len(cold)
    assert max(request.arrival_s for request in requests) < 20


def test_retrieval_in_a_fixed_order_shares_more() -> None:
    def distinct(spec: str) -> int:
        requests = requests_of(open_workload(spec, 2))
        prefixes = set()
        for request in requests:
            whole = whole_blocks(request, 64).tolist()
            prefixes.update(tuple(whole[:end]) for end in range(1, len(whole) + 1, 8))
        return len(prefixes)

    spec = "rag,requests=150,documents=6,document_tokens=1000"
    assert distinct(f"{spec},sorted=true") < distinct(spec)


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_burstiness_asked_for(cv: float) -> None:
    import numpy as np

    times = parse_arrivals(f"gamma:5:{cv}").times(20000, np.random.default_rng(1))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


@pytest.mark.parametrize("text", ["poisson", "poisson:0", "gamma:1", "at-once:2", "poisson:x", ""])
def test_other_arrivals_are_refused(text: str) -> None:
    with pytest.raises(WorkloadError, match="gamma:RATE:CV"):
        parse_arrivals(text)


def test_a_mix_assigns_its_shares_to_whole_sessions() -> None:
    workload = open_workload("chat,sessions=400,turns=3")
    mix = parse_slo_mix("interactive:0.25,slow:0.75:9:-")
    requests = requests_of(AdaptedWorkload(workload, Adaptation(slo_mix=mix)))
    classes: dict[int | None, set[str]] = {}
    for request in requests:
        classes.setdefault(request.session, set()).add(request.slo_class)
    several = {session: names for session, names in classes.items() if session is not None}
    assert all(len(names) == 1 for names in several.values())
    share = sum(names == {"interactive"} for names in several.values()) / len(several)
    assert share == pytest.approx(0.25, abs=0.08)
    slow = next(request for request in requests if request.slo_class == "slow")
    assert (slow.ttft_slo_s, slow.tbt_slo_s) == (9.0, None)
    quick = next(request for request in requests if request.slo_class == "interactive")
    assert (quick.ttft_slo_s, quick.tbt_slo_s, quick.priority) == (0.5, 0.05, 1)


def test_objectives_scale_with_what_the_prompt_takes_alone() -> None:
    workload = open_workload("chat,sessions=50,turns=3")
    change = Adaptation(slo_mix=parse_slo_mix("quick:0.5:0.5+3x:0.05,slow:0.5:9:-"))
    scaled = AdaptedWorkload(workload, change, lambda n_tokens: 0.001 * n_tokens)
    seen = set()
    for request in requests_of(scaled):
        seen.add(request.slo_class)
        expected_s = 9.0
        if request.slo_class == "quick":
            expected_s = 0.5 + 3 * 0.001 * request.input_tokens
        assert request.ttft_slo_s == pytest.approx(expected_s)
        assert request.priority == int(request.slo_class == "quick")
    assert seen == {"quick", "slow"}
    with pytest.raises(WorkloadError, match="give fixed ones"):
        AdaptedWorkload(workload, change)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("interactive:0.5", "sum to 1"),
        ("gold:1", "no service class 'gold'"),
        ("gold:1:2", "CLASS:SHARE"),
        ("gold:1:x:-", "no number"),
        ("gold:1:0.5+3:-", r"\+Nx"),
        ("gold:1:0.5+x:-", "no number"),
    ],
)
def test_other_mixes_are_refused(text: str, says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        parse_slo_mix(text)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("jazz", "the known ones are agent_sessions"),
        ("chat,tempo=3", "no option 'tempo'.*turns"),
        ("chat,turns=many", "turns must be a number"),
        ("chat,turns", "write NAME=VALUE"),
        ("chat:file", "takes no path"),
        ("mooncake", "needs a file"),
        ("mooncake:x,turns=3", "no option 'turns'"),
        ("rag,documents=1", "2 documents can't be retrieved from 1"),
        ("rag,sorted=1", "true or false"),
        ("shared_context,mode=other", "multi-turn"),
        ("chat,sessions=0", "sessions over 0"),
    ],
)
def test_a_bad_spec_is_one_sentence(spec: str, says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        open_workload(spec)
