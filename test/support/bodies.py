"""Bodies that a caller may send to the routes that generate: mostly right, some values wrong.

Each strategy draws (path, body). A body starts from one that works; some of its fields are replaced
by another right value, and a few by one of `ODD`, which is what real clients and scanners send:
nothing, empty things, other types, numbers out of range, text that is no text.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Body = tuple[str, Any]

VOCABULARY = 49_152
#: Long enough for several pages, short enough for a model with 2,048 positions.
PROMPT_TOKENS_MAX = 300

ODD = st.sampled_from(
    [
        *(None, "", [], {}, [[]], [None], [""], [{}], {"": None}, 0, -1, 1.5, True, False),
        *(2**31, 2**63, 2**64, -(2**63), 1e308, -1e308, 1e-320, "0", "1e9", "NaN", "true"),
        *("\u0000", "\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace")),
        *("a" * 3000, ["a"] * 70, [0] * 70, {"a": {"a": {"a": []}}}, [[[[[[]]]]]]),
    ]
)


def mostly(right: st.SearchStrategy[Any], odds: int = 12) -> st.SearchStrategy[Any]:
    """`right`, but one in `odds` an odd value."""
    return st.integers(1, odds).flatmap(lambda n: ODD if n == odds else right)


def bodies(
    needed: dict[str, st.SearchStrategy[Any]], optional: dict[str, st.SearchStrategy[Any]]
) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with all of `needed`, hardly ever without one, and up to five of `optional`."""

    def some(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        chosen = {name: mostly(optional[name], 15) for name in names}
        return st.fixed_dictionaries({**{k: mostly(v, 40) for k, v in needed.items()}, **chosen})

    return st.lists(st.sampled_from(sorted(optional)), max_size=5, unique=True).flatmap(some)


# -- values that are right -------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["one", "two", "three", "red", "green", "Once upon", "?", "\n", "日本", "é"]
)
TEXT = st.one_of(
    st.lists(WORDS, max_size=60).map(" ".join), st.text(max_size=30), st.sampled_from(["", " "])
)
TOKEN = st.one_of(
    st.integers(0, VOCABULARY - 1),
    st.integers(0, VOCABULARY - 1),
    st.sampled_from([0, 1, 2, VOCABULARY, -1, 2**31, 2**63]),
)
TOKENS = st.one_of(
    st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=PROMPT_TOKENS_MAX),
    st.integers(1, 1100).map(lambda n: [5] * n),
    st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=8),
    st.lists(TOKEN, max_size=3),
)
FEW = st.integers(0, 6)
FRACTION = st.floats(0, 2, allow_nan=False)
FLAG = st.booleans()
NAME = st.sampled_from(["a", "ab", "abc", "tenant-1", "x" * 64])
STOP = st.one_of(WORDS, st.lists(WORDS, max_size=5))
SEED = st.integers(0, 2**31)

SLO = bodies(
    {},
    {
        "class": st.sampled_from(["interactive", "standard", "batch", "nobody"]),
        "ttft_ms": st.one_of(st.integers(1, 5000), st.sampled_from([0, -5, 1e12])),
        "tbt_ms": st.integers(1, 5000),
        "tenant": NAME,
        "report": FLAG,
        "unknown": FLAG,
    },
)
HINTS = bodies(
    {},
    {
        "expected_output_tokens": st.integers(0, 100),
        "next_call_in_s": st.floats(0, 100, allow_nan=False),
        "next_call_probability": st.floats(0, 1.1, allow_nan=False),
    },
)
OURS = {"slo": SLO, "hints": HINTS}

PENALTIES = {
    "frequency_penalty": st.floats(-2.1, 2, allow_nan=False),
    "presence_penalty": st.floats(-2, 2.1, allow_nan=False),
    "repetition_penalty": st.floats(0.1, 2.1, allow_nan=False),
}
SAMPLING = {
    **PENALTIES,
    "temperature": FRACTION,
    "top_p": st.floats(0.1, 1.05, allow_nan=False),
    "top_k": st.sampled_from([-1, 0, 1, 5, 2**31]),
    "min_p": st.floats(0, 1.05, allow_nan=False),
    "stop": STOP,
    "stop_token_ids": st.lists(st.integers(0, VOCABULARY), max_size=4),
    "stop_regex": st.sampled_from(["[a-z]+", "(", "a{1,1000}", ""]),
    "ignore_eos": FLAG,
    "skip_special_tokens": FLAG,
    "no_stop_trim": FLAG,
    "regex": st.sampled_from(["[ab]{2}", "(", ".*", "(a|b)*c"]),
    "ebnf": st.sampled_from(['root ::= "a"', "root ::=", ""]),
    "json_schema": st.sampled_from(['{"type": "object"}', "{", '{"type": "nothing"}', "null"]),
    "logit_bias": st.dictionaries(
        st.sampled_from(["5", "6", "7", "8", "9", "-1", "49151", "49152", "abc"]),
        st.floats(-100, 100),
    ),
    "custom_params": st.one_of(st.fixed_dictionaries({}, optional=OURS), st.just({"x": 1})),
}
LOG_PROBABILITIES = {
    "return_logprob": FLAG,
    "logprob_start_len": st.integers(-2, 400),
    "top_logprobs_num": st.integers(-1, 30),
    "token_ids_logprob": st.lists(TOKEN, max_size=4),
    "return_text_in_logprobs": FLAG,
}


def several(one: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(one, one, st.lists(mostly(one, 8), min_size=1, max_size=4))


NATIVE_SAMPLING = bodies(
    {"max_new_tokens": FEW},
    {
        **SAMPLING,
        "min_new_tokens": st.integers(-1, 8),
        "n": st.integers(0, 3),
        "sampling_seed": SEED,
    },
)
NATIVE = {
    **OURS,
    **LOG_PROBABILITIES,
    "stream": FLAG,
    "rid": several(st.uuids().map(str)),
    "extra_key": several(NAME),
    "cache_salt": several(NAME),
    "lora_path": st.sampled_from([None, "a", ["a"]]),
    "priority": st.integers(-5, 5),
    "session_params": st.fixed_dictionaries(
        {}, optional={"id": NAME, "rid": NAME, "offset": st.integers(-1, 9), "replace": FLAG}
    ),
    "session_id": NAME,
    "input_embeds": st.sampled_from([[[0.0] * 64] * 3, [[0.0] * 3], [[]]]),
    "image_data": st.sampled_from(
        ["http://127.0.0.1:9/x.png", "no image", "data:image/png;base64,AA"]
    ),
    "return_hidden_states": FLAG,
    "return_routed_experts": FLAG,
    "custom_logit_processor": st.sampled_from(["", "{}", '{"callable": "00"}']),
    "received_time": st.floats(allow_nan=False, allow_infinity=False),
    "max_thinking_tokens": st.integers(-1, 5),
    "return_sampling_mask": FLAG,
    "return_entropy": FLAG,
    **dict.fromkeys(
        (
            *("positional_embed_overrides", "http_worker_ipc", "lora_id", "num_items_assigned"),
            *("mm_data_mooncake", "need_wait_for_mm_inputs", "encoder_urls", "decode_tp_size"),
        ),
        st.sampled_from([None, None, "ipc:///tmp/x", {}, 1, ["a"], True]),
    ),
    "modalities": st.sampled_from([["image"], ["nothing"]]),
    "audio_data": st.sampled_from(["no audio", ["no audio"]]),
    "external_trace_header": st.dictionaries(NAME, NAME, max_size=1),
    "routed_experts_start_len": st.integers(-5, 50),
    "background": FLAG,
    "routing_key": NAME,
    "conversation_id": NAME,
    "multi_item_delimiter_indices": st.lists(st.integers(-1, 10), max_size=3),
    "bootstrap_room": st.integers(0, 5),
    "custom_labels": st.dictionaries(NAME, NAME, max_size=2),
    "return_prompt_token_ids": FLAG,
    "routed_dp_rank": st.integers(0, 3),
}
GENERATE: st.SearchStrategy[Body] = st.one_of(
    bodies({"text": several(TEXT), "sampling_params": several(NATIVE_SAMPLING)}, NATIVE),
    bodies({"input_ids": several(TOKENS), "sampling_params": several(NATIVE_SAMPLING)}, NATIVE),
    bodies({"input_ids": several(TOKENS), "sampling_params": NATIVE_SAMPLING}, NATIVE),
).map(lambda body: ("/generate", body))

OPENAI = {
    **OURS,
    **SAMPLING,
    "n": st.integers(0, 3),
    "seed": SEED,
    "stream": FLAG,
    "stream_options": st.fixed_dictionaries({"include_usage": FLAG}),
    "min_tokens": st.integers(-1, 8),
    "user": NAME,
    "rid": several(NAME),
    "extra_key": several(NAME),
    "cache_salt": several(NAME),
    "priority": st.integers(-5, 5),
    "session_id": NAME,
    "response_format": st.sampled_from(
        [
            {"type": "json_object"},
            {"type": "text"},
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
            {"type": "json_schema"},
            {"type": "nothing"},
        ]
    ),
    "return_hidden_states": FLAG,
    "return_token_ids": FLAG,
    "return_cached_tokens_details": FLAG,
}
MODEL = {"model": st.sampled_from(["tiny"] * 8 + ["default", "tiny:adapter"])}
COMPLETIONS: st.SearchStrategy[Body] = bodies(
    {**MODEL, "prompt": st.one_of(several(TEXT), several(TOKENS)), "max_tokens": FEW},
    {
        **OPENAI,
        "echo": FLAG,
        "best_of": st.integers(0, 3),
        "logprobs": st.integers(-1, 8),
        "suffix": TEXT,
    },
).map(lambda body: ("/v1/completions", body))

PART = st.one_of(
    TEXT.map(lambda text: {"type": "text", "text": text}),
    st.sampled_from([{"type": "image_url", "image_url": {"url": "no"}}, {"type": "text"}, {}]),
)
CONTENT = st.one_of(TEXT, TEXT, st.lists(PART, max_size=3))
ROLE = st.sampled_from(["user", "user", "assistant", "system", "tool", "developer", "nobody"])
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGE = bodies(
    {"role": ROLE, "content": CONTENT},
    {"name": NAME, "tool_calls": st.just([CALL]), "tool_call_id": NAME, "reasoning_content": TEXT},
)
TOOL = st.sampled_from(
    [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "f"}},
        {"type": "function"},
    ]
)
CHAT: st.SearchStrategy[Body] = bodies(
    {**MODEL, "messages": st.lists(mostly(MESSAGE), min_size=1, max_size=4), "max_tokens": FEW},
    {
        **OPENAI,
        "logprobs": FLAG,
        "top_logprobs": st.integers(-1, 30),
        "max_completion_tokens": FEW,
        "tools": st.lists(TOOL, max_size=2),
        "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "function"}]),
        "continue_final_message": FLAG,
        "reasoning_effort": st.sampled_from(["low", "none", "huge"]),
        "chat_template_kwargs": st.dictionaries(NAME, FLAG, max_size=2),
        "input_ids": TOKENS,
    },
).map(lambda body: ("/v1/chat/completions", body))

RESPONSES: st.SearchStrategy[Body] = bodies(
    {**MODEL, "input": st.one_of(TEXT, st.lists(MESSAGE, max_size=3)), "max_output_tokens": FEW},
    {
        **OURS,
        **PENALTIES,
        "stream": FLAG,
        "store": FLAG,
        "background": FLAG,
        "instructions": TEXT,
        "temperature": FRACTION,
        "top_p": FRACTION,
        "top_logprobs": st.integers(-1, 30),
        "previous_response_id": NAME,
        "extra_key": NAME,
        "cache_salt": NAME,
        "stop": STOP,
        "tools": st.lists(
            st.sampled_from([{"type": "web_search"}, {"type": "function", "name": "f"}])
        ),
        "truncation": st.sampled_from(["auto", "disabled"]),
        "reasoning": st.sampled_from([{"effort": "low"}, {}]),
    },
).map(lambda body: ("/v1/responses", body))

MESSAGES: st.SearchStrategy[Body] = bodies(
    {**MODEL, "messages": st.lists(MESSAGE, min_size=1, max_size=4), "max_tokens": FEW},
    {
        **OURS,
        "system": st.one_of(TEXT, st.lists(PART, max_size=2)),
        "stream": FLAG,
        "stop_sequences": st.lists(WORDS, max_size=3),
        "temperature": FRACTION,
        "top_p": FRACTION,
        "top_k": st.integers(-1, 50),
        "metadata": st.fixed_dictionaries({"user_id": NAME}),
        "cache_salt": NAME,
        "tools": st.lists(st.just({"name": "f", "input_schema": {"type": "object"}}), max_size=1),
    },
).map(lambda body: ("/v1/messages", body))

OLLAMA = bodies(
    {"num_predict": FEW},
    {"temperature": FRACTION, "top_k": st.integers(-1, 50), "stop": STOP, "seed": SEED},
)
OTHERS: st.SearchStrategy[Body] = st.one_of(
    bodies(
        {**MODEL, "messages": st.lists(MESSAGE, max_size=3), "options": OLLAMA},
        {"stream": FLAG, **OURS},
    ).map(lambda body: ("/api/chat", body)),
    bodies({**MODEL, "prompt": TEXT, "options": OLLAMA}, {"stream": FLAG, **OURS}).map(
        lambda body: ("/api/generate", body)
    ),
    bodies(
        {**MODEL, "query": st.one_of(TEXT, TOKENS), "items": several(TEXT)},
        {"label_token_ids": st.lists(TOKEN, max_size=4), "apply_softmax": FLAG, "item_first": FLAG},
    ).map(lambda body: ("/v1/score", body)),
    bodies(
        {"instances": st.lists(TEXT.map(lambda t: {"text": t}), max_size=3)},
        {"parameters": NATIVE_SAMPLING},
    ).map(lambda body: ("/vertex_generate", body)),
    CHAT.map(lambda drawn: ("/invocations", drawn[1])),
    ODD.flatmap(lambda body: st.sampled_from(ROUTES).map(lambda path: (path, body))),
)
ROUTES = (
    *("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
    *("/api/chat", "/api/generate", "/v1/score", "/vertex_generate", "/invocations"),
)

#: Drawn by route first: hypothesis would choose among the alternatives of the alternatives.
ANY: st.SearchStrategy[Body] = st.sampled_from(
    [
        GENERATE,
        GENERATE,
        GENERATE,
        COMPLETIONS,
        COMPLETIONS,
        CHAT,
        CHAT,
        RESPONSES,
        MESSAGES,
        OTHERS,
    ]
).flatmap(lambda strategy: strategy)
