"""Puts a policy in charge of a scheduler's waiting queue."""

from __future__ import annotations

import logging
from typing import Any

from tiered_kv.plugin.queue import clock_tick
from tiered_kv.plugin.queue.order import RequestOrder
from tiered_kv.scheduler.policies.slack import SlackPolicy
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.scheduler.request_policy import RequestPolicy, request_policies

logger = logging.getLogger(__name__)


def install(scheduler: Any, policy_name: str) -> None:
    """Put the policy of that name in charge of `scheduler`, which was just made."""
    cache = scheduler.tree_cache
    parts = cache.parts
    if parts.cost_model is None:
        logger.warning(
            "Tiered KV: --schedule-policy %s orders the queue, since --tiered-kv-policy %s needs "
            "the cost model that this model has none of.",
            scheduler.server_args.schedule_policy,
            policy_name,
        )
        return
    order = RequestOrder(
        scheduler,
        _make(policy_name, scheduler.server_args.trust().least_ttft_ms),
        parts.hierarchy,
        parts.cost_model,
        parts.residency,
        parts.metrics,
        max_wait_s=SlackConfig().max_wait_s if policy_name == "slack" else None,
    )
    scheduler.tiered_kv_order = order
    scheduler.policy.tiered_kv_order = order
    cache.observer = order
    clock_tick.attach(scheduler.request_receiver, order.clock)
    logger.info("Tiered KV: the waiting queue is ordered by the policy %s.", policy_name)


def _make(policy_name: str, least_ttft_ms: float | None) -> RequestPolicy:
    """The policy of that name; the one that knows deadlines of tasks gets the operator's limit."""
    make = request_policies.get(policy_name)
    if make is SlackPolicy and least_ttft_ms is not None:
        return SlackPolicy(SlackConfig(least_ttft_s=least_ttft_ms / 1000))
    return make()
