"""The policy slack and programs: whose calls go first, and what a task's deadline does."""

from __future__ import annotations

from support_simulation.builders import Queue
from support_simulation.slack_queue import blocks, queue
from tiered_kv.api.slo import Slo
from tiered_kv.scheduler.policies.slack import SlackPolicy
from tiered_kv.scheduler.policies.slack_config import SlackConfig

TASK = Slo("agent", task_s=60.0)


def run(q: Queue, request_id: int, program: str, seconds: float) -> None:
    """A call that is served at once."""
    request = q.arrive(request_id, blocks(request_id), program=program)
    q.order()
    q.admit(request_id)
    q.now_s += seconds
    q.policy.on_finish(request, q.now_s)


def test_a_call_inherits_its_programs_deadline() -> None:
    q = queue()
    q.arrive(0, blocks(0), slo=Slo("none"))
    q.now_s = 1.0
    q.arrive(1, blocks(1), slo=TASK, program="a")
    q.arrive(2, blocks(2), slo=Slo("batch", 30.0))
    assert q.order() == [2, 1, 0]


def test_later_calls_of_a_program_have_what_is_left() -> None:
    q = queue()
    first = q.arrive(0, blocks(0), slo=TASK, program="a")
    q.order()
    q.admit(0)
    q.now_s = 50.0
    q.policy.on_finish(first, q.now_s)
    q.arrive(1, blocks(1), slo=TASK, program="b")
    q.arrive(2, blocks(2), slo=TASK, program="a")
    assert q.order() == [2, 1], "10 s are left of the one, 60 of the other"


def test_a_lost_task_leaves_a_call_its_own_objective() -> None:
    q = queue()
    slo = Slo("agent", ttft_s=100.0, task_s=20.0)
    q.arrive(0, blocks(0), slo=slo, program="a")
    q.arrive(1, blocks(1), slo=Slo("batch", 30.0))
    assert q.order() == [0, 1]
    q.now_s = 21.0
    assert q.order() == [1, 0], "due at 30 and at 100 now"


def test_a_task_gives_no_more_hurry_than_the_operator_allows() -> None:
    q = Queue(SlackPolicy(SlackConfig(least_ttft_s=2.0)))
    q.arrive(0, blocks(0), slo=Slo("agent", task_s=0.5), program="a")
    q.arrive(1, blocks(1), slo=Slo("standard", 1.9))
    assert q.order() == [1, 0]


def test_programs_under_way_go_before_new_ones_where_no_deadline_decides() -> None:
    q = queue()
    run(q, 0, "old", 20.0)
    q.arrive(1, blocks(1), program="new")
    q.now_s += 1.0
    q.arrive(2, blocks(2), program="old")
    assert q.order() == [2, 1]
    assert queue_without_programs() == [1, 2]


def queue_without_programs() -> list[int]:
    q = queue(programs=False)
    run(q, 0, "old", 20.0)
    q.arrive(1, blocks(1), program="new")
    q.now_s += 1.0
    q.arrive(2, blocks(2), program="old")
    return q.order()


def test_an_old_program_is_ahead_by_the_bound_on_waiting_at_most() -> None:
    q = queue(max_wait_s=10.0)
    run(q, 0, "old", 1000.0)
    q.arrive(1, blocks(1), program="new")
    q.now_s += 9.0
    q.arrive(2, blocks(2), program="old")
    assert q.order() == [2, 1]
    q.admit(2)
    q.now_s += 0.5
    q.arrive(3, blocks(3, 1), program="old")
    q.now_s += 0.4
    assert q.order() == [3, 1], "it came 9.5 s after the other"
    q.policy.on_abort(q.waiting.get(3), q.now_s)
    q.waiting.remove(q.waiting.get(3))
    q.now_s += 0.05
    q.arrive(4, blocks(4), program="young")
    assert q.order() == [1, 4]


def test_a_new_name_is_no_way_past_another_tenant() -> None:
    """Programs order the calls of one tenant; between tenants what each was given decides."""
    q = queue()
    for request_id in range(4):
        request = q.arrive(request_id, blocks(request_id), program=f"invented {request_id}")
        request.tenant = "a"
    honest = q.arrive(9, blocks(9), program="honest")
    q.policy.on_abort(honest, q.now_s)
    honest.tenant = "b"
    q.policy.on_arrival(honest, q.now_s)
    first = q.order()[0]
    q.admit(first)
    assert q.order()[0] == 9 or first == 9
