"""The part of `hooks.HOOKS` by which no request costs anybody but its caller anything."""

from __future__ import annotations

from tiered_kv.plugin.hooks.hook import Hook, Process

_GUARD = "tiered_kv.plugin.requests.guard"
_AS_IF_THE_SERVER = (
    "a value of the wrong type would be answered with 500, as if the server had failed"
)
_OPENAI = "sglang.srt.entrypoints.openai.serving_"

#: Where SGLang reads what a client sent: nothing is on its way yet, so an error is the client's.
_READERS = (
    ("sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state", "TOKENIZER"),
    ("sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request", "TOKENIZER"),
    ("sglang.srt.managers.tokenizer_manager.TokenizerManager._tokenize_one_request", "TOKENIZER"),
    (f"{_OPENAI}chat.OpenAIServingChat._convert_to_internal_request", "HTTP_SERVER"),
    (f"{_OPENAI}completions.OpenAIServingCompletion._convert_to_internal_request", "HTTP_SERVER"),
)

#: Where images are read, in threads of its own: an end of an iterator cannot leave a thread.
_IMAGE_READERS = ("load_mm_data", "process_and_combine_mm_data")

GUARD_HOOKS = (
    *(
        Hook(
            target=f"sglang.srt.multimodal.processors.base_processor.BaseMultimodalProcessor.{method}",
            kind="around",
            function=f"{_GUARD}:read_images",
            process=Process.TOKENIZER,
            why="images that are more or less than their places would get a 500, or no answer",
        )
        for method in _IMAGE_READERS
    ),
    Hook(
        target="sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
        kind="around",
        function=f"{_GUARD}:read_batch",
        process=Process.TOKENIZER,
        why=_AS_IF_THE_SERVER,
    ),
    *(
        Hook(
            target=target,
            kind="around",
            function=f"{_GUARD}:read_client",
            process=Process[process],
            why=_AS_IF_THE_SERVER,
        )
        for target, process in _READERS
    ),
    *(
        Hook(
            target=f"sglang.srt.entrypoints.ollama.serving.OllamaServing.{method}",
            kind="around",
            function=f"{_GUARD}:begin_stream",
            process=Process.HTTP_SERVER,
            why="a stream that cannot begin would be cut off instead of being answered with 400",
        )
        for method in ("_stream_chat_response", "_stream_generate_response")
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.score_request",
        kind="before",
        function=f"{_GUARD}:check_score",
        process=Process.TOKENIZER,
        why="a score of no labels would be answered with 500, as if the server had failed",
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        kind="around",
        function=f"{_GUARD}:check_tokenized",
        process=Process.TOKENIZER,
        why="an empty prompt or a token id that the model does not have would end the server",
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner._preprocess_logits",
        kind="around",
        function="tiered_kv.plugin.requests.sampling:leave_the_end",
        process=Process.SCHEDULER,
        why="a request whose own settings leave no token to draw would end the server",
    ),
    Hook(
        target="sglang.srt.layers.logprob_processor.OutputLogprobProcessor.compute_logprobs",
        kind="after",
        function="tiered_kv.plugin.requests.sampling:rows_without_tokens",
        process=Process.SCHEDULER,
        why="log-probabilities of some tokens for one request of a batch would end the server",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.handle_generate_request",
        kind="around",
        function=f"{_GUARD}:contain_arrival",
        process=Process.SCHEDULER,
        why="a request that cannot be taken in would end the server",
    ),
)
