"""config.json of models that can't be planned, cut to what says so, with what must be named."""

# fmt: off

from __future__ import annotations

from support_plan.released import GPT_OSS_20B, Config

_USUAL: Config = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 50000,
}
REFUSED: dict[str, tuple[Config, str]] = {
    # No KV at all.
    "rwkv7": (
        {
            "architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7", "hidden_size": 2048,
            "num_hidden_layers": 24, "head_dim": 64, "num_heads": 32, "attn": None,
            "decay_low_rank_dim": 96, "intermediate_size": 8192, "vocab_size": 65536,
        },
        "state",
    ),
    "gla": (
        {
            "model_type": "gla", "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4,
            "expand_k": 0.5, "vocab_size": 32000,
        },
        "state",
    ),
    "mamba": (
        {
            "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 2560,
            "num_hidden_layers": 64, "state_size": 16, "vocab_size": 50280,
        },
        "state",
    ),
    "falcon-mamba": ({"model_type": "falcon_mamba", "hidden_size": 4096}, "state"),
    "xlstm": ({"model_type": "xlstm", "hidden_size": 4096, "num_heads": 8}, "state"),
    # No decoders.
    "bert": (
        {
            "architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": 768,
            "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 30522,
        },
        "encoder",
    ),
    "distilbert": (
        {
            "architectures": ["DistilBertForMaskedLM"], "model_type": "distilbert", "dim": 768,
            "n_heads": 12, "n_layers": 6, "vocab_size": 30522,
        },
        "no model that writes text",
    ),
    "t5": (
        {
            "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 512,
            "num_layers": 6, "num_heads": 8, "d_kv": 64, "is_encoder_decoder": True,
        },
        "no model that writes text",
    ),
    "whisper": (
        {
            "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper",
            "d_model": 1280, "encoder_layers": 32, "decoder_layers": 4, "is_encoder_decoder": True,
        },
        "encoder-decoder",
    ),
    "embedding-gemma": (
        {
            **_USUAL, "architectures": ["Gemma3TextModel"], "model_type": "gemma3_text",
            "use_bidirectional_attention": True,
        },
        "encoder",
    ),
    "clip": ({"architectures": ["CLIPModel"], "model_type": "clip"}, "no model that writes text"),
    # Some layers keep KV, and the config doesn't say which in a way that is understood.
    "phi-4-flash": (
        {**_USUAL, "model_type": "phi4flash", "mb_per_layer": 2, "mamba_d_state": 16}, "mamba",
    ),
    "plamo-2": ({**_USUAL, "model_type": "plamo2", "mamba_step": 2}, "mamba"),
    "striped-hyena": ({**_USUAL, "model_type": "evo", "attn_layer_idxs": [8, 16]}, "_idxs"),
    "apriel-h": (
        {**_USUAL, "model_type": "apriel_h", "hybrid_block_layout": ["t", "m2"] * 12}, "hybrid",
    ),
    # What changes how much is kept.
    "deepseek-v4": (
        {
            **_USUAL, "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4",
            "compress_ratios": [0, 0, 4, 128], "index_head_dim": 128,
        },
        "compress",
    ),
    "minimax-m3": (
        {
            **_USUAL, "architectures": ["MiniMaxM3SparseForCausalLM"], "model_type": "minimax_m3",
            "sparse_attention_config": {"sparse_index_dim": 128}, "index_head_dim": 128,
        },
        "index_head_dim",
    ),
    "ouro": (
        {
            **_USUAL, "model_type": "ouro", "total_ut_steps": 4,
            "layer_types": ["full_attention"] * 24,
        },
        "total_ut_steps",
    ),
    "baichuan-m1": (
        {
            **_USUAL, "model_type": "baichuan_m1", "num_swa_attention_heads": 20,
            "num_swa_key_value_heads": 8, "sliding_window_layers": [1, 3, 5],
        },
        "swa",
    ),
    "gpt-oss of another kind": (
        {**GPT_OSS_20B, "layer_types": ["sliding_attention", "wavelet"] * 12}, "wavelet",
    ),
    # Experts in layers that aren't told.
    "arctic": (
        {
            **_USUAL, "model_type": "arctic", "num_local_experts": 128, "num_experts_per_tok": 2,
            "moe_layer_frequency": 2,
        },
        "moe_layer_frequency",
    ),
}
