"""Programs: which request is a call of which, what they were given, and when their calls are due.

Guarantee: names that callers invent cost no more than so many; nobody's requests become part of
another tenant's program.
"""

from __future__ import annotations

import math
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support_simulation.builders import BLOCK_TOKENS, Queue
from tiered_kv.api.slo import Slo
from tiered_kv.scheduler.policies.pausing import PAUSE_MAX_S
from tiered_kv.scheduler.program_names import ProgramNames, program_of
from tiered_kv.scheduler.programs import GENERATIONS_MAX, Programs
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import request_policies
from tiered_kv.scheduler.tasks import Tasks

Q = Queue(request_policies.get("fcfs")())


def call(
    request_id: int, program: str = "", arrival_s: float = 0.0, blocks: int = 1, **more: object
) -> QueuedRequest:
    return QueuedRequest(
        request_id=request_id,
        arrival_s=arrival_s,
        root=Q.root,
        tokens=array("q", range(blocks)),
        prompt_tokens=blocks * BLOCK_TOKENS,
        max_new_tokens=10,
        queued_s=arrival_s,
        program=program,
        **more,  # type: ignore[arg-type]
    )


def served(programs: Programs, request: QueuedRequest, start_s: float, end_s: float) -> None:
    programs.arrived(request, start_s)
    programs.admitted(request, start_s)
    programs.ended(request, end_s)


# -- what they were given ------------------------------------------------------------------------


def test_calls_of_one_name_are_one_program() -> None:
    programs = Programs()
    served(programs, call(0, "a", 5.0), 5.0, 8.0)
    program, is_new = programs.arrived(call(1, "a", 20.0), 20.0)
    assert is_new
    assert (program.started_s, program.served_s, program.n_calls) == (5.0, 3.0, 2)
    assert programs.arrived(call(1, "a", 20.0), 21.0) == (program, False), "it is back in the queue"
    assert program.n_calls == 2
    alone, _ = programs.arrived(call(2), 22.0)
    assert alone is not program
    assert len(programs) == 1


def test_what_runs_twice_counts_twice() -> None:
    programs, request = Programs(), call(0, "a")
    programs.arrived(request, 0.0)
    programs.admitted(request, 1.0)
    programs.arrived(request, 3.0)
    programs.admitted(request, 10.0)
    programs.ended(request, 11.0)
    assert next(iter(programs)).served_s == 3.0
    assert programs.ended(request, 12.0) is None
    programs.admitted(request, 13.0)
    assert programs.of(request).n_open == 0, "it is not known any more"


def test_branches_count_together_and_along_the_longest_path() -> None:
    programs = Programs()
    served(programs, call(0, "parent"), 0.0, 10.0)
    branches = [call(1 + n, f"branch {n}", 10.0, parent_program="parent") for n in range(3)]
    for request in branches:
        child, _ = programs.arrived(request, 10.0)
        assert (child.started_s, child.path_s, child.served_s) == (0.0, 10.0, 0.0)
        programs.admitted(request, 10.0)
    for n, request in enumerate(branches):
        programs.ended(request, 12.0 + n)
    last = call(9, "parent", 20.0)
    after, _ = programs.arrived(last, 20.0)
    assert (after.served_s, after.path_s, programs.path_s(last)) == (10.0 + 2 + 3 + 4, 14.0, 14.0)


@pytest.mark.parametrize(("policy", "first"), [("plas", 5), ("atlas", 4)])
def test_who_has_branches_is_behind_by_their_sum_and_not_by_their_path(
    policy: str, first: int
) -> None:
    """Four branches of 3 s beside one another, against calls that take 4 s in a row."""
    q = Queue(request_policies.get(policy)())
    done = [q.arrive(n, [n], program="forked") for n in range(4)]
    done.append(q.arrive(6, [6], program="single"))
    for request in done:
        q.admit(request.request_id)
    for request, end_s in zip(done, (3.0, 3.0, 3.0, 3.0, 4.0), strict=True):
        q.policy.on_finish(request, end_s)
    q.now_s = 9.0
    q.arrive(4, [4], program="forked")
    q.arrive(5, [5], program="single")
    assert q.order() == [first, 9 - first]


def test_generations_are_bounded() -> None:
    programs = Programs()
    for n in range(100):
        request = call(n, str(n), float(n), parent_program=str(n - 1))
        program, _ = programs.arrived(request, float(n))
        depth = 0
        while program.parent is not None:
            program, depth = program.parent, depth + 1
        assert depth <= GENERATIONS_MAX
    assert program.root() is program


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.integers(0, 30)), max_size=120))
def test_invented_names_cost_no_more_than_so_many(
    events: list[tuple[int, bool, int]],
) -> None:
    programs, opened = Programs(n_max=4), list[QueuedRequest]()
    for n, (name, ends, parent) in enumerate(events):
        request = call(n, str(name), float(n), parent_program=str(parent))
        programs.arrived(request, float(n))
        programs.admitted(request, float(n))
        opened.append(request)
        if ends:
            programs.ended(opened.pop(n % len(opened)), float(n))
        assert len(programs) <= 4
        for one in opened:
            assert programs.of(one).n_open >= 1
    for one in opened:
        assert programs.ended(one, 1e3) is not None
    assert all(program.n_open == 0 for program in programs)


# -- names ---------------------------------------------------------------------------------------


class Chats:
    """Calls over a forest of pages, one unit each."""

    def __init__(self) -> None:
        self.q = Queue(request_policies.get("fcfs")())
        self.names = ProgramNames(1)
        self.n = 0

    def ask(self, prompt: list[int], answer: list[int], *, tenant: str = "") -> str:
        request = self.q.arrive(self.n, prompt)
        self.n += 1
        request.tenant = tenant
        self.names.arrived(request)
        self.q.admit(request.request_id)
        whole = array("q", [*prompt, *answer])
        self.q.forest.insert(self.q.root, whole[: len(prompt)], range(len(prompt)))
        result = self.q.forest.insert(self.q.root, whole, range(len(whole)))
        self.names.ended(request, result.last)
        return request.program


def test_a_prompt_that_goes_on_is_the_next_call() -> None:
    chats = Chats()
    first = chats.ask([1, 2], [3])
    assert chats.ask([7, 8], [9]) != first
    assert chats.ask([1, 2, 3, 4], [5]) == first
    assert chats.ask([1, 2, 3, 4, 5, 6], []) == first
    assert chats.ask([1, 2, 3, 4, 8, 8], []) == first, "as from the prompt with another answer"


def test_a_common_template_makes_no_program() -> None:
    chats = Chats()
    programs = {chats.ask([1, 2, 3, 10 + n], [90 + n]) for n in range(5)}
    assert len(programs) == 5
    chats.ask([1, 2, 3], [50])
    chats.ask([1, 2, 3], [51])
    assert chats.ask([1, 2, 3, 30], []) != chats.ask([1, 2, 3, 31], [])


def test_another_tenant_does_not_go_on_with_it() -> None:
    chats = Chats()
    first = chats.ask([1, 2], [3], tenant="a")
    assert chats.ask([1, 2, 3, 4], [], tenant="b") != first
    assert chats.ask([1, 2, 3, 5], [], tenant="a") == first


def test_what_callers_say_counts() -> None:
    assert program_of("a", None) == ""
    assert len({program_of("a", "b c"), program_of("a b", "c"), program_of("", "a b c")}) == 3
    chats, request = Chats(), call(0, "given")
    chats.names.arrived(request)
    assert request.program == "given"


def test_remembered_ends_are_bounded() -> None:
    chats = Chats()
    chats.names = ProgramNames(1, n_max=8)
    for n in range(50):
        chats.ask([100 * n + 1, 100 * n + 2], [100 * n + 3])
        assert len(chats.names) <= 8


# -- tasks ---------------------------------------------------------------------------------------


def test_a_call_is_due_when_there_is_time_left_for_the_rest() -> None:
    tasks = Tasks()
    slo = Slo("agent", task_s=100.0)

    def one(request_id: int, name: str, start_s: float, **more: object) -> QueuedRequest:
        request = call(request_id, name, start_s, slo=slo, **more)
        tasks.arrived(request, start_s)
        return request

    assert tasks.due_s(one(0, "first", 0.0)) == 100.0, "nothing is known of calls to come"
    for program in range(4):
        for n in range(3):
            start_s = 1000.0 * program + 10.0 * n
            request = one(10 * program + n + 100, f"p{program}", start_s)
            tasks.admitted(request, start_s)
            request.admitted_s, request.first_token_s = start_s, start_s + 1.0
            tasks.ended(request, start_s + 3.0)
    # Each call runs 3 s, answers for 2 of them, and the next comes 7 s later.
    fresh = tasks.due_s(one(1000, "new", 9000.0))
    assert 9000.0 + 100.0 - 2.0 - 2 * 10.0 <= fresh < 9100.0 - 2.0 - 1.0
    last = one(1001, "last", 9000.0, is_last_call=True)
    assert tasks.due_s(last) == pytest.approx(9098.0)
    assert tasks.due_s(call(0, "first")) == math.inf


# -- orders --------------------------------------------------------------------------------------


def queue(name: str) -> Queue:
    return Queue(request_policies.get(name)())


def run(q: Queue, request_id: int, program: str, seconds: float) -> None:
    """A call that is served at once."""
    request = arrive(q, request_id, program)
    q.admit(request_id)
    q.now_s += seconds
    q.policy.on_finish(request, q.now_s)


def arrive(q: Queue, request_id: int, program: str, blocks: int = 2) -> QueuedRequest:
    return q.arrive(request_id, [request_id * 100 + at for at in range(blocks)], program=program)


def test_the_program_that_was_given_least_comes_first() -> None:
    q = queue("plas")
    run(q, 0, "much", 30.0)
    run(q, 1, "little", 3.0)
    arrive(q, 2, "much")
    arrive(q, 3, "little")
    arrive(q, 4, "new")
    assert q.order() == [4, 3, 2]


def test_programs_that_were_given_about_as_much_go_by_arrival() -> None:
    q = queue("plas")
    run(q, 0, "a", 9.0)
    run(q, 1, "b", 8.5)
    arrive(q, 2, "a")
    q.now_s += 1.0
    arrive(q, 3, "b")
    assert q.order() == [2, 3]


def test_the_program_that_began_first_comes_first() -> None:
    q = queue("program-fcfs")
    run(q, 0, "old", 1.0)
    arrive(q, 1, "new")
    q.now_s += 5.0
    arrive(q, 2, "old")
    assert q.order() == [2, 1]


def test_programs_pause_when_contexts_do_not_fit_and_not_for_ever() -> None:
    q = queue("pausing")
    q.available_tokens = 10 * BLOCK_TOKENS
    run(q, 0, "in progress", 1.0)
    arrive(q, 1, "large", 20)
    arrive(q, 2, "small", 3)
    arrive(q, 3, "in progress", 4)
    assert q.order() == [3, 2], "the large one pauses"
    q.now_s += PAUSE_MAX_S + 1.0
    arrive(q, 4, "smaller", 1)
    assert q.order() == [3, 1, 2], "it has paused for long enough, and leaves no room"


def test_an_idle_pool_takes_whoever_comes_first() -> None:
    q = queue("pausing")
    q.available_tokens = BLOCK_TOKENS
    arrive(q, 0, "large", 20)
    assert q.order() == [0], "nobody would make room for it"
