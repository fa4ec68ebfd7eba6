"""A model, or heads, that draft what another verifies: its KV, beside that of the model.

SGLang gives the draft's KV pool the slots of the model's, so a page has the rows of both. A row of
the draft's is computed from the token behind its own, too: pages are named by pairs of tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.forest.key import namespace_hash
from tiered_kv.plugin.cache import fingerprint
from tiered_kv.plugin.cache.device_pool import DeviceBuffers, buffers_of
from tiered_kv.plugin.options import refusals
from tiered_kv.plugin.upstream.current import arguments

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

    from tiered_kv.tiers.layer_gate import LayerGate

#: What runs the draft, by the allocator of the slots that it shares.
_runners: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def note(result: Any, worker: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `BaseSpecWorker.alloc_memory_pool`: SGLang tells a cache nothing of drafts."""
    drafts = worker.draft_worker
    if drafts is not None:
        _runners[worker.token_to_kv_pool_allocator] = drafts.draft_runner


def register(original: Callable[..., None], *, tree_cache: Any, **kwargs: Any) -> None:
    """AROUND `maybe_register_hicache_draft`: it looks for SGLang's own host pool."""
    if not hasattr(tree_cache, "hierarchy"):
        original(tree_cache=tree_cache, **kwargs)


def runner_of(ctx: TreeCacheBuildContext) -> Any | None:
    """What runs the draft, if there is one that has KV."""
    return _runners.get(ctx.params.token_to_kv_pool_allocator)


def check_runner(ctx: TreeCacheBuildContext) -> None:
    """Raise ConfigError for a draft whose KV has other slots or is no plain rows, or not found."""
    algorithm = arguments.resolved(ctx.server_args).speculative_algorithm
    runner = runner_of(ctx)
    if algorithm is None or (algorithm == "NGRAM" and runner is None):
        return
    pool = ctx.params.token_to_kv_pool_allocator.get_kvcache()
    if runner is None or runner.token_to_kv_pool.size != pool.size:
        raise ConfigError(
            f"--tiered-kv does not find the draft's KV in the model's slots with "
            f"--speculative-algorithm {algorithm}; drop one of both."
        )
    refusals.check_kv_pool(runner.token_to_kv_pool)


def with_draft(device: DeviceBuffers, draft: Any) -> DeviceBuffers:
    """`device` and behind it the buffers of the pool `draft`, whose layers go on counting."""
    theirs = buffers_of(draft)
    n_layers = device.layers[-1] + 1
    return DeviceBuffers(
        device.layers + tuple(n_layers + layer for layer in theirs.layers),
        device.buffers + theirs.buffers,
        device.is_key + theirs.is_key,
    )


class DraftGate:
    """The draft's layers wait by their number in its pool; loads count them behind the model's."""

    def __init__(self, gate: LayerGate, n_layers: int) -> None:
        self._gate, self._n_layers = gate, n_layers

    def wait_until(self, layer: int) -> None:
        self._gate.wait_until(self._n_layers + layer)


def register_gate(gate: LayerGate, draft: Any) -> None:
    """Have passes of the draft wait for its rows of loaded pages."""
    n_layers = len(set(buffers_of(draft).layers))
    draft.register_layer_transfer_counter(DraftGate(gate, gate.n_layers - n_layers))


def name_of(ctx: TreeCacheBuildContext, runner: Any) -> bytes:
    """What the draft's KV depends on beside the model's, by contents: its weights and all else."""
    parts = {
        "weights": fingerprint.weights_checksum(runner.model),
        "code": fingerprint.code_of(runner.model),
        "config": fingerprint.config_of(runner.model_config.hf_config),
        "compute type": f"{runner.model_config.dtype} {runner.model_config.quantization}",
        "pool": f"{type(runner.token_to_kv_pool).__name__} {runner.token_to_kv_pool.dtype}",
        "fed": arguments.resolved(ctx.server_args).speculative_algorithm,
    }
    return namespace_hash("draft", *(one for part in sorted(parts.items()) for one in part))
