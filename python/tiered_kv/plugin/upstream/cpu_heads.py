"""Fewer KV heads than ranks on a CPU: neighbours have the same head, as on a GPU.

Upstream pads a model's heads on a CPU until each rank has KV heads of its own. With fewer heads
than ranks some ranks then have nothing but padding, and it stops while it loads the weights. Its
layers need no padding there: they give one KV head to several ranks (`QKVParallelLinear`), and its
loader takes that into account. So heads stay as they are where they can be shared out like this;
all else that upstream pads, it pads.

Source of the contract: `sglang/srt/configs/update_config.py` (0.5.17).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def can_share(n_heads: int, n_kv_heads: int, n_ranks: int) -> bool:
    """Whether each rank gets as many heads, and each KV head belongs to as many ranks."""
    return n_kv_heads < n_ranks and n_ranks % n_kv_heads == 0 and n_heads % n_ranks == 0


def keep_heads(
    pad: Callable[[Any, Any, int], Any], model_config: Any, load_config: Any, tp_size: int
) -> Any:
    """In the place of upstream's `pad`, which is `adjust_config_with_unaligned_cpu_tp`."""
    n_heads, n_kv_heads = model_config.num_attention_heads, model_config.get_total_num_kv_heads()
    padded = pad(model_config, load_config, tp_size)
    if can_share(n_heads, n_kv_heads, tp_size):
        # Where it has written what it made of them.
        for config in (padded, padded.hf_config, padded.hf_text_config):
            config.num_attention_heads = n_heads
            config.num_key_value_heads = n_kv_heads
    return padded


def register() -> None:
    """Have the process that runs the model share out heads like this."""
    from sglang.srt.model_executor import model_runner

    pad = model_runner.adjust_config_with_unaligned_cpu_tp
    if not hasattr(pad, "__wrapped__"):
        model_runner.adjust_config_with_unaligned_cpu_tp = functools.wraps(pad)(
            functools.partial(keep_heads, pad)
        )
