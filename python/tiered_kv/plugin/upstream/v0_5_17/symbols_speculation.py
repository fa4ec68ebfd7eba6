"""What is used of SGLang 0.5.17 for speculative decoding: options, and its branches for a CPU."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import MEM, SRT, function, object_

_KERNELS = "sglang.kernels.ops.speculative"
_HARDWARE = "upstream.v0_5_17.hardware"

SPECULATION = (
    object_(
        f"{SRT}.server_args.ServerArgs",
        "speculative_algorithm speculative_ngram_max_bfs_breadth page_size tp_size dp_size "
        "disaggregation_mode "
        "enable_lora enable_deterministic_inference disable_overlap_schedule "
        "speculative_eagle_topk speculative_num_steps speculative_num_draft_tokens "
        "speculative_adaptive enable_multi_layer_eagle",
        "options.speculation",
    ),
    function(
        f"{SRT}.speculative.spec_info.SpeculativeAlgorithm.create_worker",
        "self server_args",
        "upstream.cpu_speculation",
    ),
    object_(f"{SRT}.managers.scheduler.Scheduler", "draft_worker spec_algorithm", _HARDWARE),
    function(
        f"{MEM}.allocation.assign_req_to_token_pool_func",
        "req_pool_indices req_to_token start_offset end_offset out_cache_loc batch_size",
        _HARDWARE,
    ),
    function(
        f"{_KERNELS}.cache_locs.assign_extend_cache_locs_func",
        "req_pool_indices req_to_token start_offset end_offset batch_size draft_token_num device",
        _HARDWARE,
    ),
    function(
        f"{_KERNELS}.eagle.fill_accept_out_cache_loc_func",
        "accept_index out_cache_loc accept_out_cache_loc size",
        _HARDWARE,
    ),
    function(
        f"{SRT}.speculative.spec_utils.move_accept_tokens_to_target_kvcache",
        "batch accept_index num_correct_drafts token_to_kv_pool_allocator",
        _HARDWARE,
    ),
    function(
        f"{SRT}.speculative.eagle_utils.verify_tree_greedy_func",
        "predicts accept_index accept_token_num candidates retrieve_index retrieve_next_token "
        "retrieve_next_sibling target_predict topk",
        _HARDWARE,
    ),
    function(
        f"{SRT}.speculative.eagle_utils.build_tree_kernel_efficient",
        "bonus_tokens parent_list top_scores_index draft_tokens seq_lens seq_lens_sum topk "
        "spec_steps num_verify_tokens tree_mask_mode tree_mask_buf fill_prefix_mask",
        _HARDWARE,
    ),
    function(
        f"{_KERNELS}.eagle.fill_bonus_tokens_func",
        "accept_tokens accept_lens bonus_tokens accept_stride batch_size",
        _HARDWARE,
    ),
    function(
        f"{SRT}.speculative.spec_utils.select_top_k_tokens",
        "i topk_p topk_index hidden_states scores topk",
        "upstream.cpu_speculation",
    ),
    object_(
        f"{SRT}.speculative.draft_utils.DraftBackendFactory",
        "create_decode_backend create_draft_extend_backend draft_model_runner topk "
        "speculative_num_steps",
        "attention.draft_steps",
    ),
    function(
        f"{SRT}.speculative.base_spec_worker.BaseSpecWorker.alloc_memory_pool",
        "self memory_pool_config req_to_token_pool token_to_kv_pool_allocator",
        "cache.drafts",
    ),
    object_(
        f"{SRT}.speculative.base_spec_worker.BaseSpecWorker",
        "draft_worker token_to_kv_pool_allocator",
        "cache.drafts",
    ),
    object_(f"{SRT}.speculative.eagle_worker_v2.EagleDraftWorker", "draft_runner", "cache.drafts"),
    object_(
        f"{SRT}.model_executor.model_runner.ModelRunner",
        "model model_config token_to_kv_pool",
        "cache.drafts",
    ),
    object_(f"{MEM}.cache_init_params.CacheInitParams", "is_eagle", "cache.build"),
    object_(f"{MEM}.radix_cache.RadixCache", "is_eagle", "cache.prefix_cache"),
    function(
        f"{MEM}.kv_cache_builder.maybe_register_hicache_draft",
        "tree_cache draft_worker spec_algorithm server_args enable_hierarchical_cache page_size",
        "cache.drafts",
    ),
    object_(f"{_KERNELS}.ngram_corpus", "load_jit", _HARDWARE),
    *(
        object_(f"{SRT}.managers.io_struct.{name}", "", _HARDWARE)
        for name in ("UpdateWeightFromDiskReqInput", "UpdateWeightsFromIPCReqInput")
    ),
    object_(f"{SRT}.environ.envs", "SGLANG_NATIVE_MOVE_KV_CACHE", "upstream.cpu_speculation"),
)
