"""What is used of SGLang 0.5.17's pipelines: the loop of a stage, and which stage it is."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import MEM, SRT, methods, object_

_SCHEDULER = f"{SRT}.managers.scheduler.Scheduler"
_USER = "cache.stage_loop"

PIPELINE = (
    *methods(
        _SCHEDULER,
        _USER,
        get_next_batch_to_run="running_batch last_batch",
        handle_shutdown="recv_req",
        run_event_loop="",
        _pp_send_pyobj_to_next_stage="data async_send",
    ),
    object_(_SCHEDULER, "gracefully_exit pp_group", _USER),
    object_(f"{SRT}.managers.io_struct.ShutdownReq", "", _USER),
    object_(
        f"{MEM}.cache_init_params.CacheInitParams",
        "pp_rank pp_size",
        "cache.stages cache.replicas cache.shards cache.build cache.build_windows options.pipeline",
    ),
    object_(f"{MEM}.memory_pool.MHATokenToKVPool", "layer_num start_layer", "cache.stages"),
    object_(f"{MEM}.memory_pool.MLATokenToKVPool", "layer_num start_layer", "cache.stages"),
    object_(
        f"{SRT}.server_args.ServerArgs",
        "pp_size pp_async_batch_depth enable_dynamic_chunking enable_memory_saver enable_lora "
        "enable_mixed_chunk kv_events_config",
        "options.pipeline",
    ),
)
