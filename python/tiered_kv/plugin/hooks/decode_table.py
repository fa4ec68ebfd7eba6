"""The part of `hooks.HOOKS` by which an iteration policy chooses who decodes."""

from __future__ import annotations

_BATCH = "schedule_batch.ScheduleBatch"

#: (target below sglang.srt.managers, kind, function below tiered_kv.plugin, why)
DECODE_HOOKS: tuple[tuple[str, str, str, str], ...] = (
    (
        "scheduler.Scheduler.__init__",
        "after",
        "hooks.decode:choose_who_decodes",
        "--tiered-kv-iteration-policy would choose nobody",
    ),
    (
        "scheduler.Scheduler.update_running_batch",
        "around",
        "hooks.decode:update_running_batch",
        "everyone would decode in every iteration",
    ),
    (
        f"{_BATCH}.check_decode_mem",
        "around",
        "hooks.decode:check_decode_mem",
        "requests would be retracted to make room for others that do not decode now",
    ),
    (
        f"{_BATCH}.prepare_for_decode",
        "around",
        "hooks.decode:prepare_for_decode",
        "everyone would decode in every iteration",
    ),
    (
        "scheduler_components.dp_attn.SchedulerDPAttnAdapter.maybe_prepare_mlp_sync_batch",
        "around",
        "hooks.decode:batch_to_run",
        "everyone would decode in every iteration",
    ),
    (
        "scheduler.Scheduler.process_batch_result",
        "after",
        "hooks.decode:after_batch_result",
        "a policy would not know when a request got its last token",
    ),
    (
        f"{_BATCH}.cumulate_penalty_output_tokens",
        "around",
        "decode.penalties:count_by_position",
        "penalties would miss tokens of requests that skip iterations",
    ),
    (
        f"{_BATCH}.prepare_for_extend",
        "after",
        "decode.penalties:count_again",
        "requests that made way would come back without the penalties they had",
    ),
    (
        f"{_BATCH}.mix_with_running",
        "after",
        "decode.batch:place_mixed_tokens",
        "requests that had been parked would get the position of another token",
    ),
    (
        "schedule_batch.release_req",
        "around",
        "decode.swap_out:release_req",
        "requests that are retracted would lose the KV of what they have produced",
    ),
    (
        f"{_BATCH}.retract_decode",
        "around",
        "hooks.decode:retract_decode",
        "memory that runs out would be taken from whoever has produced the least",
    ),
    (
        "schedule_policy.SchedulePolicy.calc_priority",
        "after",
        "hooks.decode:note_first_in_queue",
        "nobody would make way for a more urgent request that finds no room",
    ),
)
