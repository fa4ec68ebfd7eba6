"""Speculative decoding: which of SGLang's algorithms goes with `--tiered-kv`, and what with it.

N-gram drafts come from a collection of what was said, and have no KV of their own: pages and their
names are what they are without. A model or heads that draft have KV in the model's slots, which
goes where the model's goes (`cache/drafts.py`). Only what was accepted becomes cache. SGLang
speculates without overlap on a CPU, so that is what was tried, and what is done everywhere.
"""

from __future__ import annotations

import logging
from typing import Any

from tiered_kv.plugin.options import combinations
from tiered_kv.plugin.upstream.current import arguments

logger = logging.getLogger(__name__)

NGRAM = "NGRAM"
BREADTH = "--speculative-ngram-max-bfs-breadth"
EAGLE_BREADTH = "--speculative-eagle-topk"
#: Of a chain of drafts, if its user says nothing of its length.
N_STEPS = 3

RULES: combinations.Rules = (
    ("--tp-size above 1", lambda a: a.tp_size > 1),
    ("--dp-size above 1", lambda a: a.dp_size > 1),
    ("--disaggregation-mode", lambda a: a.disaggregation_mode != "null"),
    ("--enable-lora", lambda a: bool(a.enable_lora)),
    ("--enable-deterministic-inference", lambda a: a.enable_deterministic_inference),
    combinations.RECURRENT_STATE,
    combinations.SOME_DECODE,
)
NGRAM_RULES: combinations.Rules = (
    (
        f"{BREADTH} above 1 with a --page-size above 1",
        lambda a: a.page_size > 1 and a.speculative_ngram_max_bfs_breadth > 1,
    ),
)
DRAFT_RULES: combinations.Rules = (
    (f"{EAGLE_BREADTH} above 1", lambda a: a.speculative_eagle_topk > 1),
    # With no steps, it may leave rows of the draft's KV unwritten.
    ("--speculative-adaptive", lambda a: a.speculative_adaptive),
    ("--enable-multi-layer-eagle", lambda a: a.enable_multi_layer_eagle),
    (
        "--tiered-kv-host-format or --tiered-kv-disk-format in fewer bytes",
        combinations.keeps_fewer_bytes,
    ),
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
    if str(server_args.speculative_algorithm).upper() == NGRAM:
        breadth = arguments.stock_default("speculative_ngram_max_bfs_breadth")
        if server_args.speculative_ngram_max_bfs_breadth == breadth:
            server_args.speculative_ngram_max_bfs_breadth = 1
            logger.info("Tiered KV: %s is 1 unless another than %d is given.", BREADTH, breadth)
        return
    if server_args.speculative_eagle_topk is None and not server_args.speculative_adaptive:
        server_args.speculative_eagle_topk = 1
        if server_args.speculative_num_steps is None:
            server_args.speculative_num_steps = N_STEPS
        logger.info(
            "Tiered KV: %s is 1, and --speculative-num-steps %d.",
            EAGLE_BREADTH,
            server_args.speculative_num_steps,
        )
    if server_args.speculative_eagle_topk == 1 and server_args.speculative_num_steps is not None:
        server_args.speculative_num_draft_tokens = server_args.speculative_num_steps + 1


def check_resolved(server_args: Any) -> None:
    """Raise ConfigError for what does not go with speculative decoding."""
    algorithm = server_args.speculative_algorithm
    if algorithm is None:
        return
    rules = (NGRAM_RULES if algorithm == NGRAM else DRAFT_RULES) + RULES
    combinations.check(f"with --speculative-algorithm {algorithm}", rules, server_args)


def check_model(ctx: Any) -> None:
    """Raise ConfigError for a model that nobody speculated with here.

    `ctx` is SGLang's `TreeCacheBuildContext`.
    """
    if ctx.server_args.speculative_algorithm is not None:
        combinations.check_sees_nothing(ctx, "--speculative-algorithm")
