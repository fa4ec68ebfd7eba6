"""Costs for a rig, so that loading or computing is the better by as much as a test wants."""

from __future__ import annotations

from dataclasses import replace

from support_tiers.tier_rig import PAGE_SIZE, Rig
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import find_model
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.scheduler.cost_model import CostModel, EdgeCost, PlacementCosts


def give_costs(
    rig: Rig,
    *,
    load_page_s: float = 1e-6,
    read_page_s: float = 1e-6,
    policy: str = "cost",
) -> CostModel:
    """Costs under which a page takes about 50 ms to compute and as long as told to move."""
    page_bytes = rig.page_format.page_bytes
    model = CostModel(
        find_model("SmolLM2-135M"),
        find_device("CPU-2"),
        {
            (Tier.HOST, Tier.DEVICE): EdgeCost(page_bytes / load_page_s, 0.0),
            (Tier.DEVICE, Tier.HOST): EdgeCost(page_bytes / load_page_s, 0.0),
            (Tier.DISK, Tier.HOST): EdgeCost(page_bytes / read_page_s, 0.0),
            (Tier.HOST, Tier.DISK): EdgeCost(page_bytes / read_page_s, 0.0),
            (Tier.STORE, Tier.HOST): EdgeCost(page_bytes / (2 * read_page_s), 0.0),
            (Tier.HOST, Tier.STORE): EdgeCost(page_bytes / (2 * read_page_s), 0.0),
        },
    )
    costs = PlacementCosts(model, bytes_per_token=page_bytes / PAGE_SIZE)
    config = replace(rig.config, load_policy=policy)
    rig.context.manager = MemoryManager(rig.forest, config, costs)
    return model


def page_s(rig: Rig, page: int = 0) -> float:
    """Seconds to compute one page."""
    return give_costs(rig).marginal_prefill_s(PAGE_SIZE, page * PAGE_SIZE)
