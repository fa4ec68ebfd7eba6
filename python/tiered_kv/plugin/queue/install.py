"""Puts a policy in charge of a scheduler's waiting queue."""

from __future__ import annotations

import logging
from dataclasses import replace
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
        make_policy(policy_name, scheduler.server_args),
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


def make_policy(name: str, server_args: Any) -> RequestPolicy:
    """The policy of that name; the one that knows programs gets what the operator says of them."""
    make = request_policies.get(name)
    if make is not SlackPolicy:
        return make()
    config = SlackConfig(working_set=not server_args.tiered_kv_never_pause)
    least_ttft_ms = server_args.trust().least_ttft_ms
    if least_ttft_ms is not None:
        config = replace(config, least_ttft_s=least_ttft_ms / 1000)
    return SlackPolicy(config)
