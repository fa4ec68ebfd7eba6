"""What is used of SGLang 0.5.17 to show what the server looks like now."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import SRT, function, methods, object_

_COLLECT, _ENDPOINT = "snapshots.collect", "snapshots.endpoint"

SNAPSHOTS = (
    *methods(f"{SRT}.managers.scheduler.Scheduler", _COLLECT, get_internal_state="recv_req"),
    object_(
        f"{SRT}.managers.scheduler.Scheduler",
        "running_batch last_batch chunked_req waiting_queue server_args",
        _COLLECT,
    ),
    object_(f"{SRT}.managers.io_struct.GetInternalStateReq", "rid", _ENDPOINT),
    object_(f"{SRT}.managers.io_struct.GetInternalStateReqOutput", "internal_state", _COLLECT),
    *methods(
        f"{SRT}.managers.tokenizer_manager.TokenizerManager", _ENDPOINT, auto_create_handle_loop=""
    ),
    object_(
        f"{SRT}.managers.tokenizer_manager.TokenizerManager", "server_args tokenizer", _ENDPOINT
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
    object_(f"{SRT}.utils.auth.AuthLevel", "ADMIN_OPTIONAL", _ENDPOINT),
    function(f"{SRT}.utils.auth.auth_level", "level", _ENDPOINT),
    object_(f"{SRT}.utils.auth.decide_request_auth", "", _ENDPOINT),
    object_(
        f"{SRT}.server_args.ServerArgs",
        "host api_key admin_api_key served_model_name",
        f"options.watching {_ENDPOINT}",
    ),
)
