"""What is used of SGLang 0.5.17 to show what the server looks like now, and to take orders."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import SRT, function, methods, object_

_COLLECT, _ENDPOINT = "snapshots.collect", "snapshots.endpoint"
_DESK, _ORDERS, _PROMPTS = "control.desk", "control.orders", "control.prompts"
_CACHE_ENDPOINT = "control.endpoint"

SNAPSHOTS = (
    *methods(
        f"{SRT}.managers.scheduler.Scheduler",
        f"{_COLLECT} {_DESK}",
        get_internal_state="recv_req",
    ),
    object_(
        f"{SRT}.managers.scheduler.Scheduler",
        "running_batch last_batch chunked_req waiting_queue server_args",
        _COLLECT,
    ),
    object_(f"{SRT}.managers.io_struct.GetInternalStateReq", "rid", f"{_ENDPOINT} {_ORDERS}"),
    object_(
        f"{SRT}.managers.io_struct.GetInternalStateReqOutput",
        "internal_state",
        f"{_COLLECT} {_DESK}",
    ),
    *methods(
        f"{SRT}.managers.tokenizer_manager.TokenizerManager",
        f"{_ENDPOINT} {_ORDERS}",
        auto_create_handle_loop="",
    ),
    *methods(
        f"{SRT}.managers.tokenizer_manager.TokenizerManager",
        _PROMPTS,
        _tokenize_texts="texts is_cross_encoder",
    ),
    object_(
        f"{SRT}.managers.tokenizer_manager.TokenizerManager",
        "server_args tokenizer context_len lora_registry",
        f"{_ENDPOINT} {_CACHE_ENDPOINT} {_PROMPTS}",
    ),
    *methods(
        f"{SRT}.lora.lora_registry.LoRARegistry",
        _CACHE_ENDPOINT,
        acquire="lora_name",
        release="lora_id",
    ),
    *methods(
        f"{SRT}.entrypoints.openai.serving_chat.OpenAIServingChat",
        _PROMPTS,
        _convert_to_internal_request="request raw_request",
    ),
    object_(
        f"{SRT}.entrypoints.openai.protocol.ChatCompletionRequest",
        "",
        _PROMPTS,
    ),
    *methods(
        f"{SRT}.managers.tokenizer_control_mixin.TokenizerControlMixin",
        _ENDPOINT,
        init_communicators="server_args",
    ),
    function(
        f"{SRT}.managers.communicator.FanOutCommunicator.__init__",
        "self send fan_out mode",
        _ENDPOINT,
    ),
    function(f"{SRT}.entrypoints.http_server.get_global_state", "", _ENDPOINT),
    object_(f"{SRT}.utils.auth.AuthLevel", "ADMIN_OPTIONAL", f"{_ENDPOINT} {_CACHE_ENDPOINT}"),
    function(f"{SRT}.utils.auth.auth_level", "level", f"{_ENDPOINT} {_CACHE_ENDPOINT}"),
    object_(f"{SRT}.utils.auth.decide_request_auth", "", _ENDPOINT),
    object_(
        f"{SRT}.server_args.ServerArgs",
        "host api_key admin_api_key served_model_name",
        f"options.watching {_ENDPOINT}",
    ),
)
