"""The part of `hooks.HOOKS` by which requests and adapters get names that their KV depends on."""

from __future__ import annotations

#: (kind of process, target below sglang.srt, kind, function below tiered_kv.plugin, why)
NAMING_HOOKS: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "HTTP_SERVER",
        "entrypoints.openai.serving_base.OpenAIServingBase._compute_extra_key",
        "around",
        "requests.tenants:compute_extra_key",
        "a salt and an extra key that spell another pair together would share its KV",
    ),
    (
        "SCHEDULER",
        "managers.schedule_batch.Req.__init__",
        "after",
        "cache.adapters:name_tree",
        "a request whose key spells an adapter's id would share that adapter's KV",
    ),
    *(
        (
            "SCHEDULER",
            f"managers.scheduler.Scheduler.{method}",
            "after",
            "cache.adapters:after_change",
            "KV of an adapter would be served to others that came to go by its id",
        )
        for method in (
            "load_lora_adapter",
            "load_lora_adapter_from_tensors",
            "unload_lora_adapter",
        )
    ),
)
