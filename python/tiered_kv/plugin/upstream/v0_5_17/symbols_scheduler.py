"""What is used of SGLang 0.5.17's scheduler: its steps, its batches and its queue."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import MEM, SRT, function, methods, object_

_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"

SCHEDULER = (
    function(
        f"{SRT}.managers.detokenizer_manager.DetokenizerManager.__init__",
        "self server_args port_args",
        "start.interrupts",
    ),
    function(
        f"{SRT}.managers.scheduler.Scheduler.__init__",
        "self server_args port_args gpu_id tp_rank moe_ep_rank pp_rank attn_cp_rank moe_dp_rank "
        "dp_rank",
        "hooks.scheduler",
    ),
    object_(
        f"{SRT}.managers.scheduler.Scheduler",
        "server_args tree_cache enable_hicache_storage enable_hierarchical_cache "
        "clear_hicache_storage_wrapped",
        "hooks.scheduler cache.prefix_cache",
    ),
    function(f"{SRT}.managers.scheduler.Scheduler.on_idle", "self", "hooks.scheduler"),
    function(
        f"{SRT}.managers.scheduler.Scheduler.run_batch",
        "self batch pp_proxy_tensors",
        "passes.step_times",
    ),
    function(
        f"{SRT}.managers.scheduler.Scheduler.process_batch_result",
        "self batch result",
        "passes.step_times",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.ScheduleBatch",
        "forward_mode launch_ts extend_lens prefix_lens hicache_consumer_index decoding_reqs reqs",
        "passes.step_times",
    ),
    object_(
        f"{SRT}.model_executor.forward_batch_info.ForwardMode",
        "is_extend is_mixed is_decode",
        "passes.step_times",
    ),
    object_("sglang.srt.managers.tokenizer_manager.TokenizerManager", "server_args", "hooks.table"),
    object_(
        "sglang.srt.managers.detokenizer_manager.run_detokenizer_process",
        "",
        "start.process_carrier",
    ),
)

QUEUE = (
    *methods(
        f"{SRT}.managers.scheduler.Scheduler",
        "hooks.scheduler queue.order",
        _get_new_batch_prefill_raw="prefill_delayer_single_pass running_batch",
        _add_request_to_queue="req is_retracted",
        _can_schedule_lora_req="req running_loras",
    ),
    object_(
        f"{SRT}.managers.scheduler.Scheduler",
        "waiting_queue policy chunked_req chunked_prefill_size max_prefill_tokens page_size "
        "is_mixed_chunk require_mlp_sync truncation_align_size request_receiver load_inquirer",
        "hooks.scheduler queue.order queue.mixing",
    ),
    object_(
        f"{SRT}.managers.scheduler.Scheduler",
        "max_req_input_len max_total_num_tokens",
        "hooks.scheduler",
    ),
    object_(
        f"{SRT}.managers.scheduler.Scheduler", "lora_drainer prefill_delayer", "queue.whole_queue"
    ),
    function(
        "sglang.srt.lora.lora_drainer.LoRADrainer.update_draining_state",
        "self waiting_queue running_reqs",
        "queue.whole_queue",
    ),
    function(
        f"{SRT}.managers.prefill_delayer.PrefillDelayer._negotiate_should_allow_prefill",
        "self local_prefillable token_usage running_batch max_prefill_bs max_running_requests "
        "waiting_queue_len",
        "queue.whole_queue",
    ),
    function(
        f"{SRT}.managers.schedule_policy.SchedulePolicy.calc_priority",
        "self waiting_queue running_batch",
        "hooks.scheduler",
    ),
    function(
        f"{_RECEIVER}._broadcast_reqs_across_ranks",
        "self recv_reqs",
        "queue.clock_tick",
    ),
    function(
        f"{_RECEIVER}._split_work_and_control_reqs",
        "self recv_reqs",
        "queue.clock_tick",
    ),
    function(
        f"{SRT}.managers.scheduler_components.load_inquirer.SchedulerLoadInquirer"
        "._get_num_pending_tokens",
        "self chunk_deduct",
        "queue.order",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.ScheduleBatch",
        "reqs batch_is_full extend_num_tokens prefill_stats tree_cache",
        "queue.order hooks.scheduler",
    ),
    *methods(
        f"{SRT}.managers.schedule_batch.ScheduleBatch",
        "queue.order queue.mixing hooks.scheduler",
        prepare_for_extend="",
        check_decode_mem="selected_indices",
        new_tokens_required_next_decode="selected_indices",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.Req",
        "rid origin_input_ids output_ids extra_key sampling_params priority finished to_finish "
        "finished_reason positional_embed_overrides input_embeds",
        "queue.queued queue.order requests.view",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.Req",
        "return_logprob inflight_middle_chunks",
        "queue.put_back",
    ),
    object_(f"{SRT}.managers.schedule_batch.Req", "return_logprob input_embeds", "queue.mixing"),
    object_(
        f"{SRT}.managers.schedule_batch.Req",
        "retraction_count retracted_stain",
        "queue.again",
    ),
    object_(
        f"{SRT}.managers.scheduler.Scheduler",
        "max_queued_requests ipc_channels _pending_chunked_abort_req",
        "queue.again",
    ),
    object_(f"{SRT}.managers.io_struct.AbortReq", "rid finished_reason", "queue.again"),
    function(f"{SRT}.managers.schedule_batch.Req.reset_for_retract", "self", "queue.again"),
    function(
        f"{MEM}.common.release_kv_cache",
        "req tree_cache is_insert",
        "upstream.v0_5_17.request_kv",
    ),
    object_(f"{SRT}.managers.schedule_batch.FINISH_ABORT", "", "requests.view"),
    object_(f"{SRT}.managers.schedule_batch.FINISH_LENGTH", "", "requests.view"),
    object_(f"{SRT}.constants.HEALTH_CHECK_RID_PREFIX", "", "requests.view"),
    object_(
        f"{SRT}.managers.io_struct.TokenizedGenerateReqInput", "rid time_stats", "queue.clock_tick"
    ),
    object_(
        f"{SRT}.managers.io_struct.BatchTokenizedGenerateReqInput", "batch", "queue.clock_tick"
    ),
    function(f"{SRT}.managers.io_struct.unwrap_from_pickle", "obj", "queue.clock_tick"),
    object_(
        f"{SRT}.observability.req_time_stats.APIServerReqTimeStats",
        "created_time",
        "queue.clock_tick",
    ),
    function(
        f"{SRT}.observability.req_time_stats.APIServerReqTimeStats.__getstate__",
        "self",
        "queue.clock_tick",
    ),
)

_PENALTIES = "sglang.srt.sampling.penaltylib"
_ADAPTER = "sglang.srt.managers.scheduler_components.dp_attn.SchedulerDPAttnAdapter"
_RATIO = "sglang.srt.managers.scheduler_components.new_token_ratio_tracker.NewTokenRatioTracker"

DECODE = (
    *methods(
        f"{SRT}.managers.scheduler.Scheduler",
        "hooks.decode_table decode.selection",
        update_running_batch="batch",
    ),
    object_(
        f"{SRT}.managers.scheduler.Scheduler",
        "running_batch result_queue enable_overlap waiting_queue policy page_size "
        "token_to_kv_pool_allocator new_token_ratio_tracker tree_cache tp_worker",
        "decode.selection decode.swap_out",
    ),
    *methods(
        f"{SRT}.managers.schedule_batch.ScheduleBatch",
        "hooks.decode_table decode.batch decode.selection",
        prepare_for_decode="",
        filter_batch="chunked_req_to_exclude keep_indices",
        cumulate_penalty_output_tokens="",
        mix_with_running="running_batch",
        retract_decode="server_args",
        release_req="idx remaing_req_count server_args",
        new_tokens_required_next_decode="selected_indices",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.ScheduleBatch",
        "seq_lens seq_lens_cpu orig_seq_lens seq_lens_sum out_cache_loc input_embeds forward_mode "
        "sampling_info device enable_overlap batch_is_full",
        "decode.batch decode.penalties decode.selection decode.swap_out",
    ),
    function(
        f"{SRT}.managers.schedule_batch.release_req",
        "req remaing_req_count server_args req_to_token_pool token_to_kv_pool_allocator "
        "tree_cache hisparse_coordinator offload_kv",
        "decode.swap_out",
    ),
    function(f"{_ADAPTER}.maybe_prepare_mlp_sync_batch", "self batch need_sync", "hooks.decode"),
    object_(
        f"{SRT}.managers.schedule_batch.Req",
        "last_node return_hidden_states multimodal_inputs session time_stats",
        "decode.running decode.swap_out decode.selection",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.Req",
        "req_pool_idx kv_committed_len prefix_indices extend_range",
        "upstream.v0_5_17.request_kv upstream.v0_5_17.cache_contract",
    ),
    *methods(
        f"{SRT}.managers.schedule_batch.Req",
        "upstream.v0_5_17.request_kv",
        _refresh_fill_ids="",
        set_extend_range="start end",
        effective_kv_committed_len="",
    ),
    function(
        f"{MEM}.common.maybe_cache_unfinished_req",
        "req tree_cache kwargs",
        "upstream.v0_5_17.request_kv",
    ),
    object_(f"{SRT}.managers.schedule_policy.CLIP_MAX_NEW_TOKENS", "", "decode.selection"),
    object_(f"{SRT}.environ.envs", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "options.decode"),
    object_(f"{_RATIO}", "current estimate_new_token_ratio_after_retract", "decode.selection"),
    object_(
        f"{SRT}.sampling.sampling_batch_info.SamplingBatchInfo",
        "penalizer_orchestrator",
        "decode.batch decode.penalties",
    ),
    object_(
        f"{_PENALTIES}.orchestrator.BatchedPenalizerOrchestrator",
        "penalizers is_required batch cumulate_output_tokens",
        "decode.batch decode.penalties",
    ),
    object_(
        f"{_PENALTIES}.orchestrator._BatchedPenalizer",
        "_orchestrator_ref is_prepared",
        "decode.batch decode.penalties",
    ),
    *(
        object_(f"{_PENALTIES}.{module}.{name}", attributes, "decode.penalties")
        for module, name, attributes in (
            (
                "frequency_penalty",
                "BatchedFrequencyPenalizer",
                "cumulated_frequency_penalties frequency_penalties",
            ),
            (
                "presence_penalty",
                "BatchedPresencePenalizer",
                "cumulated_presence_penalties presence_penalties",
            ),
            (
                "repetition_penalty",
                "BatchedRepetitionPenalizer",
                "cumulated_repetition_penalties repetition_penalties",
            ),
            ("min_new_tokens", "BatchedMinNewTokensPenalizer", "len_output_tokens"),
        )
    ),
)
