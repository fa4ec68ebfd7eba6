"""Architectures of SGLang's registry as small configurations of transformers' own classes."""
# fmt: off

from __future__ import annotations

from typing import Any

Shape = dict[str, Any]

_PLAIN: Shape = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 2048,
}
_WINDOW: Shape = {**_PLAIN, "sliding_window": 64}
_LATENT: Shape = {
    **_PLAIN, "num_key_value_heads": 4, "kv_lora_rank": 96, "q_lora_rank": 64,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "first_k_dense_replace": 1,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
}

ARCHITECTURES: dict[str, tuple[str, Shape]] = {
    # SGLang's architecture: transformers' class of its configuration, and a shape
    "LlamaForCausalLM": ("LlamaConfig", _PLAIN),
    "MistralForCausalLM": ("MistralConfig", {**_PLAIN, "head_dim": 32}),
    "MixtralForCausalLM": ("MixtralConfig", _PLAIN),
    "Qwen2ForCausalLM": ("Qwen2Config", _PLAIN),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", {**_PLAIN, "num_experts": 4}),
    "Qwen3ForCausalLM": ("Qwen3Config", {**_PLAIN, "head_dim": 64}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**_PLAIN, "head_dim": 32, "num_experts": 4}),
    "GemmaForCausalLM": ("GemmaConfig", {**_PLAIN, "head_dim": 64}),
    "Gemma2ForCausalLM": ("Gemma2Config", {**_WINDOW, "head_dim": 64}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**_WINDOW, "head_dim": 64}),
    "PhiForCausalLM": ("PhiConfig", _PLAIN),
    "Phi3ForCausalLM": ("Phi3Config", {**_PLAIN, "pad_token_id": 0}),
    "PhiMoEForCausalLM": ("PhimoeConfig", _PLAIN),
    "GraniteForCausalLM": ("GraniteConfig", _PLAIN),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", _PLAIN),
    "Olmo2ForCausalLM": ("Olmo2Config", _PLAIN),
    "OlmoeForCausalLM": ("OlmoeConfig", _PLAIN),
    "CohereForCausalLM": ("CohereConfig", _PLAIN),
    "Cohere2ForCausalLM": ("Cohere2Config", _WINDOW),
    "StableLmForCausalLM": ("StableLmConfig", _PLAIN),
    "Starcoder2ForCausalLM": ("Starcoder2Config", _PLAIN),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 128, "n_layer": 4, "n_head": 4}),
    "GptOssForCausalLM": ("GptOssConfig", {**_WINDOW, "head_dim": 64, "num_local_experts": 4}),
    "Glm4ForCausalLM": ("Glm4Config", {**_PLAIN, "head_dim": 32}),
    "Glm4MoeForCausalLM": ("Glm4MoeConfig", {**_PLAIN, "head_dim": 32, "n_routed_experts": 4}),
    "MiniMaxM2ForCausalLM": ("MiniMaxM2Config", {**_PLAIN, "head_dim": 64}),
    "Ernie4_5_ForCausalLM": ("Ernie4_5Config", {**_PLAIN, "head_dim": 32}),
    "Exaone4ForCausalLM": ("Exaone4Config", _WINDOW),
    "ApertusForCausalLM": ("ApertusConfig", _PLAIN),
    "PersimmonForCausalLM": ("PersimmonConfig", _PLAIN),
    "DeepseekV2ForCausalLM": ("DeepseekV2Config", _LATENT),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", _LATENT),
    "Qwen2VLForConditionalGeneration": ("Qwen2VLConfig", {"text_config": {
        **_PLAIN,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]},
    }}),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config", {"text_config": {**_WINDOW, "head_dim": 64}}
    ),
    "Llama4ForConditionalGeneration": ("Llama4Config", {"text_config": {**_PLAIN, "head_dim": 32}}),
}
