"""A small random model that sees, in the shape of Qwen2.5-VL, and images."""

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
#: Sides of a patch and of what becomes one token, in pixels.
PATCH, MERGED = 14, 28
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


def _text(model: Path) -> dict[str, Any]:
    theirs = json.loads((model / "config.json").read_text())
    ids = {name: theirs[name] for name in ("bos_token_id", "eos_token_id")}
    size = theirs["vocab_size"] + 64
    return {**_TEXT, **ids, "rope_parameters": _ROPE, "vocab_size": size, "dtype": "float32"}


def _copy_tokenizer(model: Path, to: Path) -> dict[str, int]:
    """The tokenizer with Qwen's tokens, and a processor; what the configuration says of them."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessor

    ignored = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(model, to, ignore=ignored)
    tokenizer = AutoTokenizer.from_pretrained(to)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    tokenizer.chat_template = _CHAT
    tokenizer.save_pretrained(to)
    Qwen2VLImageProcessor(
        size={"shortest_edge": MERGED * MERGED, "longest_edge": 64 * MERGED * MERGED}
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


def image(seed: int, rows: int = 4, columns: int = 4) -> str:
    """A random image of rows * columns tokens, as the address that requests carry it in."""
    from PIL import Image

    size = (rows * MERGED, columns * MERGED, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
