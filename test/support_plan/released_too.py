"""More of `released.py`."""

# fmt: off

from __future__ import annotations

from support_plan.released import Config

BLOOM: Config = {
    "architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_embed": 14336, "n_layer": 70,
    "num_attention_heads": 112, "vocab_size": 250880,
}
FALCON_40B: Config = {
    "architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": False, "bias": False,
    "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8,
    "new_decoder_architecture": True, "multi_query": True, "parallel_attn": True,
    "vocab_size": 65024,
}
# 28 layers, each with attention twice; a third of its experts compute nothing.
LONGCAT_FLASH: Config = {
    "architectures": ["LongcatFlashForCausalLM"], "model_type": "longcat_flash", "num_layers": 28,
    "hidden_size": 6144, "ffn_hidden_size": 12288, "expert_ffn_hidden_size": 2048,
    "n_routed_experts": 512, "zero_expert_num": 256, "moe_topk": 12, "num_attention_heads": 64,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "vocab_size": 131072,
}
HUNYUAN_A13B: Config = {
    "architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe",
    "attention_head_dim": 128, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 3072,
    "moe_intermediate_size": [3072] * 32, "moe_topk": [8] * 32, "num_experts": 64,
    "num_shared_expert": [1] * 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 32, "vocab_size": 128167, "use_cla": False, "cla_share_factor": 2,
    "tie_word_embeddings": True,
}
ERNIE_300B: Config = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe",
    "hidden_size": 8192, "intermediate_size": 28672, "moe_intermediate_size": 3584, "moe_k": 8,
    "moe_num_experts": 64, "moe_layer_start_index": 3, "moe_layer_end_index": 53,
    "moe_layer_interval": 1, "moe_num_shared_experts": 0, "num_attention_heads": 64,
    "num_key_value_heads": 8, "num_hidden_layers": 54, "vocab_size": 103424,
}
NEMOTRON_3_NANO: Config = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "hidden_size": 2688, "intermediate_size": 1856, "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712, "n_routed_experts": 128, "n_shared_experts": 1,
    "num_experts_per_tok": 6, "num_attention_heads": 32, "num_key_value_heads": 2,
    "head_dim": 128, "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128,
    "n_groups": 8, "conv_kernel": 4, "num_hidden_layers": 52, "vocab_size": 131072,
}
MINIMAX_M2: Config = {
    "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2",
    "attn_type_list": [1] * 62, "head_dim": 128, "hidden_size": 3072, "intermediate_size": 1536,
    "num_attention_heads": 48, "num_key_value_heads": 8, "num_hidden_layers": 62,
    "num_local_experts": 256, "num_experts_per_tok": 8, "vocab_size": 200064,
}
# Their text blocks leave almost everything to the library.
LLAVA_15_7B: Config = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
    },
}
QWEN2_AUDIO_7B: Config = {
    "architectures": ["Qwen2AudioForConditionalGeneration"], "model_type": "qwen2_audio",
    "text_config": {"model_type": "qwen2", "vocab_size": 156032, "intermediate_size": 11008},
    "audio_config": {
        "model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "encoder_layers": 32,
        "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "d_model": 1280,
    },
}
