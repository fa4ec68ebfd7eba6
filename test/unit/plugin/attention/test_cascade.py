"""From the scheduler's decode batch to a plan, on real forest nodes and pretend batches.

Guarantee: a plan reaches the backend for the very pass it was made for and no other; it is made
anew exactly when the batch changes; what it groups shares its slots.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support_plugin import on_release
from tiered_kv.attention.payoff import AttentionShape, CascadeDevice
from tiered_kv.core.errors import ConfigError
from tiered_kv.forest.node import Node
from tiered_kv.plugin.attention import cascade
from tiered_kv.plugin.attention.cascade import CascadePlanner

SHAPE = AttentionShape(n_query_heads=8, n_kv_heads=2, head_dim=64, element_bytes=2)
FREE = CascadeDevice(
    name="free", bandwidth=1e12, level_overhead_s=0.0, group_overhead_s=0.0, source="made up"
)


def child(parent: Node, node_id: int, n_tokens: int) -> Node:
    tokens = array("q", range(n_tokens))
    return Node(node_id, parent, tokens, [], parent.end + n_tokens, 3)


ROOT = Node.make_root(-1, b"root", 3)
SYSTEM = child(ROOT, 1, 1024)
DOCUMENT = child(SYSTEM, 2, 2048)
ALONE = child(ROOT, 3, 640)


class Metrics:
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def decoded(self, context_tokens: int, read_tokens: int) -> None:
        self.seen.append((context_tokens, read_tokens))


def decode_batch(*rows: tuple[Any, int], **fields: Any) -> Any:
    """rows: (last node, context tokens) of each request."""
    defaults = {
        "forward_mode": SimpleNamespace(is_decode=lambda: True),
        "spec_info": None,
        "encoder_lens": None,
        "seq_lens_cpu": torch.tensor([n for _, n in rows]),
        "reqs": [Request(node) for node, _ in rows],
        "tree_cache": SimpleNamespace(parts=SimpleNamespace(metrics=Metrics())),
    }
    return SimpleNamespace(**defaults | fields)


class Request:
    """Compared by identity, as SGLang's `Req` is."""

    def __init__(self, last_node: Any) -> None:
        self.last_node = last_node
        self.prefix_indices = torch.arange(3)


def groups_of(plan: Any) -> list[list[tuple[tuple[int, ...], int, int]]]:
    return [[(g.rows, g.start, g.length) for g in level.groups] for level in plan.levels]


@pytest.fixture
def planner() -> CascadePlanner:
    return CascadePlanner(SHAPE, FREE)


def test_groups_follow_the_forest(planner: CascadePlanner) -> None:
    batch = decode_batch((SYSTEM, 1500), (DOCUMENT, 3100), (ALONE, 700), (DOCUMENT, 3500))
    planned = planner.plan(batch)
    assert planned is not None
    assert planned.n_tokens == (1500, 3100, 700, 3500)
    assert groups_of(planned.plan) == [[((0, 1, 3), 0, 1024)], [((1, 3), 1024, 2048)]]


def test_a_plan_holds_while_the_batch_grows(
    planner: CascadePlanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = decode_batch((SYSTEM, 1500), (SYSTEM, 1400))
    first = planner.plan(batch)
    monkeypatch.setattr(cascade, "plan_batch", None)
    batch.seq_lens_cpu = batch.seq_lens_cpu + 1
    second = planner.plan(batch)
    assert first is not None
    assert second is not None
    assert (first.is_new, second.is_new) == (True, False)
    assert second.plan is first.plan
    assert second.n_tokens == (1501, 1401)


def test_batches_that_take_turns_keep_their_plans(planner: CascadePlanner) -> None:
    batches = [decode_batch((SYSTEM, 1500), (SYSTEM, 1400 + i)) for i in range(cascade.PLANS_KEPT)]
    first = [planner.plan(batch) for batch in batches]
    again = [planner.plan(batch) for batch in batches]
    assert all(planned is not None and planned.is_new for planned in first)
    assert all(
        after is not None and before is not None and after.plan is before.plan
        for before, after in zip(first, again, strict=True)
    )
    planner.plan(decode_batch((ALONE, 900)))
    kept, dropped = planner.plan(batches[-1]), planner.plan(batches[0])
    assert kept is not None
    assert dropped is not None
    assert (kept.is_new, dropped.is_new) == (False, True)


@pytest.mark.parametrize(
    "change", ["joins", "leaves", "swaps", "deepens", "another request", "comes back"]
)
def test_a_change_makes_a_new_plan(planner: CascadePlanner, change: str) -> None:
    batch = decode_batch((SYSTEM, 3500), (SYSTEM, 3400), (ALONE, 900))
    before = planner.plan(batch)
    lengths = batch.seq_lens_cpu.tolist()
    if change == "joins":
        batch.reqs.append(Request(SYSTEM))
        lengths.append(2000)
    elif change == "leaves":
        del batch.reqs[0], lengths[0]
    elif change == "swaps":
        batch.reqs.reverse()
        lengths.reverse()
    elif change == "deepens":
        batch.reqs[0].last_node = batch.reqs[1].last_node = DOCUMENT
    elif change == "comes back":
        on_release.move_prefix(batch.reqs[1])
    else:
        batch.reqs[2] = Request(SYSTEM)
        lengths[2] = 1100
    batch.seq_lens_cpu = torch.tensor(lengths)
    after = planner.plan(batch)
    assert before is not None
    assert after is not None
    assert after.is_new
    assert groups_of(before.plan) == [[((0, 1), 0, 1024)]]
    assert (
        groups_of(after.plan)
        == {
            "joins": [[((0, 1, 3), 0, 1024)]],
            "leaves": [],
            "swaps": [[((1, 2), 0, 1024)]],
            "deepens": [[((0, 1), 0, 3072)]],
            "another request": [[((0, 1, 2), 0, 1024)]],
            "comes back": [[((0, 1), 0, 1024)]],
        }[change]
    )


def test_what_left_the_forest_is_shared_with_nobody(planner: CascadePlanner) -> None:
    orphan = child(SYSTEM, 9, 1024)
    orphan.parent = None
    batch = decode_batch((orphan, 2500), (orphan, 2500), (None, 2500), (ROOT, 2500), (SYSTEM, 2500))
    planned = planner.plan(batch)
    assert planned is not None
    assert planned.plan.levels == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"forward_mode": SimpleNamespace(is_decode=lambda: False)},
        {"spec_info": object()},
        {"encoder_lens": torch.tensor([3, 4])},
        {"seq_lens_cpu": None},
        {"reqs": []},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_other_batches_have_no_plan(planner: CascadePlanner, fields: dict[str, Any]) -> None:
    batch = decode_batch((SYSTEM, 1500), (SYSTEM, 1400), **fields)
    assert planner.plan(batch) is None
    planner.launch("pass", batch)
    planner.begin("pass")
    assert planner.take() is None


def test_a_plan_is_for_its_own_pass_once(planner: CascadePlanner) -> None:
    runner = SimpleNamespace(attn_backend=SimpleNamespace(cascade=planner))
    batch = decode_batch((SYSTEM, 1500), (SYSTEM, 1400))
    cascade.plan_launched("pass", object, batch, runner, return_hidden_states_before_norm=False)
    cascade.begin_pass(runner, "pass", None)
    assert planner.current is not None
    assert planner.take() is not None
    assert planner.take() is None

    cascade.plan_launched("next", object, batch, runner)
    cascade.begin_pass(runner, "warming up")
    assert planner.take() is None
    # What was launched and did not run is not carried out later, either.
    cascade.begin_pass(runner, "next")
    assert planner.take() is None
    assert batch.tree_cache.parts.metrics.seen == [(2900, 2900 - 1024)] * 2


def test_backends_without_cascade_are_left_alone() -> None:
    runner = SimpleNamespace(attn_backend=SimpleNamespace())
    cascade.plan_launched("pass", object, None, runner)
    cascade.begin_pass(runner, "pass")


def model_runner(mode: str = "auto", **fields: Any) -> Any:
    server_args = SimpleNamespace(
        tiered_kv=True,
        tiered_kv_cascade=mode,
        device="cpu",
        tp_size=2,
        enable_deterministic_inference=False,
        enable_torch_compile=False,
        speculative_algorithm=None,
        enable_dp_attention=False,
        attn_dp_size=1,
        pp_size=1,
        **on_release.attention_backends("torch_native"),
    )
    config = SimpleNamespace(
        num_attention_heads=16,
        head_dim=64,
        get_num_kv_heads=lambda tp_size: 8 // tp_size,
        is_encoder_decoder=False,
    )
    return SimpleNamespace(
        **{
            "server_args": server_args,
            "model_config": config,
            "token_to_kv_pool": SimpleNamespace(dtype=torch.bfloat16),
            "is_draft_worker": False,
            "use_mla_backend": False,
            "sliding_window_size": None,
        }
        | fields
    )


def test_the_planner_of_one_rank() -> None:
    planner = cascade.make_planner(model_runner())
    assert planner is not None
    assert planner.shape == AttentionShape(
        n_query_heads=8, n_kv_heads=4, head_dim=64, element_bytes=2
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_mla_backend": True}, "multi-head latent attention"),
        ({"sliding_window_size": 4096}, "sliding-window"),
    ],
)
def test_models_without_cascade(fields: dict[str, Any], words: str) -> None:
    assert cascade.make_planner(model_runner(**fields)) is None
    with pytest.raises(ConfigError, match=words):
        cascade.make_planner(model_runner("on", **fields))


def test_off_and_draft_models_have_none() -> None:
    assert cascade.make_planner(model_runner("off", use_mla_backend=True)) is None
    assert cascade.make_planner(model_runner("on", is_draft_worker=True)) is None
