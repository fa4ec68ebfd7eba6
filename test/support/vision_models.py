"""Small random models that see, in the shapes of Qwen's, and images."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

#: The tokens that Qwen's processors know images and videos by.
TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
#: What the import of SGLang's other processors says where FFmpeg is not installed.
NO_FFMPEG = (
    (
        "[start of libtorchcodec loading traceback]",
        "[end of libtorchcodec loading traceback]",
    ),
)
#: Patches on a side of what becomes one token.
_MERGED = 2
#: The side of what becomes one token, in pixels: of Qwen2-VL and Qwen2.5-VL, and of Qwen3-VL.
SIDE, SIDE_3 = 14 * _MERGED, 16 * _MERGED
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    f"{{% elif part.type == 'video' %}}{VIDEO}{{% else %}}{IMAGE}{{% endif %}}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # Wide enough that answers depend on the prompt and the best token stands out.
    "initializer_range": 0.1,
}
_ROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [4, 6, 6]}


def tiny_qwen2_5_vl(model: Path, to: Path) -> Path:
    """Random weights in the shape of Qwen2.5-VL; `model`'s tokenizer, and tokens for images."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
    vision |= {"out_hidden_size": 128, "fullatt_block_indexes": [1], "initializer_range": 0.1}
    ids = _copy_tokenizer(model, to)
    config = Qwen2_5_VLConfig(text_config=_text(model), vision_config=vision, **ids)
    return _random_weights(to, config, Qwen2_5_VLForConditionalGeneration)


def tiny_qwen2_vl(model: Path, to: Path) -> Path:
    """The same in the shape of Qwen2-VL."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": 64, "mlp_ratio": 2, "num_heads": 4, "hidden_size": 128}
    ids = _copy_tokenizer(model, to)
    # SGLang reads `in_chans`, as published configurations have it.
    vision |= {"in_chans": 3, "initializer_range": 0.1}
    config = Qwen2VLConfig(text_config=_text(model), vision_config=vision, **ids)
    return _random_weights(to, config, Qwen2VLForConditionalGeneration)


def tiny_qwen3_vl(model: Path, to: Path) -> Path:
    """The same in the shape of Qwen3-VL, whose encoder hands something to several layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
    vision |= {"out_hidden_size": 128, "deepstack_visual_indexes": [0, 1]}
    vision |= {"num_position_embeddings": 256, "initializer_range": 0.1}
    ids = _copy_tokenizer(model, to, SIDE_3)
    text = {**_text(model), "head_dim": 32}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    return _random_weights(to, config, Qwen3VLForConditionalGeneration)


def _text(model: Path) -> dict[str, Any]:
    theirs = json.loads((model / "config.json").read_text())
    ids = {name: theirs[name] for name in ("bos_token_id", "eos_token_id")}
    size = theirs["vocab_size"] + 64
    return {**_TEXT, **ids, "rope_parameters": _ROPE, "vocab_size": size, "dtype": "float32"}


def _copy_tokenizer(model: Path, to: Path, side: int = SIDE) -> dict[str, int]:
    """The tokenizer with Qwen's tokens, and a processor; what the configuration says of them."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessor

    ignored = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(model, to, ignore=ignored)
    tokenizer = AutoTokenizer.from_pretrained(to)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    tokenizer.chat_template = _CHAT
    tokenizer.save_pretrained(to)
    Qwen2VLImageProcessor(
        size={"shortest_edge": side * side, "longest_edge": 64 * side * side},
        patch_size=side // _MERGED,
        merge_size=_MERGED,
    ).save_pretrained(to)
    start, end, image, video = tokenizer.convert_tokens_to_ids(TOKENS)
    ids = {"vision_start_token_id": start, "vision_end_token_id": end}
    return {**ids, "image_token_id": image, "video_token_id": video}


def _random_weights(to: Path, config: Any, architecture: Any) -> Path:
    import torch

    torch.manual_seed(0)
    config.dtype = torch.float32
    architecture(config).save_pretrained(to)
    return to


def image(seed: int, rows: int = 4, columns: int = 4, side: int = SIDE) -> str:
    """A random image of rows * columns tokens, as the address that requests carry it in."""
    from PIL import Image

    size = (rows * side, columns * side, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
