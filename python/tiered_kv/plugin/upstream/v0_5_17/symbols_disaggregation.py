"""What is used of SGLang 0.5.17's servers that compute prompts for others to decode."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import SRT, function, methods, object_

_PREFILL = f"{SRT}.disaggregation.prefill"
_UTILS = f"{SRT}.disaggregation.utils"
_USER = "queue.prefill_server"

DISAGGREGATION = (
    object_(f"{_UTILS}.DisaggregationMode", "PREFILL", _USER),
    function(f"{_UTILS}.prepare_abort", "req error_message status_code", _USER),
    function(f"{_PREFILL}.maybe_release_metadata_buffer", "req allocator", _USER),
    function(
        f"{_PREFILL}.PrefillBootstrapQueue.pop_bootstrapped",
        "self return_failed_reqs pp_good_rids pp_bad_rids",
        _USER,
    ),
    object_(f"{_PREFILL}.PrefillBootstrapQueue", "scheduler", _USER),
    *methods(
        f"{_PREFILL}.SchedulerDisaggregationPrefillMixin",
        _USER,
        process_batch_result_disagg_prefill="batch result",
        maybe_send_cached_prefix_chunk="req",
    ),
    *methods(
        f"{SRT}.managers.scheduler.Scheduler",
        _USER,
        handle_shutdown="recv_req",
        run_event_loop="",
    ),
    object_(
        f"{SRT}.managers.scheduler.Scheduler",
        "disaggregation_mode req_to_metadata_buffer_idx_allocator output_streamer",
        _USER,
    ),
    object_(
        f"{SRT}.managers.schedule_batch.Req",
        "disagg_kv_sender inflight_middle_chunks extend_batch_idx",
        _USER,
    ),
    object_(f"{SRT}.environ.envs", "SGLANG_DISAGG_STAGING_BUFFER", "options.disaggregation"),
    object_(
        f"{SRT}.server_args.ServerArgs", "optimistic_prefill_attempts", "options.disaggregation"
    ),
)
