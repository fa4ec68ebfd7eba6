"""The table of what the plugin uses of SGLang 0.5.23, by how it differs from that of 0.5.17.

Whoever uses something more in a way of this release's own adds it here, and to docs/releases.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tiered_kv.plugin.upstream.symbol import MEM, SRT, Symbol, function, methods, object_
from tiered_kv.plugin.upstream.v0_5_17 import symbols as v0_5_17
from tiered_kv.plugin.upstream.v0_5_23.symbols_recurrent import RECURRENT

_MANAGERS = f"{SRT}.managers"
_PREFILL = f"{SRT}.disaggregation.prefill"
_REQ = f"{_MANAGERS}.schedule_batch.Req"
_BATCH = f"{_MANAGERS}.schedule_batch.ScheduleBatch"
_SCHEDULER = f"{_MANAGERS}.scheduler.Scheduler"
_WORKER = f"{_MANAGERS}.tp_worker.BaseTpWorker"
_UPDATER = f"{_MANAGERS}.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_RUNNER_UPDATER = f"{SRT}.model_executor.model_runner_components.weight_updater.WeightUpdater"
_PLATFORM = f"{SRT}.platforms.interface.SRTPlatform"
_PAGED = f"{MEM}.allocator.paged.PagedTokenToKVPoolAllocator"
_OPENAI = f"{SRT}.entrypoints.openai.serving_base.OpenAIServingBase"
_KERNELS = "sglang.kernels.ops.speculative"
_FLASHINFER = f"{SRT}.layers.attention.flashinfer_backend"

_RADIX_METHODS_GONE = (
    *("cache_finished_req", "cache_unfinished_req", "is_root", "is_backuped"),
    "get_last_hash_value",
)

#: Not used here: gone, called otherwise, or not needed any more. `ADDED` has what came instead.
GONE = frozenset(
    {
        f"{_SCHEDULER}._can_schedule_lora_req",
        f"{_MANAGERS}.schedule_batch.release_req",
        f"{_MANAGERS}.mm_utils.embedding_cache",
        f"{_REQ}._refresh_fill_ids",
        f"{_REQ}.set_extend_range",
        f"{_REQ}.effective_kv_committed_len",
        f"{MEM}.common.maybe_cache_unfinished_req",
        f"{_OPENAI}._compute_extra_key",
        f"{_PREFILL}.SchedulerDisaggregationPrefillMixin.maybe_send_cached_prefix_chunk",
        *(f"{_WORKER}.update_weights_from_{k}" for k in ("disk", "distributed", "tensor", "ipc")),
        *(f"{MEM}.radix_cache.RadixCache.{name}" for name in _RADIX_METHODS_GONE),
        f"{SRT}.server_args.ServerArgs.__post_init__",
        f"{SRT}.server_args.ServerArgs._validate_mamba_no_buffer",
        f"{SRT}.server_args.ServerArgs.get_attention_backends",
        f"{SRT}.server_args.ServerArgs.get_model_config",
        f"{_PLATFORM}.get_mha_kv_pool_cls",
        f"{_PLATFORM}.get_mla_kv_pool_cls",
        f"{_PLATFORM}.get_paged_allocator_cls",
        *(_PAGED, f"{_PAGED}.alloc_extend", f"{_PAGED}.alloc_decode"),
        f"{_PAGED}.merge_and_sort_free",
        f"{SRT}.distributed.parallel_state_wrapper.ParallelState",
        f"{SRT}.speculative.eagle_utils.verify_tree_greedy_func",
        f"{_KERNELS}.ngram_corpus",
    }
)
#: Whole modules of SGLang's that are not used here: its caches are one now, and cascade attention
#: through FlashInfer is written for 0.5.17 only.
MODULES_GONE = (f"{MEM}.hiradix_cache", f"{MEM}.mamba_radix_cache", _FLASHINFER)

#: Modules of ours that are not loaded on this release.
UNUSED_MODULES = ("attention.flashinfer",)

#: Attributes that are not there, or not used.
LOST = {
    f"{SRT}.environ.envs": "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE SGLANG_ENABLE_UNIFIED_RADIX_TREE",
    _REQ: "prefix_indices extend_range req_pool_idx kv_committed_len mamba_pool_idx "
    "mamba_needs_clear get_fill_ids",
    f"{MEM}.base_prefix_cache.MatchResult": "device_indices",
    f"{MEM}.base_prefix_cache.InsertParams": "chunked",
    f"{_MANAGERS}.tp_worker.TpModelWorker": "ps",
}

#: Functions with other parameters.
PARAMETERS = {
    f"{_SCHEDULER}.__init__": "self server_args port_args",
    f"{_SCHEDULER}.is_fully_idle": "self for_health_check ignore_waiting",
    f"{_SCHEDULER}._prefetch_kvcache": "self req storage_hit_end",
    f"{_SCHEDULER}.handle_generate_request": "self recv_req mm_input_error",
    f"{_MANAGERS}.schedule_policy.SchedulePolicy.calc_priority": (
        "self waiting_queue running_batch processed_tokens"
    ),
    f"{_MANAGERS}.scheduler_components.request_receiver.SchedulerRequestReceiver"
    "._broadcast_reqs_across_ranks": "self recv_reqs local_reqs",
    f"{MEM}.kv_cache_builder.maybe_register_hicache_draft": "tree_cache draft_plan",
    f"{MEM}.common.release_kv_cache": "req tree_cache checkpoint",
    f"{_BATCH}.filter_batch": "self reqs_to_exclude keep_indices",
    f"{_BATCH}.retract_decode": "self",
    f"{_BATCH}.release_req": "self idx remaing_req_count offload_kv",
    f"{_PREFILL}.PrefillBootstrapQueue.pop_bootstrapped": "self",
    f"{_UPDATER}.flush_cache_after_weight_update": "self recv_req success message",
    f"{_MANAGERS}.tokenizer_manager.TokenizerManager._handle_batch_request": (
        "self obj request request_states"
    ),
    f"{_MANAGERS}.tokenizer_manager.TokenizerManager._init_req_state": "self obj request",
    f"{_MANAGERS}.tokenizer_control_mixin.TokenizerControlMixin.init_communicators": "self",
    f"{SRT}.model_executor.forward_batch_info.ForwardBatch.init_new": (
        "batch model_runner capture_hidden_mode return_hidden_states_before_norm "
        "extend_position_info spec_mrope_positions kv_loc_plan write_cols"
    ),
    f"{SRT}.configs.model_config.ModelConfig.get_num_kv_heads": (
        "self tensor_parallel_size dcp_size"
    ),
    f"{SRT}.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
    ".capture_one_shape": "self size forward stream_idx variant_label attention_variant",
    f"{SRT}.model_executor.model_runner.ModelRunner._preprocess_logits": (
        "self logits_output sampling_info observer"
    ),
}

_CONTRACT = "upstream.v0_5_23.cache_contract"
_ARGUMENTS = "upstream.v0_5_23.arguments"
_REQUEST_KV = "upstream.v0_5_23.request_kv"

ADDED = (
    *RECURRENT,
    *methods(
        f"{_MANAGERS}.schedule_batch.MultimodalDataItem",
        _REQUEST_KV,
        set_identity="identity",
        padding_sequence="length",
        padding_values="",
    ),
    object_(f"{_MANAGERS}.mm_schedule.embedding_cache", "", _CONTRACT),
    function(f"{SRT}.server_args.ServerArgs.resolve_once", "self", _ARGUMENTS),
    object_(
        f"{SRT}.server_args.ServerArgs",
        "smg_grpc_mode grpc_mode grpc_port enable_unified_cache_external_linker "
        "hicache_host_memory_mode prefill_only_disable_kv_cache attn_dp_size "
        "hicache_host_memory_fraction hicache_storage_prefetch_retry_poll_interval "
        "hicache_storage_prefetch_retry_max_attempts "
        "prefill_decode_interval",
        f"{_ARGUMENTS} options.refusals",
    ),
    function(f"{SRT}.runtime_context.get_parallel", "", "upstream.v0_5_23.hardware"),
    object_(f"{SRT}.environ.envs", "SGLANG_RUST_SERVER SGLANG_GRPC_PORT", "options.refusals"),
    function(
        f"{SRT}.arg_groups.overrides.resolution_result", "server_args field default", _ARGUMENTS
    ),
    function(f"{SRT}.arg_groups.arg_utils.record_fields", "cls", _ARGUMENTS),
    function(f"{SRT}.arg_groups.model_override_base.attention_backends_of", "cfg", _ARGUMENTS),
    function(f"{SRT}.arg_groups.model_override_base.model_config_of", "server_args", _ARGUMENTS),
    function(
        f"{_MANAGERS}.schedule_policy.PrefillAdder.add_one_req",
        "self req has_chunked_req truncation_align_size",
        "hooks.scheduler",
    ),
    object_(f"{_MANAGERS}.schedule_policy.PrefillAdder", "tree_cache", "hooks.scheduler"),
    function(f"{_SCHEDULER}.can_schedule_lora_req", "self req running_loras", "hooks.scheduler"),
    object_(
        _REQ,
        "kv prefix_len extend_end extend_len full_untruncated_fill_ids best_match_node "
        "skip_radix_cache_insert cache_salt cache_request_handle",
        f"{_REQUEST_KV} {_CONTRACT}",
    ),
    function(
        f"{_KERNELS}.spec_tree.verify_tree_greedy_func",
        "predicts accept_index accept_token_num candidates retrieve_index retrieve_next_token "
        "retrieve_next_sibling target_predict topk",
        "upstream.v0_5_23.hardware",
    ),
    function(
        f"{MEM}.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup",
        "self",
        "upstream.v0_5_23.hardware",
    ),
    function(f"{_PLATFORM}.supports_speculative_algorithm", "self algorithm", "start.platform"),
    object_(
        f"{_MANAGERS}.schedule_batch.ReqKvInfo",
        "req_pool_idx holds_kv kv_committed_len kv_allocated_len cache_protected_len",
        _REQUEST_KV,
    ),
    *methods(
        f"{MEM}.radix_cache.RadixCache",
        _CONTRACT,
        checkpoint="req up_to",
        path_device_indices="node",
        touch_prefix="key",
        on_release="req checkpointed",
        lock="node",
        unlock="lock",
        finish="handle outcome",
        pop_prefetch_loaded_span="handle",
        release_aborted_request="handle",
    ),
    object_(f"{MEM}.radix_cache.RadixKey", "cache_salt", _CONTRACT),
    object_(f"{MEM}.base_prefix_cache.CacheRequestHandle", "rid attempt_id", _CONTRACT),
    object_(
        f"{MEM}.cache_init_params.CacheInitParams",
        "kv_event_lora_names dynamo_kv_event_format",
        _CONTRACT,
    ),
    function(f"{MEM}.events.KvEventLoraNames.get", "self extra_key", _CONTRACT),
    object_(f"{SRT}.disaggregation.kv_events.BlockStored", "lora_name cache_salt", _CONTRACT),
    object_(f"{MEM}.base_prefix_cache.MatchResult", "device_prefix_len", _CONTRACT),
    *methods(
        f"{MEM}.unified_radix_cache.UnifiedRadixCache",
        _CONTRACT,
        is_root="node_id",
        is_backuped="node_id",
        get_last_hash_value="node_id",
    ),
    function(
        f"{_RUNNER_UPDATER}.update_weights_from_disk",
        "self model_path load_format weight_name_filter recapture_cuda_graph",
        "cache.weight_updates",
    ),
    *methods(
        _RUNNER_UPDATER,
        "cache.weight_updates",
        load_weights_from_distributed="named_tensors",
        update_weights_from_tensor="named_tensors load_format",
        update_weights_from_ipc="recv_req",
    ),
    object_(_RUNNER_UPDATER, "get_model_runner", "cache.weight_updates"),
    *methods(
        _UPDATER,
        "cache.weight_updates",
        begin_weight_update="recv_req",
        end_weight_update="recv_req",
    ),
)


def _of_this_release() -> Iterator[Symbol]:
    for symbol in v0_5_17.SYMBOLS:
        name = symbol.name
        if name in GONE or name.startswith(MODULES_GONE):
            continue
        lost = LOST.get(name, "").split()
        parameters = PARAMETERS.get(name)
        yield dataclasses.replace(
            symbol,
            users=tuple(user.replace("v0_5_17", "v0_5_23") for user in symbol.users),
            parameters=symbol.parameters if parameters is None else tuple(parameters.split()),
            attributes=tuple(name for name in symbol.attributes if name not in lost),
        )
    yield from ADDED


SYMBOLS: tuple[Symbol, ...] = tuple(_of_this_release())
