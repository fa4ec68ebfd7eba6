"""Speculative decoding: which of SGLang's algorithms goes with `--tiered-kv`, and what with it.

N-gram drafts come from a collection of what was said, and have no KV of their own: pages and their
names are what they are without. Only what was accepted becomes cache. SGLang runs it without
overlap on a CPU, so that is what was tried, and what is done everywhere.
"""

from __future__ import annotations

import logging
from typing import Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import combinations, decode
from tiered_kv.plugin.upstream.current import arguments

logger = logging.getLogger(__name__)

ALGORITHM = "NGRAM"
BREADTH = "--speculative-ngram-max-bfs-breadth"

RULES: combinations.Rules = (
    (
        f"{BREADTH} above 1 with a --page-size above 1",
        lambda a: a.page_size > 1 and a.speculative_ngram_max_bfs_breadth > 1,
    ),
    ("--tp-size above 1", lambda a: a.tp_size > 1),
    ("--dp-size above 1", lambda a: a.dp_size > 1),
    ("--disaggregation-mode", lambda a: a.disaggregation_mode != "null"),
    ("--enable-lora", lambda a: bool(a.enable_lora)),
    ("--enable-deterministic-inference", lambda a: a.enable_deterministic_inference),
    (
        "models with recurrent state (Mamba, linear attention)",
        lambda a: getattr(a, "uses_mamba_radix_cache", False),
    ),
    (decode.OPTION, lambda a: a.tiered_kv_iteration_policy != decode.EVERYONE),
)


def is_refused(server_args: Any) -> bool:
    """Whether an algorithm was chosen that is not served on this release."""
    chosen = server_args.speculative_algorithm
    return chosen is not None and str(chosen).upper() not in arguments.SPECULATES


def choose_defaults(server_args: Any) -> None:
    """Before SGLang resolves: one draft for each request, unless its user said how many."""
    if server_args.speculative_algorithm is None:
        return
    server_args.disable_overlap_schedule = True
    breadth = arguments.stock_default("speculative_ngram_max_bfs_breadth")
    if server_args.speculative_ngram_max_bfs_breadth == breadth:
        server_args.speculative_ngram_max_bfs_breadth = 1
        logger.info("Tiered KV: %s is 1 unless another than %d is given.", BREADTH, breadth)


def check_resolved(server_args: Any) -> None:
    """Raise ConfigError for what does not go with speculative decoding."""
    if server_args.speculative_algorithm is None:
        return
    combinations.check(f"with --speculative-algorithm {ALGORITHM}", RULES, server_args)


def check_model(ctx: Any) -> None:
    """Raise ConfigError for a model that nobody speculated with here.

    `ctx` is SGLang's `TreeCacheBuildContext`.
    """
    if ctx.server_args.speculative_algorithm is not None and ctx.model_config.is_multimodal:
        raise ConfigError(
            "--tiered-kv does not support --speculative-algorithm with multimodal models; drop "
            "one of both."
        )
