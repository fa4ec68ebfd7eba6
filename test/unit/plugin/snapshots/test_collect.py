"""What the scheduler's thread notes: true of the forest and the queue, and bounded.

The forest, the queue and the policy are real; what is read of SGLang's scheduler and of the tiers'
queues stands in for them. test/integration/test_view.py has them all.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from benchmark.micro.snapshot import Scheduler
from support_view.recorded import over_the_wire
from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency
from tiered_kv.plugin.snapshots import collect
from tiered_kv.snapshot.prefixes import PREFIXES_MAX
from tiered_kv.snapshot.requests import RUNNING_MAX, WAITING_MAX
from tiered_kv.snapshot.schema import shaped


def take(scheduler: Scheduler) -> dict[str, Any]:
    """As it is served."""
    return shaped(over_the_wire(scheduler.snapshot()), at_s=0.0)


@pytest.fixture(autouse=True)
def time_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are about what is noted, however slow the machine is."""
    monkeypatch.setattr(collect, "PART_S", 100.0)


@pytest.mark.parametrize(("n_nodes", "n_waiting"), [(50, 3), (600, 200)])
def test_shown_and_rest_are_the_forest(n_nodes: int, n_waiting: int) -> None:
    scheduler = Scheduler("slack", n_nodes, n_waiting, n_documents=5)
    forest, chosen = scheduler.talk.forest, random.Random(n_nodes)
    for node in chosen.sample(forest.nodes(), n_nodes // 2):
        forest.set_resident(node, Tier.HOST, range(node.n_pages))
    for _ in range(30):
        scheduler.step()
    served = take(scheduler)["forest"]
    nodes = {node.node_id: node for node in forest.nodes()}
    assert served["count"] == len(nodes)
    assert served["tokens"] == sum(node.n_tokens for node in nodes.values())
    shown = served["prefixes"]
    assert len(shown) == min(PREFIXES_MAX, len(nodes))
    assert served["rest"]["count"] == len(nodes) - len(shown)
    assert served["tokens"] == served["rest"]["tokens"] + sum(p["tokens"] for p in shown)
    for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK):
        name = tier.name.lower()
        there = sum(p["tokens"] for p in shown if p["tiers"][name] == "resident")
        rest = served["rest"]["resident_tokens"][name]
        assert rest >= 0
        assert there + rest == forest.resident_tokens(tier)
    for prefix in shown:
        node = nodes[prefix["id"]]
        assert node.parent is not None
        assert prefix["parent"] == node.parent.node_id
        assert (prefix["tokens"], prefix["end"]) == (node.n_tokens, node.end)
        assert (prefix["pages"], prefix["hits"]) == (node.n_pages, node.hits)
        assert prefix["name"] == node.last_page_hash.hex()[:8]
        assert prefix["users"] == node.pins(Tier.DEVICE)
    # Within a parent: its own tokens, those of shown children, and others.
    for prefix in shown:
        below = sum(p["tokens_with_below"] for p in shown if p["parent"] == prefix["id"])
        assert prefix["tokens_with_below"] >= prefix["tokens"] + below
    trees = {tree["id"]: tree["tokens"] for tree in served["trees"]}
    assert sum(trees.values()) <= served["tokens"]
    assert {p["parent"] for p in shown if p["parent"] < 0} == set(trees)


def test_requests_are_bounded_and_counted() -> None:
    scheduler = Scheduler("slack", 300, 500)
    requests = take(scheduler)["requests"]
    assert requests["waiting"]["count"] == 500
    assert len(requests["waiting"]["rows"]) == WAITING_MAX
    assert requests["running"]["count"] == 128
    assert len(requests["running"]["rows"]) == RUNNING_MAX
    assert requests["parked"] == {"count": 0, "rows": []}
    slacks = [row["slack_s"] for row in requests["waiting"]["rows"]]
    assert any(slack is not None and slack < 0 for slack in slacks)
    assert any(slack is not None and slack > 0 for slack in slacks)
    assert len({row["name"] for row in requests["waiting"]["rows"]}) == WAITING_MAX


@pytest.mark.parametrize("policy", ["slack", "fcfs", "edf", "lpm"])
def test_slack_is_until_the_latest_start(policy: str) -> None:
    scheduler = Scheduler(policy, 100, 8)
    rows = {row["name"]: row for row in take(scheduler)["requests"]["waiting"]["rows"]}
    assert len(rows) == 8
    for req in scheduler.reqs.values():
        request = req.tiered_kv_queued
        row = rows[req.rid]
        work_s = row["age_s"] + row["slack_s"] - request.slo.ttft_s
        assert -10 < work_s <= 0  # what its prefill takes
        assert (row["slo_class"], row["tenant"]) == (request.slo.slo_class, request.tenant)


def test_a_request_goes_on_from_the_deepest_prefix_that_is_shown() -> None:
    scheduler = Scheduler("slack", 60, 10, n_documents=3)
    snapshot = take(scheduler)
    shown = {prefix["id"] for prefix in snapshot["forest"]["prefixes"]}
    assert len(shown) == 60
    rows = {row["name"]: row for row in snapshot["requests"]["waiting"]["rows"]}
    for req in scheduler.reqs.values():
        assert rows[req.rid]["prefix"] == req.tiered_kv_queued.path[-1].node_id
    running = {row["name"]: row for row in snapshot["requests"]["running"]["rows"]}
    for req in scheduler.scheduler.running_batch.reqs[:RUNNING_MAX]:
        assert running[req.rid]["prefix"] == req.last_node.node_id
        assert running[req.rid]["gang"] is not None


def test_transfers_under_way_show() -> None:
    scheduler = Scheduler("slack", 20, 1, n_documents=1)
    (document,) = (node for node in scheduler.talk.forest.nodes() if node.start == 0)
    slots = range(document.n_pages)
    scheduler.talk.forest.start_transfer(document, Tier.HOST, Residency.WRITING_BACK, slots, 1)
    (first, *_) = take(scheduler)["forest"]["prefixes"]
    assert first["tiers"] == {
        "device": "resident",
        "host": "writing_back",
        "disk": first["tiers"]["disk"],
    }


def test_no_token_leaves_the_scheduler_unless_asked_for() -> None:
    scheduler = Scheduler("slack", 20, 1, n_documents=3)

    def ids() -> list[Any]:
        return [row[-1] for row in over_the_wire(scheduler.snapshot())["prefixes"]]

    assert all(tokens == [] for tokens in ids())
    scheduler.scheduler.server_args.tiered_kv_view_text_tokens = 4
    assert all(len(tokens) == 4 for tokens in ids())


def test_it_leaves_off_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PART_S", 0.0)
    scheduler = Scheduler("slack", 600, 200)
    snapshot = take(scheduler)
    assert 0 < len(snapshot["forest"]["prefixes"]) < PREFIXES_MAX
    assert snapshot["requests"]["waiting"]["count"] == 200
    forest = snapshot["forest"]
    shown = sum(p["tokens"] for p in forest["prefixes"])
    assert forest["tokens"] == forest["rest"]["tokens"] + shown


def test_a_snapshot_is_small() -> None:
    scheduler = Scheduler("slack", 2000, 2000)
    assert len(msgspec.msgpack.encode(scheduler.snapshot())) < 40_000


def test_without_an_order_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler("fcfs", 50, 5)
    del scheduler.scheduler.tiered_kv_order
    scheduler.scheduler.server_args.schedule_policy = "lpm"
    for req in scheduler.reqs.values():
        monkeypatch.setattr(type(req), "origin_input_ids", [1, 2, 3], raising=False)
        monkeypatch.setattr(
            type(req), "time_stats", SimpleNamespace(wait_queue_entry_time=1.0), raising=False
        )
    snapshot = take(scheduler)
    assert snapshot["policy"] == "lpm"
    assert snapshot["requests"]["waiting"]["count"] == 5
    assert snapshot["requests"]["waiting"]["in_time"] is None
