"""The cost model of the model and machine being served, before anything was measured."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from tiered_kv.core.device_spec import DeviceSpec, find_device, preset_for
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_config import Shape, read_shape
from tiered_kv.core.model_spec import ModelSpec
from tiered_kv.scheduler.cost_model import CostModel, EdgeCost
from tiered_kv.tiers.page_format import PageFormat

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

logger = logging.getLogger(__name__)

#: What a local NVMe drive gives; the first reads and writes correct it.
DISK_READ = EdgeCost(bandwidth=2e9, latency_s=2e-4)
DISK_WRITE = EdgeCost(bandwidth=1e9, latency_s=2e-4)

#: What a store behind a network of 10 Gbit/s gives; the same.
STORE_READ = EdgeCost(bandwidth=1e9, latency_s=2e-3)
STORE_WRITE = EdgeCost(bandwidth=1e9, latency_s=2e-3)

_OTHER_GPU = "H100-80"


def build_cost_model(
    ctx: TreeCacheBuildContext, pool: Any, page_format: PageFormat, n_ranks: int
) -> CostModel | None:
    """None for a model whose configuration does not say how large its parts are.

    page_format: of pages on the host; n_ranks: those that compute the same requests.
    Seen as one device: a tensor-parallel group computes together, but each rank moves its own part
    of a page, so the edges are one rank's.
    """
    hf_config = ctx.model_config.hf_config
    dtype: torch.dtype = ctx.tp_worker.model_runner.model_config.dtype
    try:
        config = _as_published(hf_config.to_dict(), ctx.model_config.head_dim)
        shape = read_shape(config, str(ctx.server_args.model_path))
        # A config.json does not say how large layers with recurrent state are.
        counts = count(ctx.tp_worker.model_runner.model, shape) if ctx.is_hybrid_ssm else {}
        model = ModelSpec.of_shape(
            shape,
            **counts,
            weight_bytes_per_parameter=float(dtype.itemsize),
            kv_bytes_per_element=float(pool.dtype.itemsize),
        )
    except ConfigError as error:
        logger.warning("Tiered KV: no cost model (%s); what can be loaded is loaded.", error)
        return None
    device = nearest_device().scaled(n_ranks)
    link = EdgeCost(device.host_link_bandwidth / n_ranks, device.host_link_latency_s)
    logger.info(
        "Tiered KV: costs start from the figures of %s, %.0f bytes of KV per token and rank.",
        device.name,
        page_format.token_bytes,
    )
    return CostModel(
        model,
        device,
        {
            (Tier.HOST, Tier.DEVICE): link,
            (Tier.DEVICE, Tier.HOST): link,
            (Tier.DISK, Tier.HOST): DISK_READ,
            (Tier.HOST, Tier.DISK): DISK_WRITE,
            (Tier.STORE, Tier.HOST): STORE_READ,
            (Tier.HOST, Tier.STORE): STORE_WRITE,
        },
        host_bytes_per_token=page_format.token_bytes,
    )


def count(model: torch.nn.Module, shape: Shape) -> dict[str, int]:
    """How many parameters a model in memory has, on one rank, and how many a token uses."""
    total = in_experts = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        in_experts += parameter.numel() if ".experts." in name else 0
    idle_share = 1.0 - shape.experts.n_active / shape.experts.n_experts if shape.experts else 0.0
    return {
        "n_parameters": total,
        "n_active_parameters": total - round(in_experts * idle_share),
    }


def _as_published(config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Without what SGLang writes into every model's configuration: windows as wide as the rest."""
    for block in (config, config.get("text_config")):
        if isinstance(block, dict) and block.get("swa_head_dim") == head_dim:
            del block["swa_head_dim"]
    return config


def nearest_device() -> DeviceSpec:
    """The preset most like the device in use."""
    if not torch.cuda.is_available():
        return find_device("CPU-2")
    return preset_for(torch.cuda.get_device_name()) or find_device(_OTHER_GPU)
