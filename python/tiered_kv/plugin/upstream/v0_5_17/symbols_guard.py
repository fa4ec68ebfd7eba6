"""What is used of SGLang 0.5.17 where it reads what a caller sent."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import SRT, function, methods, object_

GUARD = (
    function(
        f"{SRT}.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
        "self",
        "requests.guard",
    ),
    object_(f"{SRT}.managers.io_struct.GenerateReqInput", "custom_labels", "requests.guard"),
    object_(f"{SRT}.managers.io_struct.AbortReq", "rid finished_reason", "requests.guard"),
    object_(f"{SRT}.managers.tokenizer_manager.TokenizerManager", "model_config", "requests.guard"),
    *methods(
        f"{SRT}.managers.tokenizer_manager.TokenizerManager",
        "requests.guard",
        _init_req_state="obj request lifecycle_id",
        _validate_one_request="obj input_ids",
        _tokenize_one_request="obj",
        _create_tokenized_object="obj input_text input_ids input_embeds mm_inputs token_type_ids",
    ),
    *(
        object_(
            f"{SRT}.multimodal.processors.base_processor.BaseMultimodalProcessor.{method}",
            "",
            "requests.guard",
        )
        for method in ("load_mm_data", "process_and_combine_mm_data")
    ),
    object_(
        f"{SRT}.managers.tokenizer_manager.TokenizerManager.score_request", "", "requests.guard"
    ),
    object_(
        f"{SRT}.managers.io_struct.TokenizedGenerateReqInput",
        "input_ids mm_inputs sampling_params",
        "requests.guard",
    ),
    object_(
        f"{SRT}.sampling.sampling_params.SamplingParams",
        "stop_token_ids sampling_seed repetition_penalty logit_bias",
        "requests.guard",
    ),
    *methods(
        f"{SRT}.model_executor.model_runner.ModelRunner",
        "requests.sampling",
        _preprocess_logits="logits_output sampling_info",
    ),
    object_(f"{SRT}.model_executor.model_runner.ModelRunner", "model_config", "requests.sampling"),
    object_(
        f"{SRT}.sampling.sampling_batch_info.SamplingBatchInfo",
        "grammars logit_bias acc_additive_penalties acc_scaling_penalties penalizer_orchestrator",
        "requests.sampling",
    ),
    object_(
        f"{SRT}.sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator",
        "is_required",
        "requests.sampling",
    ),
    object_(
        f"{SRT}.layers.logits_processor.LogitsProcessorOutput",
        "next_token_logits",
        "requests.sampling",
    ),
    object_(f"{SRT}.configs.model_config.ModelConfig", "hf_eos_token_id", "requests.sampling"),
    *methods(
        f"{SRT}.layers.logprob_processor.OutputLogprobProcessor",
        "requests.sampling",
        compute_logprobs="logprobs top_logprobs_nums token_ids_logprobs batch_next_token_ids",
    ),
    object_(
        f"{SRT}.layers.logprob_processor.LogprobResult",
        "token_ids_logprobs_val",
        "requests.sampling",
    ),
    object_(
        f"{SRT}.server_args.ServerArgs",
        "tokenizer_metrics_allowed_custom_labels",
        "requests.guard",
    ),
    function(
        f"{SRT}.entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request",
        "self request raw_request",
        "requests.guard",
    ),
    function(
        f"{SRT}.entrypoints.openai.serving_completions.OpenAIServingCompletion"
        "._convert_to_internal_request",
        "self request raw_request",
        "requests.guard",
    ),
    *methods(
        f"{SRT}.entrypoints.ollama.serving.OllamaServing",
        "requests.guard",
        _stream_chat_response="gen_request raw_request model_name",
        _stream_generate_response="gen_request raw_request model_name",
    ),
    object_(f"{SRT}.entrypoints.http_server.app", "", "start.process_carrier"),
    object_(f"{SRT}.entrypoints.http_server", "app", "start.process_carrier"),
    function(
        f"{SRT}.managers.scheduler.Scheduler.handle_generate_request",
        "self recv_req",
        "requests.guard",
    ),
    object_(f"{SRT}.managers.scheduler.Scheduler", "waiting_queue ipc_channels", "requests.guard"),
)
