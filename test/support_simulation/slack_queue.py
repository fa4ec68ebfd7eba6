"""Queues that the policy slack orders, and prompts that share nothing."""

from __future__ import annotations

from support_simulation.builders import Queue
from tiered_kv.scheduler.policies.slack import SlackPolicy
from tiered_kv.scheduler.policies.slack_config import SlackConfig


def queue(**changes: object) -> Queue:
    return Queue(SlackPolicy(SlackConfig(**changes)))  # type: ignore[arg-type]


def blocks(request_id: int, n: int = 4) -> list[int]:
    """A prompt that shares nothing with any other."""
    return [1000 * (request_id + 1) + at for at in range(n)]
