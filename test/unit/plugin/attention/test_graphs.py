"""CUDA graphs for batches in groups: SGLang's own graph runner, with a stand-in for graphs.

Guarantee: a pass is replayed in the graph for its plan, or in SGLang's, or runs eagerly, and
attends to all of every context in each case; runners that do something else keep SGLang's graphs
alone. No kernel was run (`support_plugin/graph_runner.py` says what was).
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner.shape_key import ShapeKey

from support_attention.batches import Batch, draw_batch, in_float64, worst_error
from support_plugin import on_release
from support_plugin.graph_runner import SIZES, Rig
from tiered_kv.attention.flashinfer_graph import fits_graph
from tiered_kv.attention.plan import CascadePlan, Group, Level
from tiered_kv.plugin.attention import graphs as cascade_graphs
from tiered_kv.plugin.attention.cascade import PlannedBatch

pytestmark = on_release.reads_shared_kv_on_gpus


def drawn(seed: int, n_levels: int) -> tuple[Batch, CascadePlan]:
    """A batch with a plan that fits the graph of its size."""
    while True:
        batch = draw_batch(random.Random(seed), torch.float64)
        plan = batch.plan(2)
        n_rows = next(size for size in SIZES if size >= plan.n_rows)
        if len(plan.levels) == n_levels and fits_graph(plan, n_rows):
            return batch, plan
        seed += 1000


def test_each_size_has_a_graph_per_number_of_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(drawn(0, 1)[0], monkeypatch)
    keys = rig.capture()
    labels = [None, "tiered_kv_cascade_1", "tiered_kv_cascade_2"]
    expected = [ShapeKey(size, None, label) for size in SIZES[:0:-1] for label in labels]
    assert keys == [*expected, ShapeKey(1)]


@pytest.mark.parametrize("n_levels", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_a_pass_is_replayed_in_the_graph_of_its_plan(
    seed: int, n_levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, plan = drawn(seed, n_levels)
    rig = Rig(batch, monkeypatch)
    rig.capture()
    exact = in_float64(batch)
    size = next(size for size in SIZES if size >= plan.n_rows)
    plain = CascadePlan(plan.n_rows)
    # SGLang's graph of the same size still attends by itself, before and after.
    for current in (plain, plan, plain, plan):
        output = rig.decode(current)
        assert output is not None
        assert worst_error(output, exact) < 1e-12
    label = f"tiered_kv_cascade_{n_levels}"
    ours, theirs = ShapeKey(size, None, label), ShapeKey(size)
    assert rig.runner.backend.replayed == [theirs, ours, theirs, ours]


def test_levels_are_planned_when_the_plan_or_the_graph_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, plan = drawn(3, 1)
    rig = Rig(batch, monkeypatch)
    rig.capture()
    graphs = rig.backend.cascade_graphs
    planned: list[CascadePlan] = []
    levels = graphs.levels_for(plan)
    original = levels.plan
    monkeypatch.setattr(levels, "plan", lambda p, t: planned.append(p) or original(p, t))
    other = CascadePlan(plan.n_rows, plan.levels)
    for current in (plan, plan, CascadePlan(plan.n_rows), plan, other, other, plan):
        output = rig.decode(current)
        assert output is not None
        assert worst_error(output, in_float64(batch)) < 1e-12
    assert [current is plan for current in planned] == [True, False, True]


def test_a_plan_that_does_not_fit_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, plan = next(
        (batch, plan)
        for batch, plan in (drawn(seed, 1) for seed in range(100))
        if plan.n_rows >= 9 and len(plan.levels[0].groups[0].rows) >= 6
    )
    rig = Rig(batch, monkeypatch)
    rig.capture()
    group = plan.levels[0].groups[0]
    pairs = [Group(group.rows[i : i + 2], 0, 1) for i in range(0, 5, 2)]
    many = CascadePlan(plan.n_rows, (Level(tuple(pairs)),))
    n_rows = next(size for size in SIZES if size >= plan.n_rows)
    assert fits_graph(many, n_rows)  # three pairs and the rest
    deep = CascadePlan(
        plan.n_rows, tuple(Level((Group(group.rows, i, 1),)) for i in range(min(3, group.length)))
    )
    assert rig.decode(many) is not None
    assert len(deep.levels) == 3
    assert rig.decode(deep) is None
    assert not rig.planner.has_graph(deep)
    assert rig.planner.has_graph(many)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("require_gathered_buffer", True, "data-parallel"),
        ("enable_two_batch_overlap", True, "several streams"),
        ("capture_forward_mode", ForwardMode.TARGET_VERIFY, "speculative"),
        ("backend", SimpleNamespace(capture_one=lambda *args, **kwargs: None), "segments"),
    ],
)
def test_runners_that_get_no_graphs_of_ours(
    field: str,
    value: Any,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch, plan = drawn(0, 1)
    rig = Rig(batch, monkeypatch)
    theirs: list[Any] = []

    def original(runner: Any, size: int, *args: Any) -> None:
        theirs.append((size, args[-1]))

    setattr(rig.runner, field, value)
    with caplog.at_level("INFO"):
        for size in reversed(SIZES):
            cascade_graphs.capture_variants(original, rig.runner, size, rig.model, None, None)
    assert theirs == [(size, None) for size in reversed(SIZES)]
    assert [words in record.message for record in caplog.records] == [True]
    assert not rig.planner.has_graph(plan)


def test_variants_for_lora_stay_upstreams(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(drawn(0, 1)[0], monkeypatch)
    rig.runner.capture_one_shape(16, rig.model, None, "lora")
    assert list(rig.runner.backend.graphs) == [ShapeKey(16, None, "lora")]


def test_backends_without_cascade_are_upstreams() -> None:
    runner = SimpleNamespace(attn_backend=SimpleNamespace())
    assert cascade_graphs.may_run_graph(lambda *args: True, runner, "pass")
    assert cascade_graphs.variant_of_pass(lambda *args: "lora", runner, "pass") == "lora"
    calls: list[Any] = []
    cascade_graphs.capture_variants(lambda *args: calls.append(args), runner, 8, len)
    assert calls == [(runner, 8, len, None, None)]


def test_without_graphs_a_pass_with_levels_runs_eagerly() -> None:
    plan = CascadePlan(2, (Level((Group((0, 1), 0, 5),)),))
    planner = SimpleNamespace(current=PlannedBatch(plan, (9, 9), is_new=True))
    backend = SimpleNamespace(cascade=planner, cascade_graphs=None)
    runner = SimpleNamespace(attn_backend=backend)
    assert not cascade_graphs.may_run_graph(lambda *args: True, runner, "pass")
    planner.current = PlannedBatch(CascadePlan(2), (9, 9), is_new=True)
    assert cascade_graphs.may_run_graph(lambda *args: True, runner, "pass")
