"""The part of `hooks.HOOKS` by which requests and adapters get names that their KV depends on."""

from __future__ import annotations

from tiered_kv.plugin.hooks.hook import Hook, Process

_ADAPTERS = "tiered_kv.plugin.cache.adapters"

NAMING_HOOKS = (
    Hook(
        target="sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._compute_extra_key",
        kind="around",
        function="tiered_kv.plugin.requests.salts:compute_extra_key",
        process=Process.HTTP_SERVER,
        why="a salt and an extra key that spell another pair together would share its KV",
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.Req.__init__",
        kind="after",
        function=f"{_ADAPTERS}:name_tree",
        process=Process.SCHEDULER,
        why="a request whose key spells an adapter's id would share that adapter's KV",
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.MultimodalDataItem.set_pad_value",
        kind="around",
        function="tiered_kv.plugin.requests.inputs:set_pad_value",
        process=Process.SCHEDULER,
        why="images whose placeholders are alike would share KV",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        kind="before",
        function="tiered_kv.plugin.requests.inputs:name_inputs",
        process=Process.SCHEDULER,
        why="prompts with images would not be cached",
    ),
    *(
        Hook(
            target=f"sglang.srt.managers.scheduler.Scheduler.{method}",
            kind="after",
            function=f"{_ADAPTERS}:after_change",
            process=Process.SCHEDULER,
            why="KV of an adapter would be served to others that came to go by its id",
        )
        for method in ("load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter")
    ),
)
