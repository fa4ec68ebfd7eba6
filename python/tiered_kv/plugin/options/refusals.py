"""What `--tiered-kv` does not support: refused at the start with a sentence, never served wrong.

Each rule reads attributes only, so the tests can hand in plain namespaces. The rules run twice on
the arguments: as the user gave them, because SGLang would meet some combinations with a traceback,
and as SGLang resolved them, because a model may switch a feature on by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.forest.inputs import LEAST_PAGE_TOKENS
from tiered_kv.plugin.options import speculation
from tiered_kv.plugin.options import values as option_values
from tiered_kv.plugin.upstream.current import arguments

RADIX_CACHE_OFF = (
    "SGLang switches its radix cache off for this model or these options, and --tiered-kv is a "
    "radix cache; start without --tiered-kv."
)


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """One thing that is not supported."""

    applies: Callable[[Any], bool]
    """Whether the object at hand has it."""
    subject: str
    """What it is, as the user knows it."""
    remedy: str
    """What to do about it, in the imperative."""

    def sentence(self) -> str:
        """The refusal as the user reads it."""
        return f"--tiered-kv does not support {self.subject}; {self.remedy}."


def _prefill_graphs(server_args: Any) -> str:
    return str(server_args.cuda_graph_config.prefill.backend)


def _option(flag: str, applies: Callable[[Any], bool]) -> Rule:
    return Rule(applies, flag, f"drop {flag} or --tiered-kv")


SERVER_ARGS_RULES: tuple[Rule, ...] = (
    # Drafts whose KV is of another kind, or nobody tried.
    Rule(
        speculation.is_refused,
        f"this --speculative-algorithm (of SGLang's algorithms, {arguments.SPECULATES or 'none'})",
        "drop --speculative-algorithm or --tiered-kv",
    ),
    _option("--decoupled-spec-role", lambda a: a.decoupled_spec_role != "null"),
    # Ranks that hold other layers or other requests must agree on what is evicted and loaded.
    _option("--attn-cp-size above 1", lambda a: a.attn_cp_size > 1),
    _option("--dcp-size above 1", lambda a: a.dcp_size > 1),
    _option("--enable-prefill-cp", lambda a: a.enable_prefill_cp),
    _option("--dwdp-size above 1", lambda a: a.dwdp_size > 1),
    _option("--elastic-ep-backend", lambda a: a.elastic_ep_backend not in (None, "none")),
    _option("--enable-pdmux", lambda a: a.enable_pdmux),
    _option("--encoder-only", lambda a: a.encoder_only),
    _option("--language-only", lambda a: a.language_only),
    # Ray actors receive the arguments before they load the scheduler that our hooks attach to.
    _option("--use-ray", lambda a: a.use_ray),
    # Other caches and other pools.
    _option("--disable-radix-cache", lambda a: a.disable_radix_cache),
    _option("--enable-lmcache", lambda a: a.enable_lmcache),
    _option("--enable-flexkv", lambda a: a.enable_flexkv),
    _option("--enable-hisparse", lambda a: a.enable_hisparse),
    _option("--enable-unified-memory", lambda a: a.enable_unified_memory),
    _option("--enable-page-major-kv-layout", lambda a: a.enable_page_major_kv_layout),
    _option("--enable-session-radix-cache", lambda a: a.enable_session_radix_cache),
    # Its wrapper keeps a session's KV outside the tree, where our tiers don't see it.
    _option("--enable-streaming-session", lambda a: a.enable_streaming_session),
    _option("--dllm-algorithm", lambda a: a.dllm_algorithm is not None),
    _option("--is-embedding", lambda a: a.is_embedding),
    # What these return per token is remembered by device slot, and a load fills other slots.
    _option("--enable-return-routed-experts", lambda a: a.enable_return_routed_experts),
    _option("--enable-return-indexer-topk", lambda a: a.enable_return_indexer_topk),
    # They walk one root of nodes shaped as upstream's; ours is a forest.
    Rule(
        lambda a: a.schedule_policy == "dfs-weight",
        "--schedule-policy dfs-weight",
        "drop --schedule-policy dfs-weight in favour of --tiered-kv-policy dfs-weight, or drop "
        "--tiered-kv",
    ),
    _option("--kv-canary", lambda a: a.kv_canary != "none"),
    Rule(
        lambda a: a.radix_eviction_policy != "lru",
        "this --radix-eviction-policy",
        "use lru",
    ),
    Rule(
        lambda a: a.page_size is not None and a.page_size < 1,
        "a --page-size below 1",
        "give at least 1, or leave it out for 64",
    ),
    *(Rule(applies, subject, remedy) for subject, applies, remedy in arguments.REFUSED),
)

#: Backends of prefill's graphs that leave attention outside.
PREFILL_GRAPHS = ("breakable", "tc_piecewise", "disabled")

HICACHE_OPTIONS = (
    "hicache_size",
    "hicache_ratio",
    "hicache_write_policy",
    "hicache_storage_backend",
    "hicache_storage_backend_extra_config",
    "hicache_storage_prefetch_policy",
    *arguments.MORE_HICACHE_OPTIONS,
)
"""Options of SGLang's own hierarchical cache, which would silently do nothing."""

RESOLVED_RULES: tuple[Rule, ...] = (
    Rule(
        lambda a: a.device not in ("cuda", "cpu"),
        "this device",
        "use --device cuda or --device cpu",
    ),
    Rule(
        lambda a: a.chunked_prefill_size > 0 and a.chunked_prefill_size % a.page_size != 0,
        "a --chunked-prefill-size that is no multiple of the page size",
        "choose a multiple of --page-size, which is 64 unless you gave another",
    ),
    Rule(
        # Attention must be launched by Python, which waits for the layer of a load. ("full" replays
        # whole passes: they would read KV that has not arrived.)
        lambda a: a.device == "cuda" and _prefill_graphs(a) not in PREFILL_GRAPHS,
        "--cuda-graph-backend-prefill full",
        "use --cuda-graph-backend-prefill breakable",
    ),
    Rule(
        lambda a: not a.enable_hierarchical_cache,
        "this model or these options, for which SGLang forbids a hierarchical cache",
        "start without --tiered-kv",
    ),
)


def _inputs_have_names(ctx: Any) -> bool:
    return set(ctx.model_config.hf_config.architectures) <= set(arguments.MULTIMODAL_MODELS)


def _hands_kv_over(ctx: Any) -> bool:
    return bool(ctx.server_args.disaggregation_mode != "null")


MODEL_RULES: tuple[Rule, ...] = (
    # Their state goes with the KV, or their inputs' names do not: neither was tried.
    Rule(
        lambda ctx: _hands_kv_over(ctx) and (ctx.is_hybrid_ssm or ctx.model_config.is_multimodal),
        "--disaggregation-mode for multimodal models, or models with recurrent state",
        "drop --disaggregation-mode, or start without --tiered-kv",
    ),
    Rule(
        # Options let SGLang have no pool for windows: `windows.py`.
        lambda ctx: ctx.is_hybrid_swa,
        "models whose sliding-window layers need a pool of their own",
        "start without --tiered-kv",
    ),
    Rule(
        lambda ctx: ctx.is_dsa,
        "models with DeepSeek sparse attention",
        "start without --tiered-kv",
    ),
    Rule(
        lambda ctx: ctx.model_config.is_multimodal and not _inputs_have_names(ctx),
        "this multimodal model on this release of SGLang",
        "see docs/models.md for those it serves, or start without --tiered-kv",
    ),
    Rule(
        lambda ctx: ctx.model_config.is_multimodal and ctx.params.page_size < LEAST_PAGE_TOKENS,
        f"multimodal models with a --page-size below {LEAST_PAGE_TOKENS}",
        "leave it out for 64",
    ),
    Rule(
        lambda ctx: ctx.model_config.is_encoder_decoder,
        "encoder-decoder models",
        "start without --tiered-kv",
    ),
    Rule(
        lambda ctx: not ctx.model_config.is_generation,
        "embedding, reward and classification models",
        "start without --tiered-kv",
    ),
    Rule(
        lambda ctx: ctx.disable_radix_cache,
        "this model, for which SGLang switches its radix cache off",
        "start without --tiered-kv",
    ),
)


def check_options_need_flag(server_args: Any) -> None:
    """Raise ConfigError if an option of ours was given without `--tiered-kv`."""
    if server_args.tiered_kv:
        return
    for name, default in arguments.field_defaults(server_args).items():
        if name.startswith("tiered_kv_") and getattr(server_args, name) != default:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} has no effect without --tiered-kv; add --tiered-kv.")
    if server_args.radix_cache_backend == "tiered_kv":
        raise ConfigError(
            "--radix-cache-backend tiered_kv is chosen by --tiered-kv; give that flag instead."
        )


def check_server_args(server_args: Any) -> None:
    """Raise ConfigError for options that do not go with `--tiered-kv`."""
    _refuse_first(SERVER_ARGS_RULES, server_args)
    if server_args.radix_cache_backend not in (None, "tiered_kv"):
        raise ConfigError(
            f"--radix-cache-backend {server_args.radix_cache_backend} and --tiered-kv are two "
            "caches; drop one of them."
        )
    _refuse_hicache_options(server_args)
    _refuse_by_environment(server_args)


def check_one_orders_the_queue(server_args: Any) -> None:
    """Raise ConfigError if both a policy of ours and one of SGLang's were named."""
    policy = server_args.tiered_kv_policy
    if policy == option_values.UPSTREAM_POLICY:
        return
    if server_args.enable_priority_scheduling:
        raise ConfigError(
            f"--enable-priority-scheduling and --tiered-kv-policy {policy} both order the waiting "
            "queue; drop one of them, or give --tiered-kv-policy upstream."
        )
    default = arguments.stock_default("schedule_policy")
    if server_args.schedule_policy != default:
        raise ConfigError(
            f"--schedule-policy {server_args.schedule_policy} and --tiered-kv-policy {policy} "
            "both order the waiting queue; drop one of them, or give --tiered-kv-policy upstream."
        )


def check_resolved(server_args: Any) -> None:
    """Raise ConfigError if what SGLang made of the options does not go with `--tiered-kv`."""
    _refuse_first(SERVER_ARGS_RULES, server_args)
    if names_a_model(server_args):
        _refuse_first(RESOLVED_RULES, server_args)


def names_a_model(server_args: Any) -> bool:
    """A path of "dummy" does not: it ends SGLang's resolution before there is anything to check."""
    return server_args.model_path.lower() not in ("none", "dummy")


def check_model(ctx: Any) -> None:
    """Raise ConfigError for a model that is not supported.

    `ctx` is SGLang's `TreeCacheBuildContext`.
    """
    _refuse_first(MODEL_RULES, ctx)
    pool = ctx.params.token_to_kv_pool_allocator.get_kvcache()
    # Of a hybrid model, that of the layers with attention.
    check_kv_pool(getattr(pool, "full_kv_pool", pool))


def check_kv_pool(pool: Any) -> None:
    """Raise ConfigError unless `pool` is one whose pages are plain rows of K and V.

    Subclasses are refused as well: those of SGLang 0.5.17 add scales, indexes or another layout
    that a copy of the K and V buffers would lose.
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    layout = getattr(pool, "kv_cache_layout", "nhd")
    plain = type(pool) in (MHATokenToKVPool, MLATokenToKVPool)
    if not plain or layout != "nhd" or getattr(pool, "is_quantized_kv_cache", False):
        raise ConfigError(
            f"--tiered-kv does not support this KV cache ({type(pool).__name__}, layout {layout}, "
            f"{pool.dtype}); use another --kv-cache-dtype or start without --tiered-kv."
        )


def _refuse_first(rules: Iterable[Rule], subject: Any) -> None:
    for rule in rules:
        if rule.applies(subject):
            raise ConfigError(rule.sentence())


def _refuse_hicache_options(server_args: Any) -> None:
    defaults = arguments.field_defaults(server_args)
    for name in HICACHE_OPTIONS:
        if getattr(server_args, name) != defaults[name]:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} belongs to SGLang's own hierarchical cache, which --tiered-kv replaces; "
                "drop it and see the --tiered-kv-* options."
            )


def _refuse_by_environment(server_args: Any) -> None:
    from sglang.srt.environ import envs

    for name in arguments.OTHER_CACHES:
        if getattr(envs, name).get():
            raise ConfigError(f"{name} and --tiered-kv are two caches; unset {name}.")
    for name in arguments.OTHER_FRONT_ENDS:
        if getattr(envs, name).get():
            raise ConfigError(
                f"{name} chooses a front end that --tiered-kv does not support; unset {name}."
            )
    if server_args.device != "cpu" and envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get():
        # Whoever copies goes by the size of the buffers.
        raise ConfigError(
            "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING makes KV buffers larger than the memory behind "
            "them, which --tiered-kv does not know of; unset it."
        )
