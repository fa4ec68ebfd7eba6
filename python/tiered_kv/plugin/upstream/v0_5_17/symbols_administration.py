"""What is used of SGLang 0.5.17 to update weights, flush, pause, and give memory away."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import SRT, function, methods, object_

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_KINDS = ("disk", "distributed", "tensor", "ipc")

ADMINISTRATION = (
    *(
        function(f"{owner}.update_weights_from_{kind}", "self recv_req", "cache.weight_updates")
        for owner in (_UPDATER, f"{SRT}.managers.tp_worker.BaseTpWorker")
        for kind in _KINDS
    ),
    *methods(
        _UPDATER,
        "cache.weight_updates",
        flush_cache_after_weight_update="recv_req",
        release_memory_occupation="recv_req",
        resume_memory_occupation="recv_req",
    ),
    object_(_UPDATER, "scheduler offload_tags", "cache.weight_updates"),
    function(
        f"{SRT}.managers.tokenizer_control_mixin.TokenizerControlMixin.release_memory_occupation",
        "self obj request",
        "cache.weight_updates",
    ),
    object_(
        f"{SRT}.managers.tokenizer_manager.TokenizerManager",
        "is_pause model_update_lock",
        "cache.weight_updates",
    ),
    object_(f"{SRT}.constants.GPU_MEMORY_ALL_TYPES", "", "cache.weight_updates"),
    object_(f"{SRT}.constants.GPU_MEMORY_TYPE_KV_CACHE", "", "cache.weight_updates"),
    object_(f"{SRT}.constants.GPU_MEMORY_TYPE_WEIGHTS", "", "cache.weight_updates"),
    *(
        object_(f"{SRT}.managers.io_struct.{name}", attributes, "cache.weight_updates")
        for name, attributes in (
            ("UpdateWeightFromDiskReqInput", "flush_cache"),
            ("UpdateWeightFromDiskReqOutput", "success message"),
            ("UpdateWeightsFromDistributedReqInput", "flush_cache"),
            ("UpdateWeightsFromDistributedReqOutput", "success message"),
            ("UpdateWeightsFromTensorReqInput", "flush_cache"),
            ("UpdateWeightsFromTensorReqOutput", "success message"),
            ("UpdateWeightsFromIPCReqInput", "flush_cache"),
            ("UpdateWeightsFromIPCReqOutput", "success message"),
            ("ReleaseMemoryOccupationReqInput", "tags"),
            ("ReleaseMemoryOccupationReqOutput", ""),
            ("ResumeMemoryOccupationReqInput", "tags"),
            ("ResumeMemoryOccupationReqOutput", ""),
        )
    ),
    object_(f"{SRT}.managers.io_struct.PauseGenerationReqInput", "mode", "cache.idle"),
    *methods(
        f"{SRT}.managers.scheduler.Scheduler",
        "cache.idle",
        is_fully_idle="for_health_check",
        flush_cache="empty_cache",
        process_input_requests="recv_reqs",
        maybe_sleep_on_idle="",
        pause_generation="recv_req",
        continue_generation="recv_req",
        _prefetch_kvcache="req",
    ),
    object_(
        f"{SRT}.managers.scheduler.Scheduler",
        "_engine_paused waiting_queue running_batch last_batch chunked_req",
        "cache.idle queue.failed_loads",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.Req",
        "finished extend_batch_idx retracted_stain cached_tokens "
        "cached_tokens_device cached_tokens_host cached_tokens_storage _cache_breakdown_computed",
        "cache.idle queue.again",
    ),
)
