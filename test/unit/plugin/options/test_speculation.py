"""Which speculative decoding is served, and what does not go with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import refusals, speculation


def arguments(**changes: Any) -> Any:
    given = {
        "speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 10, "page_size": 64,
        "tp_size": 1, "dp_size": 1, "disaggregation_mode": "null", "enable_lora": None,
        "enable_deterministic_inference": False,
        "uses_mamba_radix_cache": False, "tiered_kv_iteration_policy": "all",
        "disable_overlap_schedule": False, "speculative_eagle_topk": None,
        "speculative_num_steps": None, "speculative_num_draft_tokens": None,
        "speculative_adaptive": False, "enable_multi_layer_eagle": False,
        "tiered_kv_host_format": "raw", "tiered_kv_disk_format": "same",
    }  # fmt: skip
    return SimpleNamespace(**given | changes)


def test_ngrams_are_served_as_chains_without_overlap() -> None:
    args = arguments()
    speculation.choose_defaults(args)
    speculation.check_resolved(args)
    assert args.disable_overlap_schedule
    assert args.speculative_ngram_max_bfs_breadth == 1


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "NEXTN", "STANDALONE"])
def test_drafts_with_kv_are_chains_without_overlap(algorithm: str) -> None:
    args = arguments(speculative_algorithm=algorithm)
    assert not speculation.is_refused(args)
    speculation.choose_defaults(args)
    speculation.check_resolved(args)
    assert args.disable_overlap_schedule
    chain = args.speculative_eagle_topk, args.speculative_num_steps
    assert (*chain, args.speculative_num_draft_tokens) == (1, 3, 4)


def test_the_length_of_a_chain_is_its_users_choice() -> None:
    args = arguments(speculative_algorithm="EAGLE", speculative_num_steps=5)
    speculation.choose_defaults(args)
    speculation.check_resolved(args)
    assert (args.speculative_eagle_topk, args.speculative_num_draft_tokens) == (1, 6)


def test_pages_of_one_token_take_trees() -> None:
    args = arguments(page_size=1, speculative_ngram_max_bfs_breadth=4)
    speculation.choose_defaults(args)
    speculation.check_resolved(args)
    assert args.speculative_ngram_max_bfs_breadth == 4


def test_without_speculation_nothing_is_chosen_or_refused() -> None:
    args = arguments(speculative_algorithm=None, tp_size=8)
    before = dict(vars(args))
    speculation.choose_defaults(args)
    speculation.check_resolved(args)
    assert vars(args) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"tp_size": 2},
        {"dp_size": 2},
        {"disaggregation_mode": "prefill"},
        {"speculative_ngram_max_bfs_breadth": 4},
        {"enable_lora": True},
        {"enable_deterministic_inference": True},
        {"uses_mamba_radix_cache": True},
        {"tiered_kv_iteration_policy": "slack"},
    ],
    ids=str,
)
def test_what_was_not_tried_is_refused(changes: dict[str, Any]) -> None:
    args = arguments(**changes)
    speculation.choose_defaults(args)
    with pytest.raises(ConfigError, match=r"^--tiered-kv does not support, with --speculative-alg"):
        speculation.check_resolved(args)


@pytest.mark.parametrize(
    "changes",
    [
        {"speculative_eagle_topk": 4},
        {"speculative_adaptive": True, "speculative_eagle_topk": 1},
        {"enable_multi_layer_eagle": True},
        {"tiered_kv_host_format": "fp8"},
        {"tiered_kv_disk_format": "int4"},
        {"tp_size": 2},
    ],
    ids=str,
)
def test_what_was_not_tried_with_a_draft_is_refused(changes: dict[str, Any]) -> None:
    args = arguments(speculative_algorithm="EAGLE", **changes)
    speculation.choose_defaults(args)
    with pytest.raises(ConfigError, match=r"with --speculative-algorithm EAGLE, "):
        speculation.check_resolved(args)


@pytest.mark.parametrize("name", ["DFLASH", "dspark", "FROZEN_KV_MTP", "another"])
def test_other_algorithms_are_refused(name: str) -> None:
    args = arguments(speculative_algorithm=name)
    assert speculation.is_refused(args)
    sentence = next(r for r in refusals.SERVER_ARGS_RULES if r.applies(args)).sentence()
    assert "NGRAM" in sentence
    assert sentence.endswith("drop --speculative-algorithm or --tiered-kv.")


def test_images_are_not_drafted_for() -> None:
    for algorithm, is_multimodal, is_refused in (
        ("NGRAM", True, True),
        ("NGRAM", False, False),
        (None, True, False),
    ):
        ctx = SimpleNamespace(
            server_args=SimpleNamespace(speculative_algorithm=algorithm),
            model_config=SimpleNamespace(is_multimodal=is_multimodal),
        )
        if is_refused:
            with pytest.raises(ConfigError, match="multimodal"):
                speculation.check_model(ctx)
        else:
            speculation.check_model(ctx)
