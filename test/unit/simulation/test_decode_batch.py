"""A decode batch under cascade: what its passes cost, in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from support_simulation.builders import BLOCK_TOKENS, MODEL, call, recorded, server
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.simulation.decode_batch import DecodeBatch
from tiered_kv.simulation.engine import Simulation
from tiered_kv.simulation.execution import Execution
from tiered_kv.simulation.live import LiveRequest, new_record

# The first three begin alike, and of those the first two go on alike; the last shares nothing.
PROMPTS = (
    [*range(1, 41), *range(50, 60), 70],
    [*range(1, 41), *range(50, 60), 80, 81],
    [*range(1, 41), 90],
    list(range(100, 120)),
)


def decoding(cache: object, index: int) -> LiveRequest:
    """Request `index`, its prompt computed."""
    request = call(index, 0.0, PROMPTS[index], output_tokens=10)
    queued = QueuedRequest(
        index, 0.0, cache.root, request.blocks, request.input_tokens, request.output_tokens
    )
    queued.prefilled_tokens = request.input_tokens
    return LiveRequest(request, queued, new_record(request))


def test_under_cascade_a_pass_reads_a_shared_prefix_once() -> None:
    settings = server()
    (instance,) = Simulation(recorded([]), settings).instances
    batch = DecodeBatch(instance.cache, is_cascade=True)
    lives = [decoding(instance.cache, index) for index in range(4)]
    for live in lives:
        batch.add(live)

    execution, steps = Execution(settings.costs()), 9
    ends_s = execution.decode_ends_s(
        0.0, batch.context_tokens, len(batch), steps, batch.shared_tokens_saved
    )

    distinct = 40 + 10 + 1 + 2 + 1 + 20
    device = settings.device
    read = [distinct * BLOCK_TOKENS + 4 + 4 * at + 4 for at in range(steps)]
    bandwidth = device.memory_bandwidth * device.bandwidth_efficiency
    pass_s = [
        device.iteration_floor_s + (MODEL.weight_bytes + n * MODEL.kv_bytes_per_token) / bandwidth
        for n in read
    ]
    assert ends_s == pytest.approx(np.cumsum(pass_s))


def test_who_leaves_takes_its_share_of_the_prefix_along() -> None:
    (instance,) = Simulation(recorded([]), server()).instances
    batch = DecodeBatch(instance.cache, is_cascade=True)
    lives = [decoding(instance.cache, index) for index in range(4)]
    for live in lives:
        batch.add(live)
    saved = [batch.shared_tokens_saved]
    for live in lives[:3]:
        batch.remove(live)
        saved.append(batch.shared_tokens_saved)
    assert saved == [(2 * 40 + 10) * BLOCK_TOKENS, 40 * BLOCK_TOKENS, 0, 0]


def test_without_cascade_nothing_is_saved() -> None:
    (instance,) = Simulation(recorded([]), server()).instances
    batch = DecodeBatch(instance.cache)
    for index in range(4):
        batch.add(decoding(instance.cache, index))
    assert batch.shared_tokens_saved == 0
