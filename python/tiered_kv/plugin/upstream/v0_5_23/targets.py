"""Hooks that are attached elsewhere in SGLang 0.5.23 than in other releases, or nowhere."""

from __future__ import annotations

_MANAGERS = "sglang.srt.managers"
_WORKER = f"{_MANAGERS}.tp_worker.BaseTpWorker"
_UPDATER = f"{_MANAGERS}.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_RUNNER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_AGREE = "tiered_kv.plugin.cache.weight_updates:agree_on_outcome"

#: Target in `hooks/` -> the target here, and our function for it; None: there is none.
ELSEWHERE: dict[str, tuple[str, str] | None] = {
    f"{_MANAGERS}.scheduler.Scheduler._can_schedule_lora_req": (
        f"{_MANAGERS}.scheduler.Scheduler.can_schedule_lora_req",
        "tiered_kv.plugin.hooks.scheduler:may_start",
    ),
    # The function has one caller more here, which wants KV forgotten.
    f"{_MANAGERS}.schedule_batch.release_req": (
        f"{_MANAGERS}.schedule_batch.ScheduleBatch.release_req",
        "tiered_kv.plugin.decode.swap_out:release_row",
    ),
    # Salt and extra key travel apart; nothing joins them.
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._compute_extra_key": None,
    f"{_WORKER}.update_weights_from_disk": (f"{_RUNNER}.update_weights_from_disk", _AGREE),
    f"{_WORKER}.update_weights_from_distributed": (
        f"{_RUNNER}.load_weights_from_distributed",
        _AGREE,
    ),
    f"{_WORKER}.update_weights_from_tensor": (f"{_RUNNER}.update_weights_from_tensor", _AGREE),
    f"{_WORKER}.update_weights_from_ipc": (f"{_RUNNER}.update_weights_from_ipc", _AGREE),
}
#: Hooks that this release alone needs: (target, kind, our function, why).
MORE: tuple[tuple[str, str, str, str], ...] = (
    (
        f"{_MANAGERS}.schedule_policy.PrefillAdder.add_one_req",
        "before",
        "tiered_kv.plugin.hooks.scheduler:promise_load",
        "a load of less than all that the host has would end the server",
    ),
    (
        "sglang.srt.arg_groups.mamba_hook.validate_mamba_no_buffer",
        "around",
        "tiered_kv.plugin.upstream.v0_5_23.arguments:validate_no_buffer",
        "models with recurrent state would be refused unless their pages had one token",
    ),
    *(
        (
            f"{_UPDATER}.{method}_weight_update",
            "around",
            "tiered_kv.plugin.cache.weight_updates:change_form",
            "KV of weights in another form would go by the same name",
        )
        for method in ("begin", "end")
    ),
)
