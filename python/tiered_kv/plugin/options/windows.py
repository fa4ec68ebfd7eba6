"""Models some of whose layers look back a window only.

SGLang would keep the KV of such layers in a pool of its own, and drop what their windows have
passed. Here all layers keep all of their KV in one pool: a prefix is then exact wherever it was
kept, like that of any other model.
"""

from __future__ import annotations

import logging
from typing import Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import refusals
from tiered_kv.plugin.upstream.current import arguments

logger = logging.getLogger(__name__)

#: Their windows are none of plain attention: what SGLang keeps of them fits no pool but its own.
COMPRESSED = ("DeepseekV4",)


def have_one_pool(server_args: Any) -> None:
    """Before SGLang resolves: no pool apart, whatever the model."""
    server_args.disable_hybrid_swa_memory = True


def check_resolved(server_args: Any) -> None:
    """Say what that costs. Raise ConfigError for a model whose layers cannot share a pool."""
    if not refusals.names_a_model(server_args):
        return
    model_config = arguments.model_config(server_args)
    if not has_pool_of_its_own(model_config):
        return
    if needs_pool_of_its_own(model_config):
        raise ConfigError(
            "--tiered-kv does not support models whose sliding-window layers keep KV of another "
            "shape than the others; start without --tiered-kv."
        )
    logger.info(
        "Tiered KV: the sliding-window layers of this model keep all of their KV, in one pool with "
        "the others (--disable-hybrid-swa-memory); SGLang alone drops what the windows have "
        "passed, so that more tokens fit on the device."
    )


def has_pool_of_its_own(model_config: Any) -> bool:
    """Whether SGLang, left alone, would keep the KV of this model's windows apart."""
    from sglang.srt.configs.model_config import is_hybrid_swa_model

    architectures = model_config.hf_config.architectures or []
    return bool(is_hybrid_swa_model(architectures, model_config.hf_text_config))


def needs_pool_of_its_own(model_config: Any) -> bool:
    """Whether its layers differ in what they keep of a token."""
    architectures = model_config.hf_config.architectures or []
    if any(name.startswith(COMPRESSED) for name in architectures):
        return True
    return bool(model_config.is_hybrid_swa_compress or model_config.has_asymmetric_kv)
