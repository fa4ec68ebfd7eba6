"""config.json of models as they were released, cut to what says how large they are."""
# fmt: off

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _every(n: int, period: int, kind: str, others: str) -> list[str]:
    return [kind if (index + 1) % period == 0 else others for index in range(n)]


QWEN3_NEXT: Config = {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next",
    "full_attention_interval": 4, "head_dim": 256, "hidden_size": 2048, "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_value_head_dim": 128, "mlp_only_layers": [],
    "decoder_sparse_step": 1, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 2,
    "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48, "vocab_size": 151936,
}
QWEN35_27B: Config = {
    "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5",
    "text_config": {
        "model_type": "qwen3_5_text", "num_hidden_layers": 64, "full_attention_interval": 4,
        "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256, "hidden_size": 5120,
        "intermediate_size": 17408, "linear_num_key_heads": 16, "linear_num_value_heads": 48,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248320,
    },
}
# It leaves its heads, its vocabulary and which layers have a window to the library.
GEMMA3_4B: Config = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
        "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 27,
        "patch_size": 14, "vision_use_head": False,
    },
}
GEMMA3N_E4B: Config = {
    "architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n",
    "text_config": {
        "hidden_size": 2048, "intermediate_size": [16384] * 35, "model_type": "gemma3n_text",
        "num_hidden_layers": 35, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 256, "num_kv_shared_layers": 15, "sliding_window": 512,
        "layer_types": _every(35, 5, "full_attention", "sliding_attention"),
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
    },
}
DEEPSEEK_V3: Config = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "kv_lora_rank": 512, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_nextn_predict_layers": 1, "vocab_size": 129280,
    "quantization_config": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
}
DEEPSEEK_V32: Config = {
    **DEEPSEEK_V3, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32",
    "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
}
KIMI_K2: Config = {
    **DEEPSEEK_V3, "model_type": "kimi_k2", "first_k_dense_replace": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 163840,
}
GPT_OSS_120B: Config = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
    "head_dim": 64, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
    "num_key_value_heads": 8, "num_hidden_layers": 36, "num_local_experts": 128,
    "num_experts_per_tok": 4, "experts_per_token": 4, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18, "vocab_size": 201088,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
            "lm_head",
        ],
    },
}
GPT_OSS_20B: Config = {
    **GPT_OSS_120B, "num_hidden_layers": 24, "num_local_experts": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}
LLAMA4_MAVERICK: Config = {
    "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text", "attention_chunk_size": 8192, "head_dim": 128,
        "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "interleave_moe_layer_step": 2, "num_attention_heads": 40, "num_key_value_heads": 8,
        "num_hidden_layers": 48, "num_local_experts": 128, "num_experts_per_tok": 1,
        "vocab_size": 202048, "tie_word_embeddings": False,
    },
}
LLAMA4_SCOUT: Config = {
    **LLAMA4_MAVERICK,
    "text_config": {
        **LLAMA4_MAVERICK["text_config"], "interleave_moe_layer_step": 1, "num_local_experts": 16,
    },
}
JAMBA: Config = {
    "architectures": ["JambaForCausalLM"], "model_type": "jamba", "attn_layer_offset": 4,
    "attn_layer_period": 8, "expert_layer_offset": 1, "expert_layer_period": 2,
    "hidden_size": 4096, "intermediate_size": 14336, "mamba_conv_bias": True, "mamba_d_conv": 4,
    "mamba_d_state": 16, "mamba_dt_rank": 256, "mamba_expand": 2, "num_attention_heads": 32,
    "num_experts": 16, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "vocab_size": 65536,
}
NEMOTRON_H_8B: Config = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "num_hidden_layers": 52, "hidden_size": 4096, "intermediate_size": 21504,
    "num_attention_heads": 32, "attention_head_dim": 128, "num_key_value_heads": 8,
    "mamba_head_dim": 64, "mamba_num_heads": 128, "n_groups": 8, "ssm_state_size": 128,
    "conv_kernel": 4, "expand": 2, "mlp_hidden_act": "relu2", "vocab_size": 131072,
}
BAMBA_9B: Config = {
    "architectures": ["BambaForCausalLM"], "model_type": "bamba", "attn_layer_indices": [9, 18, 27],
    "hidden_size": 4096, "intermediate_size": 14336, "mamba_d_conv": 4, "mamba_d_head": 64,
    "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 128,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LFM2_1B: Config = {
    "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "block_auto_adjust_ff_dim": True,
    "block_dim": 2048, "block_ff_dim": 12288, "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256, "conv_L_cache": 3, "conv_bias": False,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14], "hidden_size": 2048, "num_attention_heads": 32,
    "num_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "vocab_size": 65536,
}
GRANITE4_H_SMALL: Config = {
    "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid",
    "hidden_size": 4096, "intermediate_size": 768, "shared_intermediate_size": 1536,
    "layer_types": [
        "attention" if index in (5, 15, 25, 35) else "mamba" for index in range(40)
    ],
    "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2,
    "mamba_n_groups": 1, "mamba_n_heads": 128, "num_attention_heads": 32,
    "num_experts_per_tok": 10, "num_hidden_layers": 40, "num_key_value_heads": 8,
    "num_local_experts": 72, "tie_word_embeddings": True, "vocab_size": 100352,
}
FALCON_H1_34B: Config = {
    "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "head_dim": 128,
    "hidden_size": 5120, "intermediate_size": 21504, "mamba_d_conv": 4, "mamba_d_head": 128,
    "mamba_d_ssm": 4096, "mamba_d_state": 256, "mamba_expand": 2, "mamba_n_groups": 2,
    "mamba_n_heads": 32, "num_attention_heads": 20, "num_hidden_layers": 72,
    "num_key_value_heads": 4, "vocab_size": 261120,
}
RECURRENT_GEMMA_2B: Config = {
    "architectures": ["RecurrentGemmaForCausalLM"], "model_type": "recurrent_gemma",
    "attention_window_size": 2048, "block_types": ["recurrent", "recurrent", "attention"],
    "conv1d_width": 4, "head_dim": 256, "hidden_size": 2560, "intermediate_size": 15360,
    "lru_width": 2560, "num_attention_heads": 10, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "vocab_size": 256000,
}
ZAMBA2_2B: Config = {
    "architectures": ["Zamba2ForCausalLM"], "model_type": "zamba2", "hidden_size": 2560,
    "attention_head_dim": 160, "attention_hidden_size": 5120, "intermediate_size": 10240,
    "hybrid_layer_ids": [6, 12, 18, 24, 30, 36, 42, 47, 51], "mamba_d_state": 64,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_ngroups": 1, "n_mamba_heads": 80,
    "num_attention_heads": 32, "num_hidden_layers": 54, "num_key_value_heads": 32,
    "num_mem_blocks": 2, "adapter_rank": 128, "vocab_size": 32000,
}
LLAMA32_VISION_11B: Config = {
    "architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama",
    "text_config": {
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "hidden_size": 4096,
        "intermediate_size": 14336, "model_type": "mllama_text_model", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}
QWEN3_OMNI_30B: Config = {
    "architectures": ["Qwen3OmniMoeForConditionalGeneration"], "model_type": "qwen3_omni_moe",
    "thinker_config": {
        "model_type": "qwen3_omni_moe_thinker",
        "text_config": {
            "head_dim": 128, "hidden_size": 2048, "intermediate_size": 768,
            "model_type": "qwen3_omni_moe_text", "moe_intermediate_size": 768,
            "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
            "num_hidden_layers": 48, "num_key_value_heads": 4, "vocab_size": 152064,
        },
    },
}
QWEN25_VL_7B: Config = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": False,
    "vocab_size": 152064,
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14,
    },
}
INTERNVL3_8B: Config = {
    "architectures": ["InternVLChatModel"], "model_type": "internvl_chat",
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
        "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "sliding_window": None, "use_sliding_window": False,
        "vocab_size": 151674,
    },
    "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
MISTRAL_SMALL_24B: Config = {
    "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
    "text_config": {
        "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "num_hidden_layers": 40, "vocab_size": 131072, "sliding_window": None,
    },
    "vision_config": {
        "model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24,
        "intermediate_size": 4096, "num_attention_heads": 16, "head_dim": 64,
    },
}
DEEPSEEK_VL2_TINY: Config = {
    "architectures": ["DeepseekVLV2ForCausalLM"], "model_type": "deepseek_vl_v2",
    "language_config": {
        "architectures": ["DeepseekV2ForCausalLM"], "first_k_dense_replace": 1,
        "hidden_size": 1280, "intermediate_size": 6848, "kv_lora_rank": None,
        "model_type": "deepseek_v2", "moe_intermediate_size": 896, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_attention_heads": 10, "num_experts_per_tok": 6,
        "num_hidden_layers": 12, "num_key_value_heads": 10, "q_lora_rank": None,
        "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "use_mla": False, "v_head_dim": 0,
        "vocab_size": 129280,
    },
}
# Of what stands below, the library has no class: layers are read from the config alone.
KIMI_LINEAR_48B: Config = {
    "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear",
    "first_k_dense_replace": 1, "head_dim": 72, "hidden_size": 2304, "intermediate_size": 9216,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "mla_use_nope": True, "moe_intermediate_size": 1024, "moe_layer_freq": 1,
    "num_attention_heads": 32, "num_experts": 256, "num_experts_per_token": 8,
    "num_hidden_layers": 27, "num_key_value_heads": 32, "num_shared_experts": 1,
    "vocab_size": 163840,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4,
    },
}
MINIMAX_TEXT_01: Config = {
    "architectures": ["MiniMaxText01ForCausalLM"], "model_type": "minimax_text_01",
    "attn_type_list": ([0] * 7 + [1]) * 10, "head_dim": 128, "hidden_size": 6144,
    "intermediate_size": 9216, "num_attention_heads": 64, "num_experts_per_tok": 2,
    "num_hidden_layers": 80, "num_key_value_heads": 8, "num_local_experts": 32,
    "vocab_size": 200064,
}
RING_MINI_LINEAR: Config = {
    "architectures": ["BailingMoeLinearV2ForCausalLM"], "model_type": "bailing_moe_linear",
    "first_k_dense_replace": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 5120,
    "layer_group_size": 5, "moe_intermediate_size": 512, "num_attention_heads": 16,
    "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 20,
    "num_key_value_heads": 4, "num_shared_experts": 1, "vocab_size": 157184,
}
MIMO_V2_FLASH: Config = {
    "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "head_dim": 192,
    "v_head_dim": 128, "hidden_size": 4096, "intermediate_size": 16384,
    "hybrid_layer_pattern": [0, *([1] * 5 + [0]) * 7, *[1] * 4, 0],
    "moe_intermediate_size": 2048, "moe_layer_freq": [0] + [1] * 47, "n_routed_experts": 256,
    "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "sliding_window": 128, "swa_head_dim": 192,
    "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8, "swa_v_head_dim": 128,
    "vocab_size": 152576,
}
STEP_35_FLASH: Config = {
    "architectures": ["Step3p5ForCausalLM"], "model_type": "step3p5", "hidden_size": 4096,
    "intermediate_size": 11264, "num_hidden_layers": 45, "num_attention_heads": 64,
    "num_attention_groups": 8, "head_dim": 128, "sliding_window": 512,
    "attention_other_setting": {
        "attention_type": "sliding_attention", "head_dim": 128, "num_attention_groups": 8,
        "num_attention_heads": 96,
    },
    # Three more than it has layers: those are for predicting several tokens.
    "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 12,
    "moe_layers_enum": ",".join(map(str, range(3, 45))), "moe_num_experts": 288,
    "moe_top_k": 8, "moe_intermediate_size": 1280, "share_expert_dim": 1280,
    "vocab_size": 128896,
}
NEMOTRON_SUPER_49B: Config = {
    "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "hidden_size": 8192,
    "num_attention_heads": 64, "num_hidden_layers": 80, "vocab_size": 128256,
    "intermediate_size": None, "num_key_value_heads": None,
    "block_configs": [
        {
            "attention": {
                "n_heads_in_group": None if index % 2 else 8, "no_op": bool(index % 2),
                "replace_with_linear": False, "window_length": None,
            },
            "ffn": {"ffn_mult": 2.625, "no_op": False, "replace_with_linear": False},
        }
        for index in range(80)
    ],
}
HUNYUAN_LARGE: Config = {
    "architectures": ["HunYuanForCausalLM"], "model_type": "hunyuan", "use_cla": True,
    "cla_share_factor": 2, "hidden_size": 6400, "intermediate_size": 18304, "moe_topk": 1,
    "num_attention_heads": 80, "num_experts": 16, "num_hidden_layers": 64,
    "num_key_value_heads": 8, "num_shared_expert": 1, "attention_head_dim": 128,
    "vocab_size": 129024,
}
OPENELM_270M: Config = {
    "architectures": ["OpenELMForCausalLM"], "model_type": "openelm", "head_dim": 64,
    "model_dim": 1280, "hidden_size": 1280, "num_transformer_layers": 16, "num_hidden_layers": 16,
    "num_kv_heads": [3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5],
    "num_query_heads": [12, 12, 12, 12, 12, 16, 16, 16, 16, 16, 16, 16, 20, 20, 20, 20],
    "ffn_multipliers": [0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3,
                        3.53, 3.77, 4.0],
    "vocab_size": 32000,
}
DBRX: Config = {
    "architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "d_model": 6144, "n_heads": 48,
    "n_layers": 40, "vocab_size": 100352, "tie_word_embeddings": False,
    "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
    "ffn_config": {
        "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4,
        "ffn_act_fn": {"name": "silu"},
    },
}
CHATGLM3_6B: Config = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm", "hidden_size": 4096,
    "ffn_hidden_size": 13696, "kv_channels": 128, "multi_query_attention": True,
    "multi_query_group_num": 2, "num_attention_heads": 32, "num_layers": 28,
    "padded_vocab_size": 65024, "add_qkv_bias": True,
}
MINICPM3_4B: Config = {
    "architectures": ["MiniCPM3ForCausalLM"], "model_type": "minicpm3", "hidden_size": 2560,
    "intermediate_size": 6400, "kv_lora_rank": 256, "q_lora_rank": 768, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "num_attention_heads": 40, "num_hidden_layers": 62,
    "num_key_value_heads": 40, "vocab_size": 73448, "tie_word_embeddings": True,
}
BAICHUAN2_13B: Config = {
    "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "hidden_size": 5120,
    "intermediate_size": 13696, "num_attention_heads": 40, "num_hidden_layers": 40,
    "vocab_size": 125696, "tie_word_embeddings": False,
}
